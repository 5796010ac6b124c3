"""Calling what plugins bring: whose fault it is when it fails, and whether what it answers can be used.

Every hook object of a trainer is registered through `guarded`. So each caller gets an answer of the right form, or an
error that names hook, algorithm, distribution and version. A check costs microseconds per call, never per token.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Generated, Samples, TokenRows
from .errors import HookResultError, InvalidHookError, PluginError, TRLCoreError, words_of
from .hookspecs import PROJECT, hook_kinds
from .stages.aggregate import TokenMean

Shape = tuple[int, ...]
_MARK = f"{PROJECT}_impl"
_LONGEST_NAME = 64
_DEVICES_OF_WINDOWS = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
_SEE = "See trl_core.hookspecs for what each hook returns."


# -- whose fault it is ------------------------------------------------------------------------------------------------
class told:
    """Raise what the block raises as a `PluginError` that says where it happened; the original is its cause.

    An error of trl-core's own is raised as it is, with a note; what ends the process passes. (A class, for
    `contextlib.contextmanager` would let a StopIteration pass.)

    Args:
        what: what is done in the block, as the beginning of a sentence.
        whose: who wrote it.
    """

    def __init__(self, what: str, whose: str) -> None:
        self.what, self.whose = what, whose

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, TRLCoreError):
            if not getattr(error, "__notes__", None) and not isinstance(error, InvalidHookError):
                error.add_note(f"{self.what} of {self.whose} raised this.")
        elif isinstance(error, Exception):
            raise PluginError(
                f"{self.what} of {self.whose} raised {words_of(error)}",
                mend=f"The traceback of the cause shows the line. Correct it, or tell the authors of {self.whose}.",
            ) from error


def is_of(error: BaseException, module: str) -> bool:
    """Whether the line that raised stands in the package of a module."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] == module.partition(".")[0]


@contextlib.contextmanager
def _found_in(hook: str, whose: str) -> Iterator[None]:
    """Add to an error about an answer whose it was."""
    try:
        yield
    except HookResultError as error:
        raise type(error)(f"{error.what} It is the hook {hook!r} of {whose}.", mend=error.mend) from None


def guarded(instance: object, whose: str, calls: Sequence[Mapping[str, Any]], facts: Mapping[str, int]) -> object:
    """What to register in place of a hook object: the same hooks, of which failures and wrong answers are told.

    Args:
        instance: the object with methods marked by `@hookimpl`.
        whose: its origin, for messages.
        calls: the arguments of the calls that are going on; the last is the current one.
        facts: what else answers are compared with, where it is known: "rewards" and "vocabulary".
    """
    found: dict[str, Any] = {}
    for hook in hook_kinds():
        if (options := marked(instance, hook)) is not None:
            guard = _wrapper if options["wrapper"] else _answer
            found[hook] = staticmethod(guard(getattr(instance, hook), hook, whose, calls, facts))
    return type(type(instance).__name__, (), found)()


def marked(owner: object, hook: str) -> dict[str, Any] | None:
    """The options of `@hookimpl` on the owner's method of that name, or None. Runs no property."""
    function = inspect.getattr_static(owner, hook, None)
    options = getattr(function, _MARK, None) or getattr(getattr(function, "__func__", None), _MARK, None)
    return options if isinstance(options, dict) else None


