"""Moving the one line that is an algorithm's stability tag, and announcing a removal where the algorithm is defined."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from ..discovery import GROUPS, find_spec
from ..errors import PromotionError
from ..project import Project, needed
from ..stability import Stability

NOTICE = 2
"""Minor versions between the announcement of a stable algorithm's removal and the removal."""


def moved(project: Project, name: str, to: Stability) -> str:
    """The text of `pyproject.toml` with an algorithm's entry point in the group of another tag, all else as it was.

    Raises:
        AlgorithmNotFoundError: the project registers no such algorithm.
        PromotionError: it has that tag already.
        ProjectError: tomlkit is not installed.
    """
    tomlkit = needed("tomlkit")
    now, value = project.algorithm(name)
    if now is to:
        raise PromotionError(f"{name!r} of {project.name} is {to.value} already.", mend="Nothing needs to be done.")
    text = project.file.read_text(encoding="utf-8")
    document: Any = tomlkit.parse(text)
    old, new = (f"trl_core.{tag.value}" for tag in (now, to))
    points = document["project"]["entry-points"]
    others = {group for group in points if group in GROUPS and group != old}
    header = f'[project.entry-points."{old}"]'
    if len(points[old]) == 1 and new not in others and text.count(header) == 1:
        # Its header is then the one line, and the comments around it stay where they are.
        return text.replace(header, f'[project.entry-points."{new}"]')
    del points[old][name]
    if not points[old]:
        del points[old]
    if new not in points:
        points[new] = tomlkit.table()
    points[new][name] = value
    return str(tomlkit.dumps(document))


def check_removal(project: Project, stability: Stability, removal: str) -> None:
    """That a removal is announced in time.

    Raises:
        PromotionError: `removal` is no version, has passed, or comes too soon for a stable algorithm.
    """
    try:
        now, then = Version(project.version), Version(removal)
    except InvalidVersion as error:
        raise PromotionError(f"{error}.", mend="Give a version such as 0.4.") from error
    soonest = f"{now.major}.{now.minor + NOTICE}" if stability is Stability.STABLE else f"{now.major}.{now.minor + 1}"
    if then < Version(soonest) and then.release[0] == now.major:
        raise PromotionError(
            f"{removal} is too soon to remove what is {stability.value} in {project.name} {project.version}.",
            mend=f"Give {soonest} or later; a stable algorithm stays for {NOTICE} minor versions, and for six months.",
        )
    if then <= now:
        raise PromotionError(f"{project.name} {project.version} is past {removal}.", mend=f"Give {soonest} or later.")


def announced(value: str, removal: str, replacement: str) -> tuple[Path, str]:
    """The file that defines an algorithm, and its text with `removal` and `replacement` in the `Algorithm(...)` call.

    Args:
        value: its entry point, `"module:object"`.
        removal: version that removes it.
        replacement: what to use instead.

    Raises:
        PromotionError: the call is not found in the module the entry point names.
        ProjectError: libcst is not installed.
    """
    libcst = needed("libcst")
    module, _, target = value.partition(":")
    spec = find_spec(module.strip())
    mend = f"Write removal={removal!r}, replacement={replacement!r} into its Algorithm(...) yourself."
    if spec is None or spec.origin is None:
        raise PromotionError(f"The module {module!r} is not found.", mend=mend)
    file = Path(spec.origin)
    call = _Announce(target.strip(), {"removal": removal, "replacement": replacement})
    text = libcst.parse_module(file.read_text(encoding="utf-8")).visit(call.transformer()).code
    if not call.found:
        raise PromotionError(f"{file} does not define {target!r} as Algorithm(...).", mend=mend)
    ast.parse(text)
    return file, text


class _Announce:
    """Adds keyword arguments to `target = Algorithm(...)`, or replaces their values."""

    def __init__(self, target: str, values: dict[str, str]) -> None:
        self.target, self.values, self.found = target, values, False

    def transformer(self) -> Any:
        import libcst as cst
        from libcst import matchers as m

        outer = self
        wanted = m.AssignTarget(m.Name(self.target))
        call = m.Call(func=m.OneOf(m.Name("Algorithm"), m.Attribute(attr=m.Name("Algorithm"))))

        class Visitor(cst.CSTTransformer):
            def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
                if not m.matches(updated_node, m.Assign(targets=[wanted], value=call)):
                    return updated_node
                outer.found = True
                return updated_node.with_changes(value=outer.extended(updated_node.value))

        return Visitor()

    def extended(self, call: Any) -> Any:
        import libcst as cst

        kept = [arg for arg in call.args if not (arg.keyword and arg.keyword.value in self.values)]
        # What stands between the last two arguments, a line break perhaps, stands before the new ones too.
        comma = next((arg.comma for arg in reversed(kept[:-1]) if arg.comma), None)
        comma = comma if isinstance(comma, cst.Comma) else cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
        last, closing = kept[-1], kept[-1].comma
        new = [
            cst.Arg(
                keyword=cst.Name(key),
                value=cst.SimpleString(f'"{text}"'),
                equal=cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace("")),
                comma=comma,
            )
            for key, text in self.values.items()
        ]
        new[-1] = new[-1].with_changes(comma=closing)
        return call.with_changes(args=[*kept[:-1], last.with_changes(comma=comma), *new])
