"""What every trainer does: hooks, model, tokenizer, reference, checkpoints, provenance, non-finite losses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..batch import TokenRows
from ..declared import implements_hooks
from ..errors import ConfigError, HookResultError, NonFiniteLossError
from ..hookspecs import HookContext, hookimpl
from ..models.layout import PADDED, Layouts, layouts_of
from ..models.loading import (
    add_adapter,
    disable_dropout,
    evaluating,
    is_peft,
    load_policy,
    load_tokenizer,
    terminators,
)
from ..models.logprobs import TokenScores, token_logps
from ..models.parts import joined, parts_of, without_output
from ..models.reference import ReferenceModel, mix_into
from ..options import check_options, require
from ..redaction import remember
from ..stages.aggregate import TokenMean
from .arguments import check_arguments, check_names, given_arguments
from .callbacks import STEP_BEGUN, CarefulCallbacks
from .card import sources
from .checkpoints import CHECKPOINT_FILES
from .folder import check_output_dir
from .loader import as_is
from .metrics import Metrics
from .runs import RunTrainer

logger = logging.getLogger(__name__)


class DefaultHooks:
    """Answers where no algorithm does."""

    def __init__(self, trainer: CoreTrainer) -> None:
        self.trainer = trainer

    @hookimpl
    def reference_logps(self, samples: Any) -> Tensor:
        """Under the trainer's reference model."""
        assert self.trainer.reference is not None
        args = self.trainer.args
        return self.trainer.reference.logps(
            samples,
            batch_size=self.trainer.rows_per_forward,
            pad_token_id=self.trainer.pad_token_id,
            temperature=getattr(args, "temperature", 1.0),
        )

    @hookimpl
    def after_step(self, step: int, policy: nn.Module, reference: nn.Module | None) -> None:
        """TR-DPO: every `ref_model_sync_steps` the reference moves towards the policy."""
        args = self.trainer.args
        if getattr(args, "sync_ref_model", False) and reference is not None and step % args.ref_model_sync_steps == 0:
            mix_into(reference, policy, args.ref_model_mixup_alpha)


