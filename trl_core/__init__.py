"""A plugin framework for post-training language models.

Public names, resolved on first use: `import trl_core` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

PUBLIC_MODULES = ("trl_core", "trl_core.data", "trl_core.models", "trl_core.stages", "trl_core.testing")
"""What plugins may import from; every other module is an inner matter of the core."""

_HOMES = {
    "Algorithm": "algorithm",
    "AlgorithmInfo": "discovery",
    "Deprecation": "stability",
    "Generated": "batch",
    "HookContext": "hookspecs",
    "JsonlMetricsCallback": "training.callbacks",
    "OfflineConfig": "training.config",
    "OfflineTrainer": "training.offline",
    "OnlineConfig": "training.config",
    "OnlineTrainer": "training.online",
    "Pairs": "batch",
    "PairConfig": "training.config",
    "PairTrainer": "training.pairs",
    "Prompts": "batch",
    "Rollouts": "batch",
    "Samples": "batch",
    "Sampling": "batch",
    "Texts": "batch",
    "TokenRows": "batch",
    "Stability": "stability",
    "StepLineCallback": "training.callbacks",
    "check_options": "options",
    "deprecated": "stability",
    "get_config": "composition",
    "get_trainer": "composition",
    "hookimpl": "hookspecs",
    "list_algorithms": "discovery",
    "option": "options",
    "reference_parameters": "models.reference",
    "require": "options",
    "require_choice": "options",
    "TRLDeprecationWarning": "errors",
    "TRLExperimentalWarning": "errors",
}
_ALGORITHMS = {
    f"{prefix}{suffix}": (suffix.lower(), f"trl-core:{prefix.lower()}")
    for prefix in ("SFT", "Reward", "DPO", "GRPO")
    for suffix in ("Config", "Trainer")
}

__all__ = sorted([*_HOMES, *_ALGORITHMS, "errors"])

if TYPE_CHECKING:
    from . import errors as errors
    from .algorithm import Algorithm as Algorithm
    from .algorithms.dpo import DPOConfig as DPOConfig
    from .algorithms.grpo import GRPOConfig as GRPOConfig
    from .algorithms.reward import RewardConfig as RewardConfig
    from .algorithms.sft import SFTConfig as SFTConfig
    from .batch import Generated as Generated
    from .batch import Pairs as Pairs
    from .batch import Prompts as Prompts
    from .batch import Rollouts as Rollouts
    from .batch import Samples as Samples
    from .batch import Sampling as Sampling
    from .batch import Texts as Texts
    from .batch import TokenRows as TokenRows
    from .composition import get_config as get_config
    from .composition import get_trainer as get_trainer
    from .discovery import AlgorithmInfo as AlgorithmInfo
    from .discovery import list_algorithms as list_algorithms
    from .errors import TRLDeprecationWarning as TRLDeprecationWarning
    from .errors import TRLExperimentalWarning as TRLExperimentalWarning
    from .hookspecs import HookContext as HookContext
    from .hookspecs import hookimpl as hookimpl
    from .models.reference import reference_parameters as reference_parameters
    from .options import check_options as check_options
    from .options import option as option
    from .options import require as require
    from .options import require_choice as require_choice
    from .stability import Deprecation as Deprecation
    from .stability import Stability as Stability
    from .stability import deprecated as deprecated
    from .training.callbacks import JsonlMetricsCallback as JsonlMetricsCallback
    from .training.callbacks import StepLineCallback as StepLineCallback
    from .training.config import OfflineConfig as OfflineConfig
    from .training.config import OnlineConfig as OnlineConfig
    from .training.config import PairConfig as PairConfig
    from .training.offline import OfflineTrainer as OfflineTrainer
    from .training.offline import OfflineTrainer as SFTTrainer  # noqa: F401
    from .training.online import OnlineTrainer as GRPOTrainer  # noqa: F401
    from .training.online import OnlineTrainer as OnlineTrainer
    from .training.pairs import PairTrainer as DPOTrainer  # noqa: F401
    from .training.pairs import PairTrainer as PairTrainer
    from .training.pairs import ScoreTrainer as RewardTrainer  # noqa: F401


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _ALGORITHMS:
        kind, algorithm = _ALGORITHMS[name]
        return getattr(importlib.import_module(f"{__name__}.composition"), f"get_{kind}")(algorithm)
    if name == "errors":
        return importlib.import_module(f"{__name__}.errors")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
