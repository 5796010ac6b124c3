"""Log-probabilities from hidden states, a few tokens at a time: the logits of all tokens never exist together.

The last layer of a language model multiplies T hidden states with V embeddings. The (T, V) logits, and as much again
for each step of the softmax and its gradient, are more than the rest of a small model needs. `score_tokens` forms them
for a chunk of tokens, keeps what was asked for, and forms them again in the backward pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .loading import evaluating

logger = logging.getLogger(__name__)
CHUNK_BYTES = 128 * 2**20
"""Of the logits, in float32, that are held at a time; those of the last chunk are kept for the backward pass."""
BLOCK_BYTES = 8 * 2**20
"""Of their probabilities."""
_LEAST_TOKENS = 64
"""Of a chunk, however large the vocabulary: products of fewer rows are slow."""
STATISTICS = ("entropy", "accuracy", "mean_logit", "mean_logp", "log_collision")


# -- what a model does to the logits of its head ----------------------------------------------------------------------
@dataclass(frozen=True)
class AfterHead:
    """`cap * tanh(scale * x / cap)` of each logit x, or `scale * x` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """In place, and divided by the temperature."""
        if self.cap is not None:
            return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap / temperature)
        return logits if self.scale == temperature else logits.mul_(self.scale / temperature)


_found: WeakKeyDictionary[nn.Module, AfterHead | None] = WeakKeyDictionary()


def after_head(model: nn.Module, head: nn.Module | None) -> AfterHead | None:
    """What the model does to its logits if they may be formed outside of it, else None.

    They may be where the head is a linear layer, its weights are whole and its own, nobody listens to it, and the model
    does nothing else to its logits. That is tried once for each model: other numbers are put in place of its output.

    Args:
        model: language model, without what wraps it for distributed training.
        head: its output embeddings.
    """
    if head is None or not _is_plain(head):
        return None
    if model not in _found:
        try:
            with evaluating(model):
                _found[model] = _try(model, head)
        except Exception as error:  # whatever a model does that was not made for such inputs
            logger.info("The logits of %s are formed by itself: %s", type(model).__name__, error)
            _found[model] = None
    return _found[model]


def _is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    if type(head) is not nn.Linear or head.out_features < 2 or type(head.weight) is not nn.Parameter:
        return False
    whole = head.weight.shape == (head.out_features, head.in_features) and not hasattr(head.weight, "ds_id")
    listeners = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    # A `forward` of the object itself: hooks of accelerate.
    return whole and not any(listeners) and "forward" not in vars(head)


def _try(model: nn.Module, head: nn.Linear) -> AfterHead | None:
    device, size = head.weight.device, head.out_features
    steps = 2.0 ** torch.arange(-6, 17.25, 0.25, device=device)
    numbers = torch.cat([steps, -steps])
    # Four tokens, so that each entry of the vocabulary gets small and large ones.
    tokens = torch.arange(4, device=device)
    given = numbers[(torch.arange(size, device=device) + 36 * tokens[:, None]) % len(numbers)][None]
    inputs = {"input_ids": tokens[None] % size, "attention_mask": torch.ones_like(tokens)[None], "use_cache": False}
    seen: list[torch.Size] = []

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(args[0].shape)
        torch.set_grad_enabled(True)  # from here on, to see whether a trained number takes part
        return given.clone()

    with torch.no_grad(), head.register_forward_hook(replace):
        logits: Tensor = model(**inputs).logits
    with head.register_forward_pre_hook(lambda module, args: (args[0][:, :0], *args[1:])):
        left = model(**inputs).logits.numel()
    if seen != [(1, 4, head.in_features)] or logits.requires_grad or logits.shape != given.shape or left:
        return None
    # The first number is so small that no curve shows, the largest so large that only the cap does.
    step, small, cap = float(steps[0]), float(logits[0, 0, 0]), float(logits.max())
    bent = cap / step * math.atanh(small / cap) if 0 < small < cap else 1.0
    for candidate in (AfterHead(small / step), AfterHead(1.0, cap), AfterHead(bent, cap)):
        if torch.allclose(candidate(given.clone()), logits.float(), rtol=1e-5, atol=0.0):
            return candidate
    return None


# -- scores of tokens --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _How:
    names: tuple[str, ...]
    after: AfterHead
    temperature: float
    entropy_grad: bool
    product: torch.dtype


