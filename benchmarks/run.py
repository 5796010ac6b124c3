"""Train the same work with trl-core and with TRL, in processes of their own that alternate, and print the ratios.

    python benchmarks/run.py --model FOLDER --work a --steps 3 --rounds 2 [--trl-python PATH]

TRL must be importable by `--trl-python` (default: this interpreter), with the same versions of torch and transformers.
Nothing here is run by the tests: times depend on the machine, so they are reported with their conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")


def run(python: str, library: str, options: argparse.Namespace) -> dict:
    """One worker process."""
    command = [python, str(WORKER), library, "--model", options.model, "--work", options.work]
    command += ["--steps", str(options.steps), *(["--checkpointing"] if options.checkpointing else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{library} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    """Run all rounds and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument(
        "--work",
        default="a",
        help="a: GRPO, one group of 8, long prompt; b: DPO, 4 pairs; c: SFT, 8 rows; short: GRPO, 8 short prompts of 4",
    )
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--steps", type=int, default=3, help="measured steps per process, after one warm-up step")
    parser.add_argument("--rounds", type=int, default=2, help="processes per library, alternating")
    parser.add_argument("--trl-python", default=sys.executable)
    options = parser.parse_args()
    results: dict[str, list[dict]] = {"trl_core": [], "trl": []}
    for _ in range(options.rounds):
        for library, python in (("trl_core", sys.executable), ("trl", options.trl_python)):
            results[library].append(run(python, library, options))
            print(f"{library}: {results[library][-1]}", file=sys.stderr, flush=True)
    conditions = f"{options.rounds} x {options.steps} steps, {os.cpu_count()} cores, {platform.machine()}"
    print(f"Work {options.work!r}, {conditions}\n")
    print("| library | median s/step | min | max | peak GiB | tokens/step | through the policy |")
    print("|---|---|---|---|---|---|---|")
    medians, peaks = {}, {}
    for library, rounds in results.items():
        seconds = [s for r in rounds for s in r["seconds"]]
        medians[library] = statistics.median(seconds)
        peaks[library] = statistics.median(r["peak_gib"] for r in rounds)
        row = (
            medians[library],
            min(seconds),
            max(seconds),
            peaks[library],
            rounds[-1]["tokens"],
            rounds[-1]["forwarded"],
        )
        print(f"| {library} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    print(f"\nRatio trl-core / TRL: time {medians['trl_core'] / medians['trl']:.2f}", end=", ")
    print(f"peak memory {peaks['trl_core'] / peaks['trl']:.2f}")


if __name__ == "__main__":
    main()
