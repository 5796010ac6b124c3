"""The report of the conformance kit: which check gave what, for which algorithm, of which source, when and on what."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import importlib_metadata

from ..discovery import CORE, find, source_files
from ..errors import ProjectError

FILE = Path("evidence") / "conformance.json"
"""Where a project keeps its report."""
MARKER = "conformance"
"""Of the kit's tests, for `pytest -m`."""
GREEN = frozenset(("passed", "not applicable"))
_LIBRARIES = (CORE, "torch", "transformers", "accelerate", "datasets", "pluggy")


@dataclass(frozen=True)
class Subject:
    """One algorithm, or several composed, as one test checked it."""

    name: str
    test: str
    exempt: dict[str, str]
    checks: dict[str, dict[str, Any]]
    """Check to `outcome` ("passed", "not applicable", "exempt", "blocked" or "failed"), `seconds`, `says`, `what`."""
    sources: dict[str, str]
    """Qualified name of each algorithm to the fingerprint of its source."""

    @property
    def red(self) -> list[str]:
        """Checks that neither passed nor were out of place."""
        return [name for name, check in self.checks.items() if check["outcome"] not in GREEN]

    @property
    def seconds(self) -> float:
        """How long all of its checks took."""
        return sum(float(check["seconds"]) for check in self.checks.values())

    def covers(self, qualified: str) -> bool:
        """Whether it is about this algorithm alone."""
        return [*self.sources] == [qualified]


@dataclass(frozen=True)
class Report:
    """What one run of the kit found."""

    when: str
    versions: dict[str, str]
    subjects: list[Subject]


def write(entries: Iterable[dict[str, Any]], file: Path) -> None:
    """Write what the tests said, one entry for each check, as a report."""
    subjects: dict[str, dict[str, Any]] = {}
    for entry in entries:
        described, test = entry["subject"], entry["test"]
        if test not in subjects:
            infos = [find(name) for name in described["name"].split("+")]
            sources = {info.qualified: fingerprint(info.value) for info in infos}
            subjects[test] = {"test": test, **described, "sources": sources, "checks": {}}
        subjects[test]["checks"][entry["check"]] = {key: entry[key] for key in ("outcome", "seconds", "says", "what")}
    distributions = {name for subject in subjects.values() for name in subject["distributions"]}
    record = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: importlib_metadata.version(name) for name in sorted({*_LIBRARIES, *distributions})},
        "subjects": [subjects[test] for test in sorted(subjects)],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read(file: Path) -> Report:
    """A report that `write` wrote.

    Raises:
        ProjectError: the file is no such report.
        FileNotFoundError: there is none.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        fields = ("name", "test", "exempt", "checks", "sources")
        subjects = [Subject(**{key: subject[key] for key in fields}) for subject in record["subjects"]]
        return Report(record["when"], record["versions"], subjects)
    except (ValueError, KeyError, TypeError) as error:
        what = f"{file} is no report of the conformance kit: {type(error).__name__}: {error}."
        raise ProjectError(what, mend="Write it anew: trl-core check NAME") from error


def fingerprint(value: str) -> str:
    """A hash of the source of an algorithm, given its entry point (`"module:object"`).

    A report whose fingerprint differs from that of the source is about another version of the algorithm.
    """
    digest = hashlib.sha256()
    for name, file in source_files(value).items():
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
