"""The contract between the core and an algorithm: every hook, its kind and its shapes.

Three kinds:
    provide     exactly one implementation answers. An algorithm that extends another replaces its answer; two
                algorithms composed side by side that both provide one are refused (`PluginConflict`).
    refine      (a provide hook may allow it) a wrapper, `@hookimpl(wrapper=True)`, gets the answer from `yield` and
                returns a changed one. The first algorithm named in a composition is the closest to the base.
    contribute  all implementations answer; the answers are merged by an operation whose order does not matter.

Implement a hook as a method of the class given as `Algorithm(hooks=...)`, marked with `@hookimpl`. Take only the
arguments you need, by name, without default values. Legend of shapes: see `trl_core.batch`.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from .errors import HookResultError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .batch import Generated, Pairs, Prompts, Rollouts, Samples, Sampling, TokenRows
    from .stages.aggregate import TokenMean

    LossTerms = dict[str, Tensor | TokenMean]

PROJECT = "trl_core"
hookimpl = pluggy.HookimplMarker(PROJECT)
_hookspec = pluggy.HookspecMarker(PROJECT)

_F = TypeVar("_F", bound=Callable[..., Any])


def _provide(*, refine: bool = False) -> Callable[[_F], _F]:
    def mark(function: _F) -> _F:
        function.kind, function.refine = "provide", refine  # type: ignore[attr-defined]
        return _hookspec(function, firstresult=True)

    return mark


def _contribute(function: _F) -> _F:
    function.kind, function.refine = "contribute", False  # type: ignore[attr-defined]
    return _hookspec(function)


class HookSpecs:
    """All hooks, in the order in which they are called."""

    # -- models ---------------------------------------------------------------------------------------------------
    @_contribute
    def extra_models(self, policy: nn.Module) -> dict[str, nn.Module]:  # type: ignore[empty-body]
        """Further models to train beside the policy, by name; called once, before the first step.

        The core puts them on the device, gives their parameters to the optimizer, clips gradients over all of them,
        and saves and restores them with each checkpoint. Afterwards `context.models[name]` is the model to call: it
        may be wrapped for distributed training. Who changes it: critics.
        """

    # -- rollout --------------------------------------------------------------------------------------------------
    @_provide(refine=True)
    def generate(self, prompts: Prompts, sampling: Sampling) -> Generated:  # type: ignore[empty-body]
        """Sample one completion for each row of `prompts` (the rows of this process).

        Who changes it: server backends, tools. A trainer's `rollouts=` argument is such a provider.
        """

    @_provide(refine=True)
    def score(self, rollouts: Rollouts) -> Tensor:  # type: ignore[empty-body]
        """(N, R) float32 rewards of the rows of this process; NaN where a function gives no score.

        Who changes it: reward shaping. `rollouts.rewards` and `rollouts.reward` are not set yet.
        """

    @_contribute
    def keep(self, rollouts: Rollouts) -> Tensor:  # type: ignore[empty-body]
        """(N,) bool: which rows of the whole generation batch to train on. Merged by "and". Training only.

        Runs on gathered rows, so a group is always complete, and must give the same answer in every process. Rows
        that are dropped enter neither the group statistics, nor a forward pass, nor a denominator.
        """

    @_provide()
    def reference_logps(self, samples: TokenRows) -> Tensor:  # type: ignore[empty-body]
        """(T,) float32 log-probabilities of this process's rows under the reference model, without gradient.

        Called only if the algorithm uses a reference. Who changes it: adapters, mixtures, precomputed values.
        """

    @_contribute
    def annotate(self, samples: Samples) -> dict[str, Tensor]:  # type: ignore[empty-body]
        """(T,) float32 each, by name: what a model says about kept rows of this process, before training on them.

        Called without gradient and with some rows at a time, as many as go through the policy at once. `ref_logps` and
        `old_logps` are set where they are computed, `advantages` are not known yet. The answers become
        `rollouts.notes` and later `samples.notes`. Who changes it: critics, process rewards.
        """

    @_provide(refine=True)
    def advantages(self, rollouts: Rollouts, keep: Tensor) -> Tensor:  # type: ignore[empty-body]
        """(N,) or (T,) float32 advantages of the whole generation batch; values at rows not kept are ignored.

        Where N happens to equal T, the shape (N,) means per row: write per-token values as (T, 1) to be safe. Runs on
        gathered rows like `keep`. May add to `rollouts.notes` what the loss needs later, (T,) each. Who changes it:
        other baselines, GAE, per-token credit.
        """

    @_provide(refine=True)
    def select(self, samples: Samples) -> Samples:  # type: ignore[empty-body]
        """The kept rows of the whole generation batch, possibly replaced, to train on. Training only.

        Runs on gathered rows. Keep `position` of a row that is replaced: it says in which optimizer step the row is
        used; and let a row that comes from elsewhere keep its `generation`. When an algorithm implements this hook,
        `old_logps` is always set. Who changes it: replay.
        """

    # -- loss -----------------------------------------------------------------------------------------------------
    @_provide(refine=True)
    def log_ratio(self, samples: Samples, logps: Tensor) -> Tensor:  # type: ignore[empty-body]
        """(T,) log of the importance ratio of each token; `logps` (T,) carries gradient, `samples.old_logps` not.

        Who changes it: sequence-level ratios, GSPO-token.
        """

    @_contribute
    def loss_terms(  # type: ignore[empty-body]
        self, samples: Samples, logps: Tensor, log_ratio: Tensor
    ) -> LossTerms:
        """Named loss terms of a micro-batch, each (T,); the terms of all algorithms are added.

        Return values per token, never a scalar: `trl_core.stages.aggregate` alone weights tokens, so denominators,
        gradient accumulation and process counts are right whatever you write. A term that must be a mean over
        tokens whatever the algorithm's aggregation is wrapped as `TokenMean(values)`, which may have any number of
        entries. In supervised training
        `samples` are `Texts` and `log_ratio` is None.
        """

    @_provide(refine=True)
    def pair_loss(self, pairs: Pairs, policy: Tensor, reference: Tensor | None) -> Tensor:  # type: ignore[empty-body]
        """(P,) loss of each preference pair; the core takes their mean.

        `policy` is what the model that is trained says, with gradient, and `reference` what the reference model says,
        without (None where the algorithm uses none): (T,) log-probabilities of a language model, or (N,) scores, one
        per row, of a reward model. Rows 2i and 2i + 1 are the preferred and the rejected completion of pair i.
        Who changes it: every loss on pairs.
        """

    # -- after the step -------------------------------------------------------------------------------------------
    @_contribute
    def after_step(self, step: int, policy: nn.Module, reference: nn.Module | None) -> None:
        """Called after optimizer step `step` (1, 2, ...) with the bare policy and the reference model, if there is one.

        Return nothing. Who changes it: references that follow the policy (TR-DPO, BEMA).
        """


def hook_kinds() -> dict[str, tuple[str, bool]]:
    """Every hook with its kind ("provide" or "contribute") and whether wrappers may refine it."""
    specs = ((name, value) for name, value in vars(HookSpecs).items() if hasattr(value, "kind"))
    return {name: (value.kind, value.refine) for name, value in specs}


REDUCTIONS = ("mean", "min", "max", "variance")
"""How the values of a metric are joined, see `HookContext.log`."""
TRAINER_METRICS = ("loss", "grad_norm", "learning_rate", "epoch", "step")
"""Names of what `transformers.Trainer` logs itself."""


def _check_metric(name: Any, value: Any, weight: Any, reduce: str) -> None:
    """Refuse where it is logged what cannot be averaged later; what a tensor holds is not read for that."""

    def is_number(given: Any) -> bool:
        if hasattr(given, "numel"):
            return bool(given.numel() == 1 and not given.is_complex())
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return not isinstance(given, str | bytes) and isinstance(float(given), float)
        return False

    named = isinstance(name, str) and bool(name.strip()) and name.isprintable()
    if not (named and is_number(value) and is_number(weight) and reduce in REDUCTIONS):
        raise HookResultError(
            f"The metric {name!r} was logged with the value {reprlib.repr(value)}, the weight {reprlib.repr(weight)} "
            f"and reduce={reduce!r}; expected a name, two numbers, and one of mean, min, max, variance.",
            mend="Give context.log(name, value) one number, such as values.mean(); NaN says that there is none.",
        )
    if name in TRAINER_METRICS:
        mend = f"Begin the name with that of the algorithm: 'NAME/{name}'."
        raise HookResultError(f"The metric {name!r} was logged, which the trainer logs itself.", mend=mend)


class HookContext:
    """What an algorithm's hooks know of the run. Passed to the hooks class when the trainer is made.

    Attributes:
        args: the composed configuration, all options of all composed algorithms.
        arguments: the values given to the trainer for the names in `Algorithm.arguments`; missing ones are None.
        processing_class: the tokenizer; None until the trainer has loaded it (hooks are made before any loading).
        num_processes: number of data-parallel processes.
        process_index: number of this process.
        training: False while evaluating.
        models: the models of `extra_models`, ready to be called.
        learning_rates: of extra models by name, where they differ from the policy's; set it when the hooks are made.
        token_statistics: what these hooks need to know of each token besides its log-probability, beyond what the
            options ask for (`args.token_statistics`); add to it when they are made. "states": the hidden states.
    """

    def __init__(self, args: Any, arguments: dict[str, Any]) -> None:
        self.args = args
        self.arguments = arguments
        self.processing_class: Any = None
        self.num_processes = 1
        self.process_index = 0
        self.training = True
        self.models: dict[str, nn.Module] = {}
        self.learning_rates: dict[str, float] = {}
        self.token_statistics: set[str] = set()
        self._log: Callable[..., None] | None = None
        self._gather: Callable[[Tensor], Tensor] | None = None

    def log(self, name: str, value: Any, weight: float | Tensor = 1.0, reduce: str = "mean") -> None:
        """Record a metric of this process's rows for the next log line.

        Over processes the values are joined by `reduce`: "mean" weights each by `weight` (for a mean over tokens give
        the number of tokens), "min" and "max" take the extreme; then they are averaged over the logging interval.
        "variance" joins them like "mean" and takes the sample variance over the interval instead of its average.
        NaN is ignored. Evaluation adds the prefix `eval_`. A name of no run (outside a trainer) is dropped.
        """
        _check_metric(name, value, weight, reduce)
        if self._log is not None:
            self._log(name, value, weight, reduce)

    def gather(self, values: Tensor) -> Tensor:
        """The 1-D `values` of all processes, joined in process order; their sizes may differ."""
        return values if self._gather is None else self._gather(values)
