"""From results.json to a table (results.md) and a plot (results.png).

results.json is a list of records, one for each process measured, with its conditions. Records of the same work,
library and conditions are taken together: the median over all their steps.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import works

DATA = "results.json"
NAMES = {"trl_core": "trl-core", "trl": "TRL", "python": "Python"}
PHASES = ("generate", "prepare", "update", "optimizer", "rest")
PARTS = (
    "Medians in seconds. Generate: sampling. Prepare: all else before the update, such as rewards and a reference's "
    "log-probabilities. Update: forward and backward passes. Rest: what remains, logging for instance; where a library "
    "has no such parts (PPO of TRL) all but sampling."
)
SETTING = ("model", "dtype", "device", "checkpointing")
Record = dict[str, Any]


def load(folder: Path) -> list[Record]:
    """The records of a folder."""
    try:
        records: list[Record] = json.loads((folder / DATA).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"There is no {DATA} in {folder}.\n  To mend: give the folder of --out.") from None
    return records


def save(folder: Path, records: Sequence[Record]) -> None:
    """Replace the records of a folder, one to a line; a run that is stopped meanwhile loses nothing."""
    lines = ",\n".join(json.dumps(record) for record in records)
    part = folder / f"{DATA}.part"
    part.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    os.replace(part, folder / DATA)


@dataclass
class Summary:
    """What the processes of one work and library took together."""

    name: str
    """Library and version."""
    seconds: float
    fastest: float
    slowest: float
    steps: int
    processes: int
    peak: float
    """GiB."""
    tokens: float | None
    forwarded: float | None
    new: float | None
    phases: dict[str, float]
    record: Record
    """The last one, for what is the same in all."""


def summary(records: Sequence[Record]) -> Summary:
    """Medians of the steps of all processes, and of the processes for what each has once."""
    seconds = [s for record in records for s in record["seconds"]]
    last, phases = records[-1], [record.get("phases", {}) for record in records]

    def middle(name: str) -> float | None:
        known = [record[name] for record in records if record.get(name) is not None]
        return statistics.median(known) if known else None

    return Summary(
        name=named(last),
        seconds=statistics.median(seconds),
        fastest=min(seconds),
        slowest=max(seconds),
        steps=len(seconds),
        processes=len(records),
        peak=statistics.median(record["peak_gib"] for record in records),
        tokens=middle("tokens"),
        forwarded=middle("forwarded"),
        new=middle("new"),
        phases={name: statistics.median(p[name] for p in phases if name in p) for name in phases[-1]},
        record=last,
    )


def named(record: Record) -> str:
    """Library and version, where the record knows it."""
    library = record["library"]
    number = record.get("versions", {}).get(library.replace("_", "-"))
    return f"{NAMES[library]} {number}" if number else NAMES[library]


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Records with the same key, in order of appearance."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return found


def ratios(ours: Summary, theirs: Summary) -> dict[str, float]:
    """Ours divided by theirs; smaller than 1 is better."""
    found = {"time": ours.seconds / theirs.seconds, "peak memory": ours.peak / theirs.peak}
    if ours.forwarded and theirs.forwarded:
        found["tokens through the policy"] = ours.forwarded / theirs.forwarded
    return found


def by_work(records: Iterable[Record]) -> dict[str, dict[str, Summary]]:
    """Summaries of a to e and g, by work and library."""
    training = [r for r in records if r["work"] in works.TITLES and r["work"] not in "fh"]
    return {
        work: {library: summary(own) for library, own in sorted(grouped(of, lambda r: r["library"]).items())[::-1]}
        for work, of in sorted(grouped(training, lambda r: r["work"]).items())
    }


# -- growth ------------------------------------------------------------------------------------------------------------
def by_point(records: Iterable[Record]) -> dict[str, dict[tuple[int, int], Summary]]:
    """Summaries of f, by library and (prompt, group)."""
    measured = [r for r in records if r["work"] == "f" and "skipped" not in r]
    return {
        library: {
            point: summary(own)
            for point, own in sorted(grouped(of, lambda r: (r["point"]["prompt"], r["point"]["group"])).items())
        }
        for library, of in sorted(grouped(measured, lambda r: r["library"]).items())[::-1]
    }


def curve(points: dict[tuple[int, int], Summary], axis: str, fixed: int, value: str) -> tuple[list[int], list[float]]:
    """Values along one axis, "prompt" or "group", with the other fixed; a prompt of one token is the yardstick."""
    own, other = (0, 1) if axis == "prompt" else (1, 0)
    found = [
        (p[own], getattr(s, value)) for p, s in points.items() if p[other] == fixed and (axis == "group" or p[0] > 1)
    ]
    return [x for x, _ in sorted(found)], [y for _, y in sorted(found)]


def slope(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Of the line with least squares; None for less than two points."""
    return statistics.linear_regression(xs, ys).slope if len(xs) > 1 else None


