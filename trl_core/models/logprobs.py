"""What a model says about the loss tokens of flat rows: log-probabilities, entropies, scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.fsdp import is_fsdp_managed_module

from ..batch import TokenRows
from ..errors import ConfigError
from .head import after_head, score_tokens
from .layout import PADDED, Layout, Layouts, Places, head_of, lay_out, layouts_of, token_outputs, unwrapped
from .loading import evaluating

STATES = "states"
"""Asks for the hidden states as well."""


@dataclass
class TokenScores:
    """Of each loss token, in float32."""

    logps: Tensor
    """(T,) log-probability, with gradient if enabled."""
    output: Any
    """What the model returned; its logits are those of no position where they were formed outside of it."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """(T,) each; those asked for. entropy: in nats. accuracy: 1 where the token is the likeliest. mean_logit: mean of
    the logits over the vocabulary. mean_logp: mean of the log-probabilities over the vocabulary, with gradient.
    log_collision: log of the sum of the squared probabilities."""
    states: Tensor | None = None
    """(T, H) last hidden states before each loss token, as the output head sees them, with gradient if enabled."""
    last_states: Tensor | None = None
    """(N, H) those after the last token of each row."""


@dataclass
class _Head:
    """What `_head_only_at` saw."""

    hidden: Tensor | None = None
    """(T, H) what the head was to be called with at the positions."""
    last: Tensor | None = None
    """(N, H) likewise after each row."""
    product: torch.dtype | None = None
    """In which type it multiplies, if not that of its weights: that of autocast."""


@contextlib.contextmanager
def _head_only_at(
    model: nn.Module, places: Places, last: Places | None = None, *, idle: bool = False
) -> Iterator[_Head]:
    """While active, the model's output head sees only these positions: logits come back as (1, T, V).

    Going through the model's own forward keeps what it does after the head (soft-capping, scaling) and any wrapper
    around it. A model whose head is not a module called once per forward returns full logits; `hidden` then stays None.
    With `last`, the hidden states there are kept as well. With `idle`, the head sees no position at all; it still takes
    part in the forward pass, for wrappers that look which parameters do.
    """
    seen = _Head()
    head = head_of(model)

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if hidden.dim() != 3:
            return None
        seen.hidden = hidden[places[0], places[1]]
        if last is not None:
            seen.last = hidden[last[0], last[1]]
        device = hidden.device.type
        seen.product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return (hidden[:, :0] if idle else seen.hidden[None], *args[1:])

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
    layout = layouts(rows, pad_token_id) if layouts else lay_out(rows, PADDED, pad_token_id=pad_token_id)
    head = head_of(model)
    # A static graph waits for the gradient of what its forward returned.
    static = getattr(model, "static_graph", False) or is_fsdp_managed_module(model)
    after = None if static else after_head(unwrapped(model, "get_output_embeddings"), head)
    last = layout.last if STATES in statistics else None
    with _head_only_at(model, layout.predicting, last, idle=after is not None) as seen:
        output = model(**layout.inputs, use_cache=False, **(forward_kwargs or {}))
    if last is not None and seen.hidden is None:
        raise ConfigError(
            f"The hidden states of {type(model).__name__} cannot be read: its output head is not called on them.",
            mend="Train a model with output embeddings, or give the critic a network of its own.",
        )
    source = seen.hidden
    if source is None:
        source, head, after = output.logits[layout.predicting], None, None
    elif after is None:
        source, head = output.logits.squeeze(0), None
    found = score_tokens(
        source,
        rows.completion_ids[rows.loss_mask],
        statistics,
        head=cast(nn.Linear | None, head),
        after=after,
        temperature=temperature,
        entropy_grad=entropy_grad,
        product=seen.product,
    )
    found = {name: value.float() for name, value in found.items()}
    return TokenScores(found.pop("logp"), output, found, None if last is None else seen.hidden, seen.last)


def row_scores(
    model: nn.Module, rows: TokenRows, *, pad_token_id: int, layouts: Layouts | None = None
) -> tuple[Tensor, Any]:
    """Scores of a sequence classifier with one output, read at the last token of each row.

    The place is known by length: the pad token may be the terminator, which some models would take for padding.
    `layouts` says how rows are laid out; default: what this model computes exactly with the fewest tokens.

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
    layout = (layouts or layouts_of(model))(rows, pad_token_id)
    with token_outputs(model) as found:
        output = model(**layout.inputs, use_cache=False)
    return layout, found.pop() if found and found[-1].dim() == 3 else None, output


def token_values(
    model: nn.Module, rows: TokenRows, *, pad_token_id: int, layouts: Layouts | None = None
) -> tuple[Tensor, Tensor]:
    """What a critic, a sequence classifier with one output, gives before each loss token and after the last token.

    `layouts` as for `row_scores`.

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
