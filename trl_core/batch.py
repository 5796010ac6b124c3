"""Rows of generated text in a flat layout: the one form in which data travels between the steps.

Legend, used in every shape of this project:
    P  prompts of a generation batch        G  completions of one prompt (a *group*; its rows are adjacent)
    N  rows, one per completion             R  reward functions
    Q  prompt tokens of all rows            C  completion tokens of all rows
    T  loss tokens of all rows: the completion tokens that enter the loss (`T <= C`: tool output and masked
       truncated rows do not)

Offline data have the same form. A pair of preferred and rejected completion is a group of two rows; text without a
prompt is a row whose "prompt" is its first token, which nothing predicts.

Nothing here is padded, so no hook ever needs a mask: a `(T,)` tensor holds the loss tokens of row 0, then of row 1, ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from .errors import HookResultError


def _axis(name: str, *, optional: bool = False, default_factory: Any = MISSING) -> Any:
    """Field whose first dimension is `name`: "row" (N), "prompt" (Q), "completion" (C) or "loss" (T)."""
    default = None if optional else MISSING
    return field(default=default, default_factory=default_factory, metadata={"axis": name})


def _ragged_index(lengths: Tensor, rows: Tensor) -> Tensor:
    """Positions, in a flat tensor of rows with these lengths, of all entries of `rows`, in the order of `rows`."""
    starts = torch.cumsum(lengths, 0) - lengths
    chosen = lengths[rows]
    within = torch.arange(int(chosen.sum()), device=lengths.device)
    within = within - torch.repeat_interleave(torch.cumsum(chosen, 0) - chosen, chosen)
    return torch.repeat_interleave(starts[rows], chosen) + within


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.long)


@dataclass(eq=False, kw_only=True)
class TokenRows:
    """Prompt and completion tokens of N rows, with the helpers every step uses."""

    prompt_ids: Tensor = _axis("prompt")
    """(Q,) int64, prompt tokens."""
    prompt_lengths: Tensor = _axis("row")
    """(N,) int64, prompt tokens of each row."""
    completion_ids: Tensor = _axis("completion")
    """(C,) int64, sampled tokens, the terminator included; never re-tokenised text."""
    completion_lengths: Tensor = _axis("row")
    """(N,) int64, completion tokens of each row."""
    loss_mask: Tensor = _axis("completion")
    """(C,) bool, which completion tokens enter the loss."""
    group: Tensor = _axis("row")
    """(N,) int64, number of the prompt in the generation batch; rows of a group are adjacent."""
    notes: dict[str, Tensor] = _axis("loss", default_factory=dict)
    """(T,) each, by name: what hooks find out about the loss tokens and want to find again, such as the values a critic
    gives. Notes stay with their rows through selection, replay, micro-batches and checkpoints."""

    @classmethod
    def from_lists(
        cls,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        loss_mask: Sequence[Sequence[int]] | None = None,
        group: Sequence[int] | None = None,
        **more: Any,
    ) -> Self:
        """Rows from token lists.

        Args:
            prompt_ids: N lists; where one is empty, the first token of its completion takes its place, since no token
                predicts it.
            completion_ids: N lists.
            loss_mask: N lists, as long as the completions; default: all of their tokens enter the loss.
            group: N numbers; default: each row is a group of its own.
            **more: further fields of the class.
        """
        masks = [[1] * len(row) for row in completion_ids] if loss_mask is None else loss_mask
        # How many tokens of the completion move to the prompt.
        moved = [0 if prompt else min(1, len(row)) for prompt, row in zip(prompt_ids, completion_ids, strict=True)]
        prompts = [
            [*prompt, *row[:first]] for prompt, row, first in zip(prompt_ids, completion_ids, moved, strict=True)
        ]
        completions = [row[first:] for row, first in zip(completion_ids, moved, strict=True)]
        kept = [row[first:] for row, first in zip(masks, moved, strict=True)]
        return cls(
            prompt_ids=_flat(prompts),
            prompt_lengths=torch.tensor([len(row) for row in prompts], dtype=torch.long),
            completion_ids=_flat(completions),
            completion_lengths=torch.tensor([len(row) for row in completions], dtype=torch.long),
            loss_mask=_flat(kept).bool(),
            group=torch.arange(len(prompts)) if group is None else torch.tensor(group, dtype=torch.long),
            **more,
        )

    # -- sizes ----------------------------------------------------------------------------------------------------
    @property
    def num_rows(self) -> int:
        """N."""
        return self.completion_lengths.numel()

    @property
    def row_of_completion_token(self) -> Tensor:
        """(C,) int64, the row each completion token belongs to."""
        rows = torch.arange(self.num_rows, device=self.completion_lengths.device)
        return torch.repeat_interleave(rows, self.completion_lengths)

    @property
    def lengths(self) -> Tensor:
        """(N,) int64, loss tokens of each row."""
        counts = torch.zeros_like(self.completion_lengths)
        return counts.index_add_(0, self.row_of_completion_token, self.loss_mask.long())

    @property
    def row_of_token(self) -> Tensor:
        """(T,) int64, the row each loss token belongs to."""
        return self.row_of_completion_token[self.loss_mask]

    # -- between rows, tokens and groups --------------------------------------------------------------------------
    def sum_per_row(self, values: Tensor) -> Tensor:
        """(T,) to (N,): sum over the loss tokens of each row; 0 for a row without any."""
        return values.new_zeros(self.num_rows).index_add(0, self.row_of_token, values)

    def mean_per_row(self, values: Tensor) -> Tensor:
        """(T,) to (N,): mean over the loss tokens of each row; 0 for a row without any."""
        return self.sum_per_row(values) / self.lengths.clamp(min=1)

    def expand(self, values: Tensor) -> Tensor:
        """(N,) to (T,): each row's value at each of its loss tokens.

        A tensor of shape (T,) or (T, 1) is taken to be per token already; where N = T, the shape (N,) means per row.

        Raises:
            HookResultError: `values` has neither N nor T entries.
        """
        rows = self.row_of_token
        if values.shape == (self.num_rows,):
            return values[rows]
        if values.shape in (rows.shape, (rows.numel(), 1)):
            return values.reshape(-1)
        raise HookResultError(
            f"A tensor of shape {tuple(values.shape)} is neither per row ({self.num_rows},) nor per loss token "
            f"({rows.numel()},).",
            mend="Return one value per row or one per loss token.",
        )

    def by_group(self, values: Tensor, fill: float = float("nan")) -> Tensor:
        """(N,) to (P, G): one line per group; groups with fewer rows than the largest are filled with `fill`."""
        line, column, shape = self._group_places()
        grid = values.new_full(shape, fill)
        grid[line, column] = values
        return grid

    def flat(self, grid: Tensor) -> Tensor:
        """(P, G) to (N,): the inverse of `by_group`."""
        line, column, _ = self._group_places()
        return grid[line, column]

    def _group_places(self) -> tuple[Tensor, Tensor, tuple[int, int]]:
        _, line, counts = torch.unique_consecutive(self.group, return_inverse=True, return_counts=True)
        starts = torch.cumsum(counts, 0) - counts
        column = torch.arange(self.num_rows, device=self.group.device) - starts[line]
        return line, column, (counts.numel(), int(counts.max()) if counts.numel() else 0)

    # -- selecting and joining rows -------------------------------------------------------------------------------
    def _lengths_on(self, axis: str) -> Tensor:
        if axis == "row":
            return torch.ones_like(self.completion_lengths)
        if axis == "loss":
            return self.lengths
        return self.prompt_lengths if axis == "prompt" else self.completion_lengths

    def take(self, rows: Tensor | Sequence[int]) -> Self:
        """The given rows (indices into N), in that order, with everything that belongs to them."""
        rows = torch.as_tensor(rows, dtype=torch.long, device=self.completion_lengths.device)
        chosen: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor | dict) and "axis" in f.metadata:
                entries = _ragged_index(self._lengths_on(f.metadata["axis"]), rows)
                value = value[entries] if isinstance(value, Tensor) else {k: v[entries] for k, v in value.items()}
            elif isinstance(value, list):
                value = [value[i] for i in rows.tolist()]
            elif isinstance(value, dict):
                value = {key: [column[i] for i in rows.tolist()] for key, column in value.items()}
            chosen[f.name] = value
        return type(self)(**chosen)

    def split(self, size: int) -> list[Self]:
        """The rows in their order, `size` at a time; nothing where there are none."""
        starts = range(0, self.num_rows, size)
        return [self.take(range(first, min(first + size, self.num_rows))) for first in starts]

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """Rows of all parts, one after the other.

        Raises:
            HookResultError: a field is None in some parts only.
        """
        joined: dict[str, Any] = {}
        for f in fields(cls):
            values = [getattr(part, f.name) for part in parts]
            if 0 < sum(value is None for value in values) < len(values):
                raise HookResultError(
                    f"{cls.__name__}.{f.name} is set in some of the batches to be joined, but not in all.",
                    mend="Set it in all of them, or set it to None in all.",
                )
            if isinstance(values[0], Tensor) and "axis" in f.metadata:
                joined[f.name] = torch.cat(values)
            elif isinstance(values[0], list):
                joined[f.name] = [item for value in values for item in value]
            elif isinstance(values[0], dict) and "axis" in f.metadata:
                if any(value.keys() != values[0].keys() for value in values):
                    raise HookResultError(
                        f"The batches to be joined have other notes: {[sorted(value) for value in values]}.",
                        mend="Note the same things about all rows.",
                    )
                joined[f.name] = {key: torch.cat([value[key] for value in values]) for key in values[0]}
            elif isinstance(values[0], dict):
                joined[f.name] = {key: [item for value in values for item in value[key]] for key in values[0]}
            else:
                joined[f.name] = values[0]
        return cls(**joined)

    def to(self, device: torch.device | str) -> Self:
        """The same rows with every tensor on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
        moved["notes"] = {name: value.to(device) for name, value in self.notes.items()}
        return type(self)(**moved)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields that are set, for example to save them; a note is named "notes.<name>"."""
        named = [(f.name, getattr(self, f.name)) for f in fields(self)]
        named += [(f"notes.{name}", value) for name, value in self.notes.items()]
        return {name: value for name, value in named if isinstance(value, Tensor)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        notes = {k.removeprefix("notes."): v for k, v in tensors.items() if k.startswith("notes.")}
        fields: dict[str, Any] = {k: v for k, v in tensors.items() if not k.startswith("notes.")}
        return cls(**fields, notes=notes)

    def validate(self) -> Self:
        """Check that all sizes agree.

        Raises:
            HookResultError: a field has another size than its axis.
        """
        axes = {f.name: (f.metadata["axis"], getattr(self, f.name)) for f in fields(self) if "axis" in f.metadata}
        axes |= {f"notes[{name!r}]": ("loss", value) for name, value in self.notes.items()}
        for name, (axis, value) in axes.items():
            if not isinstance(value, Tensor | list):
                continue
            size = int(self._lengths_on(axis).sum())
            if len(value) != size:
                raise HookResultError(
                    f"{type(self).__name__}.{name} has {len(value)} entries; expected {size}, one per "
                    f"{axis}{'' if axis == 'row' else ' token'}.",
                    mend="Return the batch with all of its fields changed alike; `take` and `concat` do so.",
                )
        return self


@dataclass(eq=False, kw_only=True)
class Prompts:
    """What the generation backend is asked for: one row per completion wanted, rows of a group adjacent."""

    ids: list[list[int]]
    """N token lists, without padding."""
    raw: list[Any]
    """N prompts as the user gave them: a string or a list of messages."""
    group: Tensor
    """(N,) int64, number of the prompt in the generation batch."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(eq=False, kw_only=True)
