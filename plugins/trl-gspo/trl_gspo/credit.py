"""Advantages of single tokens, from a function of the user."""

import reprlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trl_core import Rollouts, errors
from trl_core.stages import accepted_arguments


def token_advantages(function: Callable, rollouts: Rollouts, advantages: Tensor, keep: Tensor) -> Tensor:
    """Call an advantage function and check its answer.

    Args:
        function: called with those it accepts of `prompts`, `completions`, `completion_ids`, `advantages`, `rewards`
            and the dataset's columns, all lists of N entries. Returns N lists, one number per completion token.
        rollouts: the whole generation batch.
        advantages: what the algorithms below say: (N,), or per token, of which the function gets each row's mean.
        keep: (N,) bool.

    Returns:
        (T, 1) float32; 0 at rows that are not kept or have no reward, whatever the function says of them.

    Raises:
        HookResultError: the function wants an unknown argument, or its answer has another shape or, at a loss token of
            a row that counts, a number that is not finite.
    """
    name = f"The advantage function {getattr(function, '__name__', type(function).__name__)!r}"
    if advantages.shape != (rollouts.num_rows,):
        advantages = rollouts.mean_per_row(rollouts.expand(advantages))
    lengths = rollouts.completion_lengths.tolist()
    given: dict[str, Any] = {
        **rollouts.columns,
        "prompts": rollouts.prompts,
        "completions": rollouts.completions,
        "completion_ids": [ids.tolist() for ids in rollouts.completion_ids.split(lengths)],
        "advantages": advantages.tolist(),
        "rewards": rollouts.reward.tolist(),
    }
    accepted, missing = accepted_arguments(function, given)
    if missing:
        mend = f"Take some of: {', '.join(sorted(given))}; or add columns to the dataset."
        raise errors.HookResultError(f"{name} wants the arguments {missing}, which there are not.", mend=mend)
    answer = function(**accepted)
    if not hasattr(answer, "__len__") or len(answer) != len(lengths):
        what = f"{name} returned {reprlib.repr(answer)}; expected {len(lengths)} lists, one per completion."
        raise errors.HookResultError(what, mend="Answer for every completion, in order.")
    counts = keep & ~rollouts.reward.isnan()
    rows = [
        _checked_row(name, row, answer[row], used) if counts[row] else torch.zeros(len(used))
        for row, used in enumerate(rollouts.loss_mask.split(lengths))
    ]
    return torch.cat(rows)[rollouts.loss_mask, None]


def _checked_row(name: str, row: int, answer: Any, used: Tensor) -> Tensor:
    """(L,) the numbers of one completion; `used` (L,) bool says which enter the loss."""
    try:
        values = torch.as_tensor(answer, dtype=torch.float32, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        values = torch.zeros(())
    bad = (used & ~values.isfinite()).nonzero().flatten().tolist() if values.shape == used.shape else None
    if bad == []:
        return values
    got = f"{len(values)} numbers" if values.dim() == 1 else reprlib.repr(answer)
    got = f"{values[bad[0]]} at token {bad[0]}" if bad else got
    what = f"{name} returned {got} for row {row}, whose completion has {len(used)} tokens."
    raise errors.HookResultError(what, mend="Return one finite number for each token of its completion_ids.")