def _answer(
    function: Callable[..., Any], hook: str, whose: str, calls: Sequence[Mapping[str, Any]], facts: Mapping[str, int]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def answer(*args: Any) -> Any:
        with told(f"The hook {hook!r}", whose):
            given = function(*args)
        with _found_in(hook, whose):
            _CHECKS[hook](given, calls[-1], facts)
        return given

    return answer


def _wrapper(
    function: Callable[..., Any], hook: str, whose: str, calls: Sequence[Mapping[str, Any]], facts: Mapping[str, int]
) -> Callable[..., Generator[None, Any, Any]]:
    where = f"The hook {hook!r}"

    @functools.wraps(function)
    def wrapper(*args: Any) -> Generator[None, Any, Any]:
        with told(where, whose):
            generator = function(*args)
            ended, given = _run(generator.send, None)
        if not ended:
            try:
                inner = yield
            except BaseException as failure:
                try:
                    ended, given = _run(generator.throw, failure)
                except BaseException as error:
                    if error is failure:
                        raise  # that of an inner hook, which goes through
                    with told(where, whose):
                        raise
            else:
                with told(where, whose):
                    ended, given = _run(generator.send, inner)
            _require_yield(ended, f"The wrapper {hook} yields a second time.", hook, whose)
        else:
            _require_yield(False, f"The wrapper {hook} came to its end without a yield.", hook, whose)
        with _found_in(hook, whose):
            _CHECKS[hook](given, calls[-1], facts)
        return given

    return wrapper


def _run(advance: Callable[[Any], Any], value: Any) -> tuple[bool, Any]:
    """Let a generator go on: whether it came to its end, and what it returned there."""
    try:
        advance(value)
    except StopIteration as end:
        return True, end.value
    return False, None


def _require_yield(condition: bool, what: str, hook: str, whose: str) -> None:
    with _found_in(hook, whose):
        if not condition:
            raise HookResultError(what, mend="Write `result = yield` once, and return the result or a changed one.")


# -- what hooks answer ------------------------------------------------------------------------------------------------
_DTYPES: dict[str, Callable[[Tensor], bool]] = {
    "floating-point": lambda values: values.is_floating_point(),
    "real": lambda values: not values.is_complex() and not values.is_quantized,
    "bool": lambda values: values.dtype is torch.bool,
    "integer": lambda values: not (values.is_floating_point() or values.is_complex() or values.dtype is torch.bool),
}


def _wrong(what: str, answer: Any, expected: str, mend: str = _SEE) -> HookResultError:
    """The error that an answer is of another type than expected."""
    if inspect.iscoroutine(answer):
        answer.close()  # or Python warns that nobody waited for it
    got = f"a {type(answer).__name__}"
    if answer is None:
        got, mend = "nothing", f"Is a `return` forgotten? {mend}"
    return HookResultError(f"{what} returned {got}; expected {expected}.", mend=mend)


def _is(kind: type, what: str, answer: Any, mend: str = _SEE) -> Any:
    if not isinstance(answer, kind):
        raise _wrong(what, answer, f"a {kind.__name__}", mend)
    return answer


def _tensor(
    what: str,
    answer: Any,
    *shapes: Shape,
    dtype: str = "floating-point",
    device: torch.device | None = None,
    finite: str = "",
    mend: str = _SEE,
) -> Tensor:
    """The answer, if it is a plain tensor of one of the shapes, and of numbers that can be used.

    Args:
        what: whose answer it is, as the beginning of a sentence.
        answer: to be looked at.
        *shapes: which are right.
        dtype: a key of `_DTYPES`.
        device: where it must be; None for anywhere.
        finite: "all" if no entry may be NaN or infinite, "or nan" if none may be infinite.
        mend: what its author can do.
    """
    if not isinstance(answer, Tensor):
        raise _wrong(what, answer, f"a {dtype} tensor of shape {_either(shapes)}", mend)
    got = None
    if answer.is_nested or answer.layout is not torch.strided or answer.device.type == "meta":
        got = "a tensor without plain values (nested, sparse or meta)"
    elif tuple(answer.shape) not in shapes:
        got = f"shape {tuple(answer.shape)}"
    elif not _DTYPES[dtype](answer):
        got = str(answer.dtype)
    elif device is not None and answer.device != device:
        got = f"a tensor on {answer.device}"
    elif finite and bool((unusable := answer.isinf() if finite == "or nan" else ~answer.isfinite()).any()):
        got = f"{answer[unusable][0].item()} at {unusable.nonzero()[0].tolist()}"
    if got is None:
        return answer
    place = f" on {device}" if device is not None and device.type != "cpu" else ""
    numbers = {"": "", "all": " of finite numbers", "or nan": " of finite numbers or NaN"}[finite]
    expected = f"a {dtype} tensor of shape {_either(shapes)}{numbers}{place}"
    raise HookResultError(f"{what} returned {got}; expected {expected}.", mend=mend)


def _either(shapes: Sequence[Shape]) -> str:
    return " or ".join(map(str, dict.fromkeys(shapes)))


def _tokens(rows: TokenRows) -> Shape:
    return (int(rows.loss_mask.sum()),)


def _named(what: str, answer: Any, empty: str) -> dict[str, Any]:
    """The answer, if it is a dictionary whose keys are names."""
    named: dict[str, Any] = _is(dict, what, answer, f"Return a dictionary, {{}} {empty}.")
    for name in named:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise HookResultError(
                f"{what} returned the key {name!r}; expected a name.", mend="Name each entry with a text."
            )
    return named


def _check_extra_models(given: Any, call: Mapping[str, Any], facts: Mapping[str, int]) -> None:
    named = _named("extra_models", given, "for no further model")
    for name, module in named.items():
        if not (name.isidentifier() and name.isascii() and len(name) <= _LONGEST_NAME):
            why = f"which is no plain name of at most {_LONGEST_NAME} letters, digits and underscores"
        elif name.lower() in _DEVICES_OF_WINDOWS:
            why = "which is that of a device on some systems"
        elif not isinstance(module, nn.Module):
            why = "to no module"
        elif not any(True for _ in module.parameters()):
            why = "to a module without parameters, so that there is nothing to train"
        else:
            continue
        raise HookResultError(
            f"extra_models gave the name {name!r} {why}.",
            mend='Return a dictionary of modules, such as {"critic": module}.',
        )


def _check_generate(given: Any, call: Mapping[str, Any], facts: Mapping[str, int]) -> None:
    _is(Generated, "generate", given, "Return trl_core.Generated(completion_ids=[[...], ...]).")
    rows = len(call["prompts"])
    ids = _lists("completion_ids", given.completion_ids, rows, "integer")
    lengths = [len(row) for row in given.completion_ids]
    if 0 in lengths:
        raise HookResultError(
            f"generate returned an empty completion for row {lengths.index(0)}.",
            mend="Return at least one token per row, for example the terminator.",
        )
    _check_vocabulary("completion_ids", ids, lengths, facts)
    if given.prompt_ids is not None:
        prompts = _lists("prompt_ids", given.prompt_ids, rows, "integer")
        _check_vocabulary("prompt_ids", prompts, [len(row) for row in given.prompt_ids], facts)
    for name, dtype in (("logps", "floating-point"), ("loss_mask", "real")):
        if (values := getattr(given, name)) is None:
            continue
        flat = _lists(name, values, rows, dtype)
        if [len(row) for row in values] != lengths:
            raise HookResultError(
                f"generate returned {name} that do not fit its completions.",
                mend="Return one value for each token of each completion, the terminator's included.",
            )
        right = flat.isfinite() if name == "logps" else (flat == 0) | (flat == 1)
        if not bool(right.all()):
            wanted = "finite log-probabilities" if name == "logps" else "True or False"
            raise HookResultError(
                f"generate returned {flat[~right][0].item()} in {name}; expected {wanted}.", mend=_SEE
            )


def _lists(name: str, lists: Any, rows: int, dtype: str) -> Tensor:
    """All entries of N lists, one after the other."""
    # Tokens are joined and decoded as lists.
    fits = isinstance(lists, Sequence if dtype == "integer" else Sequence | Tensor)
    fits = fits and not isinstance(lists, str | bytes)
    if fits and len(lists) != rows:
        what = "completions" if name == "completion_ids" else name
        raise HookResultError(
            f"generate returned {len(lists)} {what} for {rows} rows.",
            mend="Return one list per row of `prompts`, in order.",
        )
    try:
        flat = torch.tensor([entry for row in lists for entry in row]) if fits else None
    except (TypeError, ValueError, RuntimeError, OverflowError):
        flat = None
    if flat is None or flat.dim() != 1 or (flat.numel() and not _DTYPES[dtype](flat)):
        raise HookResultError(
            f"generate returned {name} that are no lists of {dtype} numbers, one list per row.",
            mend="Return lists of Python numbers.",
        )
    return flat


def _check_vocabulary(name: str, ids: Tensor, lengths: list[int], facts: Mapping[str, int]) -> None:
    outside = (ids < 0) | (ids >= facts.get("vocabulary", 2**63 - 1))
    if bool(outside.any()):
        row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[outside][0]
        raise HookResultError(
            f"generate returned the token {ids[outside][0].item()} in {name} of row {row.item()}, which is not in the "
            f"policy's vocabulary of {facts.get('vocabulary', 'any size')}.",
            mend="Sample with the tokenizer of the policy.",
        )


def _check_score(given: Any, call: Mapping[str, Any], facts: Mapping[str, int]) -> None:
    columns = facts.get("rewards")
    if columns is None and isinstance(given, Tensor) and given.dim() == 2:
        columns = given.shape[1]
    mend = "Return one line per row and one column per reward function; NaN where there is no score."
    shape = (call["rollouts"].num_rows, 1 if columns is None else columns)
    _tensor("score", given, shape, dtype="real", finite="or nan", mend=mend)


def _check_keep(given: Any, call: Mapping[str, Any], facts: Mapping[str, int]) -> None:
    shape = (call["rollouts"].num_rows,)
    _tensor("keep", given, shape, dtype="bool", mend="Return True for every row to train on.")


def _check_reference_logps(given: Any, call: Mapping[str, Any], facts: Mapping[str, int]) -> None:
    rows = call["samples"]
    _tensor("reference_logps", given, _tokens(rows), device=rows.loss_mask.device, finite="all")


def _check_annotate(given: Any, call: Mapping[str, Any], facts: Mapping[str, int]) -> None:
    for name, values in _named("annotate", given, "for no note").items():
        _tensor(f"annotate, for the note {name!r},", values, tuple(call["samples"].advantages.shape), dtype="real")


def _check_advantages(given: Any, call: Mapping[str, Any], facts: Mapping[str, int]) -> None:
    rollouts, keep = call["rollouts"], call["keep"]
    (tokens,) = _tokens(rollouts)
    shapes = ((rollouts.num_rows,), (tokens,), (tokens, 1))
    values = _tensor("advantages", given, *shapes, dtype="real", mend="Return one value per row or per loss token.")
    used = rollouts.expand(values.float().cpu())[keep[rollouts.row_of_token]]
    if not bool(used.isfinite().all()):
        raise HookResultError(
            f"advantages returned {used[~used.isfinite()][0].item()} for a row that is kept.",
            mend="Give rows without a reward the advantage 0; look for a division by 0.",
        )
    for name, note in _named("advantages, for rollouts.notes,", rollouts.notes, "for no note").items():
        _is(Tensor, f"advantages, for the note {name!r},", note)
    rollouts.validate()


def _check_select(given: Any, call: Mapping[str, Any], facts: Mapping[str, int]) -> None:
    samples = _is(Samples, "select", given)
    cpu = torch.device("cpu")
    for f in (f for f in fields(samples) if "axis" in f.metadata):
        value, what = getattr(samples, f.name), f"select, for {f.name},"
        if f.name == "notes":
            for name, note in _named(what, value, "for no note").items():
                _is(Tensor, f"{what[:-1]} {name!r},", note)
        elif f.name in ("states", "last_states") or (value is None and f.default is None):
            continue  # not there before the loss
        else:
            integers = f.name in ("position", "group", "generation") or f.name.endswith(("_ids", "_lengths"))
            dtype = "bool" if f.name == "loss_mask" else "integer" if integers else "real"
            finite = "all" if f.name == "advantages" else ""
            _tensor(what, value, (getattr(value, "numel", int)(),), dtype=dtype, device=cpu, finite=finite)
    for name, most in (("prompt_lengths", 2**31), ("completion_lengths", 2**31), ("position", facts.get("rows"))):
        value = getattr(samples, name)
        if value.numel() and (int(value.min()) < 0 or int(value.max()) >= (most or 2**63 - 1)):
            raise HookResultError(
                f"select returned rows whose {name} goes from {int(value.min())} to {int(value.max())}; expected 0 to "
                f"{(most or 2**63) - 1}.",
                mend="Let a row that replaces another keep its `position`.",
            )
    samples.validate()
    for name in ("prompt", "completion"):
        lengths = getattr(samples, f"{name}_lengths").tolist()
        _check_vocabulary(f"{name}_ids", getattr(samples, f"{name}_ids"), lengths, facts)


def _check_log_ratio(given: Any, call: Mapping[str, Any], facts: Mapping[str, int]) -> None:
    logps = call["logps"]
    _tensor("log_ratio", given, tuple(logps.shape), device=logps.device, mend="Return one value per loss token.")


def _check_loss_terms(given: Any, call: Mapping[str, Any], facts: Mapping[str, int]) -> None:
    logps: Tensor = call["logps"]
    for name, term in _named("loss_terms", given, "to add nothing").items():
        what = f"loss_terms, for the loss term {name!r},"
        if isinstance(term, TokenMean):
            values = _tensor(what, term.values, (getattr(term.values, "numel", int)(),), device=logps.device)
            _tensor(f"{what} as mask", term.mask, tuple(values.shape), dtype="real", device=logps.device)
        else:
            mend = "Return per-token values; the core forms means and sums. A mean is TokenMean(values)."
            _tensor(what, term, tuple(logps.shape), device=logps.device, mend=mend)


def _check_pair_loss(given: Any, call: Mapping[str, Any], facts: Mapping[str, int]) -> None:
    shape, device = (call["pairs"].num_pairs,), call["policy"].device
    _tensor("pair_loss", given, shape, device=device, mend="Return one loss per pair; the core takes their mean.")


def _check_after_step(given: Any, call: Mapping[str, Any], facts: Mapping[str, int]) -> None:
    if given is not None:
        raise _wrong("after_step", given, "nothing", "Return nothing: what it returns goes nowhere.")


_CHECKS: dict[str, Callable[[Any, Mapping[str, Any], Mapping[str, int]], None]] = {
    hook: globals()[f"_check_{hook}"] for hook in hook_kinds()
}
