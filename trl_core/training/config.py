"""Options shared by all trainers, and those of trainers that generate."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from ..options import option, require, require_choice
from ..redaction import redacted, remember

logger = logging.getLogger(__name__)
LOSS_AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


@dataclass
class CoreConfig(TrainingArguments):
    """`transformers.TrainingArguments` with this project's defaults.

    Other defaults than there: `logging_steps` 10, activation (gradient) checkpointing on, and `bf16` on where the
    hardware has it. On a CPU training is in float32.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

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
        None, "Round the length of the lines up to a multiple; TRL's 'auto' is None.", resume=False
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
        resume=False,
    )
    on_nonfinite_loss: str = option(
        "stop", "'stop' or 'skip' the micro-batch; its rows are written to <output_dir>/nonfinite.", resume=False
    )
    resume_check: str = option(
        "strict", "'strict' refuses to resume with other options than the checkpoint's, 'warn' warns.", resume=False
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

    def __post_init__(self) -> None:
        remember(self)
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
            self.max_tokens_per_forward is None or self.max_tokens_per_forward >= 1,
            f"max_tokens_per_forward={self.max_tokens_per_forward} is below 1.",
            "Give the tokens that fit into memory at a time, or None for no limit.",
        )
        self.enable_jit_checkpoint = False  # every run saves a checkpoint when it is told to end
        require_choice(self, "on_nonfinite_loss", ("stop", "skip"))
        require_choice(self, "resume_check", ("strict", "warn"))
        require(
            not self.auto_find_batch_size,
            "auto_find_batch_size would change how rows are grouped into steps.",
            "Set per_device_train_batch_size yourself; raise gradient_accumulation_steps to keep the batch.",
        )
        super().__post_init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):  # a dataclass makes one that shows all
            cls.__repr__ = CoreConfig.__str__  # type: ignore[method-assign,assignment]

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values, with secrets hidden; for trackers and records."""
        return dict(redacted(self))

    def __str__(self) -> str:
        return "\n".join([f"{type(self).__name__}(", *(f"{k}={v}," for k, v in sorted(self.to_dict().items())), ")"])

    __repr__ = __str__


def as_dict(value: Any) -> dict[str, Any]:
    """A dictionary option, which on a command line is JSON and is parsed by then."""
    return dict(value or {})


def _has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported())


@dataclass
class ReferenceOptions:
    """Options of algorithms with a reference model that may follow the policy (TR-DPO, 2404.09656)."""

    sync_ref_model: bool = option(False, "Move the reference towards the policy during training (TR-DPO).")
    ref_model_mixup_alpha: float = option(0.6, "Share of the policy in the new reference: a*policy + (1-a)*reference.")
    ref_model_sync_steps: int = option(512, "Optimizer steps between two moves of the reference.")


@dataclass
class OfflineConfig(CoreConfig):
    """Options of every trainer that learns from a dataset of texts."""

    remove_unused_columns: bool = option(False, "Not used: columns are chosen when the rows are tokenised.")
    max_length: int | None = option(1024, "Most tokens of prompt and completion together; None for no limit.")
    truncation_mode: str = option("keep_start", "Which end of a row that is too long stays: keep_start or keep_end.")
    dataset_num_proc: int | None = option(None, "Processes that tokenise the dataset.", resume=False)
    router_aux_loss_coef: float | None = option(
        None, "Weight of the load-balancing loss of a mixture of experts; default: the model's own; 0 leaves it out."
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
        require_choice(self, "truncation_mode", ("keep_start", "keep_end"))
        require(
            self.max_length is None or self.max_length >= 2,
            f"max_length={self.max_length} leaves no token to predict.",
            "Give at least 2, or None for no limit.",
        )
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
        None, "Pairs at a time in that pass; default per_device_train_batch_size.", resume=False
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
    num_generations: int = option(8, "G, completions per prompt.")
    num_generations_eval: int | None = option(None, "Completions per prompt in evaluation; default num_generations.")
    max_completion_length: int = option(512, "Most tokens of a completion.")
    generation_batch_size: int | None = option(
        None, "Completions generated at a time, over all processes. Give this or steps_per_generation."
    )
    steps_per_generation: int | None = option(
        None, "Micro-batches a generation batch is split into; default gradient_accumulation_steps."
    )
    generation_rows: int | None = option(
        None,
        "Most completions sampled at a time in a process; when some end, waiting ones take their places; default: all.",
    )
    num_iterations: int = option(1, "How often each generation batch is trained on.")
    temperature: float = option(1.0, "Sampling temperature; every log-probability is computed at it as well.")
    top_p: float = option(1.0, "Nucleus sampling: smallest set of tokens with this probability.")
    top_k: int = option(0, "Sample among the k likeliest tokens; 0 for all.")
    min_p: float | None = option(None, "Least probability of a token, relative to the likeliest.")
    repetition_penalty: float = option(1.0, "Penalty on tokens already present; 1 for none.")
    generation_kwargs: dict[str, Any] | str | None = option(None, "Further options of transformers.GenerationConfig.")
    chat_template_kwargs: dict[str, Any] | str | None = option(None, "Arguments of the chat template.")
    reward_weights: list[float] | None = option(None, "One weight per reward function; default all 1.")
    reward_timeout: float | None = option(None, "Seconds the reward functions may take per batch.", resume=False)
    reward_processes: int = option(
        0,
        "Processes that call plain reward functions (parsing, running code, symbolic maths); 0 calls them in this one.",
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
    dynamic_sampling_max_rounds: int = option(4, "Most refills of one generation batch.")
    loss_type: str = option("dapo", "How the loss is formed; see the algorithm.")
    token_normalizer: str = option(
        "step",
        "Denominator of dapo, cispo, vespo: 'step' counts the loss tokens of an optimizer step; 'generation' all "
        "completion tokens of the generation batch, as TRL up to 1.10.",
    )
    log_completions: bool = option(
        False, "Write every generation to <output_dir>/completions/*.parquet and print a sample.", resume=False
    )
    num_completions_to_print: int | None = option(5, "Rows of the printed sample; 0 prints none.", resume=False)

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
        require_choice(self, "loss_type", LOSS_AGGREGATIONS)
        require_choice(self, "token_normalizer", ("step", "generation"))
        for name in ("num_iterations", "max_completion_length", "dynamic_sampling_max_rounds", "generation_rows"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} is below 1.", "Give at least 1.")
        require(
            self.reward_processes >= 0,
            f"reward_processes={self.reward_processes} is negative.",
            "Give the number of processes, or 0 for none.",
        )
        require(
            self.temperature > 0, f"temperature={self.temperature} is not above 0.", "Sampling needs a positive one."
        )
        for name in ("num_generations", "num_generations_eval"):
            value = getattr(self, name)
            require(
                value is None or value >= (self.minimum_generations if name == "num_generations" else 1),
                f"{name}={value} is below {self.minimum_generations}: advantages compare completions of one prompt.",
                f"Give at least {self.minimum_generations}.",
            )
        self._set_generation_batch()

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
