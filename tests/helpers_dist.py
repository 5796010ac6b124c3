"""Plugins as an installer leaves them: a `.dist-info` folder and modules, in a folder that tests put on the path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

# Every synthetic module leaves this trace of having been imported.
TRACE = "import pathlib\npathlib.Path(__file__).with_suffix('.imported').touch()\n"


def algorithm_source(name: str, *, summary: str = "Read from the source.", extends: str | None = "grpo") -> str:
    """A module that exports an algorithm as `algorithm`."""
    return (
        "from trl_core.algorithm import Algorithm\n"
        f"algorithm = Algorithm(name={name!r}, summary={summary!r}, extends={extends!r})\n"
    )


def write_distribution(
    folder: Path,
    name: str,
    entry_points: Mapping[str, Mapping[str, str]],
    *,
    files: Mapping[str, str] | None = None,
    version: str = "1.0",
    requires: Iterable[str] = ("trl-core>=0.1",),
    summary: str = "Read from the metadata.",
) -> Path:
    """Write a distribution into `folder` and return its `.dist-info` folder.

    Args:
        folder: stands for site-packages.
        name: name of the distribution.
        entry_points: group to name to value.
        files: path in `folder` to content; Python files leave a trace when they are imported.
        version: version of the distribution.
        requires: its `Requires-Dist` lines.
        summary: its `Summary`.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    header = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Summary: {summary}"]
    header += [f"Requires-Dist: {requirement}" for requirement in requires]
    (info / "METADATA").write_text("\n".join(header) + "\n", encoding="utf-8")
    lines = []
    for group, points in entry_points.items():
        lines += [f"[{group}]", *(f"{point} = {value}" for point, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for path, content in (files or {}).items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(TRACE + content if path.endswith(".py") else content, encoding="utf-8")
    return info


def write_plugin(
    folder: Path,
    name: str,
    *,
    tag: str = "experimental",
    distribution: str | None = None,
    source: str | None = None,
    version: str = "1.0",
    requires: Iterable[str] = ("trl-core>=0.1",),
) -> Path:
    """Write the distribution `trl-NAME` with one module that registers the algorithm `name`; return the module's path.

    Args:
        folder: stands for site-packages.
        name: name of the algorithm.
        tag: the stability tag, which chooses the group.
        distribution: name of the distribution, if not `trl-NAME`.
        source: the module, if not `algorithm_source(name)`.
        version: version of the distribution.
        requires: its `Requires-Dist` lines.
    """
    distribution = distribution or f"trl-{name}"
    module = distribution.replace("-", "_")
    write_distribution(
        folder,
        distribution,
        {f"trl_core.{tag}": {name: f"{module}:algorithm"}},
        files={f"{module}.py": algorithm_source(name) if source is None else source},
        version=version,
        requires=requires,
    )
    return folder / f"{module}.py"


def imported(folder: Path) -> list[str]:
    """Names of the synthetic modules in `folder` that were imported since they were written."""
    return sorted(trace.stem for trace in folder.rglob("*.imported"))
