"""Moving the one line that is an algorithm's stability tag, and announcing a removal where the algorithm is defined."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from ..discovery import GROUPS, Definition, definition
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
    text = project.file.read_bytes().decode()  # with its line ends
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


def check_removal(project: Project, stability: Stability, removal: str, earlier: str | None = None) -> None:
    """That a removal is announced in time.

    Args:
        project: what registers the algorithm.
        stability: its tag.
        removal: the version that is to remove it.
        earlier: the version that was to remove it, where it is deprecated already.

    Raises:
        PromotionError: `removal` is no version, has passed, comes too soon, or before what was said earlier.
    """
    try:
        now = Version(project.version)
    except InvalidVersion as error:
        what = f"{project.file} says no version that can be compared: {project.version!r}."
        raise PromotionError(what, mend='Write version = "0.1.0".') from error
    try:
        then = Version(removal)
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
    if stability is Stability.DEPRECATED and earlier and then < Version(earlier):
        raise PromotionError(
            f"Its removal was announced for {earlier}; {removal} is before that.", mend=f"Give {earlier} or later."
        )


@dataclass(frozen=True)
class Announcement:
    """The call `Algorithm(...)` of an algorithm of a project, and what it says of its removal.

    Raises:
        PromotionError: the call is not found in the sources of the project, or does not show its arguments.
    """

    project: Project
    name: str

    @cached_property
    def _found(self) -> Definition:
        value = self.project.algorithm(self.name)[1]
        mend = "Write removal=... and replacement=... into its Algorithm(...) yourself."
        try:
            found, why = definition(value), "the sources do not show it"
        except Exception as error:
            found, why = None, f"{type(error).__name__}: {error}"
        if found is None:
            raise PromotionError(f"The Algorithm(...) that {value!r} leads to is not found: {why}.", mend=mend)
        if not Path(found.file).resolve().is_relative_to(self.project.folder.resolve()):
            what = f"The Algorithm(...) of {value!r} is written in {found.file}, outside of {self.project.folder}."
            raise PromotionError(what, mend="Deprecate it where it is written.")
        shown = [keyword for keyword in found.call.keywords if keyword.arg]
        if shown != found.call.keywords or not (shown or found.call.args):
            what = f"{found.file}, line {found.call.lineno}: Algorithm(**...) does not show what is given."
            raise PromotionError(what, mend=mend)
        return found

    @property
    def file(self) -> Path:
        """The file that holds the call."""
        return Path(self._found.file)

    @property
    def removal(self) -> str | None:
        """The version that removes it, as far as it is written as a literal."""
        given = {keyword.arg: keyword.value for keyword in self._found.call.keywords}.get("removal")
        return given.value if isinstance(given, ast.Constant) and isinstance(given.value, str) else None

    def text(self, **values: str | None) -> str:
        """The text of the file with these keyword arguments in the call; those that are None are taken away.

        Raises:
            ProjectError: libcst is not installed.
        """
        cst, call = needed("libcst"), self._found.call
        tree = cst.MetadataWrapper(cst.parse_module(self.file.read_bytes()), unsafe_skip_copy=True)
        lines = self._found.source.split("\n")
        places = ((call.lineno, call.col_offset), (call.end_lineno or 0, call.end_col_offset or 0))
        # Python counts bytes, libcst characters.
        ends = [(line, len(lines[line - 1].encode()[:column].decode())) for line, column in places]
        for node, where in tree.resolve(needed("libcst.metadata").PositionProvider).items():
            if isinstance(node, cst.Call) and [(end.line, end.column) for end in (where.start, where.end)] == ends:
                text = str(tree.module.deep_replace(node, _with_arguments(node, values)).code)
                ast.parse(text)
                return text
        raise AssertionError(f"libcst does not see the call in line {call.lineno} of {self.file}")


def _with_arguments(call: Any, values: Mapping[str, str | None]) -> Any:
    import libcst as cst

    last = call.args[-1]
    kept = [arg for arg in call.args if not (arg.keyword and arg.keyword.value in values)]
    # What stands between the first two arguments, a line break perhaps, stands before the new ones too.
    one_space = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    between = _plain(call.args[0].comma) if len(call.args) > 1 else one_space
    new = [
        cst.Arg(
            keyword=cst.Name(key),
            value=cst.SimpleString(json.dumps(text, ensure_ascii=False)),
            equal=cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace("")),
            comma=between,
        )
        for key, text in values.items()
        if text is not None
    ]
    args = [*kept, *new]
    if last in kept[-1:] and new:
        moved = last.with_changes(comma=_aligned(last.comma, between), whitespace_after_arg=cst.SimpleWhitespace(""))
        args[len(kept) - 1] = moved
    if args[-1] is not last:
        closing = _aligned(_plain(last.comma) if new else args[-1].comma, last.comma)
        args[-1] = args[-1].with_changes(comma=closing, whitespace_after_arg=last.whitespace_after_arg)
    return call.with_changes(args=args)


def _aligned(comma: Any, like: Any) -> Any:
    """A comma, with its comment, that is followed by as much space as another one."""
    if not (_breaks(comma) and _breaks(like)):
        return like
    space = like.whitespace_after
    return comma.with_changes(
        whitespace_after=comma.whitespace_after.with_changes(indent=space.indent, last_line=space.last_line)
    )


def _breaks(comma: Any) -> bool:
    """Whether a line ends after a comma."""
    import libcst as cst

    return isinstance(comma, cst.Comma) and isinstance(comma.whitespace_after, cst.ParenthesizedWhitespace)


def _plain(comma: Any) -> Any:
    """A comma without the comment behind it."""
    import libcst as cst

    if not _breaks(comma):
        return comma
    space = comma.whitespace_after.with_changes(first_line=cst.TrailingWhitespace(), empty_lines=[])
    return comma.with_changes(whitespace_after=space)
