"""Log-probabilities and entropies at the loss tokens of flat rows, for any causal language model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..batch import TokenRows

_ENTROPY_CHUNK = 512
"""Tokens whose probabilities are held at a time when entropy needs no gradient."""


def padded_inputs(rows: TokenRows, pad_token_id: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """Prompt and completion of each row, padded on the right.

    Returns:
        ids (N, L); attention mask (N, L), made from lengths because the pad token may be the terminator; the
        coordinates (row, position) of the logits that predict each loss token, two (T,) tensors; the T loss tokens.
    """
    prompts = rows.prompt_ids.split(rows.prompt_lengths.tolist())
    completions = rows.completion_ids.split(rows.completion_lengths.tolist())
    sequences = [torch.cat(pair) for pair in zip(prompts, completions, strict=True)]
    ids = pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
    lengths = rows.prompt_lengths + rows.completion_lengths
    mask = (torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]).long()
    row = rows.row_of_completion_token
    starts = torch.cumsum(rows.completion_lengths, 0) - rows.completion_lengths
    within = torch.arange(row.numel(), device=row.device) - starts[row]
    position = rows.prompt_lengths[row] + within - 1
    keep = rows.loss_mask
    return ids, mask, (row[keep], position[keep]), rows.completion_ids[keep]


@contextlib.contextmanager
def _head_only_at(model: nn.Module, places: tuple[Tensor, Tensor]) -> Iterator[dict[str, bool]]:
    """While active, the model's output head sees only these positions: logits come back as (1, T, V).

    Going through the model's own forward keeps what it does after the head (soft-capping, scaling) and any wrapper
    around it. A model whose head is not a module called once per forward returns full logits; `used` then stays False.
    """
    used = {"used": False}
    inner: Any = model
    while not hasattr(inner, "get_output_embeddings") and hasattr(inner, "module"):
        inner = inner.module
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if hidden.dim() != 3:
            return None
        used["used"] = True
        return (hidden[places[0], places[1]][None], *args[1:])

    handle = head.register_forward_pre_hook(select) if isinstance(head, nn.Module) else None
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
    entropy_grad: bool = False,
    forward_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Any]:
    """Score the loss tokens of `rows`.

    Args:
        model: causal language model, possibly wrapped for distributed training.
        rows: N rows on the model's device.
        pad_token_id: any valid id; padded positions are masked.
        temperature: logits are divided by it, as when sampling.
        entropy_grad: whether the entropy carries gradient.
        forward_kwargs: further arguments of the model's forward.

    Returns:
        log-probabilities (T,) float32 with gradient if enabled; entropies (T,) float32 in nats; the model's output.
    """
    ids, mask, places, targets = padded_inputs(rows, pad_token_id)
    with _head_only_at(model, places) as head:
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, **(forward_kwargs or {}))
    logits = output.logits[0] if head["used"] else output.logits[places]
    logits = logits.float()
    logits = logits if temperature == 1.0 else logits / temperature
    normalizer = torch.logsumexp(logits, -1)
    logps = logits.gather(-1, targets[:, None]).squeeze(-1) - normalizer
    if entropy_grad:
        return logps, _entropy(logits, normalizer), output
    with torch.no_grad():
        chunks = zip(logits.detach().split(_ENTROPY_CHUNK), normalizer.detach().split(_ENTROPY_CHUNK), strict=True)
        parts = [_entropy(*chunk) for chunk in chunks]
    return logps, torch.cat(parts) if parts else logps.detach(), output


def _entropy(logits: Tensor, normalizer: Tensor) -> Tensor:
    probabilities = (logits - normalizer[:, None]).exp()
    # A forbidden token (-inf) has probability 0 and contributes nothing.
    return normalizer - (probabilities * logits.masked_fill(logits == float("-inf"), 0.0)).sum(-1)


@torch.no_grad()
def batched_token_logps(
    model: nn.Module, rows: TokenRows, *, batch_size: int, pad_token_id: int, temperature: float
) -> Tensor:
    """(T,) log-probabilities without gradient, `batch_size` rows at a time, in evaluation mode."""
    if rows.num_rows == 0:
        return torch.zeros(0, device=rows.completion_ids.device)
    training = model.training
    model.eval()
    try:
        parts = [
            token_logps(model, rows.take(chunk), pad_token_id=pad_token_id, temperature=temperature)[0]
            for chunk in torch.arange(rows.num_rows).split(batch_size)
        ]
    finally:
        model.train(training)
    return torch.cat(parts)
