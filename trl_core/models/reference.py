"""The frozen model that a policy is compared with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..batch import TokenRows
from ..errors import ConfigError
from .layout import Layouts
from .loading import disable_dropout, is_peft
from .logprobs import batched_token_logps

REFERENCE_ADAPTER = "ref"


class ReferenceModel:
    """Log-probabilities under the reference, wherever its weights live.

    Full fine-tuning: a frozen copy of the weights the policy has when the trainer is made, also when those exist only
    in memory, or the model that is given. A new adapter: the policy with its adapter switched off. A continued
    adapter: a frozen copy of the initial adapter, named "ref", beside the trained one.

    Args:
        policy: before any optimizer step.
        new_adapter: the trainer has just added the adapter, so switching it off gives the original model.
        given: a model to take as the reference, or None.
        separate: also a new adapter gets a copy beside it, which can be moved.
        layouts: how rows are laid out for a model; default: padded.

    Attributes:
        module: the model that holds the reference weights; None while they are shared with the policy.

    Raises:
        ConfigError: the given model is the policy itself.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        new_adapter: bool,
        given: nn.Module | None = None,
        separate: bool = False,
        layouts: Callable[[nn.Module], Layouts | None] | None = None,
    ) -> None:
        # An adapter lies in the modules of the model it was made from, so that one is the policy as well.
        if given is not None and any(given is module for module in policy.modules()):
            raise ConfigError(
                "The reference model is the model that is trained, so they would always agree.",
                mend="Leave the reference out: a frozen copy of the policy's weights is made.",
            )
        self._policy = policy
        self._adapter: str | None = None
        self.module: nn.Module | None = None
        self._make_layouts = layouts
        self._layouts: Layouts | None = None
        if given is not None or not is_peft(policy):
            self.module = copy.deepcopy(policy) if given is None else given
            disable_dropout(self.module)
            self.module.requires_grad_(False).eval()
        elif separate or not new_adapter:
            self._adapter = _copy_adapter(policy)

    def logps(self, rows: TokenRows, *, batch_size: int, pad_token_id: int, temperature: float) -> Tensor:
        """(T,) float32 log-probabilities without gradient, `batch_size` rows at a time."""
        with self._active() as model:
            if self._layouts is None and self._make_layouts is not None:
                self._layouts = self._make_layouts(model)
            return batched_token_logps(
                model,
                rows,
                batch_size=batch_size,
                pad_token_id=pad_token_id,
                temperature=temperature,
                layouts=self._layouts,
            )

    def release(self) -> None:
        """Let go of the model that holds the reference weights."""
        self.module = self._layouts = None

    @contextlib.contextmanager
    def _active(self) -> Iterator[nn.Module]:
        if self.module is not None:
            yield self.module
        elif self._adapter is None:
            with self._policy.disable_adapter():  # type: ignore[operator]
                yield self._policy
        else:
            trained = self._policy.active_adapter
            self._policy.set_adapter(self._adapter)  # type: ignore[operator]
            try:
                yield self._policy
            finally:
                self._policy.set_adapter(trained)  # type: ignore[operator]
                _freeze_adapter(self._policy, self._adapter)


def _copy_adapter(policy: nn.Module) -> str:
    """A frozen copy of the active adapter under the name "ref"."""
    trained = policy.active_adapter
    policy.add_adapter(REFERENCE_ADAPTER, policy.peft_config[trained])  # type: ignore[operator,index]
    for name, module in policy.named_modules():
        if name.endswith(f".{REFERENCE_ADAPTER}"):
            disable_dropout(module)
    parameters = dict(policy.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            source = name.replace(f".{REFERENCE_ADAPTER}.", f".{trained}.")
            if source != name:
                parameter.copy_(parameters[source])
    policy.set_adapter(trained)  # type: ignore[operator]
    _freeze_adapter(policy, REFERENCE_ADAPTER)
    return REFERENCE_ADAPTER


def _freeze_adapter(policy: nn.Module, adapter: str) -> None:
    for name, parameter in policy.named_parameters():
        if f".{adapter}." in name:
            parameter.requires_grad_(False)


@torch.no_grad()
def mix_into(reference: nn.Module, policy: nn.Module, alpha: float) -> None:
    """TR-DPO (2404.09656): `reference <- alpha * policy + (1 - alpha) * reference`, parameter by parameter, by name."""
    current = dict(policy.named_parameters())
    for name, parameter in reference.named_parameters():
        parameter.lerp_(current[name].to(parameter), alpha)


def reference_parameters(policy: nn.Module, reference: nn.Module | None) -> dict[str, nn.Parameter]:
    """The parameters of the reference by the names they have in the policy, for those who move it in `after_step`.

    All parameters of a reference model; or, where the policy carries a separate reference adapter, those of that
    adapter by the names of the trained one's.

    Raises:
        ConfigError: there is no reference that can be moved.
    """
    if reference is not None:
        return dict(reference.named_parameters())
    named = dict(policy.named_parameters())
    if is_peft(policy) and REFERENCE_ADAPTER in policy.peft_config:  # type: ignore[operator]
        mark, trained = f".{REFERENCE_ADAPTER}.", f".{policy.active_adapter}."
        return {name.replace(mark, trained): value for name, value in named.items() if mark in name}
    raise ConfigError(
        "There is no reference that could be moved: it is the policy with its adapter switched off, or there is none.",
        mend="Train all weights, continue a saved adapter, or use an algorithm that has a reference model.",
    )
