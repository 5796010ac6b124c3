"""What a model says about the loss tokens of flat rows: log-probabilities, entropies, scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import TokenRows
from ..errors import ConfigError
from .layout import PADDED, Layout, Layouts, Places, head_of, lay_out, token_outputs
from .loading import evaluating

_CHUNK = 512
"""Tokens whose probabilities are held at a time where they need no gradient."""
STATISTICS = ("entropy", "accuracy", "mean_logit", "mean_logp", "log_collision")
STATES = "states"
"""Asks for the hidden states as well."""


@dataclass
class TokenScores:
    """Of each loss token, in float32."""

    logps: Tensor
    """(T,) log-probability, with gradient if enabled."""
    output: Any
    """What the model returned."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """(T,) each; those asked for. entropy: in nats. accuracy: 1 where the token is the likeliest. mean_logit: mean of
    the logits over the vocabulary. mean_logp: mean of the log-probabilities over the vocabulary, with gradient.
    log_collision: log of the sum of the squared probabilities."""
    states: Tensor | None = None
    """(T, H) last hidden states before each loss token, as the output head sees them, with gradient if enabled."""
    last_states: Tensor | None = None
    """(N, H) those after the last token of each row."""


class _LogProbs(torch.autograd.Function):
    """log_softmax at one index per row, whose backward allocates one tensor of the size of the logits, not three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        normalizer = torch.logsumexp(logits, -1)
        ctx.save_for_backward(logits, targets, normalizer)
        ctx.mark_non_differentiable(normalizer)
        return logits.gather(-1, targets[:, None]).squeeze(-1) - normalizer, normalizer

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalizer = ctx.saved_tensors
        result = (logits - normalizer[:, None]).exp_().mul_(-grad[:, None])
        return result.scatter_add_(-1, targets[:, None], grad[:, None]), None


@dataclass
class _Head:
    """What `_head_only_at` saw."""

    used: bool = False
    states: Tensor | None = None
    last_states: Tensor | None = None


@contextlib.contextmanager
def _head_only_at(model: nn.Module, places: Places, last: Places | None = None) -> Iterator[_Head]:
    """While active, the model's output head sees only these positions: logits come back as (1, T, V).

    Going through the model's own forward keeps what it does after the head (soft-capping, scaling) and any wrapper
    around it. A model whose head is not a module called once per forward returns full logits; `used` then stays False.
    With `last`, the hidden states at the positions and at those of `last` are kept.
    """
    seen = _Head()
    head = head_of(model)

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if hidden.dim() != 3:
            return None
        seen.used = True
        chosen = hidden[places[0], places[1]]
        if last is not None:
            seen.states, seen.last_states = chosen, hidden[last[0], last[1]]
        return (chosen[None], *args[1:])

    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def token_logps(
    model: nn.Module,
    rows: TokenRows,
    *,
    pad_token_id: int,
    temperature: float = 1.0,
    statistics: Sequence[str] = (),
    entropy_grad: bool = False,
    forward_kwargs: dict[str, Any] | None = None,
    layouts: Layouts | None = None,
) -> TokenScores:
    """Score the loss tokens of `rows`.

    Args:
        model: causal language model, possibly wrapped for distributed training.
        rows: N rows on the model's device.
        pad_token_id: any valid id; padded positions are masked.
        temperature: logits are divided by it, as when sampling.
        statistics: what else to find out, names of `STATISTICS`, or "states" for the hidden states.
        entropy_grad: whether the entropy carries gradient.
        forward_kwargs: further arguments of the model's forward.
        layouts: how to lay out the rows; default: padded.

    Raises:
        ConfigError: hidden states are asked for and the model's output head is not known.
    """
    layout = _laid_out(rows, layouts, pad_token_id)
    with _head_only_at(model, layout.predicting, layout.last if STATES in statistics else None) as head:
        output = model(**layout.inputs, use_cache=False, **(forward_kwargs or {}))
    if STATES in statistics and head.states is None:
        raise ConfigError(
            f"The hidden states of {type(model).__name__} cannot be read: its output head is not called on them.",
            mend="Train a model with output embeddings, or give the critic a network of its own.",
        )
    logits = output.logits[0] if head.used else output.logits[layout.predicting]
    logits = logits.float()
    logits = logits if temperature == 1.0 else logits / temperature
    targets = rows.completion_ids[rows.loss_mask]
    logps, normalizer = _LogProbs.apply(logits, targets)  # type: ignore[no-untyped-call]
    scores = TokenScores(logps, output, states=head.states, last_states=head.last_states)
    if "mean_logp" in statistics:
        scores.statistics["mean_logp"] = logits.mean(-1) - torch.logsumexp(logits, -1)
    if entropy_grad:
        scores.statistics["entropy"] = _entropy(logits, torch.logsumexp(logits, -1))
    wanted = [name for name in statistics if name not in (*scores.statistics, STATES)]
    with torch.no_grad():
        parts = zip(
            logits.detach().split(_CHUNK), normalizer.detach().split(_CHUNK), targets.split(_CHUNK), strict=True
        )
        found = [_statistics(*part, wanted) for part in parts]
    for name in wanted:
        scores.statistics[name] = torch.cat([part[name] for part in found]) if found else logps.detach()
    return scores


