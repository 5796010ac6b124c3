"""How many floating-point operations a training step needs at least, and how many bytes it must move.

Operations of matrix products only; an addition and a multiplication are two. For a model whose linear layers, without
the head, have B weights and whose head has H, with L layers whose attention is W wide (heads x size of a head):

    forward  = 2 B x tokens  +  2 H x positions with logits  +  4 L W x pairs of a token and one it sees
    backward = 2 forward

Tokens are those that are really needed: a prompt once for all its completions, no padding, and not the last token of a
completion, which is only predicted. Logits are needed where a completion's token is predicted. Nothing is computed
twice for checkpointing. The look-up of embeddings, norms, softmax and the optimizer count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Size:
    """What of a model decides the count."""

    body: int
    head: int
    layers: int
    width: int
    weight_bytes: int
    """Of all weights that a forward pass reads: body and head."""
    parameters: int
    parameter_bytes: int


def size_of(model: Any) -> Size:
    """Of a causal language model of `transformers` without experts."""
    head = model.get_output_embeddings().weight
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(
        body=linear - head.numel(),
        head=head.numel(),
        layers=config.num_hidden_layers,
        width=heads * head_dim,
        weight_bytes=linear * head.element_size(),
        parameters=parameters,
        parameter_bytes=parameters * head.element_size(),
    )


def forward(size: Size, prompt: int, completions: Sequence[int]) -> int:
    """Of a prompt, once, and the completions that follow it, which see it and themselves."""
    spans = [(0, prompt), *((prompt, length - 1) for length in completions)]
    tokens = sum(length for _, length in spans)
    pairs = sum(length * seen + length * (length + 1) // 2 for seen, length in spans)
    return 2 * size.body * tokens + 2 * size.head * sum(completions) + 4 * size.layers * size.width * pairs


def grpo(size: Size, groups: Sequence[tuple[int, Sequence[int]]]) -> dict[str, int]:
    """A step on groups (prompt, completions), each token sampled once and trained once, without a reference."""
    once = sum(forward(size, prompt, completions) for prompt, completions in groups)
    return {"generate": once, "update": 3 * once}


def dpo(size: Size, pairs: Sequence[tuple[int, Sequence[int]]]) -> dict[str, int]:
    """A step on pairs (prompt, (chosen, rejected)) with a reference of the same size."""
    once = sum(forward(size, prompt, completions) for prompt, completions in pairs)
    return {"update": 4 * once}


def least_bytes(size: Size, new: int) -> dict[str, int]:
    """What a step must move: all weights for each new token but those of the prompt's pass, and AdamW's numbers.

    AdamW reads weight, gradient and two moments and writes three of them back.
    """
    return {"generate": new * size.weight_bytes, "optimizer": 7 * size.parameter_bytes}
