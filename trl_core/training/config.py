"""Options shared by all trainers, and those of trainers that generate."""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from ..errors import ConfigError
from ..names import did_you_mean
from ..options import check_names, check_options, checked, fields_of, option, require
from ..redaction import redacted, remember

logger = logging.getLogger(__name__)
LOSS_AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def _each(names: str, **limits: Any) -> dict[str, dict[str, Any]]:
    return {name: limits for name in names.split()}


@dataclass
class CoreConfig(TrainingArguments):
    """`transformers.TrainingArguments` with this project's defaults.

    Other defaults than there: `logging_steps` 10, activation (gradient) checkpointing on, and `bf16` on where the
    hardware has it. On a CPU training is in float32.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    limits: ClassVar[dict[str, dict[str, Any]]] = {
        # Steps between two times, or a share of all steps.
        **_each("logging_steps eval_steps save_steps", gt=0, whole_from=1),
        **_each("warmup_steps", ge=0, whole_from=1),
        **_each("max_steps local_rank", ge=-1),
        **_each("num_train_epochs", ge=0),
        **_each("learning_rate weight_decay adam_epsilon max_grad_norm", ge=0),
        **_each("neftune_noise_alpha eval_delay dataloader_num_workers", ge=0),
        **_each("adam_beta1 adam_beta2", ge=0, lt=1),
        **_each("label_smoothing_factor", ge=0, le=1),
        **_each("per_device_train_batch_size per_device_eval_batch_size save_total_limit", ge=1),
        **_each("gradient_accumulation_steps eval_accumulation_steps torch_empty_cache_steps", ge=1),
        **_each("dataloader_prefetch_factor ddp_timeout ddp_bucket_cap_mb", ge=1),
        **_each("seed data_seed", ge=0, le=2**32 - 1),  # what numpy takes
        **_each("include_num_input_tokens_seen", choices=("all", "non_padding", "no", True, False)),
        # What transformers makes of them, or takes as well.
        **_each("accelerator_config", file=True, types=(AcceleratorConfig,)),
        **_each("fsdp_config deepspeed", file=True),
        **_each("fsdp", types=(bool, list)),
        **_each("debug", types=(type(None),), choices=("", "underflow_overflow", "tpu_metrics_debug")),
        **_each("dataloader_multiprocessing_context", choices=("fork", "forkserver", "spawn")),
    }
    """What the options of transformers take, which do not say so themselves; see `trl_core.options.fields_of`."""

    logging_steps: float = option(10, "Log every so many optimizer steps.", resume=False)
    bf16: bool | None = option(None, "Train in bfloat16; default: where the accelerator supports it and fp16 is off.")  # type: ignore[assignment]
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Arguments of from_pretrained when the model is given by name; dtype defaults to float32."
    )
    trust_remote_code: bool = option(False, "Run model code from the Hub. Never on unless you ask.")
    disable_dropout: bool = option(False, "Set every dropout probability to 0.")
    padding_free: bool = option(
        False,
        "Lay the rows of a micro-batch end to end in one line. Otherwise the lines are as long as the longest row; "
        "rows beside each other never attend to each other either way.",
        resume=False,
    )
    pad_to_multiple_of: int | str | None = option(
        None,
        "Round the length of the lines up to a multiple; TRL's 'auto' is None.",
        ge=1,
        choices=("auto",),
        resume=False,
    )
    share_prompts: bool = option(
        True,
        "Send the prompt that several rows share through the model once, where that is exact; False never does.",
        resume=False,
    )
    max_tokens_per_forward: int | None = option(
        None,
        "Most tokens, padding included, that go through the policy at a time with gradient. A micro-batch with more "
        "is run in parts, long rows first, each once more in the backward pass (so leave gradient_checkpointing off); "
        "the loss stays that of the whole micro-batch. Default: no limit.",
        ge=1,
        resume=False,
    )
    on_nonfinite_loss: str = option(
        "stop",
        "'stop' or 'skip' the micro-batch; its rows are written to <output_dir>/nonfinite.",
        choices=("stop", "skip"),
        resume=False,
    )
    resume_check: str = option(
        "strict",
        "'strict' refuses to resume with other options than the checkpoint's, 'warn' warns.",
        choices=("strict", "warn"),
        resume=False,
    )

    overwrite_output_dir: bool = option(
        False,
        "Replace another run in output_dir: its checkpoints, metrics and completions are deleted; other files stay.",
        resume=False,
    )

    @property
    def uses_reference(self) -> bool:
        """Whether `reference_logps` is needed."""
        return False

    @property
    def separate_reference(self) -> bool:
        """Whether the reference must have weights of its own, because something moves them, also with an adapter."""
        return False

    @property
    def token_statistics(self) -> tuple[str, ...]:
        """What the hooks need to know of each token besides its log-probability; see `trl_core.models.logprobs`."""
        return ()

    def __new__(cls, *args: Any, **options: Any) -> CoreConfig:
        """Refuse a keyword that is no option, with a suggestion."""
        check_names(cls, options)
        return super().__new__(cls)

    without_effect: ClassVar[dict[str, str]] = dict.fromkeys(
        ("include_for_metrics", "batch_eval_metrics", "label_names"),
        "Leave it out: evaluation logs the trainer's metrics, and calls no function of yours with predictions.",
    )
    """Options of transformers that nothing acts on here, and what to do instead."""
    smooths_labels = False
    """Whether the loss acts on `label_smoothing_factor`."""

    def __post_init__(self) -> None:
        remember(self)
        check_options(self)
        cls: Any = type(self)
        given = [f.name for f in fields_of(cls) if getattr(self, f.name) != f.default]
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and torch.cuda.is_available() and _has_bf16()
        elif self.bf16 and not torch.cuda.is_available():
            logger.warning("bf16=True on a CPU without AMX or AVX-512 is extremely slow; float32 is the default there.")
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch would warn that there is nothing to pin for
        # Both spellings are known; transformers warns about the older one, which is the one users of TRL write.
        if self.activation_checkpointing is None:
            older = self.gradient_checkpointing
            self.activation_checkpointing = True if older is None else older
            self.gradient_checkpointing = None
        if self.pad_to_multiple_of == "auto":
            self.pad_to_multiple_of = None
        require(
            not self.label_smoothing_factor or self.smooths_labels,
            f"label_smoothing_factor={self.label_smoothing_factor} is ignored by the losses of this algorithm.",
            "Leave it out; SFT takes it, and some preference losses have an option label_smoothing.",
        )
        for f in fields_of(cls):
            if (mend := self.without_effect.get(f.name)) and (value := getattr(self, f.name)) != f.default:
                raise ConfigError(f"{f.name}={value!r} has no effect here.", mend=mend)
        self.report_to = "none" if self.report_to is None else self.report_to
        self.enable_jit_checkpoint = False  # every run saves a checkpoint when it is told to end
        _check_trackers(self.report_to)
        require(
            not self.auto_find_batch_size,
            "auto_find_batch_size would change how rows are grouped into steps.",
            "Set per_device_train_batch_size yourself; raise gradient_accumulation_steps to keep the batch.",
        )
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except Exception as error:
            what = f"transformers refuses the options: {str(error).strip(' .')}."
            install = "Install what is missing, or change" if isinstance(error, ImportError) else "Change"
            raise ConfigError(what, mend=f"{install} one of the options given: {', '.join(given)}.") from error
        self._check_checkpointing()
        self._check_optimization()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):  # a dataclass makes one that shows all
            cls.__repr__ = CoreConfig.__str__  # type: ignore[method-assign,assignment]

    def _check_checkpointing(self) -> None:
        """Refuse arguments of activation checkpointing that the first step would fail with."""
        given = as_dict(self.activation_checkpointing_kwargs)
        known = {*inspect.signature(checkpoint).parameters} - {"function", "args", "kwargs"}
        known |= {"preserve_rng_state", "every_n_layers", "offload"}
        for name, value in given.items():
            what = f"activation_checkpointing_kwargs has {name!r}, which nothing takes.{did_you_mean(name, known)}"
            require(name in known, what, f"Use some of: {', '.join(sorted(known))}.")
            whole = name == "every_n_layers"
            fits = type(value) is int and value >= 1 if whole else type(value) in (bool, NoneType)
            what = f"activation_checkpointing_kwargs has {name}={value!r}."
            mend = "Give a whole number of at least 1." if whole else "Give True or False."
            require(fits or name in ("context_fn", "determinism_check"), what, mend)

    def _check_optimization(self) -> None:
        """Try the schedule, which would otherwise fail, or ignore what it is given, when training begins."""
        schedule, given = SchedulerType(self.lr_scheduler_type), as_dict(self.lr_scheduler_kwargs)
        made: Any = TYPE_TO_SCHEDULER_FUNCTION[schedule]
        known = inspect.signature(made).parameters
        unknown = [name for name in given if name not in known and "kwargs" not in known]
        what = f"lr_scheduler_kwargs has {unknown}, which lr_scheduler_type={schedule.value!r} does not take."
        require(not unknown, what, f"Use some of: {', '.join(list(known)[1:])}; or leave it out.")
        mend = "Change lr_scheduler_kwargs, or use another schedule."
        try:
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=float(self.learning_rate))
            scheduler: Any = get_scheduler(schedule, optimizer, 10, 1000, given)
            rates = [part(step) for part in getattr(scheduler, "lr_lambdas", []) for step in (0, 1, 11, 500, 1000)]
        except Exception as error:
            what = f"lr_scheduler_type={schedule.value!r} with lr_scheduler_kwargs={given} cannot be: {error}"
            raise ConfigError(what, mend=mend) from error
        what = f"lr_scheduler_kwargs={given} make learning rates of {rates} times the initial one."
        require(all(0 <= rate < math.inf for rate in rates), what, mend)
        fits = all(part.count("=") == 1 for part in self.optim_args.split(",")) if self.optim_args else True
        what = f"optim_args={self.optim_args!r} is not of the form key=value,key=value."
        require(fits, what, "Write the arguments of the optimizer so.")
        for part in self.optim_args.split(",") if self.optim_args else ():
            what = f"optim_args has {part!r}, which optim={OptimizerNames(self.optim).value!r} does not take."
            require(self._optimizer_given(part) != self._optimizer_given(None), what, "Leave it out, or change optim.")

    def _optimizer_given(self, optim_args: str | None) -> Any:
        """What the optimizer is made with; something else each time where that takes a model or a package."""
        with_these = copy.copy(self)
        with_these.optim_args = optim_args
        try:
            return Trainer.get_optimizer_cls_and_kwargs(with_these)
        except Exception:
            return object()

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values, with secrets hidden; for trackers and records."""
        return dict(redacted(self))

    def __str__(self) -> str:
        return "\n".join([f"{type(self).__name__}(", *(f"{k}={v}," for k, v in sorted(self.to_dict().items())), ")"])

    __repr__ = __str__


