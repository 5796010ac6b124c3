"""GRPO with a replay buffer: groups without a signal are replaced by stored ones.

from trl_replay import GRPOWithReplayBufferConfig, GRPOWithReplayBufferTrainer
"""

from trl_core import get_config, get_trainer

from .buffer import ReplayBuffer
from .replay import algorithm

__all__ = ["GRPOWithReplayBufferConfig", "GRPOWithReplayBufferTrainer", "ReplayBuffer", "algorithm"]


def __getattr__(name: str):
    if name in ("GRPOWithReplayBufferConfig", "GRPOWithReplayBufferTrainer"):
        return (get_config if name.endswith("Config") else get_trainer)("trl-replay:replay")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
