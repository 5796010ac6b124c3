"""What a run adapts from step to step: the KL coefficient, and the running statistics of scores."""

import math

from torch import Tensor


class AdaptiveKLController:
    """A KL coefficient that follows the KL (1909.08593 section 2.2).

    Args:
        init_kl_coef: first coefficient.
        target: KL to steer to.
        horizon: rows over which it acts.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, current: float, n_steps: int) -> None:
        """`value <- value (1 + clip(current / target - 1, -0.2, 0.2) n_steps / horizon)`."""
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon


class FixedKLController:
    """A KL coefficient that stays."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Nothing happens."""


class RunningMoments:
    """Mean and sample standard deviation of all scores seen (parallel update of Chan, Golub and LeVeque, 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def update(self, scores: Tensor) -> None:
        """Take in the scores of all processes, any shape."""
        number, mean = scores.numel(), scores.double().mean().item()
        change, total = mean - self.mean, self.count + number
        self.squares += (scores.double() - mean).square().sum().item() + change**2 * self.count * number / total
        self.mean += change * number / total
        self.count = total

    @property
    def std(self) -> float:
        """1 while all scores have been equal: there is nothing to scale by."""
        return math.sqrt(self.squares / (self.count - 1)) if self.squares > 0 else 1.0
