"""From "gspo_token+gfpo" to one config class, one trainer class, and one plugin manager per trainer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import pluggy

from . import discovery, stability
from .algorithm import Algorithm
from .answers import guarded, is_of, marked, told
from .declared import check_fields, check_hooks, check_making, check_pair, implements_hooks
from .discovery import AlgorithmInfo
from .errors import (
    AlgorithmNotFoundError,
    AmbiguousAlgorithmError,
    BrokenAlgorithmError,
    CompositionError,
    HookResultError,
    InvalidHookError,
    PluginConflict,
    words_of,
)
from .hookspecs import PROJECT, HookContext, HookSpecs, hook_kinds
from .options import check_options, definer, hints_of

DEFAULTS = "trl_core defaults"
"""Name under which a trainer's own answers are registered."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One algorithm of a composition, with where it comes from."""

    info: AlgorithmInfo
    algorithm: Algorithm

    @property
    def origin(self) -> str:
        """Who wrote it, for messages."""
        return f"{self.info.name!r} of {self.info.distribution} {self.info.version}"


@dataclasses.dataclass(frozen=True, eq=False)
class Composition:
    """Algorithms that run together, ancestors first, then in the order the user named them.

    The order is the order of nesting: the first is the closest to the base, the last wrapper is the outermost.
    """

    name: str
    parts: tuple[Part, ...]

    @property
    def root(self) -> Algorithm:
        """The algorithm all others extend."""
        return self.parts[0].algorithm

    @property
    def qualified_name(self) -> str:
        """A spelling that stays unambiguous whatever else is installed."""
        qualified = {part.info.name: part.info.qualified for part in self.parts}
        return "+".join(qualified[name] for name in self.name.split("+"))

    @property
    def own(self) -> Part:
        """The last part: it names the composed classes when it was asked for alone."""
        return self.parts[-1]

    @cached_property
    def arguments(self) -> dict[str, str]:
        """Extra keyword arguments of the trainer, with help."""
        return {name: text for part in self.parts for name, text in part.algorithm.arguments.items()}

    @cached_property
    def config_class(self) -> type:
        """Base config and all own options in one dataclass.

        Raises:
            PluginConflict: an option is defined twice.
        """
        base: Any = self.root.config
        check_fields(base, object, self.parts[0].origin)
        owners = {f.name: self.root.name for f in dataclasses.fields(base)}
        options: list[type] = []
        overrides: dict[str, Any] = {}
        for part in self.parts:
            overrides.update(part.algorithm.defaults)
            config = part.algorithm.config
            if config is None or part is self.parts[0]:
                continue
            check_fields(config, base, part.origin)
            for f in dataclasses.fields(config):
                if f.name in owners:
                    raise PluginConflict(
                        f"The option {f.name!r} is defined by {owners[f.name]!r} and again by {part.info.qualified!r}.",
                        mend="Rename one of them; to change a default of a base option use Algorithm(defaults=...).",
                    )
                owners[f.name] = part.info.qualified
            options.insert(0, config)
        unknown = set(overrides) - set(owners)
        if unknown:
            raise CompositionError(
                f"Algorithm(defaults=...) of {self.name!r} names options that do not exist: {sorted(unknown)}.",
                mend="Name options of the base algorithm only.",
            )
        return _make_config(self, base, tuple(options), overrides)

    @cached_property
    def trainer_class(self) -> type:
        """The root's trainer class bound to this composition."""
        module, _, attribute = str(self.root.trainer).partition(":")
        origin = self.parts[0].origin
        try:
            base = getattr(importlib.import_module(module), attribute)
        except Exception as error:
            raise BrokenAlgorithmError(
                f"The trainer {self.root.trainer!r} of {origin} cannot be imported.\n  {words_of(error)}",
                mend="Name it as 'module:Class' in the plugin's Algorithm(trainer=...).",
            ) from error
        if not isinstance(base, type) or not hasattr(base, "default_hooks"):
            raise BrokenAlgorithmError(
                f"The trainer {self.root.trainer!r} of {origin} is {base!r}; expected a trainer class of trl-core.",
                mend="Derive it from trl_core.OnlineTrainer, or from another trainer of trl-core.",
            )
        doc = f"Trainer of {self.name!r}: {self.own.algorithm.summary}\n\n{inspect.getdoc(base) or ''}"
        return type(self.class_name("Trainer"), (base,), {"composition": self, "__doc__": doc, "__module__": __name__})

    def class_name(self, suffix: str) -> str:
        """Public name of its class: `suffix` is "Config" or "Trainer"."""
        given = getattr(self.own.algorithm, f"{suffix.lower()}_name")
        if given and "+" not in self.name:
            return str(given)
        return "".join(p.upper() for p in self.name.replace("_", "").split("+")) + suffix

    def chain(self) -> dict[str, list[tuple[str, str]]]:
        """For each hook the (algorithm, kind) that act, from the base outwards. Kinds: provide, refine, contribute.

        A replaced provider is left out.
        """
        table: dict[str, list[tuple[str, str]]] = {}
        for hook, (kind, _) in hook_kinds().items():
            acting: list[tuple[str, str]] = []
            for part in self.parts:
                options = _implementation(part.algorithm, hook)
                if options is None:
                    continue
                if not options["wrapper"] and kind == "provide":
                    acting = [entry for entry in acting if entry[1] != "provide"]
                    acting.insert(0, (part.algorithm.name, "provide"))
                else:
                    acting.append((part.algorithm.name, "refine" if options["wrapper"] else kind))
            table[hook] = acting
        return table

    def provenance(self) -> list[dict[str, str]]:
        """Algorithm, distribution, version and tag of every part, in order, for checkpoints and model cards."""
        return [
            {
                "algorithm": part.algorithm.name,
                "distribution": part.info.distribution,
                "version": part.info.version,
                "stability": part.info.stability.value,
            }
            for part in self.parts
        ]

    def check(self) -> None:
        """Check every hook implementation against the contract, and that no two siblings contradict each other.

        Raises:
            InvalidHookError: a misspelt hook, an unmarked method with a hook's name, a wrapper where none is allowed,
                an unknown argument or one with a default value, or an ordering request.
            PluginConflict: two algorithms composed side by side provide the same step, or set different defaults for
                the same option.
        """
        names = [part.algorithm.name for part in self.parts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            both = " and ".join(repr(part.info.qualified) for part in self.parts if part.algorithm.name == twice[0])
            raise CompositionError(
                f"{both} have one name, which nothing can tell apart.", mend="Leave one of them out."
            )
        for part in self.parts:
            with told("Looking at the hooks", part.origin):
                check_hooks(part.algorithm.hooks, part.info.qualified)
                check_making(part.algorithm.hooks, part.info.qualified)
        for option in sorted({name for part in self.parts for name in part.algorithm.defaults}):
            self._check_single_default(option)
        for hook, (kind, _) in hook_kinds().items():
            if kind == "provide":
                self._check_single_provider(hook)

    def _latest(self, parts: Iterable[Part]) -> list[Part]:
        """Those that no other extends: an algorithm replaces what its ancestors say."""
        left: list[Part] = []
        for part in parts:
            left = [p for p in left if p.algorithm.name not in self._ancestors(part.algorithm)]
            left.append(part)
        return left

    def _check_single_default(self, option: str) -> None:
        parts = self._latest(part for part in self.parts if option in part.algorithm.defaults)
        values = [part.algorithm.defaults[option] for part in parts]
        for part, value in zip(parts, values, strict=True):
            if value != values[0]:
                raise PluginConflict(
                    f"{parts[0].info.qualified!r} and {part.info.qualified!r} want different defaults for the option "
                    f"{option!r}: {values[0]!r} and {value!r}.",
                    mend=f"Leave one of them out, and set {option} yourself if that is all you want of it.",
                )

    def _check_single_provider(self, hook: str) -> None:
        implementations = ((part, _implementation(part.algorithm, hook)) for part in self.parts)
        providers = self._latest(part for part, options in implementations if options and not options["wrapper"])
        if len(providers) > 1:
            names = " and ".join(repr(p.info.qualified) for p in providers)
            raise PluginConflict(
                f"{names} both provide {hook!r}; exactly one algorithm may.",
                mend="Leave one of them out, or turn one into a refinement (@hookimpl(wrapper=True)).",
            )

    def _ancestors(self, algorithm: Algorithm) -> set[str]:
        by_name = {part.algorithm.name: part.algorithm for part in self.parts}
        found: set[str] = set()
        while algorithm.extends is not None:
            parent = _unqualified(algorithm.extends)
            found.add(parent)
            algorithm = by_name[parent]
        return found

    def instantiate(
        self, context: HookContext, defaults: object | None = None, extra: dict[str, object] | None = None
    ) -> Hooks:
        """Make this composition's hook objects and the manager that calls them: one set per trainer.

        Args:
            context: passed to each hooks class.
            defaults: object whose hooks answer where no algorithm does.
            extra: further providers by name, for example a generation backend; they count like an algorithm's.
        """
        self.check()
        for part in self.parts:
            for name, note in part.algorithm.deprecated.items():
                if context.arguments.get(name) is not None:
                    what = f"The trainer's argument {name!r} of {part.info.qualified!r}"
                    origin = (part.info.distribution, part.info.version)
                    stability.warn_or_refuse(what, note.removal, note.replacement, *origin)
        hooks = Hooks()
        if defaults is not None:
            hooks.manager.register(defaults, name=DEFAULTS)
        for part in self.parts:
            if (made := part.algorithm.hooks) is not None:
                with told("Making the hooks", part.origin):
                    instance = made(context)
                if not isinstance(instance, made):
                    what = f"Making the hooks of {part.origin} gave {type(instance).__name__}, no {made.__name__}."
                    raise InvalidHookError(what, mend="Give Algorithm(hooks=...) a plain class.")
                check_pair(instance, part.info.qualified)
                hooks.objects[part.algorithm.name] = instance
                hooks.origins[part.algorithm.name] = part.origin
        for name, instance in hooks.objects.items():
            hooks.register(name, instance)
        if defaults is not None:
            self._check_called(hooks)
        for name, provider in (extra or {}).items():
            self.add_provider(hooks, name, provider)
        return hooks

    def _check_called(self, hooks: Hooks) -> None:
        """Check that the trainer calls all that algorithms implement, and that someone provides what it calls."""
        trainer: Any = self.trainer_class
        if trainer.calls is None:
            return
        for part in self.parts:
            for hook in (hook for hook in hook_kinds() if hook not in trainer.calls):
                if _implementation(part.algorithm, hook) is not None:
                    raise InvalidHookError(
                        f"The hook {hook!r} of {part.info.qualified!r} is never called by {trainer.__name__}.",
                        mend=f"Leave it out, or extend another algorithm. Called are: {', '.join(trainer.calls)}.",
                    )
        for hook in (hook for hook, (kind, _) in hook_kinds().items() if kind == "provide" and hook in trainer.calls):
            if all(impl.wrapper for impl in getattr(hooks.call, hook).get_hookimpls()):
                raise CompositionError(
                    f"Nobody provides the step {hook!r}, which {trainer.__name__} needs.",
                    mend=f"Write it as a hook of {self.own.info.qualified!r}, or extend an algorithm that has it.",
                )

    def add_provider(self, hooks: Hooks, name: str, provider: object) -> None:
        """Let a further object take part in a trainer's hooks, for example a generation backend or a callback.

        Raises:
            InvalidHookError: it implements no hook, or one wrongly.
            PluginConflict: it provides what an algorithm other than the base provides.
        """
        check_hooks(type(provider), name)
        if isinstance(provider, type) or not implements_hooks(provider):
            raise InvalidHookError(
                f"{name} must be an object that implements a hook, but it is {provider!r}, which has no hook.",
                mend="Pass an instance of a class with @hookimpl methods; see trl_core.hookspecs.",
            )
        for hook, (kind, _) in hook_kinds().items():
            options = marked(provider, hook)
            if kind == "provide" and options is not None and not options["wrapper"]:
                others = [owner for owner, kind in self.chain()[hook] if kind == "provide" and owner != self.root.name]
                if others:
                    raise PluginConflict(
                        f"{name} and the algorithm {self.name!r} both provide {hook!r}.",
                        mend=f"Leave {name} out, or use an algorithm that does not replace this step.",
                    )
        check_pair(provider, name)
        while name in hooks.objects:
            name += "'"
        hooks.objects[name] = provider
        hooks.origins[name] = f"{name} ({type(provider).__module__}.{type(provider).__name__})"
        hooks.register(name, provider)


class Hooks:
    """A trainer's hook objects. `call` is pluggy's relay: `hooks.call.advantages(rollouts=..., keep=...)`.

    Attributes:
        objects: the hook objects, by the name of the algorithm, or of the provider.
        origins: who wrote each, for messages.
        facts: what answers are compared with beside the arguments of a call; see `trl_core.answers.guarded`.
    """

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(HookSpecs)
        self.objects: dict[str, object] = {}
        self.origins: dict[str, str] = {}
        self.facts: dict[str, int] = {}
        self.call = self.manager.hook
        self._calls: list[Any] = []
        self.manager.add_hookcall_monitoring(
            lambda _, __, arguments: self._calls.append(arguments), lambda *_: self._calls.pop()
        )

    def register(self, name: str, instance: object) -> None:
        """Let the hooks of an object in `objects` be called."""
        self.manager.register(guarded(instance, self.origins[name], self._calls, self.facts), name=name)
        self.manager.check_pending()

    def acting(self, hook: str) -> list[str]:
        """Who implements a hook, in the order of the answers of a hook that all answer."""
        impls = reversed(getattr(self.call, hook).get_hookimpls())
        return [self.origins.get(impl.plugin_name, impl.plugin_name) for impl in impls]

    def changed(self, hook: str) -> bool:
        """Whether any algorithm provides or refines this hook, instead of the trainer alone."""
        return any(impl.plugin_name != DEFAULTS for impl in getattr(self.call, hook).get_hookimpls())

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """State of every hook object that has one, by algorithm name."""
        states: dict[str, dict[str, Any]] = {}
        for name, obj in self.objects.items():
            if hasattr(obj, "state_dict"):
                with told("state_dict", self.origins[name]):
                    states[name] = obj.state_dict()
                if not isinstance(states[name], dict):
                    raise HookResultError(
                        f"state_dict of {self.origins[name]} returned a {type(states[name]).__name__}, no dict.",
                        mend="Return a dictionary with all that changes during training; is a `return` forgotten?",
                    )
        return states

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """The inverse of `state_dict`; objects without a saved state keep theirs."""
        for name, obj in self.objects.items():
            if name in state and hasattr(obj, "load_state_dict"):
                with told("load_state_dict", self.origins[name]):
                    obj.load_state_dict(state[name])

    def state_difference(self, state: dict[str, Any]) -> str | None:
        """Who has a state now and none among the saved ones, or the other way round; None if nobody."""
        now = {name for name, obj in self.objects.items() if hasattr(obj, "state_dict")}
        told = [f"{self.origins[name]} has a state, of which nothing is saved" for name in sorted(now - state.keys())]
        told += [f"the state of {name!r} is saved, which does not take part" for name in sorted(state.keys() - now)]
        return "; ".join(told) or None


# -- resolving a name -------------------------------------------------------------------------------------------------
_cache: dict[tuple[object, ...], Composition] = {}


def compose(name: str, *, require: str | None = None, warn: bool = True) -> Composition:
    """Resolve an algorithm's name, or several joined by "+", to a composition.

    Args:
        name: "gfpo", "trl-gfpo:gfpo" or "gspo_token+gfpo"; the first named is the closest to the base.
        require: refuse anything less stable: "stable" or "experimental". The environment variable
            `TRL_CORE_REQUIRE` does the same for a whole process.
        warn: whether this is a use, of which experimental and deprecated algorithms warn.

    Raises:
        AlgorithmNotFoundError, AmbiguousAlgorithmError, BrokenAlgorithmError: see `trl_core.discovery`.
        StabilityError: the production guard refuses a part.
        CompositionError: the parts have no common base.
        PluginConflict, InvalidHookError: see `Composition.check`.
    """
    with discovery.scanned():
        return _composed(name, require, warn)


def _composed(name: str, require: str | None, warn: bool) -> Composition:
    parts: dict[str, Part] = {}
    roots: dict[str, str] = {}
    asked: list[Part] = []
    for spelling in _spellings(name):
        info = discovery.find(spelling)
        if info.qualified in (part.info.qualified for part in asked):
            raise CompositionError(f"{name!r} names {spelling!r} twice.", mend="Name each algorithm once.")
        lineage = _lineage(Part(info, discovery.load(info)))
        roots[spelling] = lineage[0].algorithm.name
        asked.append(lineage[-1])
        for part in lineage:
            parts.setdefault(part.info.qualified, part)
    if len(set(roots.values())) > 1:
        listing = ", ".join(f"{piece!r} builds on {root!r}" for piece, root in roots.items())
        raise CompositionError(
            f"{name!r} cannot be composed: {listing}.", mend="Compose only algorithms that build on the same base."
        )
    ordered = tuple(sorted(parts.values(), key=lambda part: part.algorithm.extends is not None))
    stability.guard([part.info for part in ordered], require)
    extensions = [part for part in asked if part.algorithm.extends is not None]
    named = tuple(dict.fromkeys(part.info.name for part in extensions)) or (ordered[0].info.name,)
    key = (named, *(id(part.algorithm) for part in ordered))
    if key not in _cache:
        composition = Composition("+".join(named), ordered)
        composition.check()
        _cache[key] = composition
    for part in ordered if warn else ():
        stability.warn_on_use(part.info, part.algorithm)
    return _cache[key]


def _unqualified(name: str) -> str:
    return name.rpartition(":")[2]


def _lineage(part: Part) -> list[Part]:
    """The algorithm and all it extends, root first."""
    line = [part]
    while (parent := line[0].algorithm.extends) is not None:
        if _unqualified(parent) in [p.algorithm.name for p in line]:
            raise CompositionError(
                f"{part.info.qualified!r} extends itself through {parent!r}.",
                mend="Fix `extends` in the plugin's Algorithm.",
            )
        try:
            info = discovery.find(parent)
        except AmbiguousAlgorithmError:
            # Installing a second "grpo" must not break everything that extends the core's.
            info = discovery.find(f"{discovery.CORE}:{parent}")
        line.insert(0, Part(info, discovery.load(info)))
    root = line[0]
    if root.algorithm.trainer is None or root.algorithm.config is None:
        raise CompositionError(
            f"{root.info.qualified!r} extends nothing but names no trainer or no config.",
            mend="Give Algorithm(extends=...), or both trainer='module:Class' and config=....",
        )
    return line


def _spellings(name: Any) -> list[str]:
    """The names in a composition, of which none is empty."""
    pieces = [piece.strip() for piece in name.split("+")] if isinstance(name, str) else []
    if not all(pieces) or not pieces:
        raise AlgorithmNotFoundError(
            f"{name!r} ({type(name).__name__}) is not the name of an algorithm, nor several joined by '+'.",
            mend="Pass a name that `trl-core list` shows, such as 'grpo', or 'gfpo+replay'.",
        )
    return pieces


def get_trainer(name: str, *, require: str | None = None) -> type:
    """The trainer class of an algorithm or composition; used like any `transformers.Trainer`. See `compose`."""
    return compose(name, require=require).trainer_class


def get_config(name: str, *, require: str | None = None) -> type:
    """The config class that goes with `get_trainer(name)`. See `compose`."""
    return compose(name, require=require).config_class


# -- config classes ---------------------------------------------------------------------------------------------------
def _make_config(composition: Composition, base: type, options: tuple[type, ...], overrides: dict[str, Any]) -> type:
    def __post_init__(self: Any) -> None:
        check_options(self)  # before anything computes with the values
        _check_deprecated_options(composition, self)
        try:
            base.__post_init__(self)  # type: ignore[attr-defined]
        except Exception as error:
            # Of transformers' own complaints the algorithm is not to blame.
            own = is_of(error, base.__module__) and not is_of(error, __name__)
            with told(check, owners[base]) if own else contextlib.nullcontext():
                raise
        for option_class in reversed(options):
            if "__post_init__" in vars(option_class):
                with told(check, owners[option_class]):
                    option_class.__post_init__(self)  # type: ignore[attr-defined]

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _restore_config, (composition.qualified_name, dict(self.__dict__))

    check, owners = "The check of the options", {part.algorithm.config: part.origin for part in composition.parts}
    by_name = {f.name: f for cls in (*options, base) for f in dataclasses.fields(cls)}
    hints = {name: hint for cls in (*options, base) for name, hint in hints_of(cls).items()}
    namespace: dict[str, Any] = {
        "__annotations__": {name: hints[name] for name in overrides},
        "__module__": __name__,
        "__doc__": f"Options of {composition.name!r}: {composition.own.algorithm.summary}",
        "__post_init__": __post_init__,
        # A class made at run time cannot be found by name again, so a copy is rebuilt from the algorithm's name.
        "__reduce__": __reduce__,
        "algorithm_name": composition.name,
    }
    for name, value in overrides.items():
        # A list or dictionary is copied for each config, so that none changes the others' default.
        default = {"default": value} if value.__hash__ else {"default_factory": functools.partial(copy.deepcopy, value)}
        namespace[name] = dataclasses.field(**default, metadata=by_name[name].metadata)
    try:
        return dataclasses.dataclass(type(composition.class_name("Config"), (*options, base), namespace))
    except TypeError as error:
        raise CompositionError(
            f"The options of {composition.name!r} make no dataclass: {words_of(error)}",
            mend="Write plain dataclasses of options that all have a default: @dataclass, neither frozen nor slots.",
        ) from error


def _check_deprecated_options(composition: Composition, config: Any) -> None:
    """Warn of deprecated options that were given, or refuse them. Runs before any default is filled in."""
    for f in dataclasses.fields(config):
        note = f.metadata.get("deprecated")
        if note is None or getattr(config, f.name) == default_of(f):
            continue
        parts = {name: part for part in composition.parts for name in _own_options(part)}
        info = parts[f.name].info
        origin = (info.distribution, info.version)
        # An option that the core gives to all trainers.
        if definer(type(config), f.name).__module__.startswith(f"{__package__}."):
            origin = (discovery.CORE, discovery.core_version())
        what = f"The option {f.name!r} of {info.qualified!r}"
        stability.warn_or_refuse(what, note.removal, note.replacement, *origin)


def _own_options(part: Part) -> list[str]:
    return [] if part.algorithm.config is None else [f.name for f in dataclasses.fields(part.algorithm.config)]


def default_of(f: dataclasses.Field[Any]) -> Any:
    """The default value of an option; `dataclasses.MISSING` if it has none."""
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _restore_config(name: str, state: dict[str, Any]) -> Any:
    config: Any = object.__new__(get_config(name))
    config.__dict__.update(state)
    return config


def _implementation(algorithm: Algorithm, hook: str) -> dict[str, Any] | None:
    return None if algorithm.hooks is None else marked(algorithm.hooks, hook)
