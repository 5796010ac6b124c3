"""`trl-core check`: run the conformance kit on an algorithm or on a project, and write what came out as evidence."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import importlib_metadata

from .. import install
from ..errors import ConfigError, ConformanceError, ProjectError
from ..options import require
from ..project import Project, check_installed, find_project
from ..promotion.conformance import FILE, MARKER, Report, read
from .flags import fields_of
from .flags import read as read_value
from .list import make_console, print_rows

_TEST = """from trl_core.testing import Subject, conformance

test_conformance = conformance(Subject({name!r}, options={options!r}))
"""
_PYTEST_HELP = 'such as "-n 2 -k trains"; what comes out is then no evidence, and kept only with --report'
_NO_TESTS = 5  # pytest's exit code where no test was selected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the subcommand."""
    parser.usage = "trl-core check NAME [--set OPTION=VALUE ...] [--report FILE] [--pytest OPTIONS]"
    parser.description = (
        "Run the conformance tests of a project: what its tests mark, with their options and exemptions. For an "
        "algorithm that is not installed from its folder, or with --set, run the whole kit on it as it is."
    )
    parser.add_argument("name", metavar="NAME", help="algorithm, distribution, or folder of a project")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="option to check it under")
    parser.add_argument("--report", type=Path, metavar="FILE", help="default: evidence/conformance.json of the project")
    parser.add_argument("--pytest", type=shlex.split, default=[], metavar="OPTIONS", help=_PYTEST_HELP)


def run(args: argparse.Namespace) -> int:
    """Run the checks, print each with what came out, and write the report; 1 if a check failed.

    Raises:
        TRLCoreError: there is no such algorithm or project, or it has no conformance tests.
    """
    project = None if args.set or "+" in args.name else _project(args.name)
    with tempfile.TemporaryDirectory() as scratch:
        if project is None:
            source = _TEST.format(name=args.name, options=_options(args.name, args.set))
            tests = Path(scratch, "test_kit.py")
            tests.write_text(source, encoding="utf-8")
        else:
            tests = project.folder / "tests" if (project.folder / "tests").is_dir() else project.folder
        found = Path(scratch, "report.json")
        code = _pytest(tests, found, args.pytest)
        report = read(found) if found.is_file() else None
        if report is None or not report.subjects:
            name = f"{project.name}:{next(iter(project.algorithms), 'NAME')}" if project else args.name
            lines = f"Write tests/test_conformance.py:\n\n{_TEST.format(name=name, options={})}"
            raise ConformanceError(
                f"No test of the conformance kit was run in {tests}.",
                mend=lines if code == _NO_TESTS else "Correct what pytest says above.",
            )
        _print(report)
        # A part of the kit is no evidence.
        target = args.report or (project and not args.pytest and project.folder / FILE)
        if target:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, target)
            print(f"Report: {target}")
    return int(code != 0)


def _project(name: str) -> Project | None:
    """The project that is named; None for an algorithm that is not installed from its folder."""
    try:
        project = find_project(name)
    except ProjectError:
        if os.path.isdir(name):
            raise
        return None
    check_installed(project)
    return project


def _options(name: str, settings: Sequence[str]) -> dict[str, Any]:
    from ..composition import compose

    fields = {f.name: f for f in fields_of(compose(name, warn=False).config_class)} if settings else {}
    options = {}
    for setting in settings:
        option, _, value = setting.partition("=")
        require(option in fields, f"{name!r} has no option {option!r}.", f"See trl-core info {name}.")
        try:
            options[option] = read_value(value, fields[option].type)
        except TypeError as error:
            raise ConfigError(f"{option}: {error}.", mend=f"See trl-core info {name}.") from error
    return options


def _pytest(tests: Path, report: Path, options: Sequence[str]) -> int:
    """Run the marked tests in a process of its own, in the folder above them, and return its exit code.

    Raises:
        ConformanceError: pytest is not installed.
    """
    if importlib.util.find_spec("pytest") is None:
        raise ConformanceError("The conformance kit runs on pytest.", mend=install.how("trl-core[authors]"))
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-m", MARKER]
    command += [str(tests), f"--conformance-report={report}", *options]
    if not importlib_metadata.entry_points(group="pytest11", name="trl_core"):
        command += ["-p", "trl_core.pytest_plugin"]  # an installation from before there was one
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
    return subprocess.run(command, cwd=tests.parent, env=environment, check=False).returncode


def _print(report: Report) -> None:
    console = make_console()
    for subject in report.subjects:
        console.print(f"{subject.name} ({subject.test}), {subject.seconds:.0f} s:", markup=False)
        rows = [
            [name.removeprefix("check_"), check["outcome"], check["says"] if check["outcome"] != "passed" else ""]
            for name, check in subject.checks.items()
        ]
        print_rows(console, ["check", "outcome", "why"], rows)
    checks = [check["outcome"] for subject in report.subjects for check in subject.checks.values()]
    counts = [f"{number} {outcome}" for outcome, number in Counter(checks).most_common()]
    console.print(", ".join(counts), markup=False)
