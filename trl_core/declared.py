"""What a plugin declares: its class of options and its class of hooks, looked at before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from typing import Any

from .answers import marked
from .errors import CompositionError, InvalidHookError
from .hookspecs import HookSpecs, hook_kinds
from .options import fields_of, fits_itself


# -- options ----------------------------------------------------------------------------------------------------------
def check_fields(config: Any, base: type, origin: str) -> None:
    """Refuse options, to be merged with those of the base, that would be none, or would break the base."""

    def refuse(what: str, mend: str) -> None:
        raise CompositionError(f"{config.__qualname__}, the options of {origin}, {what}.", mend=mend)

    dataclass_mend = "Put @dataclass over the class, and write each option as `name: type = option(default, help)`."
    if not dataclasses.is_dataclass(config):
        refuse("is no dataclass", dataclass_mend)
    lost = sorted(name for c in config.__mro__ for name, v in vars(c).items() if isinstance(v, dataclasses.Field))
    lost += [name for name, f in config.__dataclass_fields__.items() if "InitVar" in str(f.type)]
    if lost:
        refuse(f"has {lost[0]!r}, which is no field of a dataclass", dataclass_mend)
    for f in () if base is object else dataclasses.fields(config):
        if not f.init or f.default is f.default_factory is dataclasses.MISSING:
            refuse(f"has the option {f.name!r} without a default value", dataclass_mend)
        inherited = base.__dataclass_fields__  # type: ignore[attr-defined]
        kept = f.name == "algorithm_name" or f.name.startswith("_") or hasattr(base, f.name)
        if kept and f.name not in inherited:
            refuse(f"has the option {f.name!r}, a name that the base keeps for itself", "Choose another name.")
    own = {} if base is object else inspect.get_annotations(config)
    for f in fields_of(config) if own else ():
        if f.name in own and not fits_itself(f):
            expected = f"the default {f.default!r}, which it does not take itself"
            refuse(f"has the option {f.name!r} with {expected}", "Correct its type, range, choices or default.")


# -- hooks ------------------------------------------------------------------------------------------------------------
def implements_hooks(owner: object) -> bool:
    """Whether an object has any method marked with `@hookimpl`."""
    return any(marked(owner, hook) for hook in hook_kinds())


def check_hooks(hooks: type | None, owner: str) -> None:
    """Check that each hook exists, is marked, is a method, takes what it may take, and wraps only where it may."""
    if hooks is None:
        return
    kinds = hook_kinds()
    for name, static in inspect.getmembers_static(hooks):
        options = marked(hooks, name)
        where = f"The hook {name!r} of {owner!r}"
        if options is None:
            if name in kinds and (callable(static) or isinstance(static, property | staticmethod | classmethod)):
                raise InvalidHookError(f"{where} is not marked, so it would never be called.", mend="Add @hookimpl.")
            continue
        function = _function_of(static, hooks, where)
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
        if inspect.isgeneratorfunction(inspect.unwrap(function)) is not bool(options["wrapper"]):
            has = "is a wrapper without a yield" if options["wrapper"] else "has a yield, but is no wrapper"
            raise InvalidHookError(f"{where} {has}.", mend="@hookimpl(wrapper=True) goes with `result = yield`.")
        _check_arguments(function, name, where)


def _function_of(static: Any, hooks: type, where: str) -> Any:
    """What is called for a marked attribute of a hooks class."""
    function = static.__get__(None, hooks) if isinstance(static, staticmethod | classmethod) else static
    if not inspect.isroutine(function):
        raise InvalidHookError(f"{where} is a {type(static).__name__}, which is never called.", mend="Write a method.")
    inner = inspect.unwrap(function)
    if inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner):
        raise InvalidHookError(f"{where} is a coroutine, for which nobody waits.", mend="Write `def`, not `async def`.")
    return function


def check_making(hooks: type | None, owner: str) -> None:
    """Check that hooks can be made from a context, as far as the signature says."""
    try:
        if hooks is not None:
            inspect.signature(hooks).bind(None)
    except TypeError as error:
        raise InvalidHookError(
            f"The hooks class {hooks.__name__} of {owner!r} cannot be made as {hooks.__name__}(context): {error}.",  # type: ignore[union-attr]
            mend="Write `def __init__(self, context):`.",
        ) from None
    except ValueError:
        pass  # it has no signature that Python can tell


def check_pair(instance: object, owner: str) -> None:
    """Check that who has a state can also take it back."""
    has = {name: callable(getattr(instance, name, None)) for name in ("state_dict", "load_state_dict")}
    for name, other in (("state_dict", "load_state_dict"), ("load_state_dict", "state_dict")):
        if has[name] and not has[other]:
            raise InvalidHookError(
                f"{owner!r} has {name}, but no {other}: after a resume its state would be another.",
                mend=f"Write {other} too, or neither.",
            )


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