class Sampling:
    """How to sample; the names are those of `transformers.GenerationConfig`."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    """Every token that ends a completion: the tokenizer's and the generation config's."""
    pad_token_id: int = 0
    rows: int | None = None
    """Most rows to sample at a time, None for all; a backend with a scheduler of its own need not look at it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """`generation_kwargs` of the configuration."""


@dataclass(eq=False, kw_only=True)
class Generated:
    """What a generation backend returns for N rows."""

    completion_ids: list[list[int]]
    """N token lists, terminator included when one was sampled."""
    prompt_ids: list[list[int]] | None = None
    """N token lists when the backend tokenises itself; None keeps the ids it was given."""
    logps: list[list[float]] | None = None
    """N lists: the sampler's log-probability of each token, after temperature and filters, in nats."""
    loss_mask: list[list[bool]] | None = None
    """N lists: False at tokens that were not sampled (tool output)."""


@dataclass(eq=False, kw_only=True)
class Rollouts(TokenRows):
    """Generated rows with their prompts, texts and rewards."""

    prompts: list[Any] = _axis("row")
    """N prompts as the user gave them."""
    completions: list[Any] = _axis("row")
    """N completions in the user's form: text, or `[{"role": "assistant", "content": text}]`."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """The dataset's other columns, N values each."""
    truncated: Tensor = _axis("row")
    """(N,) bool, the row does not end with a terminator."""
    sampling_logps: Tensor | None = _axis("completion", optional=True)
    """(C,) the sampler's log-probabilities, when the backend reports them."""
    rewards: Tensor = _axis("row", optional=True)
    """(N, R) one column per reward function; NaN where it gave no score. Not set before `score` has run."""
    reward: Tensor = _axis("row", optional=True)
    """(N,) weighted sum over the functions that scored the row; NaN for a row that none scored."""
    old_logps: Tensor | None = _axis("loss", optional=True)
    """(T,) under the policy that generated the row, where they are computed; 0 at rows that are not kept. Set, as
    `ref_logps` and the notes are, before `advantages` is called."""
    ref_logps: Tensor | None = _axis("loss", optional=True)
    """(T,) under the reference model, when the algorithm uses one; likewise."""


