"""Per-token losses of supervised training: negative log-likelihood, and DFT (arXiv 2508.05629).

All functions take and return flat (T,) tensors (see `trl_core.batch`); none forms a scalar.
"""

from __future__ import annotations

from torch import Tensor


def token_nll(logps: Tensor, mean_logps: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """(T,) `-logp`, or with label smoothing `-(1 - eps) logp - eps mean_v(log p_v)`.

    Args:
        logps: (T,) log-probabilities of the tokens, with gradient.
        mean_logps: (T,) mean over the vocabulary of the log-probabilities at each place, with gradient; only label
            smoothing reads it.
        label_smoothing: eps, the share of the target that is spread evenly over the vocabulary.
    """
    if not label_smoothing:
        return -logps
    assert mean_logps is not None, "label smoothing needs mean_logps"
    return -(1.0 - label_smoothing) * logps - label_smoothing * mean_logps


def dft(logps: Tensor) -> Tensor:
    """(T,) `-sg[p] logp`: each token weighted by its own probability, without gradient (2508.05629).

    The weight undoes the 1/p in the gradient of the likelihood, read as a policy gradient.
    """
    return -logps.detach().exp() * logps
