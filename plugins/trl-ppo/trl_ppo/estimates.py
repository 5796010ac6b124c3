"""The estimates of PPO, on plain tensors: advantages, whitening, the clipped value loss, KL estimates.

Rows are padded on the right to W steps; what lies behind a row's last step is 0 in every argument.
"""

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """(N, W) generalised advantage estimates (1506.02438 eq. 16); behind the last step the value is 0."""
    ahead = torch.zeros_like(values[:, :1])
    following = torch.cat([values[:, 1:], ahead], 1)
    deltas = rewards + gamma * following - values
    found: list[Tensor] = []
    running = ahead[:, 0]
    for delta in reversed(deltas.unbind(1)):
        running = delta + gamma * lam * running
        found.insert(0, running)
    return torch.stack(found, 1)


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """Values of any shape with sample variance 1, and mean 0 unless the mean is kept; a single value stays finite."""
    mean = values.mean()
    variance = values.var() if values.numel() > 1 else torch.zeros_like(mean)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Clipped squared error of each value, and where the clipped branch is the larger one; any shape.

    Implementation detail of 1909.08593, written down in 2403.17031.
    """
    error = (values - returns).square()
    clipped_error = (values.clamp(old_values - cliprange, old_values + cliprange) - returns).square()
    return 0.5 * torch.maximum(error, clipped_error), clipped_error > error


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str) -> Tensor:
    """k1 or k3 of each sampled token (http://joschu.net/blog/kl-approx.html), any shape."""
    difference = ref_logps - logps
    return -difference if estimator == "k1" else difference.exp() - 1 - difference
