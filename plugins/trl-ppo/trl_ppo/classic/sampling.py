"""Drawing responses, and their lengths."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TopKLogitsWarper, TopPLogitsWarper


class LengthSampler:
    """Called, it draws a whole number from `min_value` up to, and without, `max_value`, by torch's random state."""

    def __init__(self, min_value: int, max_value: int) -> None:
        self.min_value, self.max_value = min_value, max_value

    def __call__(self) -> int:
        return int(torch.randint(self.min_value, self.max_value, ()).item())


@torch.no_grad()
def respond_to_batch(
    model: nn.Module, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Draw exactly `txt_len` tokens after each query; no token ends a response.

    Args:
        model: a causal language model, with a value head or without.
        queries: (B, Q) without padding: every token is attended to.
        txt_len: W, tokens to draw.
        top_k: draw from the k likeliest; 0: from all.
        top_p: draw from the likeliest tokens that hold this much probability; 1: from all.

    Returns:
        (B, W) token ids.
    """
    top: list[Any] = [TopKLogitsWarper(top_k)] if top_k > 0 else []
    top += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    training = model.training
    model.eval()
    tokens = queries
    for _ in range(txt_len):
        logits = model(tokens)[0][:, -1].float()
        for keep in top:
            logits = keep(tokens, logits)
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    model.train(training)
    return tokens[:, queries.shape[1] :]
