"""How to install what is ours: the one place that says it, because until the first release no index has it.

A requirement is written as for pip: "trl-core[peft]", "trl-gfpo". What begins with another word than trl-core is the
plugin in the folder of that name.
"""

from __future__ import annotations

import shlex

PUBLISHED = False  # to be switched at the first release; the tests then name the pages that are to follow


def from_index(*wanted: str) -> str:
    """The command once an index has them."""
    return f"pip install {shlex.join(wanted)}"


def from_checkout(*wanted: str) -> str:
    """The command in a checkout of trl-core."""
    folders = {one: one.replace("trl-core", ".") if _is_core(one) else f"plugins/{one}" for one in _with_core(wanted)}
    return f"pip install {' '.join(f'-e {shlex.quote(folder)}' for folder in folders.values())}"


def from_git(*wanted: str) -> str:
    """The command without a checkout; GIT_ADDRESS stands for the address of the repository."""
    where = {one: "" if _is_core(one) else f"#subdirectory=plugins/{one}" for one in _with_core(wanted)}
    return f"pip install {' '.join(shlex.quote(f'{one} @ git+GIT_ADDRESS{place}') for one, place in where.items())}"


def how(*wanted: str) -> str:
    """What an error says: the command that works today."""
    if PUBLISHED:
        return from_index(*wanted)
    return f"{from_checkout(*wanted)} in a checkout of trl-core ({from_index(*wanted)} once it is published)"


def _is_core(requirement: str) -> bool:
    return requirement.partition("[")[0] == "trl-core"


def _with_core(wanted: tuple[str, ...]) -> list[str]:
    """The same with trl-core, which no index has either."""
    return list(wanted) if any(map(_is_core, wanted)) else ["trl-core", *wanted]
