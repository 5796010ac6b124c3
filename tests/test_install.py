"""Wherever it is said how to install what is ours, the form that works before the first release stands with it."""

import re
from pathlib import Path

import pytest

from trl_core import install

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "EVIDENCE.md")),
    *(
        file
        for folder in ("docs", "examples", "benchmarks", "plugins", "trl_core")
        for file in sorted((ROOT / folder).rglob("*"))
        if file.suffix in (".md", ".py", ".tmpl", ".yaml", ".yml", ".toml", ".ipynb") and file.name != "install.py"
    ),
]
COMMAND = re.compile(r"pip install ((?:[^\n`#)\\]|#subdirectory)*)")
OURS = re.compile(r"(?<![\w/.-])trl-(?:core|[a-z]+)(?:\[[\w,]+\])?(?![\w/-]| @)")
NEAR = 15  # lines


def installs(text):
    """Where a distribution of ours is installed by its name, and which ones."""
    for found in COMMAND.finditer(text):
        if names := OURS.findall(found[1]):
            yield found.start(), names


def unaccompanied(text):
    lines = text.split("\n")
    for start, names in installs(text):
        line = text.count("\n", 0, start)
        around = "\n".join(lines[max(0, line - NEAR) : line + NEAR + 1])
        if install.from_checkout(*names) not in around:
            yield line + 1, names


@pytest.mark.skipif(install.PUBLISHED, reason="an index has it")
def test_every_page_gives_the_form_that_works_from_a_checkout():
    found = [
        f"{file.relative_to(ROOT)}:{line}: {' '.join(names)}, without: {install.from_checkout(*names)}"
        for file in PAGES
        for line, names in unaccompanied(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
    said = [file for file in PAGES if list(installs(file.read_text(encoding="utf-8")))]
    assert {"README.md", "getting-started.md", "migration.md"} <= {file.name for file in said}


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("pip install trl-core trl-gfpo", False),
        ("`pip install 'trl-core[peft]'`", False),
        ("pip install -e . -e plugins/trl-gfpo; later pip install trl-gfpo", True),
        ("pip install -e . later pip install trl-gfpo", False),
        ("pip install trl-someone-else-s", True),
        ("pip install -e plugins/trl-gfpo", True),
        ("pip install matplotlib", True),
    ],
)
def test_the_search_sees_what_it_is_for(line, right):
    assert (not list(unaccompanied(line))) == right


def test_commands_before_and_after_the_release(monkeypatch):
    assert install.from_checkout("trl-core[peft,authors]") == "pip install -e '.[peft,authors]'"
    assert install.from_checkout("trl-gfpo") == "pip install -e . -e plugins/trl-gfpo"
    assert install.from_git("trl-gfpo") == (
        "pip install 'trl-core @ git+GIT_ADDRESS' 'trl-gfpo @ git+GIT_ADDRESS#subdirectory=plugins/trl-gfpo'"
    )
    before = install.how("trl-core[peft]")
    assert before.startswith("pip install -e '.[peft]' ") and "pip install 'trl-core[peft]'" in before
    monkeypatch.setattr(install, "PUBLISHED", True)
    assert install.how("trl-core[peft]") == "pip install 'trl-core[peft]'"


def test_getting_started_has_the_form_of_a_git_address():
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    assert install.from_git("trl-core", "trl-gfpo", "trl-replay") in re.sub(r" \\\n +", " ", page)
