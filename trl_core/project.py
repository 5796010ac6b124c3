"""The source folder of a distribution: what its `pyproject.toml` says, and how to find it from a name.

Only authors need it (`trl-core check`, `api`, `promote`, ...); a run reads the metadata of what is installed instead.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import importlib_metadata
from packaging.utils import canonicalize_name

from . import install
from .discovery import CORE, GROUPS, find, find_spec, list_algorithms
from .errors import AlgorithmNotFoundError, ProjectError, TRLCoreError
from .stability import Stability

PYPROJECT = "pyproject.toml"


@dataclass(frozen=True)
class Project:
    """A folder with a `pyproject.toml`.

    Raises:
        ProjectError: there is none, or it names no distribution.
    """

    folder: Path

    def __post_init__(self) -> None:
        mend = "Give the folder of a distribution, one made with `trl-core new` for example."
        try:
            named = self.table.get("name")
        except (OSError, UnicodeDecodeError) as error:
            raise ProjectError(f"{self.file} cannot be read: {error}.", mend=mend) from error
        except tomllib.TOMLDecodeError as error:
            raise ProjectError(f"{self.file} is no valid TOML: {error}.", mend="Correct the file.") from error
        points = self.table.get("entry-points", {})
        tables = isinstance(points, dict) and all(isinstance(each, dict) for each in points.values())
        if not tables or not all(isinstance(value, str) for each in points.values() for value in each.values()):
            what = f'In {self.file} [project.entry-points."group"] is no table of texts.'
            raise ProjectError(what, mend='Write lines such as my_algo = "trl_my_algo:algorithm" under it.')
        names = [name for group in GROUPS for name in points.get(group, {})]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ProjectError(f"{self.file} registers {', '.join(twice)} twice.", mend="Keep one of the lines.")
        if not named or not isinstance(named, str):
            raise ProjectError(f"{self.file} has no [project] with a name.", mend=mend)

    @property
    def file(self) -> Path:
        """Its `pyproject.toml`."""
        return self.folder / PYPROJECT

    @cached_property
    def document(self) -> dict[str, Any]:
        """All of the `pyproject.toml`."""
        if self.file.exists() and not self.file.is_file():
            # A pipe would wait for ever.
            raise ProjectError(f"{self.file} is no regular file.", mend="Put the file of the project in its place.")
        return tomllib.loads(self.file.read_text(encoding="utf-8"))

    @property
    def table(self) -> dict[str, Any]:
        """Its table `[project]`."""
        table = self.document.get("project")
        return table if isinstance(table, dict) else {}

    @property
    def name(self) -> str:
        """Name of the distribution, normalised."""
        return canonicalize_name(self.table["name"])

    @property
    def version(self) -> str:
        """Version of the distribution as the file says it; "unknown" where a build tool makes it up."""
        return str(self.table.get("version", "unknown"))

    @property
    def dependencies(self) -> list[str]:
        """What it says that it needs, as requirements."""
        needs = self.table.get("dependencies")
        return [str(need) for need in needs] if isinstance(needs, list) else []

    @property
    def required(self) -> set[str]:
        """Names of the distributions that it needs, normalised."""
        return {canonicalize_name(re.split(r"[^\w.-]", need.strip(), maxsplit=1)[0]) for need in self.dependencies}

    @property
    def algorithms(self) -> dict[str, tuple[Stability, str]]:
        """Each algorithm it registers: tag and entry point (`"module:object"`)."""
        groups = self.table.get("entry-points", {})
        return {
            name: (stability, value)
            for group, stability in GROUPS.items()
            for name, value in groups.get(group, {}).items()
        }

    def algorithm(self, name: str) -> tuple[Stability, str]:
        """Tag and entry point of one algorithm.

        Raises:
            AlgorithmNotFoundError: it registers none of that name.
        """
        return self.algorithms[self.named(name)]

    def named(self, name: str) -> str:
        """The algorithm that is meant by its name, qualified or as `trl-core new` was given it.

        Where it registers only one, the name of the distribution will do.

        Raises:
            AlgorithmNotFoundError: it registers none of that name.
        """
        distribution, _, short = name.rpartition(":")
        if canonicalize_name(distribution or self.name) == self.name:
            found = [known for known in self.algorithms if short == known or spelt(short) == spelt(known)]
            if not found and len(self.algorithms) == 1 and canonicalize_name(short) == self.name:
                found = [*self.algorithms]
            if found:
                return short if short in found else found[0]
        known = ", ".join(self.algorithms) or "none"
        raise AlgorithmNotFoundError(
            f"{self.file} registers no algorithm {name!r}; it has: {known}.",
            mend='Name one of these, or add it to [project.entry-points."trl_core.experimental"].',
        )


def spelt(name: str) -> str:
    """What the spellings of a name have in common that `trl-core new` makes one algorithm of: `My-Algo` and my_algo."""
    return re.sub(r"[-_.]+", "_", name).lower()


def find_project(name: str) -> Project:
    """The project of an algorithm or distribution that is installed from its folder (`pip install -e`), or in a folder.

    Args:
        name: path of the folder, name of an algorithm (`"gfpo"`, `"trl-gfpo:gfpo"`), or name of a distribution. Of
            several distributions with such an algorithm the one that is installed from its folder is meant.

    Raises:
        ProjectError: it is not installed from a folder.
        AlgorithmNotFoundError, AmbiguousAlgorithmError: it is neither a folder, nor a distribution, nor an algorithm.
    """
    folder, name = Path(name), name.strip()
    if folder.is_dir() and ((folder / PYPROJECT).exists() or folder.parts != (name,) or name in (".", "..")):
        return Project(folder.resolve())
    names = {info: (info.name, info.qualified, info.distribution) for info in list_algorithms()}
    found = [info for info, each in names.items() if name in each]
    found = found or [info for info, each in names.items() if spelt(name) in map(spelt, each)]
    owners = {info.distribution for info in found}
    if not owners:
        try:
            owners = {importlib_metadata.distribution(name).name}
        except (importlib_metadata.PackageNotFoundError, ValueError):
            try:
                find(name)
            except AlgorithmNotFoundError as error:  # says what it may have been
                mend = f"{error.mend} If it is not installed, give its folder (--project, where NAME is an algorithm)."
                raise AlgorithmNotFoundError(error.what, mend=mend) from None
    distributions = [each for owner in sorted(owners) for each in importlib_metadata.distributions(name=owner)]
    sources = {source.resolve() for each in distributions if (source := installed_from(each))}
    if len(sources) == 1:
        return Project(sources.pop())
    if len(owners) > 1:
        find(found[0].name)  # says that several have it
    raise ProjectError(
        f"{distributions[0].name} {distributions[0].version} is not installed from its source folder.",
        mend="Give the folder (--project, where NAME is an algorithm), or install it from there: pip install -e FOLDER",
    )


@contextlib.contextmanager
def from_source(project: Project) -> Iterator[list[str]]:
    """While it is open, a project is what its folder says, whatever is installed; gives what is first on the path.

    Unless it is installed from there, it is found as `pip install -e` would leave it.

    Raises:
        ProjectError: a module of it is not in its folder, or was imported from elsewhere before.
    """
    before, sources = list(sys.path), [str(project.folder), str(project.folder / "src")]
    with tempfile.TemporaryDirectory() as site:
        try:
            sys.path[:0] = sources
            importlib.invalidate_caches()
            if _differs(project):
                _write_metadata(project, Path(site))
                sys.path.insert(0, site)
                sources.insert(0, site)
                importlib.invalidate_caches()
            if differs := _differs(project):
                raise ProjectError(differs, mend=f"Install it from its folder: pip install -e {project.folder}")
            yield sources
        finally:
            sys.path[:] = before
            importlib.invalidate_caches()


def _differs(project: Project) -> str | None:
    """Why what is known and imported under the names of a project is not what its folder has; None if it is."""
    for name, (stability, value) in project.algorithms.items():
        try:
            info = find(f"{project.name}:{name}")
        except TRLCoreError as error:
            return error.what
        if (info.stability, info.value) != (stability, value):
            return f"{info} is installed as {info.stability.value}; {project.file} says {stability.value}, {value!r}."
        spec = find_spec(value.partition(":")[0].strip())
        file = spec.origin if spec else None
        if file is None or not Path(file).resolve().is_relative_to(project.folder.resolve()):
            return f"{info} is imported from {file}, not from {project.folder}."
    return None


def _write_metadata(project: Project, site: Path) -> None:
    """What an installer would write about a project."""
    info = site / f"{project.name.replace('-', '_')}-0.dist-info"
    info.mkdir()
    needs = [f"Requires-Dist: {' '.join(need.split())}" for need in project.dependencies]
    lines = ["Metadata-Version: 2.1", f"Name: {project.name}", f"Version: {project.version}", *needs]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    groups: dict[str, list[str]] = {}
    for name, (stability, value) in project.algorithms.items():
        groups.setdefault(stability.value, []).append(f"{name} = {value}")
    points = [line for tag, lines in groups.items() for line in (f"[trl_core.{tag}]", *lines)]
    (info / "entry_points.txt").write_text("\n".join(points) + "\n", encoding="utf-8")


def installed_from(distribution: Any) -> Path | None:
    """The folder that an `importlib_metadata` distribution was installed from; None if there is none."""
    try:
        direct = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return None
    url = urlsplit(direct.get("url", ""))
    folder = Path(url2pathname(url.path))
    return folder if url.scheme == "file" and (folder / PYPROJECT).is_file() else None


def needed(module: str) -> Any:
    """A module that only authors need, which the extra `authors` of trl-core brings.

    Raises:
        ProjectError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = f"{error.name} is not installed."
        raise ProjectError(what, mend=install.how(f"{CORE}[authors]")) from error


def is_core(project: Project) -> bool:
    """Whether it is trl-core itself."""
    return project.name == CORE