@dataclass(eq=False, kw_only=True)
class Samples(TokenRows):
    """Rows to train on: tokens, advantages and the log-probabilities the loss compares with."""

    advantages: Tensor = _axis("loss")
    """(T,) advantage of each loss token; a row's own value repeated where the algorithm gives one per row."""
    position: Tensor = _axis("row")
    """(N,) int64, place of the row in the generation batch; decides the optimizer step it is used in."""
    reward: Tensor = _axis("row")
    """(N,) row rewards, NaN for unscorable rows."""
    generation: Tensor = _axis("row")
    """(N,) int64, number of the generation batch in which the row was generated; a replayed row keeps its own."""
    old_logps: Tensor | None = _axis("loss", optional=True)
    """(T,) under the policy that generated the row. In the loss hooks it is always set: where the policy has not
    moved since, the trainer fills in the current values without gradient."""
    ref_logps: Tensor | None = _axis("loss", optional=True)
    """(T,) under the reference model, when the algorithm uses one."""
    sampling_logps: Tensor | None = _axis("loss", optional=True)
    """(T,) as reported by the generation backend, when it does."""
    entropy: Tensor | None = _axis("loss", optional=True)
    """(T,) entropy of the current policy at each token, in nats; set in the loss hooks."""
    states: Tensor | None = _axis("loss", optional=True)
    """(T, H) last hidden state of the current policy before each token; set in `annotate`, and with gradient in the
    loss hooks, where a hook asks for it (`HookContext.token_statistics`)."""
    last_states: Tensor | None = _axis("row", optional=True)
    """(N, H) likewise, after the last token of each row."""


