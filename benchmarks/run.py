"""Do the same work with trl-core and with TRL, in processes of their own that alternate, and write table and plot.

    python benchmarks/run.py --model FOLDER --work a b c --trl-python PYTHON_WITH_TRL --out FOLDER

Everything measured is added to results.json in the folder of `--out`, from which results.md and results.png are made
anew; so works may be measured one after the other. `--render FOLDER` only makes these two. Nothing here is run by the
tests: times depend on the machine, so they are reported with their conditions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
import report
import works

HERE = Path(__file__).parent
LIBRARIES = ("trl_core", "trl")
# In f, TRL is not asked for steps that would take more of the memory.
MOST_MEMORY = 0.85


class Results:
    """What was measured so far, on disk after each process."""

    def __init__(self, folder: Path, conditions: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.conditions = folder, conditions
        self.records = report.load(folder) if (folder / report.DATA).exists() else []

    def add(self, **record: Any) -> dict[str, Any]:
        """Keep a record, and show it."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        record = {**self.conditions, "date": now, **record}
        self.records.append(record)
        report.save(self.folder, self.records)
        shown = {name: value for name, value in record.items() if name not in self.conditions}
        print(json.dumps(shown), file=sys.stderr, flush=True)
        return record


def call(command: list[str]) -> dict[str, Any]:
    """The result that a script of this folder prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def train(options: argparse.Namespace, results: Results, library: str, work: str, **point: int) -> dict[str, Any]:
    """One process of the worker."""
    steps = min(options.steps, 2) if work == "f" else options.steps
    command = [python_of(options, library, work), str(HERE / "worker.py"), library, "--work", work]
    command += ["--model", options.model, "--steps", str(steps), "--device", options.device, "--dtype", options.dtype]
    command += [part for name, value in point.items() for part in (f"--{name}", str(value))]
    command += ["--checkpointing"] if options.checkpointing else []
    return results.add(work=work, library=library, point=point, **call(command))


def grow(options: argparse.Namespace, results: Results) -> None:
    """Work f. TRL leaves out steps that would take too long or too much memory, going by its largest so far."""
    largest: dict[str, Any] | None = None
    for point in works.POINTS:
        tokens = point["group"] * (point["prompt"] + works.GROWTH_NEW)
        for library in options.libraries:
            if library == "trl" and largest is not None and tokens > largest["size"]:
                times = tokens / largest["size"]
                seconds, gib = times * max(largest["seconds"]), times * largest["peak_gib"]
                if seconds > options.growth_seconds or gib > MOST_MEMORY * largest["memory_gib"]:
                    why = f"about {seconds:.0f} s a step and {gib:.0f} GiB expected"
                    results.add(work="f", library=library, point=point, skipped=why)
                    continue
            found = train(options, results, library, "f", **point)
            if library == "trl" and (largest is None or tokens > largest["size"]):
                largest = found | {"size": tokens}


def start_up(options: argparse.Namespace, results: Results) -> None:
    """Work h: seconds and peak memory of fresh processes."""
    ours, theirs = sys.executable, options.trl_python
    scripts = {"trl_core": Path(ours).with_name("trl-core"), "trl": Path(theirs).with_name("trl")}
    commands: list[tuple[str, str, list[str]]] = [
        ("python", "nothing", [ours, "-c", "pass"]),
        ("python", "import torch", [ours, "-c", "import torch"]),
        ("trl_core", "import", [ours, "-c", "import trl_core"]),
        ("trl", "import", [theirs, "-c", "import trl"]),
        ("trl_core", "import of GRPOTrainer", [ours, "-c", "from trl_core import GRPOTrainer"]),
        ("trl", "import of GRPOTrainer", [theirs, "-c", "from trl import GRPOTrainer"]),
        ("trl_core", "list", [str(scripts["trl_core"]), "list"]),
        ("trl_core", "train grpo --help", [str(scripts["trl_core"]), "train", "grpo", "--help"]),
        ("trl", "train grpo --help", [str(scripts["trl"]), "grpo", "--help"]),
    ]
    commands = [each for each in commands if each[0] in (*options.libraries, "python")]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(max(options.steps, 5) + 1):
        for library, name, command in commands:
            found.setdefault((library, name), []).append(fresh(command))
    for (library, name), runs in found.items():
        seconds, peaks = zip(*runs[1:], strict=True)
        results.add(work="h", library=library, command=name, seconds=list(seconds), peak_gib=max(peaks))


def fresh(command: list[str]) -> tuple[float, float]:
    """Seconds and peak GiB of a process. A process starts with the size of this one, which is small."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said.decode(errors='replace')[-4000:]}")
    return seconds, usage.ru_maxrss / 2**20


def python_of(options: argparse.Namespace, library: str, work: str) -> str:
    """The interpreter that has what this needs."""
    if library == "trl_core":
        return sys.executable
    return str(options.trl_ppo_python if work == "g" else options.trl_python)


def check(options: argparse.Namespace) -> None:
    """Say what is missing before anything is measured."""
    needs = set()
    for work in options.work:
        for library in options.libraries:
            module = {"trl_core": "trl_ppo", "trl": "trl.experimental.ppo"}[library] if work == "g" else library
            needs.add((python_of(options, library, work), module))
    for python, module in sorted(needs):
        if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
            raise SystemExit(
                f"{module} cannot be imported by {python}.\n  To mend: name an interpreter that has it with "
                "--trl-python (TRL), or --trl-ppo-python (TRL 1.12, which still has PPO); or leave TRL out with "
                "--libraries trl_core."
            )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model")
    titles = "; ".join(f"{name}: {title}" for name, title in works.TITLES.items())
    parser.add_argument("--work", nargs="+", default=[], choices=[*works.TITLES, "all"], metavar="WORK", help=titles)
    parser.add_argument(
        "--steps", type=int, default=5, help="measured steps per process, after one more; of f at most 2"
    )
    parser.add_argument("--rounds", type=int, default=1, help="processes per library and work, alternating")
    parser.add_argument("--growth-seconds", type=float, default=90.0, help="of f: longest step that TRL is asked for")
    parser.add_argument("--peak", action="store_true", help="measure what the machine's matrix products reach")
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES, choices=LIBRARIES)
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter with TRL 1.16")
    parser.add_argument("--trl-ppo-python", default=sys.executable, help="interpreter with TRL 1.12, for g")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the results")
    parser.add_argument("--render", type=Path, metavar="FOLDER", help="only make table and plot of results anew")
    options = parser.parse_args(arguments)
    if options.render is None and not options.work and not options.peak:
        parser.error("nothing to do: give --work, --peak or --render")
    if options.render is None and options.model is None:
        parser.error("--model is needed to measure")
    options.work = list(works.TITLES) if "all" in options.work else options.work
    return options


def main() -> None:
    """Measure and render."""
    options = parse()
    if options.render is not None:
        report.render(options.render)
        return
    check(options)
    conditions = {
        "model": Path(options.model).resolve().name,
        "dtype": options.dtype,
        "checkpointing": options.checkpointing,
        "cpu": machine.cpu_name(),
        "cores": machine.cores(),
    }
    results = Results(options.out, conditions)
    if options.peak:
        script = [sys.executable, str(HERE / "machine.py"), "--model", options.model]
        found = call([*script, "--device", options.device, "--dtype", options.dtype])
        results.add(work="peak", **found)
    for work in options.work:
        for _ in range(1 if work == "h" else options.rounds):
            if work == "f":
                grow(options, results)
            elif work == "h":
                start_up(options, results)
            else:
                for library in options.libraries:
                    train(options, results, library, work)
    report.render(options.out)


if __name__ == "__main__":
    main()
