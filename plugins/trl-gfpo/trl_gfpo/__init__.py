"""GFPO: sample more, keep the best by a filter, train on those (arXiv 2508.09726).

from trl_gfpo import GFPOConfig, GFPOTrainer
"""

from trl_core import get_config, get_trainer

from .gfpo import algorithm

__all__ = ["GFPOConfig", "GFPOTrainer", "algorithm"]


def __getattr__(name: str):
    if name in ("GFPOConfig", "GFPOTrainer"):
        return (get_config if name == "GFPOConfig" else get_trainer)("trl-gfpo:gfpo")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
