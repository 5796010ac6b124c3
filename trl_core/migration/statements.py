"""New import statements, with the comments of those that they replace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import libcst as cst
from libcst.helpers import get_full_name_for_node

from .names import Home

WIDTH = 100
"""Characters of an import on one line."""


def small_statements(
    replaced: Iterable[tuple[list[cst.BaseSmallStatement], cst.BaseSmallStatement]],
) -> list[cst.BaseSmallStatement]:
    """The statements of one line, each with its semicolon: new ones for each old one, the last in its place."""
    body: list[cst.BaseSmallStatement] = []
    for new, old in replaced:
        *first, last = new
        body += [statement.with_changes(semicolon=cst.MaybeSentinel.DEFAULT) for statement in first]
        body.append(last.with_changes(semicolon=old.semicolon))
    return body


def import_module(module: cst.Module, what: str) -> cst.BaseSmallStatement:
    """`import WHAT`."""
    return _parse(module, f"import {what}")


def _parse(module: cst.Module, text: str) -> cst.BaseSmallStatement:
    line = cst.parse_statement(text, config=module.config_for_parsing)
    assert isinstance(line, cst.SimpleStatementLine)
    return line.body[0]


def import_from(
    module: cst.Module, statement: cst.ImportFrom, homes: Mapping[cst.ImportAlias, Home | None]
) -> list[cst.BaseSmallStatement]:
    """The imports that replace one of TRL.

    Args:
        module: the script.
        statement: the old one.
        homes: of the names that are imported; None keeps the old import of a name, and one that is left out goes.

    Returns:
        An import for each module here, in the order in which their names stood, then what is kept.
    """
    old = get_full_name_for_node(statement.module) if statement.module else ""
    groups: dict[str, list[cst.ImportAlias]] = {}
    for alias, home in homes.items():
        groups.setdefault(home.module if home else "", []).append(alias)
    ordered = [*(key for key in groups if key), *([""] if "" in groups else [])]
    assert not isinstance(statement.names, cst.ImportStar)
    if len(ordered) == 1 and len(homes) == len(statement.names):
        # All names move together: the layout stays as it is.
        changed = [_renamed(alias, homes[alias]) for alias in statement.names]
        name = cst.parse_expression(ordered[0] or str(old))
        return [statement.with_changes(module=name, names=changed)]
    comments = _comments(statement)
    return [
        _parse(module, _text(key or str(old), [(a, homes[a]) for a in groups[key]], comments, key == ordered[-1]))
        for key in ordered
    ]


def _spelling(alias: cst.ImportAlias, home: Home | None) -> str:
    old = alias.evaluated_name
    new = home.name if home else old
    local = alias.evaluated_alias or old
    return new if new == local else f"{new} as {local}"


def _renamed(alias: cst.ImportAlias, home: Home | None) -> cst.ImportAlias:
    if home is None or home.name == alias.evaluated_name:
        return alias
    name, _, local = _spelling(alias, home).partition(" as ")
    asname = cst.AsName(cst.Name(local)) if local else None
    return alias.with_changes(name=cst.Name(name), asname=asname)


_Comments = dict[cst.ImportAlias | None, tuple[list[str], str]]


def _comments(statement: cst.ImportFrom) -> _Comments:
    """For each imported name the comments on lines above it, and the one behind it; for None those at the end."""
    assert not isinstance(statement.names, cst.ImportStar)
    found: _Comments = {}
    above = _above(statement.lpar.whitespace_after)[1] if statement.lpar else []
    behind_bracket = _above(statement.lpar.whitespace_after)[0] if statement.lpar else ""
    above = [behind_bracket, *above] if behind_bracket else above
    for alias in statement.names:
        behind, following = "", list[str]()
        if isinstance(alias.comma, cst.Comma):
            behind, following = _above(alias.comma.whitespace_after)
        if alias is statement.names[-1] and statement.rpar:
            last, tail = _above(statement.rpar.whitespace_before)
            behind, following = behind or last, [*following, *tail]
        found[alias] = (above, behind)
        above = following
    found[None] = (above, "")
    return found


def _above(space: Any) -> tuple[str, list[str]]:
    """The comment at the end of a line, and those on the lines after it."""
    if not isinstance(space, cst.ParenthesizedWhitespace):
        return "", []
    first = space.first_line.comment
    return (first.value if first else ""), [line.comment.value for line in space.empty_lines if line.comment]


def _text(module: str, aliases: list[tuple[cst.ImportAlias, Home | None]], comments: _Comments, last: bool) -> str:
    spelled = [(_spelling(alias, home), *comments[alias]) for alias, home in aliases]
    tail = comments[None][0] if last else []
    line = f"from {module} import {', '.join(name for name, _, _ in spelled)}"
    if len(line) <= WIDTH and not tail and not any(above or behind for _, above, behind in spelled):
        return line
    rows = [f"from {module} import ("]
    for name, above, behind in spelled:
        rows += [f"    {comment}" for comment in above]
        rows.append(f"    {name},{f'  {behind}' if behind else ''}")
    return "\n".join([*rows, *(f"    {comment}" for comment in tail), ")"])


def last_argument(argument: cst.Arg, removed: cst.Arg) -> cst.Arg:
    """An argument that becomes the last one of a call, because those behind it go: the bracket stays in its place."""
    comma, end = removed.comma, removed.whitespace_after_arg
    before = argument.comma.whitespace_after if isinstance(argument.comma, cst.Comma) else None
    after = comma.whitespace_after if isinstance(comma, cst.Comma) else end
    if isinstance(before, cst.ParenthesizedWhitespace) and isinstance(after, cst.ParenthesizedWhitespace):
        after = after.with_changes(first_line=before.first_line)  # with its comment
    if isinstance(comma, cst.Comma):
        return argument.with_changes(comma=comma.with_changes(whitespace_after=after))
    return argument.with_changes(comma=cst.MaybeSentinel.DEFAULT, whitespace_after_arg=after)
