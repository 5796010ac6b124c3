"""The table and the picture of `run.py`."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIRST, LAST = 2, 5
"""Generations whose mean reward is compared: those of nearly the first model, and the last ones."""


def write_results(found: dict[str, Any], folder: Path) -> None:
    """Write `RESULTS.md` and `results.png` from what `run.py` found."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in found["runs"]:
        runs.setdefault(run["algorithm"], []).append(run)
    draw(runs, found["before"]["sampled"], folder / "results.png")
    (folder / "RESULTS.md").write_text("\n".join(report(found, runs)) + "\n")


def draw(runs: dict[str, list[dict[str, Any]]], start: float, path: Path) -> None:
    """One small picture per algorithm: the mean over the seeds, and from the least to the largest."""
    rows = -(-len(runs) // 3)
    figure, axes = plt.subplots(
        rows, 3, figsize=(10, 2.4 * rows + 0.6), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for place in axes.flat[len(runs) :]:
        place.set_visible(False)
    for place, (name, group) in zip(axes.flat, runs.items(), strict=False):
        columns = list(zip(*(run["rewards"] for run in group), strict=True))
        numbers = range(1, len(columns) + 1)
        place.fill_between(numbers, [min(c) for c in columns], [max(c) for c in columns], alpha=0.3, linewidth=0)
        place.plot(numbers, [mean(c) for c in columns])
        place.axhline(start, color="gray", linewidth=0.8, linestyle="--")
        place.set(title=name, ylim=(0, 1))
        place.title.set_fontsize(10)
        place.grid(alpha=0.3)
    figure.supxlabel("generation")
    figure.supylabel("reward (share right)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(found: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The lines of `RESULTS.md`."""
    at, before = found["conditions"], found["before"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    lines = [
        "# Do the online algorithms learn?",
        "",
        "Written by `run.py`; what it does, and what this shows and does not show, is in the [README](README.md). It "
        "is no comparison of the algorithms at their best: options were set by hand, and the number of optimizer steps "
        "for each generation differs.",
        "",
        f"Per run {at['generations']} generations of {at['rows']} completions, sampled at temperature "
        f"{at['temperature']}; seeds {', '.join(map(str, at['seeds']))}. The first model has "
        f"{at['start']['parameters']:,} weights and {at['start']['steps']} supervised steps behind it. "
        f"{at['machine']}. {versions}.",
        "",
        "![reward curves](results.png)",
        "",
        "Mean over the seeds, range over the seeds, and, dashed, what the first model gets on held-out problems.",
        "",
        "## Rewards in training",
        "",
        f"Mean reward of all completions of the first {FIRST} and the last {LAST} generations, per seed. The least "
        "rise is that of the seed that rose least; the spread is the largest minus the smallest of the last column.",
        "",
        "| algorithm | first | last | least rise | spread | in a run |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in runs.items():
        first = [mean(run["rewards"][:FIRST]) for run in group]
        last = [mean(run["rewards"][-LAST:]) for run in group]
        rise = min(b - a for a, b in zip(first, last, strict=True))
        spread = max(last) - min(last)
        cells = [name, _each(first), _each(last), f"{rise:.2f}", f"{spread:.2f}", _reported(group)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "In a run, as a mean over the run: `clipped`, the share of tokens (of completions where the ratio is one of "
        "completions) whose ratio the clip took out; `groups replaced`, per generation, which has "
        f"{at['groups']} groups.",
        "",
        "## Held-out problems",
        "",
        f"{at['held_out']} problems; `sampled` is the share right among {at['draws']} samples of each, `greedy` that "
        f"of one greedy answer. Before: sampled {before['sampled']:.2f}, greedy {before['greedy']:.2f}. After, per "
        "seed:",
        "",
        "| algorithm | sampled | greedy | seconds |",
        "|---|---|---|---|",
    ]
    for name, group in runs.items():
        seconds = ", ".join(f"{run['seconds']:.0f}" for run in group)
        cells = [name, _each([r["sampled"] for r in group]), _each([r["greedy"] for r in group]), seconds]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "The seconds are no measurement: the machine did other work at the same time.",
        "",
        "## Options",
        "",
        "| algorithm | options |",
        "|---|---|",
    ]
    for name, options in at["options"].items():
        lines.append(f"| {name} | {', '.join(f'`{key}={value}`' for key, value in options.items())} |")
    return lines


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _reported(group: list[dict[str, Any]]) -> str:
    names = dict.fromkeys(name for run in group for name in run["reported"])
    return "; ".join(f"{name} {mean(run['reported'][name] for run in group):.3g}" for name in names)