def _check_trackers(report_to: Any) -> None:
    """Raise `ConfigError` unless the trackers are known and installed; transformers finds out with the model loaded."""
    given = [report_to] if isinstance(report_to, str) else list(report_to or [])
    installed = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    require(given != ["all"] or bool(installed), "report_to='all', but no tracker is installed.", "Install one.")
    for name in given if given not in (["all"], ["none"]) else []:
        mend = f"Use 'none', or some of: {', '.join(INTEGRATION_TO_CALLBACK)}."
        known = isinstance(name, str) and name in INTEGRATION_TO_CALLBACK
        require(known, f"report_to: there is no tracker {name!r}.{did_you_mean(name, INTEGRATION_TO_CALLBACK)}", mend)
        require(
            name in installed or name == "flyte",  # it does not say whether it is installed
            f"report_to: the tracker {name!r} is not installed; installed are: {', '.join(installed) or 'none'}.",
            f"Install it (pip install {name.replace('_', '-')}), or set report_to='none'.",
        )


def as_dict(value: Any) -> dict[str, Any]:
    """A dictionary option, which on a command line is JSON and is parsed by then."""
    mend = "On a command line write JSON: '{\"name\": 1}'."
    require(isinstance(value or {}, Mapping), f"{value!r} is no mapping of options.", mend)
    return dict(value or {})


