"""Rows that go through a model in several parts, and come out as if they had gone together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..batch import TokenRows
from .layout import PADDED, SHARED
from .logprobs import TokenScores


def parts_of(rows: TokenRows, most_tokens: int | None, kind: str) -> list[Tensor]:
    """Which rows go together so that no part holds more tokens than that; long rows come first.

    Args:
        rows: N rows.
        most_tokens: of a part, padding included; a row that is longer is a part of its own. None: all rows together.
        kind: of their layout: "padded", "packed", or "shared", where a group stays together for its prompt's sake.

    Returns:
        indices of rows, each in one of the parts.
    """
    if most_tokens is None or not rows.num_rows:
        return [torch.arange(rows.num_rows)]
    prompts, lengths = rows.prompt_lengths.tolist(), (rows.prompt_lengths + rows.completion_lengths).tolist()
    together = rows.group.tolist() if kind == SHARED else list(range(rows.num_rows))
    longest: dict[int, int] = {}
    for unit, length in zip(together, lengths, strict=True):
        longest[unit] = max(longest.get(unit, 0), length)
    parts: list[list[int]] = []
    tokens = 0
    for i in sorted(range(rows.num_rows), key=lambda i: (-longest[together[i]], together[i])):
        if parts and kind == PADDED:
            grown = lengths[parts[-1][0]] * (len(parts[-1]) + 1)
        elif parts and together[parts[-1][-1]] == together[i]:
            grown = tokens + lengths[i] - prompts[i]
        else:
            grown = tokens + lengths[i]
        if parts and grown <= most_tokens:
            parts[-1].append(i)
            tokens = grown
        else:
            parts.append([i])
            tokens = lengths[i]
    return [torch.tensor(part) for part in parts]


def joined(scores: Sequence[TokenScores], rows: TokenRows, parts: Sequence[Tensor]) -> TokenScores:
    """The scores of parts of `rows` in the order of `rows`; what the model returned is that of the last part.

    Args:
        scores: of each part; all have the same statistics.
        rows: all of them.
        parts: indices of the rows of each part. Without hidden states, rows without loss tokens may be missing.
    """
    members = torch.cat([part.to(rows.completion_ids.device) for part in parts])
    number = torch.full((rows.num_rows,), -1, device=members.device)
    number[members] = torch.arange(members.numel(), device=members.device)
    # The place of each token of `rows` in what is joined.
    place = torch.argsort(torch.argsort(number[rows.row_of_token], stable=True))
    states = [part.states for part in scores if part.states is not None]
    last_states = [part.last_states for part in scores if part.last_states is not None]
    return TokenScores(
        torch.cat([part.logps for part in scores])[place],
        scores[-1].output,
        {name: torch.cat([part.statistics[name] for part in scores])[place] for name in scores[-1].statistics},
        torch.cat(states)[place] if states else None,
        torch.cat(last_states)[number] if last_states else None,
    )


def without_output(scores: TokenScores) -> TokenScores:
    """The scores alone: what the model returned may be large."""
    return replace(scores, output=None)
