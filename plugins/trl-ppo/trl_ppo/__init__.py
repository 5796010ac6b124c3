"""PPO with a critic; the classic step API is in `trl_ppo.classic`.

from trl_ppo import PPOConfig, PPOTrainer
"""

from trl_core import get_config, get_trainer

from .ppo import algorithm

__all__ = ["PPOConfig", "PPOTrainer", "algorithm"]


def __getattr__(name: str):
    if name in ("PPOConfig", "PPOTrainer"):
        return (get_config if name == "PPOConfig" else get_trainer)("trl-ppo:ppo")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
