"""BEMA: a bias-corrected average of the weights, and DPO with it as the reference (arXiv 2508.00180).

from trl_bema import BEMACallback, DPOTrainer
"""

from trl_core import get_config, get_trainer

from .bema import BEMACallback, algorithm

__all__ = ["BEMACallback", "BEMAConfig", "BEMATrainer", "DPOTrainer", "algorithm"]


def __getattr__(name: str):
    made = {"BEMAConfig": get_config, "BEMATrainer": get_trainer, "DPOTrainer": get_trainer}
    if name in made:
        return made[name]("trl-core:dpo" if name == "DPOTrainer" else "trl-bema:bema")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
