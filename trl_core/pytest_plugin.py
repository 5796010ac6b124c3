"""What trl-core adds to pytest: a marker for the tests of the conformance kit, and a report of what came out of them.

pytest loads this in every session of an environment with trl-core, so it imports nothing heavy, has no fixture, and
does nothing unless a test is marked.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from .promotion.conformance import MARKER, write

_PROPERTY = "trl_core_conformance"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Define the option for the report."""
    group = parser.getgroup("trl-core")
    group.addoption("--conformance-report", metavar="FILE", help="write what came out of the conformance kit as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Define the marker, and collect for the report if there is to be one."""
    config.addinivalue_line("markers", f"{MARKER}(subject): a test of trl-core's conformance kit")
    file = config.getoption("conformance_report")
    if file and not hasattr(config, "workerinput"):  # with pytest-xdist, what the workers find arrives in their parent
        config.pluginmanager.register(_Collector(Path(file)), "trl_core_conformance_report")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note what a marked test says beyond passed, failed and skipped."""
    error = call.excinfo and call.excinfo.value  # taken now, for pytest puts an exception of its own in its place
    report = yield
    marker = item.get_closest_marker(MARKER)
    failed_early = report.when == "setup" and not report.passed
    if marker is not None and (report.when == "call" or failed_early):
        check = getattr(item, "callspec").params["check"]  # noqa: B009  only parametrised items have it
        entry = {
            "subject": marker.args[0],
            "test": f"{item.path.name}::{item.name.partition('[')[0]}",
            "check": check.__name__,
            "outcome": getattr(error, "outcome", report.outcome),
            "seconds": round(report.duration, 2),
            "says": " ".join(str(error).split()) if error else "",
            "what": (check.__doc__ or "").partition("\n")[0],
        }
        report.user_properties.append((_PROPERTY, json.dumps(entry)))
    return report


class _Collector:
    def __init__(self, file: Path) -> None:
        self.file, self.entries = file, list[dict[str, Any]]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.entries += [json.loads(str(value)) for name, value in report.user_properties if name == _PROPERTY]

    def pytest_sessionfinish(self) -> None:
        write(self.entries, self.file)