@dataclass(eq=False, kw_only=True)
class Texts(TokenRows):
    """Rows of supervised training; the tokens that are learned are the loss tokens."""

    first_learned: Tensor | None = _axis("row", optional=True)
    """(N,) bool: the first token of the row would be learned as well, if anything predicted it."""
    entropy: Tensor | None = _axis("loss", optional=True)
    """(T,) entropy of the current policy at each token, in nats, without gradient; set in the loss hooks."""
    mean_logps: Tensor | None = _axis("loss", optional=True)
    """(T,) mean over the vocabulary of the current log-probabilities, with gradient; set in the loss hooks where the
    options ask for it (`token_statistics`)."""


@dataclass(eq=False, kw_only=True)
class Pairs(TokenRows):
    """Preference pairs: row 2i is the preferred completion of pair i, row 2i + 1 the rejected one, in group i."""

    margin: Tensor | None = _axis("row", optional=True)
    """(N,) by how much the preferred completion is to be ahead, the same at both rows; when the dataset says so."""
    ref_logps: Tensor | None = _axis("loss", optional=True)
    """(T,) under the reference model, when they were computed before training."""
    log_collision: Tensor | None = _axis("loss", optional=True)
    """(T,) log of the sum of the squared probabilities of all tokens at each place, under the current policy, without
    gradient; set in `pair_loss` where the options ask for it (`token_statistics`)."""

    @property
    def num_pairs(self) -> int:
        """P."""
        return self.num_rows // 2

    @property
    def is_chosen(self) -> Tensor:
        """(N,) bool, the rows of preferred completions."""
        return torch.arange(self.num_rows, device=self.group.device) % 2 == 0

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) to two (P,): the values of the preferred rows and those of the rejected ones."""
        chosen, rejected = values.reshape(-1, 2).unbind(1)
        return chosen, rejected
