"""What a model says about the loss tokens of flat rows: log-probabilities, entropies, scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import TokenRows
from .layout import PADDED, Layout, Layouts, Places, head_of, lay_out, token_outputs

_CHUNK = 512
"""Tokens whose probabilities are held at a time where they need no gradient."""
STATISTICS = ("entropy", "accuracy", "mean_logit", "mean_logp", "log_collision")


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


@contextlib.contextmanager
def _head_only_at(model: nn.Module, places: Places) -> Iterator[dict[str, bool]]:
    """While active, the model's output head sees only these positions: logits come back as (1, T, V).

    Going through the model's own forward keeps what it does after the head (soft-capping, scaling) and any wrapper
    around it. A model whose head is not a module called once per forward returns full logits; `used` then stays False.
    """
    used = {"used": False}
    head = head_of(model)

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if hidden.dim() != 3:
            return None
        used["used"] = True
        return (hidden[places[0], places[1]][None], *args[1:])

    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        yield used
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
        statistics: what else to find out, names of `STATISTICS`.
        entropy_grad: whether the entropy carries gradient.
        forward_kwargs: further arguments of the model's forward.
        layouts: how to lay out the rows; default: padded.
    """
    layout = _laid_out(rows, layouts, pad_token_id)
    with _head_only_at(model, layout.predicting) as head:
        output = model(**layout.inputs, use_cache=False, **(forward_kwargs or {}))
    logits = output.logits[0] if head["used"] else output.logits[layout.predicting]
    logits = logits.float()
    logits = logits if temperature == 1.0 else logits / temperature
    targets = rows.completion_ids[rows.loss_mask]
    logps, normalizer = _LogProbs.apply(logits, targets)  # type: ignore[no-untyped-call]
    scores = TokenScores(logps, output)
    if "mean_logp" in statistics:
        scores.statistics["mean_logp"] = logits.mean(-1) - torch.logsumexp(logits, -1)
    if entropy_grad:
        scores.statistics["entropy"] = _entropy(logits, torch.logsumexp(logits, -1))
    wanted = [name for name in statistics if name not in scores.statistics]
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
    layout = _laid_out(rows, layouts, pad_token_id)
    with token_outputs(model) as found:
        output = model(**layout.inputs, use_cache=False)
    every = found.pop() if found and found[-1].dim() == 3 else None
    scores = output.logits if every is None else every[layout.last]
    return scores.squeeze(-1).float(), output


@torch.no_grad()
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
    training = model.training
    model.eval()
    try:
        parts = [
            token_logps(
                model, rows.take(chunk), pad_token_id=pad_token_id, temperature=temperature, layouts=layouts
            ).logps
            for chunk in torch.arange(rows.num_rows).split(batch_size)
        ]
    finally:
        model.train(training)
    return torch.cat(parts)