class _Steps(TrainerCallback):
    """Relays the start of a run and of each optimizer step to the trainer, and its end to the `after_step` hooks."""

    def __init__(self, trainer: CoreTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.catch_up()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.forget_gradients()
        self.trainer.after_step()


class CoreTrainer(RunTrainer):
    """Base of the trainers; made concrete by a composition of algorithms (see `trl_core.get_trainer`).

    Args:
        model: id, path or module of a causal language model.
        args: configuration of the class `get_config` returns for the same algorithm; default values when None.
        train_dataset, eval_dataset: `datasets.Dataset` or `IterableDataset` (evaluation also a dict of them).
        processing_class: tokenizer; default: the one saved beside the model.
        callbacks: as in `transformers.Trainer`; one that implements hooks (`@hookimpl`) takes part like an algorithm,
            and its state is saved with each checkpoint.
        optimizers: as in `transformers.Trainer`.
        peft_config: train a new adapter (needs peft).
        ref_model: the reference: id, path or module; default: a copy of the policy, or the policy without its adapter.
        providers: further hook providers by name.
        arguments: values for `Algorithm.arguments` of the composed algorithms.

    Raises:
        ConfigError, DatasetError, OutputDirError, PluginConflict: before any model is loaded where possible.
    """

    default_hooks: ClassVar[type[DefaultHooks]] = DefaultHooks
    calls: ClassVar[tuple[str, ...] | None] = None
    """Hooks that the trainer calls; None if it does not say."""
    new_head: ClassVar[str | None] = None
    """Module of the model that starts untrained, so that an adapter must not leave it frozen."""

    def __new__(cls, *args: Any, **more: Any) -> CoreTrainer:
        """Check what is given before any class of trainer loads something of it."""
        check_arguments(given_arguments(cls, args, more))
        return super().__new__(cls)

    def __init__(
        self,
        model: Any,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        ref_model: Any = None,
        providers: dict[str, object] | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        args = self._checked_args(args)
        self.context = HookContext(args, self._checked_arguments(arguments or {}))
        self.metrics = Metrics()
        self.loss_parts: dict[str, Tensor] = {}
        self.hooks = self.composition.instantiate(self.context, self.default_hooks(self), providers)
        callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks or []]
        for callback in callbacks:
            self._take_part(callback)
        callbacks += [hooks for hooks in self.hooks.objects.values() if isinstance(hooks, TrainerCallback)]
        callbacks = list({id(callback): callback for callback in callbacks}.values())
        check_output_dir(args.output_dir)
        self._check_reference(args, ref_model, adapter=peft_config is not None)
        self.check_datasets(train_dataset, eval_dataset, None, None, args)
        self.note_inputs(train_dataset=train_dataset, arguments=self.context.arguments, optimizers=optimizers)

        self.load_beside()
        set_seed(args.seed)
        policy = self._load_model(model, args)
        tokenizer = self._load_tokenizer(processing_class, policy, args)
        self.check_datasets(train_dataset, eval_dataset, policy, tokenizer, args)
        self._check_reference(args, ref_model, adapter=is_peft(policy))
        self.sources = sources(policy, train_dataset, eval_dataset)
        if vocabulary := getattr(policy.config.get_text_config(), "vocab_size", None):  # type: ignore[operator,union-attr]
            self.hooks.facts["vocabulary"] = vocabulary
        self.terminators = self.find_terminators(tokenizer, policy, args)
        self.pad_token_id: int = tokenizer.pad_token_id
        policy = add_adapter(policy, peft_config, args.activation_checkpointing, self.new_head)
        self.note_adapter(policy)
        if args.disable_dropout:
            disable_dropout(policy)
        self.reference = self._make_reference(policy, args, new_adapter=peft_config is not None, given=ref_model)
        given = None if ref_model is None or self.reference is None else self.reference.module
        self.note_inputs(processing_class=tokenizer, ref_model=given)
        self.extra_models = self._make_extra_models(policy, args)
        train_dataset, eval_dataset = self.prepare_datasets(train_dataset, eval_dataset, tokenizer, args)

        super().__init__(
            model=policy,
            args=args,
            data_collator=cast(Any, self.collate),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.callback_handler = CarefulCallbacks.of(self.callback_handler)
        self.layouts = self._make_layouts(self.model)
        self._check_parts(args)
        # The aggregation already weights tokens for accumulation; the loop must not divide again.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = True
        self._prepare_run(tokenizer, args)

    def _prepare_run(self, tokenizer: Any, args: Any) -> None:
        """Prepare the models beside the policy, and tell the hooks what is known only now."""
        if self.reference is not None and self.reference.module is not None:
            self.reference.module = self.accelerator.prepare_model(self.reference.module, evaluation_mode=True)
        self._prepare_extra_models()
        # Sampling must differ between processes; everything else is seeded on its own.
        set_seed(args.seed, device_specific=True)
        self.context.processing_class = tokenizer
        self.context.num_processes = self.accelerator.num_processes
        self.context.process_index = self.accelerator.process_index
        self.context._log = self._record
        self.context._gather = self._gather_flat
        self.add_callback(_Steps(self))

    # -- callbacks ------------------------------------------------------------------------------------------------
    def _take_part(self, callback: Any) -> None:
        if implements_hooks(callback) and all(callback is not other for other in self.hooks.objects.values()):
            self.composition.add_provider(self.hooks, type(callback).__name__, callback)

    def add_callback(self, callback: Any) -> None:
        """As in `transformers.Trainer`; one that implements hooks takes part like an algorithm from now on."""
        callback = callback() if isinstance(callback, type) else callback
        self._take_part(callback)
        super().add_callback(callback)

    def after_step(self, only: set[str] | None = None) -> None:
        """Call the hooks `after_step`, those of the plugins `only` if given; one that fails is kept, and owed."""
        policy = self.accelerator.unwrap_model(self.model)
        reference = self.reference.module if self.reference is not None else None
        manager, self.owed_hooks = self.hooks.manager, []
        acting = [impl.plugin_name for impl in reversed(self.hooks.call.after_step.get_hookimpls())]
        for name in acting:
            if only is None or name in only:
                others = [manager.get_plugin(other) for other in acting if other != name]
                call = manager.subset_hook_caller("after_step", others)
                try:
                    call(step=self.state.global_step, policy=policy, reference=reference)
                except BaseException as error:
                    self.owed_hooks.append(name)
                    self.callback_handler.keep(error)

    # -- checks ---------------------------------------------------------------------------------------------------
    def _checked_args(self, args: Any) -> Any:
        expected = self.composition.config_class
        remember(args)  # once more: options may be set after the config is made
        if args is None:
            return expected(output_dir=f"{self.composition.name.replace('+', '-')}-output")
        if isinstance(args, expected):
            check_options(args)  # an attribute may have been set since
            return args
        lacking = [f.name for f in dataclasses.fields(expected) if not hasattr(args, f.name)]
        if lacking or isinstance(args, type):
            found = f"the class {args.__name__}" if isinstance(args, type) else f"a {type(args).__name__}"
            without = f", which lacks options of {self.composition.name!r}: {', '.join(lacking[:3])}" if lacking else ""
            raise ConfigError(
                f"args is {found}{without}.",
                mend=f"Make it with trl_core.get_config({self.composition.name!r})(...).",
            )
        # Made for another algorithm, the base perhaps: the same values, but what a class says of itself is this one's.
        taken: Any = object.__new__(expected)
        taken.__dict__.update(args.__dict__)
        check_options(taken)
        return taken

    def _checked_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        remember(given)
        check_names(self.composition, type(self), given)
        return {name: given.get(name) for name in self.composition.arguments}

    def check_datasets(self, train: Any, evaluation: Any, model: Any, tokenizer: Any, args: Any) -> None:
        """Check the datasets; called before loading with `model` and `tokenizer` None, and again with both."""

    # -- loading --------------------------------------------------------------------------------------------------
    def load_beside(self) -> None:
        """Load what is needed beside the models; called when everything is checked, before they are loaded."""

    def _load_model(self, model: Any, args: Any) -> nn.Module:
        return load_policy(model, args.model_init_kwargs, args.trust_remote_code)

    def _load_tokenizer(self, given: Any, policy: nn.Module, args: Any) -> Any:
        return load_tokenizer(given, policy, args.trust_remote_code)

    def find_terminators(self, tokenizer: Any, policy: nn.Module, args: Any) -> tuple[int, ...]:
        """The tokens that end a completion."""
        return terminators(tokenizer, policy)

    def prepare_datasets(self, train: Any, evaluation: Any, tokenizer: Any, args: Any) -> tuple[Any, Any]:
        """The datasets as the loaders read them; here as they are."""
        return train, evaluation

    def collate(self, rows: list[dict[str, Any]]) -> Any:
        """A micro-batch from dataset rows; here the rows themselves."""
        return as_is(rows)

    def _check_parts(self, args: Any) -> None:
        most = args.max_tokens_per_forward
        require(
            most is None or not (self.is_sharded or self._forward_kwargs()),
            f"max_tokens_per_forward={most} with {'sharded weights' if self.is_sharded else 'a router loss'}: all rows "
            "of a micro-batch have to go through the model together.",
            "Leave it out, and lower per_device_train_batch_size.",
        )

    def _check_reference(self, args: Any, given: Any, *, adapter: bool) -> None:
        if given is not None and not args.uses_reference:
            raise ConfigError(
                f"ref_model is given, but {self.composition.name!r} uses no reference with these options.",
                mend="Leave ref_model out.",
            )
        if getattr(args, "sync_ref_model", False):
            if not args.uses_reference:
                raise ConfigError(
                    "sync_ref_model=True, but no reference model is used.", mend="Set beta > 0, or leave it off."
                )
            if adapter:
                raise ConfigError(
                    "sync_ref_model=True with an adapter: the reference is the model without it and cannot move.",
                    mend="Leave sync_ref_model off, or train all weights.",
                )

    def _make_reference(
        self, policy: nn.Module, args: Any, *, new_adapter: bool, given: Any = None
    ) -> ReferenceModel | None:
        if not args.uses_reference:
            return None
        if isinstance(given, str | os.PathLike):
            given = self._load_model(given, args)
        separate = args.separate_reference
        return ReferenceModel(
            policy, new_adapter=new_adapter, given=given, separate=separate, layouts=self._make_layouts
        )

    def _make_layouts(self, model: nn.Module) -> Layouts:
        """How rows are laid out for a model."""
        args = self.context.args
        return Layouts(
            model, share_prompts=args.share_prompts, one_line=args.padding_free, multiple=args.pad_to_multiple_of
        )

    # -- extra models ---------------------------------------------------------------------------------------------
    def _make_extra_models(self, policy: nn.Module, args: Any) -> dict[str, nn.Module]:
        models: dict[str, nn.Module] = {}
        owners = {id(parameter): "the policy" for parameter in policy.parameters()}
        answers = zip(self.hooks.acting("extra_models"), self.hooks.call.extra_models(policy=policy), strict=False)
        for who, name, module in ((who, *entry) for who, answer in answers for entry in answer.items()):
            wrong = None
            if name.lower() in CHECKPOINT_FILES:
                wrong = "which a file of each checkpoint has"
            elif name.lower() in map(str.lower, models):
                wrong = "twice, as far as a file system tells capitals apart"
            elif others := {owners[id(p)] for p in module.parameters() if id(p) in owners}:
                wrong = f"to a module that shares parameters with {sorted(others)[0]}, which would be trained twice"
            if wrong:
                raise HookResultError(
                    f"extra_models gave the name {name!r} {wrong}. It is the hook of {who}.",
                    mend="Return modules with parameters of their own, each under a name of its own.",
                )
            owners |= dict.fromkeys(map(id, module.parameters()), f"the model {name!r}")
            models[name] = module
        for module in models.values():
            if args.disable_dropout:
                disable_dropout(module)
            if args.activation_checkpointing and hasattr(module, "activation_checkpointing_enable"):
                module.activation_checkpointing_enable()  # type: ignore[operator]
        return models

    def _prepare_extra_models(self) -> None:
        if self.extra_models and self.is_sharded:
            raise ConfigError(
                f"{self.composition.name!r} trains {sorted(self.extra_models)} beside the policy, which runs with "
                "DeepSpeed or FSDP cannot do yet.",
                mend="Use plain data parallelism (accelerate launch), with an adapter if memory is short.",
            )
        for name, module in self.extra_models.items():
            self._check_given_optimizer(name, module)
            self.context.models[name] = prepared = self.accelerator.prepare_model(module)
            layouts_of(prepared, self._make_layouts(module))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of `transformers.Trainer`, for the extra models too."""
        models = {} if self.optimizer is not None else self.extra_models
        try:
            optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        except (ImportError, ValueError, TypeError) as error:
            what = f"The optimizer optim={str(self.args.optim.value)!r} cannot be made: {error}"
            raise ConfigError(what, mend="Install what it needs, change optim_args, or use another.") from error
        for model_name, module in models.items():
            rate = self.context.learning_rates.get(model_name, self.args.learning_rate)
            decayed = set(self.get_decay_parameter_names(module))
            named = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
            for decays, decay in ((True, self.args.weight_decay), (False, 0.0)):
                chosen = [value for name, value in named if (name in decayed) is decays]
                if chosen:
                    optimizer.add_param_group({"params": chosen, "weight_decay": decay, "lr": rate})
        return optimizer

    def _check_given_optimizer(self, name: str, module: nn.Module) -> None:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        known = {id(parameter) for group in groups for parameter in group["params"]}
        if groups and any(p.requires_grad and id(p) not in known for p in module.parameters()):
            raise ConfigError(
                f"The given optimizer has not all parameters of {name!r}, which would then not be trained.",
                mend="Leave optimizers out, or build one that has them; a module you pass has its parameters already.",
            )

    def _with_extra_models(self, model: nn.Module) -> nn.Module:
        return nn.ModuleList([model, *self.extra_models.values()]) if self.extra_models else model

    def _clip_grad_norm(self, model: Any) -> Any:
        return super()._clip_grad_norm(self._with_extra_models(model))  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._with_extra_models(model), grad_norm)  # type: ignore[no-untyped-call]

    def forget_gradients(self) -> None:
        """Drop the gradients of the extra models; the loop does so for the policy alone."""
        for module in self.extra_models.values():
            module.zero_grad()

    def evaluating(self, *models: nn.Module) -> contextlib.AbstractContextManager[None]:
        """While active, these models and the extra ones are in evaluation mode and nothing gets a gradient."""
        return evaluating(*models, *self.extra_models.values())

    # -- processes and metrics ------------------------------------------------------------------------------------
    @property
    def mode(self) -> str:
        """Which metrics are being collected: "train" or "eval"."""
        return "train" if self.context.training else "eval"

    def _record(self, name: str, value: Any, weight: Any = 1.0, reduce: str = "mean") -> None:
        self.metrics.record(self.mode, name, value, weight, reduce)

    def _gather_flat(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        parts: list[Tensor] = gather_object([values.cpu()])
        return torch.cat(parts).to(values.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the collected metrics to a log line of training."""
        evaluation = any(name.startswith("eval_") for name in logs)
        if not evaluation:
            logs = {**logs, **self.metrics.drain("train")}
        super().log(logs, start_time)

    # -- the loss -------------------------------------------------------------------------------------------------
    def loss_terms(self, samples: TokenRows, logps: Tensor, log_ratio: Tensor | None) -> dict[str, Tensor | TokenMean]:
        """The loss terms of all algorithms, by their names and their algorithms'."""
        answers = self.hooks.call.loss_terms(samples=samples, logps=logps, log_ratio=log_ratio)
        named = zip(self.hooks.acting("loss_terms"), answers, strict=False)
        terms = {f"the loss term {name!r} of {who}": term for who, answer in named for name, term in answer.items()}
        values = {name: term.values if isinstance(term, TokenMean) else term for name, term in terms.items()}
        self.loss_parts = {name: value.detach() for name, value in values.items()}
        return terms

    def check_gradient(self, loss: Tensor) -> None:
        """Raise `HookResultError` if there is nothing to learn from the loss of a micro-batch of training."""
        if self.context.training and not loss.requires_grad:
            raise HookResultError(
                f"The loss of {self.composition.name!r} has no gradient; it consists of "
                f"{', '.join(self.loss_parts) or 'no term'}.",
                mend="Form loss terms of `logps`, which carries the gradient, without detach(); train some weights.",
            )

    @property
    def exact_layouts(self) -> Layouts | None:
        """How the policy's rows are laid out: padded while a router's loss, which counts every token, is formed."""
        return None if self._forward_kwargs() else self.layouts

    @property
    def token_statistics(self) -> tuple[str, ...]:
        """What options and hooks need to know of each token besides its log-probability."""
        return tuple(dict.fromkeys((*self.args.token_statistics, *sorted(self.context.token_statistics))))

    @property
    def rows_per_forward(self) -> int:
        """Most rows that go through a model at a time."""
        return int(self.args.per_device_train_batch_size)

    @property
    def is_sharded(self) -> bool:
        """Whether weights are spread over processes, so that all of them have to run the same modules."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def score(
        self, model: Any, rows: TokenRows, *statistics: str, temperature: float = 1.0, entropy_grad: bool = False
    ) -> TokenScores:
        """Log-probabilities and statistics of a micro-batch's loss tokens, in the exact layout with fewest tokens."""
        layouts = self.exact_layouts

        def scored(module: Any, part: TokenRows) -> TokenScores:
            return token_logps(
                module,
                part,
                pad_token_id=self.pad_token_id,
                temperature=temperature,
                statistics=tuple(dict.fromkeys((*statistics, *self.token_statistics))),
                entropy_grad=entropy_grad,
                forward_kwargs=self._forward_kwargs(),
                layouts=layouts,
            )

        most_tokens = self.args.max_tokens_per_forward
        parts = parts_of(rows, most_tokens, layouts.choose(rows) if most_tokens and layouts else PADDED)
        if len(parts) == 1:
            return scored(model, rows)
        # Parts keep nothing for the backward pass, which runs them again one by one. The last one goes through what
        # wraps the model, which prepares the gradients to be reduced, once.
        policy = self.accelerator.unwrap_model(model)
        scores = [
            checkpoint(lambda part: without_output(scored(policy, part)), rows.take(part), use_reentrant=False)
            for part in parts[:-1]
        ]
        return joined([*scores, scored(model, rows.take(parts[-1]))], rows, parts)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-step; what fails in it (a reward function, a backend, the loss) stops the run after saving."""
        self.metrics.tick += 1
        start = time.perf_counter()
        for module in self.extra_models.values():
            module.train()
        inputs = self._prepare_inputs(inputs)
        update = time.perf_counter()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        now = time.perf_counter()
        # Recorded per micro-batch, reported per optimizer step.
        self._record("time/update", (now - update) * self.current_gradient_accumulation_steps)
        self._record("step_time", (now - start) * self.current_gradient_accumulation_steps)
        return loss

    def _router_coefficient(self) -> float:
        config = self.accelerator.unwrap_model(self.model).config
        enabled = getattr(config, "output_router_logits", False)
        return float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0) if enabled else 0.0

    def _forward_kwargs(self) -> dict[str, Any]:
        return {"output_router_logits": True} if self._router_coefficient() else {}

    def _add_router_loss(self, loss: Tensor, output: Any, accumulation: int) -> Tensor:
        """Load-balancing loss of mixture-of-experts models that have it switched on."""
        coefficient = self._router_coefficient()
        if not coefficient or getattr(output, "aux_loss", None) is None:
            return loss
        self._record("aux_loss", output.aux_loss)
        router: Tensor = coefficient * output.aux_loss / accumulation
        return loss + router.to(loss.device)

    # -- evaluation -----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Metrics over all rows of the loader; the random state of training stays as it was."""
        before = self.context.training
        self.context.training = False
        self.model.eval()
        rows = 0
        try:
            devices = [self.args.device] if self.args.device.type == "cuda" else []
            with torch.random.fork_rng(devices), self.evaluating():
                for batch in dataloader:
                    self.stop_if_asked()
                    rows += self._evaluate_batch(batch)
            metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.metrics.drain("eval").items()}
        finally:
            self.context.training = before
        return EvalLoopOutput(predictions=cast(Any, None), label_ids=None, metrics=metrics, num_samples=rows)

    def _evaluate_batch(self, batch: Any) -> int:
        """Record the metrics of a batch of the loader; returns its rows."""
        raise NotImplementedError

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluation in the middle of a run; what fails or is stopped in it is done again when the run is resumed."""
        if self.nothing_left:
            return {}
        callbacks, lines = self.callback_handler, len(self.state.log_history)
        self.before_step()
        phase, callbacks.phase, self.owes_evaluation = callbacks.phase, STEP_BEGUN, True
        try:
            metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        except BaseException:
            del self.state.log_history[lines:]
            raise
        callbacks.phase, self.owes_evaluation = phase, False
        return metrics

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the rows of a step are not known when the loop asks."""
        return 0

    def guard_loss(self, loss: Tensor, describe_rows: Callable[[], list[dict[str, Any]]]) -> Tensor:
        """Return the loss if it is finite in every process; otherwise write the rows to disk and stop or skip.

        Raises:
            NonFiniteLossError: with `on_nonfinite_loss="stop"`.
        """
        self.check_gradient(loss)
        bad = not bool(torch.isfinite(loss))
        if not any(gather_object([bad])):
            return loss
        rank = self.accelerator.process_index
        path = Path(self.args.output_dir) / "nonfinite" / f"step-{self.state.global_step + 1}-process-{rank}.json"
        rows = describe_rows() if bad else []
        if bad:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"loss": str(loss.item()), "rows": rows}, indent=1, default=str))
        if self.args.on_nonfinite_loss == "stop":
            self.failed_everywhere = True
            of = [name for name, values in self.loss_parts.items() if not bool(values.isfinite().all())]
            because = f", as {' and '.join(of)} is not finite" if of else ""
            found = f"is {loss.item()}{because}; the {len(rows)} rows of the micro-batch are in {path}"
            raise NonFiniteLossError(
                f"The loss at step {self.state.global_step + 1} {found if bad else 'is bad in another process'}.",
                mend="Lower the learning rate, look at the rows, or set on_nonfinite_loss='skip'.",
            )
        logger.warning("Skipped a micro-batch with a non-finite loss at step %d.", self.state.global_step + 1)
        self._record("skipped_nonfinite", 1.0)
        # A zero that reaches every trained parameter, so that gradient reduction still finds all of them.
        trained = (p for p in self.model.parameters() if p.requires_grad)
        return torch.stack([p.reshape(-1)[0].float() * 0 for p in trained]).sum()


def rows_for_inspection(rows: TokenRows, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of a micro-batch as JSON values, to be looked at."""
    prompts = rows.prompt_ids.split(rows.prompt_lengths.tolist())
    completions = rows.completion_ids.split(rows.completion_lengths.tolist())
    found = [
        {
            "prompt_ids": prompt.tolist(),
            "completion_ids": completion.tolist(),
            "completion": tokenizer.decode(completion),
        }
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    advantages = getattr(rows, "advantages", None)
    for row, value in zip(found, [] if advantages is None else rows.mean_per_row(advantages).tolist(), strict=False):
        row["advantage"] = value
    return found
