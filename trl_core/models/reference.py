"""The frozen model that a policy is compared with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..batch import TokenRows
from .loading import disable_dropout, is_peft
from .logprobs import batched_token_logps

REFERENCE_ADAPTER = "ref"


class ReferenceModel:
    """Log-probabilities under the reference, wherever its weights live.

    Full fine-tuning: a frozen copy of the weights the policy has when the trainer is made, also when those exist only
    in memory. A new adapter: the policy with its adapter switched off. A continued adapter: a frozen copy of the
    initial adapter, named "ref", beside the trained one.

    Args:
        policy: before any optimizer step.
        new_adapter: the trainer has just added the adapter, so switching it off gives the original model.

    Attributes:
        module: the model that holds the reference weights; None while they are shared with the policy.
    """

    def __init__(self, policy: nn.Module, *, new_adapter: bool) -> None:
        self._policy = policy
        self._adapter: str | None = None
        self.module: nn.Module | None = None
        if not is_peft(policy):
            self.module = copy.deepcopy(policy)
            disable_dropout(self.module)
            self.module.requires_grad_(False).eval()
        elif not new_adapter:
            self._adapter = _copy_adapter(policy)

    def logps(self, rows: TokenRows, *, batch_size: int, pad_token_id: int, temperature: float) -> Tensor:
        """(T,) float32 log-probabilities without gradient."""
        with self._active() as model:
            return batched_token_logps(
                model, rows, batch_size=batch_size, pad_token_id=pad_token_id, temperature=temperature
            )

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
