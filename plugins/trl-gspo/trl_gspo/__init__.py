"""GSPO and GSPO-token: importance ratios of whole completions (arXiv 2507.18071).

from trl_gspo import GSPOConfig, GSPOTrainer
from trl_gspo import GRPOTrainer  # GSPO-token; takes the GRPOConfig of trl_core too
"""

from trl_core import get_config, get_trainer

from .ratios import gspo, gspo_token

__all__ = ["GRPOConfig", "GRPOTrainer", "GSPOConfig", "GSPOTokenConfig", "GSPOTokenTrainer", "GSPOTrainer"]
__all__ += ["gspo", "gspo_token"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    algorithm = "gspo" if name in ("GSPOConfig", "GSPOTrainer") else "gspo_token"
    return (get_config if name.endswith("Config") else get_trainer)(f"trl-gspo:{algorithm}")