def _has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported())


@dataclass
class ReferenceOptions:
    """Options of algorithms with a reference model that may follow the policy (TR-DPO, 2404.09656)."""

    sync_ref_model: bool = option(False, "Move the reference towards the policy during training (TR-DPO).")
    ref_model_mixup_alpha: float = option(
        0.6, "Share of the policy in the new reference: a*policy + (1-a)*reference.", ge=0, le=1
    )
    ref_model_sync_steps: int = option(512, "Optimizer steps between two moves of the reference.", ge=1)


@dataclass
class OfflineConfig(CoreConfig):
    """Options of every trainer that learns from a dataset of texts."""

    remove_unused_columns: bool = option(False, "Not used: columns are chosen when the rows are tokenised.")
    max_length: int | None = option(1024, "Most tokens of prompt and completion together; None for no limit.", ge=2)
    truncation_mode: str = option(
        "keep_start", "Which end of a row that is too long stays.", choices=("keep_start", "keep_end")
    )
    dataset_num_proc: int | None = option(None, "Processes that tokenise the dataset.", ge=1, resume=False)
    router_aux_loss_coef: float | None = option(
        None,
        "Weight of the load-balancing loss of a mixture of experts; default: the model's own; 0 leaves it out.",
        ge=0,
    )
    activation_offloading: bool = option(False, "Keep activations in host memory until the backward.", resume=False)
    eos_token: str | None = option(None, "End-of-sequence token; default: the tokenizer's.")
    pad_token: str | None = option(None, "Padding token; default: the tokenizer's, else its end-of-sequence token.")
    chat_template_path: str | None = option(
        None, "A .jinja file, or a folder or Hub id of a tokenizer, whose chat template is used."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.remove_unused_columns = False
        # A stream is read by every process, which takes its share: rows of different lengths cannot be dealt out.
        loading: Any = self.accelerator_config
        if loading.dispatch_batches is None:
            loading.dispatch_batches = False


@dataclass
class PairConfig(OfflineConfig):
    """Options of every trainer that learns from preference pairs with a language model."""

    precompute_ref_log_probs: bool = option(
        False, "Score the datasets with the reference once, before training, and let go of it."
    )
    precompute_ref_batch_size: int | None = option(
        None, "Pairs at a time in that pass; default per_device_train_batch_size.", ge=1, resume=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        moving = bool(getattr(self, "sync_ref_model", False))
        require(
            not (self.precompute_ref_log_probs and (moving or self.separate_reference)),
            "precompute_ref_log_probs=True with a reference that moves during training"
            f"{' (sync_ref_model=True)' if moving else ''}: its log-probabilities would be out of date.",
            "Leave one of them off.",
        )


@dataclass
class OnlineConfig(CoreConfig):
    """Options of every trainer that generates."""

    _VALID_DICT_FIELDS = [*CoreConfig._VALID_DICT_FIELDS, "generation_kwargs", "chat_template_kwargs"]  # noqa: RUF012

    remove_unused_columns: bool = option(False, "Not used: all columns are kept and passed to the rewards.")
    shuffle_dataset: bool = option(
        True, "Shuffle prompts each epoch, and groups inside a generation batch that feeds several micro-batches."
    )
    num_generations: int = option(8, "G, completions per prompt.", ge=1)
    num_generations_eval: int | None = option(
        None, "Completions per prompt in evaluation; default num_generations.", ge=1
    )
    max_completion_length: int = option(512, "Most tokens of a completion.", ge=1)
    generation_batch_size: int | None = option(
        None, "Completions generated at a time, over all processes. Give this or steps_per_generation.", ge=1
    )
    steps_per_generation: int | None = option(
        None, "Micro-batches a generation batch is split into; default gradient_accumulation_steps.", ge=1
    )
    generation_rows: int | None = option(
        None,
        "Most completions sampled at a time in a process; when some end, waiting ones take their places; default: all.",
        ge=1,
    )
    num_iterations: int = option(1, "How often each generation batch is trained on.", ge=1)
    temperature: float = option(1.0, "Sampling temperature; every log-probability is computed at it as well.", gt=0)
    top_p: float = option(1.0, "Nucleus sampling: smallest set of tokens with this probability.", gt=0, le=1)
    top_k: int = option(0, "Sample among the k likeliest tokens; 0 for all.", ge=0)
    min_p: float | None = option(None, "Least probability of a token, relative to the likeliest.", ge=0, le=1)
    repetition_penalty: float = option(1.0, "Penalty on tokens already present; 1 for none.", gt=0)
    generation_kwargs: dict[str, Any] | str | None = option(None, "Further options of transformers.GenerationConfig.")
    chat_template_kwargs: dict[str, Any] | str | None = option(None, "Arguments of the chat template.")
    reward_weights: list[float] | None = option(None, "One weight per reward function; default all 1.")
    reward_timeout: float | None = option(None, "Seconds the reward functions may take per batch.", gt=0, resume=False)
    reward_processes: int = option(
        0,
        "Processes that call plain reward functions (parsing, running code, symbolic maths); 0 calls them in this one.",
        ge=0,
        resume=False,
    )
    overlap_rewards: bool = option(
        True,
        "Go on while a batch is scored by coroutine functions or other processes, where that changes no result.",
        resume=False,
    )
    mask_truncated_completions: bool = option(
        False, "Leave completions without terminator out of the loss; their rewards still count in the group."
    )
    dynamic_sampling: bool = option(
        False, "Replace groups whose rewards are all equal by groups of further prompts (DAPO, 2503.14476)."
    )
    dynamic_sampling_max_rounds: int = option(4, "Most refills of one generation batch.", ge=1)
    loss_type: str = option("dapo", "How the loss is formed; see the algorithm.", choices=LOSS_AGGREGATIONS)
    token_normalizer: str = option(
        "step",
        "Denominator of dapo, cispo, vespo: 'step' counts the loss tokens of an optimizer step; 'generation' all "
        "completion tokens of the generation batch, as TRL up to 1.10.",
        choices=("step", "generation"),
    )
    log_completions: bool = option(
        False, "Write every generation to <output_dir>/completions/*.parquet and print a sample.", resume=False
    )
    num_completions_to_print: int | None = option(5, "Rows of the printed sample; 0 prints none.", ge=0, resume=False)

    without_effect: ClassVar[dict[str, str]] = {
        **CoreConfig.without_effect,
        "train_sampling_strategy": "Leave it out; shuffle_dataset=False keeps the order of the prompts.",
    }
    minimum_generations = 1
    reshuffles = False
    """Whether each pass over a generation batch cuts it into micro-batches in an order of its own."""
    uses_old_logps = False
    """Whether `annotate` or `advantages` need the log-probabilities under the sampling policy."""

    @property
    def slices(self) -> int:
        """S, micro-batches of a generation batch: `steps_per_generation` once it is resolved."""
        return int(self.steps_per_generation or self.gradient_accumulation_steps)

    @property
    def micro_steps(self) -> int:
        """Micro-steps for which a generation batch is used: S x mu."""
        return self.slices * self.num_iterations

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.minimum_generations
        what = f"num_generations={self.num_generations} is below {least}: advantages compare completions of one prompt."
        require(self.num_generations >= least, what, f"Give at least {least}.")
        self._set_generation_batch()
        self._check_generation()

    def _check_generation(self) -> None:
        make: Any = GenerationConfig
        cls: Any = type(self)
        given, known = as_dict(self.generation_kwargs), make()
        for name in given:
            what = f"generation_kwargs has {name!r}, which generation does not take.{did_you_mean(name, vars(known))}"
            require(hasattr(known, str(name)), what, "Use names of transformers.GenerationConfig.")
            value, is_token = given[name], str(name).endswith("_token_id")
            what = f"generation_kwargs has {name}={value!r}."
            require(not isinstance(value, float) or math.isfinite(value), what, "Give a finite number.")
            ids = [each for each in (value if isinstance(value, list | tuple) else [value]) if each is not None]
            fits = all(type(each) is int and each >= 0 for each in ids)
            require(not is_token or fits, what, "Give the number of a token, or a list of such.")
        for f in fields_of(cls):
            if given.get(f.name) is not None:  # what is an option as well
                checked(given[f.name], f)
        try:
            make(**given)
        except Exception as error:
            what = f"generation_kwargs={given} cannot be: {error}"
            raise ConfigError(what, mend="Change the value that is named.") from error

    def _set_generation_batch(self) -> None:
        micro = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            # Both are set in a config that is restored or replaced; they must then agree.
            require(
                self.generation_batch_size == micro * self.steps_per_generation,
                f"generation_batch_size={self.generation_batch_size} and steps_per_generation="
                f"{self.steps_per_generation} are both given and do not fit.",
                "Give only one of them.",
            )
        elif self.generation_batch_size is not None:
            require(
                self.generation_batch_size % micro == 0,
                f"generation_batch_size={self.generation_batch_size} is no multiple of {micro}, the rows of a "
                "micro-batch over all processes.",
                "Make it a multiple of per_device_train_batch_size times the number of processes.",
            )
            self.steps_per_generation = self.generation_batch_size // micro
        else:
            if self.steps_per_generation is None:
                self.steps_per_generation = self.gradient_accumulation_steps
            self.generation_batch_size = micro * self.steps_per_generation
        require(
            self.generation_batch_size % self.num_generations == 0,
            f"num_generations={self.num_generations} does not divide the generation batch of "
            f"{self.generation_batch_size} completions (per_device_train_batch_size x processes x "
            "steps_per_generation).",
            "Change one of them so that every group is complete.",
        )