def growth_lines(points: dict[tuple[int, int], Summary]) -> list[str]:
    """What one completion more, and one token of the prompt more, cost."""
    added, alone = (slope(*curve(points, "group", prompt, "seconds")) for prompt in (256, 1))
    lines = []
    if added is not None:
        text = f"One completion more at a prompt of 256 tokens: {added:.3f} s"
        if (gib := slope(*curve(points, "group", 256, "peak"))) is not None:
            text += f" and {gib:.3f} GiB"
        if alone:
            text += f"; with a prompt of 1 token: {alone:.3f} s. Ratio {added / alone:.2f}"
        lines.append(text + ".")
    if (longer := slope(*curve(points, "prompt", 8, "seconds"))) is not None:
        gib = slope(*curve(points, "prompt", 8, "peak")) or 0.0
        lines.append(f"100 tokens of prompt more, in a group of 8: {100 * longer:.3f} s and {100 * gib:.3f} GiB.")
    return lines


# -- Markdown ----------------------------------------------------------------------------------------------------------
def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """Fixed digits, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def main_table(found: dict[str, dict[str, Summary]]) -> str:
    """Medians of each work and library."""
    rows = [
        [
            work,
            s.name,
            number(s.seconds),
            f"{s.fastest:.2f}-{s.slowest:.2f}",
            f"{s.processes} x {s.steps // s.processes}",
            number(s.peak),
            number(s.tokens, 0),
            number(s.forwarded, 0),
            number(1000 * s.seconds / s.new if s.new else None, 1),
        ]
        for work, libraries in found.items()
        for s in libraries.values()
    ]
    head = ["work", "library", "median s/step", "min-max", "steps", "peak GiB", "tokens/step", "through the policy"]
    return table([*head, "ms per new token"], rows)


def ratio_table(found: dict[str, dict[str, Summary]]) -> str:
    """trl-core divided by TRL."""
    names = ("time", "peak memory", "tokens through the policy")
    rows = [
        [work, *(number(ratios(both["trl_core"], both["trl"]).get(name)) for name in names)]
        for work, both in found.items()
        if len(both) == 2
    ]
    return table(["work", *names], rows) if rows else ""


def phase_table(found: dict[str, dict[str, Summary]]) -> str:
    """Seconds of each part of a step."""
    summaries = [(work, s) for work, libraries in found.items() for s in libraries.values()]
    rows = [[work, s.name, *(number(s.phases.get(phase)) for phase in PHASES)] for work, s in summaries]
    return table(["work", "library", *PHASES], rows)


def peak_table(found: dict[str, dict[str, Summary]], peak: Record) -> str:
    """How near the parts come to what the machine can do, where it is known how little they need."""
    rows = []
    for work, libraries in found.items():
        for s in libraries.values():
            needed, moved = s.record.get("flops", {}), s.record.get("bytes", {})
            for phase, seconds in {**s.phases, "step": s.seconds}.items():
                flops = sum(needed.values()) if phase == "step" else needed.get(phase)
                if not flops and not moved.get(phase):
                    continue
                at_peak = flops / peak["matmul"] if flops else None
                moving = moved[phase] / peak["read"] if moved.get(phase) else None
                share = number(100 * at_peak / seconds if at_peak else None, 0)
                tera = number(flops / 1e12 if flops else None)
                rows.append([work, s.name, phase, number(seconds), tera, number(at_peak), share, number(moving)])
    head = ["work", "library", "part", "median s", "TFLOP needed", "s at the peak", "% of the peak", "s to move memory"]
    return table(head, rows) if rows else ""


def growth_table(records: Sequence[Record]) -> str:
    """Work f, point by point."""
    rows = [
        [s.name, str(prompt), str(group), number(s.seconds), number(s.peak), number(s.forwarded, 0)]
        for points in by_point(records).values()
        for (prompt, group), s in points.items()
    ]
    skipped = grouped((r for r in records if "skipped" in r), lambda r: (r["library"], str(r["point"])))
    rows += [
        [named(r[-1]), str(r[-1]["point"]["prompt"]), str(r[-1]["point"]["group"]), r[-1]["skipped"], "", ""]
        for r in skipped.values()
    ]
    return table(["library", "prompt", "group", "median s/step", "peak GiB", "through the policy"], rows)


def start_table(records: Sequence[Record]) -> str:
    """Work h."""
    rows = []
    for (command, _), own in grouped(records, lambda r: (r["command"], r["library"])).items():
        s = summary(own)
        spread = f"{s.fastest:.2f}-{s.slowest:.2f}"
        rows.append(
            [command, NAMES[own[-1]["library"]], number(s.seconds), spread, str(s.steps), f"{1024 * s.peak:.0f}"]
        )
    return table(["command", "library", "median s", "min-max", "runs", "peak MiB"], rows)


def conditions(records: Sequence[Record]) -> list[str]:
    """What the figures depend on; everything that was ever different is named."""

    def each(read: Callable[[Record], Any]) -> str:
        return ", ".join(dict.fromkeys(str(read(r)) for r in records if read(r) is not None))

    known = dict.fromkeys(name for r in records for name in r.get("versions", {}))
    versions = [f"{name} {each(lambda r, name=name: r.get('versions', {}).get(name))}" for name in known]
    lines = [
        f"Processor: {each(lambda r: r['cpu'])}; cores {each(lambda r: r['cores'])}; "
        f"threads {each(lambda r: r.get('threads'))}",
        f"Versions: {'; '.join(versions)}",
        f"Measured from {min(r['date'] for r in records)} to {max(r['date'] for r in records)}",
    ]
    return [f"- {line}" for line in lines]


def markdown(records: Sequence[Record]) -> str:
    """The whole report: a part for each model, type of numbers and device."""
    parts = [
        "# Results",
        "Made from `results.json` by `benchmarks/run.py --render`. Times are of a step, after one to warm up.",
    ]
    for (model, dtype, device, checkpointing), own in sections(records).items():
        title = f"## {model}, {dtype}, {device}" + (", activation checkpointing" if checkpointing else "")
        found, peak = by_work(own), ([None, *(r for r in own if r["work"] == "peak")])[-1]
        parts += [title, "\n".join(conditions(own))]
        if found:
            parts += ["\n".join(f"- {work}: {works.TITLES[work]}" for work in found), main_table(found)]
            parts += ["trl-core divided by TRL, medians:", ratio_table(found)]
            parts += ["### Where the time goes", PARTS, phase_table(found)]
        if peak:
            rates = ", ".join(f"{name}: {rate / 1e9:.0f}" for name, rate in peak["rates"].items())
            parts += [f"Matrix products reach, in GFLOP/s, {rates}. Memory is read at {peak['read'] / 1e9:.1f} GB/s."]
            parts += [peak_table(found, peak)]
        if grown := by_point(own):
            parts += ["### Growth (f)", growth_table([r for r in own if r["work"] == "f"])]
            told = [f"- {NAMES[library]}: {text}" for library, points in grown.items() for text in growth_lines(points)]
            parts += ["\n".join(told)] if told else []
        if started := [r for r in own if r["work"] == "h"]:
            parts += ["### Start-up (h)", start_table(started)]
    return "\n\n".join(part for part in parts if part) + "\n"


def sections(records: Sequence[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """By model, type of numbers, device and checkpointing. What is no training goes with the first of its model."""
    found = grouped((r for r in records if "device" in r), lambda r: tuple(r[name] for name in SETTING))
    for record in records:
        if "device" not in record:
            near = [key for key in found if (key[0], key[1]) == (record["model"], record["dtype"])]
            key = near[0] if near else (record["model"], record["dtype"], "CPU", record["checkpointing"])
            found.setdefault(key, []).append(record)
    return found


# -- plot --------------------------------------------------------------------------------------------------------------
def plot(records: Sequence[Record], path: Path) -> None:
    """Ratios of each work, and the curves of f, of the first setting that has them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    key, own = next(iter(sections(records).items()))
    figure, axes = pyplot.subplot_mosaic(
        [["ratios", "time group", "peak group"], ["ratios", "time prompt", "peak prompt"]],
        figsize=(13, 6.5),
        width_ratios=[1.3, 1, 1],
        layout="constrained",
    )
    pairs = {work: ratios(both["trl_core"], both["trl"]) for work, both in by_work(own).items() if len(both) == 2}
    bars = axes["ratios"]
    for i, name in enumerate(("time", "peak memory")):
        drawn = bars.bar([x + 0.38 * i for x in range(len(pairs))], [r[name] for r in pairs.values()], 0.36, label=name)
        bars.bar_label(drawn, fmt="%.2f", fontsize=8)
    bars.axhline(1.0, color="black", linewidth=0.8)
    labels = [f"{work}\n{works.TITLES[work].split(',')[0]}" for work in pairs]
    bars.set_xticks([x + 0.19 for x in range(len(pairs))], labels)
    bars.set_ylabel("trl-core / TRL, medians")
    bars.legend()
    for axis, fixed, label in (("group", 256, "completions of the group"), ("prompt", 8, "tokens of the prompt")):
        for value, field, unit in (("time", "seconds", "s per step"), ("peak", "peak", "peak GiB")):
            panel = axes[f"{value} {axis}"]
            for library, points in by_point(own).items():
                panel.plot(*curve(points, axis, fixed, field), marker="o", label=NAMES[library])
            panel.set_xlabel(f"{label} ({'prompt of 256 tokens' if axis == 'group' else 'group of 8'})")
            panel.set_ylabel(unit)
            panel.set_ylim(bottom=0)
            if panel.lines:
                panel.legend()
    figure.suptitle(f"{key[0]}, {key[1]}, {key[2]}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def render(folder: Path) -> None:
    """Write results.md and results.png beside results.json."""
    records = load(folder)
    (folder / "results.md").write_text(markdown(records), encoding="utf-8")
    print(f"Wrote {folder / 'results.md'}")
    try:
        plot(records, folder / "results.png")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print(
            "No plot: matplotlib is not installed.\n  To mend: pip install matplotlib, and --render.", file=sys.stderr
        )
    else:
        print(f"Wrote {folder / 'results.png'}")
