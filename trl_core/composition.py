"""From "gspo_token+gfpo" to one config class, one trainer class, and one plugin manager per trainer."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import pluggy

from . import discovery, stability
from .algorithm import Algorithm
from .discovery import AlgorithmInfo
from .errors import AmbiguousAlgorithmError, CompositionError, InvalidHookError, PluginConflict
from .hookspecs import PROJECT, HookContext, HookSpecs, hook_kinds

DEFAULTS = "trl_core defaults"
"""Name under which a trainer's own answers are registered."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One algorithm of a composition, with where it comes from."""

    info: AlgorithmInfo
    algorithm: Algorithm


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
        owners = {f.name: self.root.name for f in dataclasses.fields(base)}
        options: list[type] = []
        overrides: dict[str, Any] = {}
        for part in self.parts:
            overrides.update(part.algorithm.defaults)
            config = part.algorithm.config
            if config is None or part is self.parts[0]:
                continue
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
        base = getattr(importlib.import_module(module), attribute)
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
        for part in self.parts:
            _check_hooks(part.algorithm.hooks, part.info.qualified)
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
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(HookSpecs)
        objects: dict[str, object] = {}
        if defaults is not None:
            manager.register(defaults, name=DEFAULTS)
        for part in self.parts:
            if part.algorithm.hooks is not None:
                objects[part.algorithm.name] = part.algorithm.hooks(context)
        for name, instance in objects.items():
            manager.register(instance, name=name)
        manager.check_pending()
        hooks = Hooks(manager, objects)
        for name, provider in (extra or {}).items():
            self.add_provider(hooks, name, provider)
        return hooks

    def add_provider(self, hooks: Hooks, name: str, provider: object) -> None:
        """Let a further object take part in a trainer's hooks, for example a generation backend or a callback.

        Raises:
            InvalidHookError: it implements no hook, or one wrongly.
            PluginConflict: it provides what an algorithm other than the base provides.
        """
        _check_hooks(type(provider), name)
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
        while name in hooks.objects:
            name += "'"
        hooks.manager.register(provider, name=name)
        hooks.manager.check_pending()
        hooks.objects[name] = provider


class Hooks:
    """A trainer's hook objects. `call` is pluggy's relay: `hooks.call.advantages(rollouts=..., keep=...)`."""

    def __init__(self, manager: pluggy.PluginManager, objects: dict[str, object]) -> None:
        self.manager = manager
        self.objects = objects
        self.call = manager.hook

    def changed(self, hook: str) -> bool:
        """Whether any algorithm provides or refines this hook, instead of the trainer alone."""
        return any(impl.plugin_name != DEFAULTS for impl in getattr(self.call, hook).get_hookimpls())

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """State of every hook object that has one, by algorithm name."""
        return {name: obj.state_dict() for name, obj in self.objects.items() if hasattr(obj, "state_dict")}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """The inverse of `state_dict`; objects without a saved state keep theirs."""
        for name, obj in self.objects.items():
            if name in state and hasattr(obj, "load_state_dict"):
                obj.load_state_dict(state[name])


# -- resolving a name -------------------------------------------------------------------------------------------------
_cache: dict[tuple[object, ...], Composition] = {}


@discovery.scanned()
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
    parts: dict[str, Part] = {}
    roots: dict[str, str] = {}
    asked: list[Part] = []
    for spelling in (piece.strip() for piece in name.split("+")):
        info = discovery.find(spelling)
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


def get_trainer(name: str, *, require: str | None = None) -> type:
    """The trainer class of an algorithm or composition; used like any `transformers.Trainer`. See `compose`."""
    return compose(name, require=require).trainer_class


def get_config(name: str, *, require: str | None = None) -> type:
    """The config class that goes with `get_trainer(name)`. See `compose`."""
    return compose(name, require=require).config_class


# -- config classes ---------------------------------------------------------------------------------------------------
def _make_config(composition: Composition, base: type, options: tuple[type, ...], overrides: dict[str, Any]) -> type:
    def __post_init__(self: Any) -> None:
        _check_deprecated_options(composition, self)
        base.__post_init__(self)  # type: ignore[attr-defined]
        for option_class in reversed(options):
            if "__post_init__" in vars(option_class):
                option_class.__post_init__(self)  # type: ignore[attr-defined]

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _restore_config, (composition.qualified_name, dict(self.__dict__))

    by_name = {f.name: f for cls in (*options, base) for f in dataclasses.fields(cls)}
    namespace: dict[str, Any] = {
        "__annotations__": {name: by_name[name].type for name in overrides},
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
    return dataclasses.dataclass(type(composition.class_name("Config"), (*options, base), namespace))


def _check_deprecated_options(composition: Composition, config: Any) -> None:
    """Warn of deprecated options that were given, or refuse them. Runs before any default is filled in."""
    for f in dataclasses.fields(config):
        note = f.metadata.get("deprecated")
        if note is None or getattr(config, f.name) == default_of(f):
            continue
        parts = {name: part for part in composition.parts for name in _own_options(part)}
        info = parts[f.name].info
        definer = next(c for c in type(config).__mro__[1:] if f.name in inspect.get_annotations(c))
        origin = (info.distribution, info.version)
        if definer.__module__.startswith(f"{__package__}."):  # an option that the core gives to all trainers
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


# -- checking hook implementations ------------------------------------------------------------------------------------
def marked(owner: object, hook: str) -> dict[str, Any] | None:
    """The options of `@hookimpl` on the owner's method of that name, or None."""
    function = getattr(owner, hook, None)
    return getattr(function, f"{PROJECT}_impl", None)


def implements_hooks(owner: object) -> bool:
    """Whether an object has any method marked with `@hookimpl`."""
    return any(marked(owner, hook) for hook in hook_kinds())


def _implementation(algorithm: Algorithm, hook: str) -> dict[str, Any] | None:
    return None if algorithm.hooks is None else marked(algorithm.hooks, hook)


def _check_hooks(hooks: type | None, owner: str) -> None:
    if hooks is None:
        return
    kinds = hook_kinds()
    for name, function in inspect.getmembers(hooks, callable):
        options = getattr(function, f"{PROJECT}_impl", None)
        where = f"The hook {name!r} of {owner!r}"
        if options is None:
            if name in kinds:
                raise InvalidHookError(f"{where} is not marked, so it would never be called.", mend="Add @hookimpl.")
            continue
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise InvalidHookError(
                f"{where} does not exist.{hint}", mend=f"Use one of: {', '.join(kinds)}; see trl_core.hookspecs."
            )
        if options["tryfirst"] or options["trylast"] or options["hookwrapper"]:
            raise InvalidHookError(
                f"{where} uses tryfirst, trylast or hookwrapper, which would override the order the user gave.",
                mend="Use plain @hookimpl or @hookimpl(wrapper=True).",
            )
        kind, refine = kinds[name]
        if options["wrapper"] and not refine:
            raise InvalidHookError(f"{where} is a wrapper, but {kind} hooks like it take none.", mend="Use @hookimpl.")
        _check_arguments(function, name, where)


def _check_arguments(function: Any, hook: str, where: str) -> None:
    allowed = set(inspect.signature(getattr(HookSpecs, hook)).parameters)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in allowed or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InvalidHookError(
                f"{where} takes {str(parameter)!r}; allowed: {', '.join(sorted(allowed - {'self'}))}.",
                mend="Take only arguments of the hook, by name.",
            )
        if parameter.default is not parameter.empty:
            raise InvalidHookError(
                f"{where} gives its argument {parameter.name!r} a default value, which some versions of pluggy ignore.",
                mend="Remove the default.",
            )
