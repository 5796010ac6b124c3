"""Adaptive difficulty (paper, section 3.2): harder prompts keep more completions."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_core import option, require


@dataclass
class AdaptiveOptions:
    """Options of adaptive difficulty; the defaults are the paper's for groups of 16."""

    adaptive_difficulty: bool = option(False, "Choose k per prompt from its mean reward; k_* say how many to keep.")
    k_very_hard: int = option(8, "Kept completions of prompts in the lowest quarter of mean reward.", ge=2)
    k_hard: int = option(8, "Kept completions in the second quarter.", ge=2)
    k_medium: int = option(6, "Kept completions in the third quarter.", ge=2)
    k_easy: int = option(4, "Kept completions in the highest quarter.", ge=2)
    difficulty_warmup: int = option(4, "Generation batch from which quarters are used; before it k_very_hard.", ge=0)


class Difficulty:
    """How many completions to keep of each prompt: a constant, or by exact running quartiles of mean rewards.

    Attributes:
        levels: the numbers that can occur by the options that name them, from very hard to easy prompts.
    """

    def __init__(self, args: Any) -> None:
        self.args, self.batches, self.seen = args, 0, torch.zeros(0)
        names = "k_very_hard k_hard k_medium k_easy" if args.adaptive_difficulty else "num_remains_in_group"
        self.levels = {name: getattr(args, name) for name in names.split()}
        both = args.adaptive_difficulty and args.num_remains_in_group is not None
        require(not both, "adaptive_difficulty and num_remains_in_group are both set.", "Set only one of them.")

    def remaining(self, means: Tensor) -> Tensor:
        """(P,) completions to keep, from the (P,) mean rewards (NaN: no score), which are added to the sketch first."""
        levels = torch.tensor(list(self.levels.values()))
        self.seen, self.batches = torch.cat([self.seen, means[~means.isnan()]]), self.batches + 1
        if len(levels) == 1 or self.batches < self.args.difficulty_warmup or not self.seen.numel():
            return levels[:1].expand(means.numel())
        quartiles = torch.quantile(self.seen.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        return levels[torch.bucketize(means.double().nan_to_num(-torch.inf), quartiles, right=True)]

    def state_dict(self) -> dict[str, Any]:
        """All mean rewards seen."""
        return {"batches": self.batches, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.batches, self.seen = state["batches"], state["seen"]