def score_tokens(
    source: Tensor,
    targets: Tensor,
    statistics: Sequence[str] = (),
    *,
    head: nn.Linear | None = None,
    after: AfterHead | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    product: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The log-probability of each target, as "logp", and statistics of its distribution, in one pass.

    Memory beyond that of the inputs and their gradients is bounded by `CHUNK_BYTES` and `BLOCK_BYTES`, half as much
    again where products are in half precision.

    Args:
        source: (T, H) what the head sees, or, without a head, (T, V) logits.
        targets: (T,) ids.
        statistics: names of `STATISTICS`; see `TokenScores`.
        head: the output embeddings.
        after: what the model does after its head.
        temperature: logits are divided by it.
        entropy_grad: whether the entropy carries gradient, as "logp" and "mean_logp" do.
        product: the type in which the head multiplies; default: that of its weights.

    Returns:
        (T,) each, in float32, or float64 where the source is.
    """
    wanted = {*statistics, *(("entropy",) if entropy_grad else ())}
    names = ("logp", *(name for name in STATISTICS if name in wanted))
    weight, bias = (None, None) if head is None else (head.weight, head.bias)
    product = source.dtype if weight is None else product or weight.dtype
    how = _How(names, after or AfterHead(), temperature, entropy_grad, product)
    found = _Scores.apply(source, weight, bias, targets, how)  # type: ignore[no-untyped-call]
    return dict(zip(names, found, strict=True))


class _Chunks:
    """The logits of chunk after chunk, in one buffer, and room for the probabilities of a block of it."""

    def __init__(
        self, source: Tensor, weight: Tensor | None, bias: Tensor | None, how: _How, buffer: Tensor | None = None
    ) -> None:
        self.how, self.source = how, source.to(how.product)
        self.weight, self.bias = (None if value is None else value.to(how.product) for value in (weight, bias))
        self.wide = torch.promote_types(source.dtype, torch.float32)
        tokens, vocabulary = len(source), source.shape[1] if weight is None else len(weight)
        size = max(_LEAST_TOKENS, CHUNK_BYTES // (4 * vocabulary))
        # The small one first, so that the last one, which is kept, is as large as may be.
        first = min(tokens, tokens % size or size)
        self.places = [slice(*pair) for pair in pairwise([0, *range(first, tokens + 1, size)])]
        rows = min(size, max(1, BLOCK_BYTES // (4 * vocabulary)))
        self.scratch = source.new_empty(rows, vocabulary, dtype=self.wide)
        self.buffer = source.new_empty(min(size, tokens), vocabulary, dtype=self.wide) if buffer is None else buffer

    def fill(self, place: slice) -> Tensor:
        logits, given = self.buffer[: place.stop - place.start], self.source[place]
        if self.weight is None:
            logits.copy_(given)
        elif self.how.product != self.wide:
            logits.copy_(F.linear(given, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(given, self.weight.T, out=logits)
        else:
            torch.addmm(self.bias, given, self.weight.T, out=logits)
        return self.how.after(logits, self.how.temperature)

    def blocks(self, logits: Tensor, place: slice) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Logits of some tokens, their probabilities, and where these tokens are."""
        start = place.start
        for rows in logits.split(len(self.scratch)):
            yield rows, torch.softmax(rows, -1, out=self.scratch[: len(rows)]), slice(start, start + len(rows))
            start += len(rows)


class _Scores(torch.autograd.Function):
    """See `score_tokens`.

    With p the probabilities and H the entropy of a token, gradients by its logits x are
    d logp / dx = onehot - p,  dH / dx = -p (x - sum(p x)),  d mean_logp / dx = 1 / V - p.
    """

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, weight: Tensor | None, bias: Tensor | None, targets: Tensor, how: _How
    ) -> tuple[Tensor, ...]:
        with torch.autocast(source.device.type, enabled=False):
            chunks = _Chunks(source, weight, bias, how)
            names = ("normalizer", *how.names)
            found = {name: source.new_empty(len(source), dtype=chunks.wide) for name in names}
            for place in chunks.places:
                for rows, p, at in chunks.blocks(chunks.fill(place), place):
                    for name, value in _measured(rows, p, targets[at], how.names).items():
                        found[name][at] = value
        ctx.how, ctx.kept = how, weight is not None
        ctx.set_materialize_grads(False)
        mean = found["normalizer"] - found["entropy"] if how.entropy_grad else None
        ctx.save_for_backward(source, weight, bias, targets, mean, chunks.buffer if ctx.kept else None)
        curved = {"logp", "mean_logp", *(("entropy",) if how.entropy_grad else ())}
        ctx.mark_non_differentiable(*(found[name] for name in how.names if name not in curved))
        return tuple(found[name] for name in how.names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        source, weight, bias, targets, mean, kept = ctx.saved_tensors
        how: _How = ctx.how
        needs_source, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        factor = how.after.scale / how.temperature
        given = {name: g * factor for name, g in zip(how.names, gradients, strict=True) if g is not None}
        by_source = torch.empty_like(source, dtype=how.product) if needs_source else None
        by_weight: Tensor | None = None
        with torch.autocast(source.device.type, enabled=False):
            # Written over, unknown to autograd: if it asks again, the logits of every chunk are formed again.
            chunks = _Chunks(source, weight, bias, how, None if kept is None else kept.data)
            by_bias = torch.zeros_like(bias, dtype=chunks.wide) if needs_bias else None
            for place in reversed(chunks.places):
                logits = chunks.buffer[: place.stop - place.start] if ctx.kept else chunks.fill(place)
                ctx.kept = False
                for rows, p, at in chunks.blocks(logits, place):
                    _differentiate(rows, p, targets[at, None], {n: g[at, None] for n, g in given.items()}, mean, at)
                    if how.after.cap is None:
                        rows.copy_(p)
                    else:  # 1 - tanh(scale * x / cap) ** 2
                        rows.mul_(how.temperature / how.after.cap).square_().neg_().add_(1).mul_(p)
                d, hidden = logits.to(how.product), chunks.source[place]
                if by_source is not None:
                    by_source[place] = d if chunks.weight is None else d @ chunks.weight
                if by_bias is not None:
                    by_bias += logits.sum(0)
                if needs_weight and by_weight is None:
                    by_weight = (d.T @ hidden).to(chunks.wide)
                elif by_weight is not None and how.product == chunks.wide:
                    by_weight.addmm_(d.T, hidden)
                elif by_weight is not None:
                    by_weight += d.T @ hidden
        found = zip((by_source, by_weight, by_bias), (source, weight, bias), strict=True)
        return *(None if value is None else value.to(of.dtype) for value, of in found), None, None


def _measured(rows: Tensor, p: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What is asked for of logits and their probabilities, which are written over."""
    # The largest probability is 1 / sum(exp(x - max)).
    normalizer = rows.amax(-1) - p.amax(-1).log()
    found = {"normalizer": normalizer, "logp": rows.gather(-1, targets[:, None]).squeeze(-1) - normalizer}
    if "accuracy" in names:
        found["accuracy"] = (rows.argmax(-1) == targets).to(rows.dtype)
    if "mean_logit" in names:
        found["mean_logit"] = rows.mean(-1)
    if "mean_logp" in names:
        found["mean_logp"] = rows.mean(-1) - normalizer
    if "log_collision" in names:
        found["log_collision"] = torch.einsum("tv,tv->t", p, p).log()
    if "entropy" in names:
        # A forbidden token (-inf) has probability 0 and contributes nothing.
        found["entropy"] = normalizer - p.mul_(rows).nansum(-1)
    return found


def _differentiate(
    rows: Tensor, p: Tensor, targets: Tensor, given: dict[str, Tensor], mean: Tensor | None, at: slice
) -> None:
    """In place of the probabilities, the gradient by the logits; that of each score is `given`."""
    share = -sum(given[name] for name in ("logp", "mean_logp") if name in given)
    if mean is None or "entropy" not in given:
        p.mul_(share)
    else:
        slope = given["entropy"]
        # p (share - slope (x - mean)); of a forbidden token 0 times infinity
        p.mul_(torch.addcmul(share + slope * mean[at, None], rows, slope, value=-1)).nan_to_num_(nan=0.0)
    if "mean_logp" in given:
        p.add_(given["mean_logp"] / rows.shape[-1])
    if "logp" in given:
        p.scatter_add_(-1, targets, given["logp"])
