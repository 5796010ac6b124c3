"""The object a plugin registers under its entry point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .stability import Deprecation


@dataclass(frozen=True, eq=False)
class Algorithm:
    """What a distribution exports for one algorithm.

    An algorithm that extends another brings only what is new: a dataclass of extra options and a class of hooks. One
    that stands alone (`extends=None`) names the trainer class it runs on and a full configuration class.

    Args:
        name: the name users give to `get_trainer`; must equal the entry point's name.
        summary: one line for `trl-core list`. Write `name`, `summary` and `extends` as literals: they are then read
            from the source without importing the plugin.
        extends: name of the algorithm this one builds on ("grpo", or qualified "trl-core:grpo"), or `None`.
        config: dataclass with the new options only (every field has a default and `metadata={"help": ...}`); for an
            algorithm that stands alone, a subclass of `trl_core.OnlineConfig` (or another trainer's config).
        hooks: class whose `@hookimpl` methods implement hooks of `trl_core.hookspecs`. Made once per trainer as
            `hooks(context)` with a `trl_core.HookContext`, before any model is loaded.
        defaults: other defaults for options that an ancestor defines, for example `{"loss_type": "grpo"}`.
        arguments: extra keyword arguments of the trainer (not options: functions, modules), name to help text. The
            hooks find the values in `context.arguments`.
        trainer: `"module:Class"` of the trainer, only for an algorithm that stands alone.
        config_name: public name of the composed config class; default: `name` in capitals + `Config`.
        trainer_name: public name of the composed trainer class; default: `name` in capitals + `Trainer`.
        papers: arXiv number to title of the papers it comes from; model cards cite them.
        deprecated: what of this algorithm will go while it stays, by name: an entry of `arguments` or `defaults`, or
            the public name of its config or trainer class. Options say it themselves, `option(deprecated=...)`.
        removal: for deprecated algorithms, the version that removes it.
        replacement: for deprecated algorithms, what to use instead.
    """

    name: str
    summary: str
    extends: str | None = None
    config: type | None = None
    hooks: type | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, str] = field(default_factory=dict)
    trainer: str | None = None
    config_name: str | None = None
    trainer_name: str | None = None
    papers: Mapping[str, str] = field(default_factory=dict)
    deprecated: Mapping[str, Deprecation] = field(default_factory=dict)
    removal: str | None = None
    replacement: str | None = None
