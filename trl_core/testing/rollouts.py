"""A generation backend that replays recorded completions."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState

from ..batch import Generated, Prompts, Sampling
from ..errors import HookResultError
from ..hookspecs import hookimpl


class FixedRollouts:
    """Pass as `rollouts=` to train on given completions instead of sampling.

    Args:
        generations: one entry per generation call, `{"prompt_ids": [[...]], "completion_ids": [[...]]}` with one row
            per completion of the whole generation batch (all processes), groups adjacent. Optional: `"logps"`, the
            sampler's log-probabilities, and `"loss_mask"`, in the same form.
        cycle: start again when all are used up instead of raising.
    """

    def __init__(self, generations: list[dict[str, Any]], *, cycle: bool = False) -> None:
        self.generations, self.cycle, self.calls = generations, cycle, 0

    @hookimpl
    def generate(self, prompts: Prompts, sampling: Sampling) -> Generated:
        """This process's share of the next entry.

        Raises:
            HookResultError: all entries are used up, or the entry has another number of rows than asked for.
        """
        if self.calls >= len(self.generations) and not self.cycle:
            raise HookResultError(
                f"FixedRollouts holds {len(self.generations)} generations; one more was asked for.",
                mend="Give more entries, train fewer steps, or pass cycle=True.",
            )
        entry = self.generations[self.calls % len(self.generations)]
        self.calls += 1
        total, state = len(entry["completion_ids"]), PartialState()
        rows = list(range(total))
        share, rest = divmod(total, state.num_processes)
        start = state.process_index * share + min(state.process_index, rest)
        rows = rows[start : start + share + (state.process_index < rest)]
        if len(rows) != len(prompts):
            raise HookResultError(
                f"Generation {self.calls - 1} of FixedRollouts has {total} rows, {len(rows)} for this process; "
                f"{len(prompts)} were asked for.",
                mend="Give one row per completion of the whole generation batch.",
            )
        given = [key for key in ("prompt_ids", "completion_ids", "logps", "loss_mask") if key in entry]
        return Generated(**{key: [entry[key][row] for row in rows] for key in given})

    def state_dict(self) -> dict[str, Any]:
        """How many calls were answered."""
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.calls = state["calls"]
