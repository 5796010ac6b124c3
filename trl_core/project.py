"""The source folder of a distribution: what its `pyproject.toml` says, and how to find it from a name.

Only authors need it (`trl-core check`, `api`, `promote`, ...); a run reads the metadata of what is installed instead.
"""

from __future__ import annotations

import importlib
import json
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import importlib_metadata
from packaging.utils import canonicalize_name

from . import install
from .discovery import CORE, GROUPS, find, find_spec
from .errors import AlgorithmNotFoundError, ProjectError
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
        if not named:
            raise ProjectError(f"{self.file} has no [project] with a name.", mend=mend)

    @property
    def file(self) -> Path:
        """Its `pyproject.toml`."""
        return self.folder / PYPROJECT

    @cached_property
    def document(self) -> dict[str, Any]:
        """All of the `pyproject.toml`."""
        return tomllib.loads(self.file.read_text(encoding="utf-8"))

    @property
    def table(self) -> dict[str, Any]:
        """Its table `[project]`."""
        table: dict[str, Any] = self.document.get("project", {})
        return table

    @property
    def name(self) -> str:
        """Name of the distribution, normalised."""
        return canonicalize_name(self.table["name"])

    @property
    def version(self) -> str:
        """Version of the distribution as the file says it; "unknown" where a build tool makes it up."""
        return str(self.table.get("version", "unknown"))

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
        if name not in self.algorithms:
            known = ", ".join(self.algorithms) or "none"
            raise AlgorithmNotFoundError(
                f"{self.file} registers no algorithm {name!r}; it has: {known}.",
                mend='Add it to [project.entry-points."trl_core.experimental"].',
            )
        return self.algorithms[name]


def find_project(name: str) -> Project:
    """The project of an algorithm or distribution that is installed from its folder (`pip install -e`), or in a folder.

    Args:
        name: path of the folder, name of an algorithm (`"gfpo"`, `"trl-gfpo:gfpo"`), or name of a distribution.

    Raises:
        ProjectError: it is not installed from a folder.
        AlgorithmNotFoundError, AmbiguousAlgorithmError: it is neither a folder, nor a distribution, nor an algorithm.
    """
    folder = Path(name)
    if folder.is_dir() and ((folder / PYPROJECT).exists() or folder.parts != (name,) or name in (".", "..")):
        return Project(folder.resolve())
    try:
        distribution = importlib_metadata.distribution(name)
    except (importlib_metadata.PackageNotFoundError, ValueError):
        distribution = importlib_metadata.distribution(find(name).distribution)
    source = installed_from(distribution)
    if source is None:
        raise ProjectError(
            f"{distribution.name} {distribution.version} is not installed from its source folder.",
            mend="Give the folder in place of the name, or install it from there: pip install -e FOLDER",
        )
    return Project(source)


def check_installed(project: Project) -> None:
    """That what is imported under the names of a project are the files in its folder.

    Raises:
        ProjectError: it is not installed, an algorithm was added since it was, or another copy is imported.
    """
    mend = f"Install it from its folder: pip install -e {project.folder}"
    for name, (_, value) in project.algorithms.items():
        try:
            info = find(f"{project.name}:{name}")
        except AlgorithmNotFoundError as error:
            what = f"{project.folder} registers {name!r}, but no installed distribution {project.name} does."
            raise ProjectError(what, mend=mend) from error
        spec = find_spec(info.value.partition(":")[0].strip())
        file = spec.origin if spec else None
        if info.value != value or file is None or not Path(file).resolve().is_relative_to(project.folder.resolve()):
            what = f"{info} is imported from {file}, not from {project.folder}."
            raise ProjectError(what, mend=mend)


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
