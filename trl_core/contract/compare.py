"""What changed between two records: plain functions on dictionaries, see `trl_core.contract.record`."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from packaging.version import Version

from ..stability import Stability, reached

Record = dict[str, Any]

BREAKING, EXCUSED, ALLOWED, ADDED = "breaking", "deprecated and due", "allowed, experimental", "added"
SIX_MONTHS = timedelta(days=183)
_MEND = "Put it back and deprecate it first, or keep the old way beside the new; see docs/stability.md of trl-core."
_HELD = (Stability.STABLE.value, Stability.DEPRECATED.value)


@dataclass(frozen=True)
class Change:
    """One difference, as it is told.

    `kind` is "breaking"; or why it is no fault: "deprecated and due", "allowed, experimental", "added".
    """

    kind: str
    what: str
    mend: str = ""


@dataclass(frozen=True)
class _Difference:
    what: str
    subjects: tuple[str, ...]
    """Names under which a deprecation may have said it, from the narrowest to the widest."""
    promised: bool


def breaking_changes(old: Record, new: Record) -> list[Change]:
    """What breaks users of `old`, without the deprecation that would excuse it."""
    return [change for change in changes(old, new) if change.kind == BREAKING]


def changes(old: Record, new: Record) -> list[Change]:
    """Every incompatible difference, with its verdict.

    It is excused if `old` said that the thing is deprecated and goes in a version that `new` has reached. What is
    experimental in both may change.
    """
    notes = deprecations(old)
    found = []
    for each in (*_algorithms(old, new), *_hooks(old, new), *_python(old, new)):
        due = any(s in notes and reached(notes[s]["removal"], new["version"]) for s in each.subjects)
        kind = EXCUSED if due else BREAKING if each.promised else ALLOWED
        found.append(Change(kind, f"{new['distribution']}: {each.what}", _MEND if kind == BREAKING else ""))
    return found


def additions(old: Record, new: Record) -> list[Change]:
    """What is new, for information."""
    before = _names(old)
    return [Change(ADDED, f"{new['distribution']}: {name}") for name in _names(new) if name not in before]


# -- deprecations -----------------------------------------------------------------------------------------------------
def deprecations(record: Record) -> dict[str, Record]:
    """What a record says is deprecated: the name used in messages to `since`, `removal`, `replacement`."""
    from .interface import deprecations as marked

    found: dict[str, Record] = {}
    algorithm: Record
    for name, algorithm in record["algorithms"].items():
        if algorithm["tag"] == Stability.DEPRECATED and algorithm["removal"]:
            found[f"algorithm {name!r}"] = {"removal": algorithm["removal"], "replacement": algorithm["replacement"]}
        found |= {f"{part!r} of {name!r}": note for part, note in algorithm["deprecated"].items()}
        options = algorithm["options"].items()
        found |= {f"option {key!r} of {name!r}": each["deprecated"] for key, each in options if "deprecated" in each}
    for hook, spec in record["hooks"].items():
        for part, note in spec["deprecated"].items():
            found[f"argument {part!r} of hook {hook!r}" if part else f"hook {hook!r}"] = note
    return found | marked(record["api"])


def notices(now: Record, kept: Sequence[Record], today: date) -> list[Change]:
    """What is wrong with the deprecations themselves: overdue ones, and those with too short a notice.

    Args:
        now: the present record.
        kept: the records so far, oldest first; the first that says of a thing that it is deprecated is its notice.
        today: the day for the six months.
    """
    found, said = [], [(each, deprecations(each)) for each in kept]
    present = deprecations(now)
    for name, note in ((said[-1][1] if said else {}) | present).items():
        promised, due = _is_promised(name, [*kept, now]), reached(note["removal"], now["version"])
        told = [each for each, notes in said if name in notes]
        public = next((each for each in told if each["released"]), None)
        until = date.fromisoformat(public["released"]) + SIX_MONTHS if public else today
        if due and promised and today < until:
            what = f"{name} may not go before {until}, six months after the release that said so"
            found.append((what, "Release later, or name a later removal version."))
        elif due and name in present:
            found.append((f"{name} was to be removed in {note['removal']}", "Remove it, with its tests and pages."))
        since = Version(note.get("since") or (told[0] if told else now)["version"])
        end = Version(note["removal"])
        if name in present and promised and since.major == end.major and end.minor - since.minor < 2:
            what = f"{name} goes in {end}, less than two minor versions after {since}"
            found.append((what, f"Name {since.major}.{since.minor + 2} or a later version."))
    for name, algorithm in now["algorithms"].items():
        if algorithm["tag"] == Stability.DEPRECATED and not algorithm["removal"]:
            found.append(
                (f"algorithm {name!r} is deprecated, but nobody says until when", "Give Algorithm(removal=...).")
            )
    return [Change(BREAKING, f"{now['distribution']}: {what}", mend) for what, mend in found]


def _is_promised(name: str, records: Sequence[Record]) -> bool:
    """Whether a name in messages belongs to something that was stable at any time."""
    for record in records:
        stable = {key for key, each in record["algorithms"].items() if each["tag"] == Stability.STABLE}
        owner = next(
            (key for key in record["algorithms"] if name.endswith((f" of {key!r}", f"algorithm {key!r}"))), None
        )
        if stable and (owner is None or owner in stable):
            return True
    return False


# -- algorithms -------------------------------------------------------------------------------------------------------
def _algorithms(old: Record, new: Record) -> Iterator[_Difference]:
    for name, was in old["algorithms"].items():
        now = new["algorithms"].get(name)
        whole = f"algorithm {name!r}"
        promised = was["tag"] in _HELD or (now is not None and now["tag"] == Stability.STABLE)
        if now is None:
            yield _Difference(f"{whole} was removed", (whole,), promised)
            continue
        if was["tag"] in _HELD and now["tag"] == Stability.EXPERIMENTAL:
            yield _Difference(f"{whole} was demoted to experimental", (whole,), promised)
        if was["extends"] != now["extends"]:
            yield _Difference(
                f"{whole} extends {now['extends']!r}, not {was['extends']!r} any more", (whole,), promised
            )
        for what, subject in (*_options(name, was, now), *_parts(name, was, now, new)):
            yield _Difference(what, (subject, whole), promised)


def _options(name: str, was: Record, now: Record) -> Iterator[tuple[str, str]]:
    """Sentence and name of the thing."""
    olds, news = was["options"], now["options"]
    for option, before in olds.items():
        what = f"option {option!r} of {name!r}"
        after = news.get(option)
        if after is None:
            same = [
                other
                for other, schema in news.items()
                if other not in olds and all(schema.get(key) == before.get(key) for key in ("type", "default"))
            ]
            yield f"{what} was removed{f' (renamed to {same[0]!r}?)' if same else ''}", what
            continue
        if not _members(before["type"]) <= _members(after["type"]):
            yield f"{what} changed its type from {before['type']!r} to {after['type']!r}", what
        if "default" in before and "default" not in after:
            yield f"{what} lost its default {before['default']!r}", what
        elif "default" in before and before["default"] != after["default"]:
            yield f"{what} changed its default from {before['default']!r} to {after['default']!r}", what
    for option, after in news.items():
        if option not in olds and "default" not in after:
            yield f"option {option!r} of {name!r} was added without a default", f"option {option!r} of {name!r}"


def _members(text: str) -> set[str]:
    """The members of a union, with what is always accepted for them."""
    pending, found = [ast.parse(text, mode="eval").body], set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.BinOp):
            pending += [node.left, node.right]
        else:
            found.add(ast.unparse(node))
    return found | ({"int"} if "float" in found else set())


def _parts(name: str, was: Record, now: Record, new: Record) -> Iterator[tuple[str, str]]:
    for argument in was["arguments"]:
        if argument not in now["arguments"]:
            yield f"argument {argument!r} of the trainer of {name!r} was removed", f"{argument!r} of {name!r}"
    for key in sorted({*was["defaults"], *now["defaults"]}):
        before, after = (each["defaults"].get(key, "that of the base") for each in (was, now))
        if before != after:
            yield f"default of {key!r} under {name!r} changed from {before!r} to {after!r}", f"{key!r} of {name!r}"
    exported = {
        line.partition("(")[0].partition(":")[0].rpartition(" ")[2] for lines in new["api"].values() for line in lines
    }
    for kind in ("config", "trainer"):
        if was[kind] != now[kind] and was[kind] not in exported:
            yield f"{kind} {was[kind]!r} of {name!r} was renamed to {now[kind]!r}", f"{was[kind]!r} of {name!r}"


# -- hooks and Python names -------------------------------------------------------------------------------------------
def _hooks(old: Record, new: Record) -> Iterator[_Difference]:
    promised = _promised(old, new)
    for hook, was in old["hooks"].items():
        what, now = f"hook {hook!r}", new["hooks"].get(hook)
        if now is None:
            yield _Difference(f"{what} was removed", (what,), promised)
            continue
        if was["kind"] != now["kind"]:
            yield _Difference(f"{what} changed its kind from {was['kind']} to {now['kind']}", (what,), promised)
        if was["refine"] and not now["refine"]:
            yield _Difference(f"{what} may not be refined any more", (what,), promised)
        if was["returns"] != now["returns"]:
            text = f"{what} wants {now['returns']} returned, not {was['returns']} any more"
            yield _Difference(text, (what,), promised)
        for parameter in was["parameters"]:
            if parameter not in now["parameters"]:
                subjects = (f"argument {parameter!r} of {what}", what)
                yield _Difference(f"{what}: argument {parameter!r} was removed", subjects, promised)


def _python(old: Record, new: Record) -> Iterator[_Difference]:
    from .interface import breakages

    promised = _promised(old, new)
    for what, subjects in breakages(old["api"], new["api"]):
        last = ast.literal_eval(subjects[-1]).rpartition(".")[2]
        for name, algorithm in old["algorithms"].items():
            # The classes of an algorithm go with it, or under its own note: they may exist only when asked for.
            if last in (algorithm["config"], algorithm["trainer"], *algorithm["deprecated"]):
                subjects += [f"{last!r} of {name!r}", f"algorithm {name!r}"]
        yield _Difference(what, tuple(subjects), promised)


def _promised(old: Record, new: Record) -> bool:
    """Whether the distribution has, or had, an algorithm that it promises to keep, now that `new` is its version."""
    return any(
        each["tag"] == Stability.STABLE
        or (each["tag"] == Stability.DEPRECATED and not reached(each["removal"] or "9999", new["version"]))
        for each in (*old["algorithms"].values(), *new["algorithms"].values())
    )


def _names(record: Record) -> list[str]:
    from .interface import names

    found = []
    for name, algorithm in record["algorithms"].items():
        found.append(f"algorithm {name!r}")
        found += [f"option {option!r} of {name!r}" for option in algorithm["options"]]
        found += [f"argument {argument!r} of the trainer of {name!r}" for argument in algorithm["arguments"]]
    for hook, spec in record["hooks"].items():
        found += [f"hook {hook!r}", *(f"hook {hook!r}: argument {each!r}" for each in spec["parameters"])]
    return [*found, *names(record["api"])]