def _laid_out(rows: TokenRows, layouts: Layouts | None, pad_token_id: int) -> Layout:
    if layouts is None:
        return lay_out(rows, PADDED, pad_token_id=pad_token_id)
    return layouts(rows, pad_token_id)


def _statistics(logits: Tensor, normalizer: Tensor, targets: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if "entropy" in wanted:
        found["entropy"] = _entropy(logits, normalizer)
    if "accuracy" in wanted:
        found["accuracy"] = (logits.argmax(-1) == targets).float()
    if "mean_logit" in wanted:
        found["mean_logit"] = logits.mean(-1)
    if "log_collision" in wanted:
        found["log_collision"] = torch.logsumexp(2 * logits, -1) - 2 * normalizer
    return found


def _entropy(logits: Tensor, normalizer: Tensor) -> Tensor:
    probabilities = (logits - normalizer[:, None]).exp()
    # A forbidden token (-inf) has probability 0 and contributes nothing.
    return normalizer - (probabilities * logits.masked_fill(logits == float("-inf"), 0.0)).sum(-1)


def row_scores(
    model: nn.Module, rows: TokenRows, *, pad_token_id: int, layouts: Layouts | None = None
) -> tuple[Tensor, Any]:
    """Scores of a sequence classifier with one output, read at the last token of each row.

    The place is known by length: the pad token may be the terminator, which some models would take for padding.

    Returns:
        (N,) float32 with gradient if enabled; what the model returned.
    """
    layout, every, output = _scored(model, rows, pad_token_id, layouts)
    scores = output.logits if every is None else every[layout.last]
    return scores.squeeze(-1).float(), output


def _scored(
    model: nn.Module, rows: TokenRows, pad_token_id: int, layouts: Layouts | None
) -> tuple[Layout, Tensor | None, Any]:
    """The layout, what the head gave for every position, or None if it saw only some, and what the model returned."""
    layout = _laid_out(rows, layouts, pad_token_id)
    with token_outputs(model) as found:
        output = model(**layout.inputs, use_cache=False)
    return layout, found.pop() if found and found[-1].dim() == 3 else None, output


def token_values(
    model: nn.Module, rows: TokenRows, *, pad_token_id: int, layouts: Layouts | None = None
) -> tuple[Tensor, Tensor]:
    """What a critic, a sequence classifier with one output, gives before each loss token and after the last token.

    Returns:
        (T,) and (N,) float32 with gradient if enabled.

    Raises:
        ConfigError: the model has no head with one output for each token.
    """
    layout, every, _ = _scored(model, rows, pad_token_id, layouts)
    if every is None or every.shape[-1] != 1:
        raise ConfigError(
            f"{type(model).__name__} gives no value for each token.",
            mend="Use a sequence classifier with one output as a critic: from_pretrained(..., num_labels=1).",
        )
    values = every.squeeze(-1).float()
    return values[layout.predicting], values[layout.last]


def batched_token_logps(
    model: nn.Module,
    rows: TokenRows,
    *,
    batch_size: int,
    pad_token_id: int,
    temperature: float,
    layouts: Layouts | None = None,
) -> Tensor:
    """(T,) log-probabilities without gradient, `batch_size` rows at a time, in evaluation mode."""
    if rows.num_rows == 0:
        return torch.zeros(0, device=rows.completion_ids.device)
    with evaluating(model):
        parts = [
            token_logps(model, part, pad_token_id=pad_token_id, temperature=temperature, layouts=layouts).logps
            for part in rows.split(batch_size)
        ]
    return torch.cat(parts)
