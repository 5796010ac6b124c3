"""Put the runs of several seeds side by side: a table in RESULTS.md and a picture.

for seed in 0 1 2; do make demo SEED=$seed; done
python examples/demo/report.py runs/demo-sums-seed0 runs/demo-sums-seed1 runs/demo-sums-seed2
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
COLUMNS = (("greedy_accuracy", "right, greedy"), ("sampled_accuracy", "right, sampled"), ("sampled_tokens", "tokens"))


def smooth(values: list[float], width: int = 5) -> list[float]:
    """Mean of the last `width` values at each place."""
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def main() -> None:
    """Read the runs, write the table and the picture."""
    parser = argparse.ArgumentParser(description="Put demo runs of several seeds side by side.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--note", default="", help="a sentence on how the runs were made")
    arguments = parser.parse_args()
    folders = arguments.runs
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for folder, summary in zip(folders, summaries, strict=True):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "reward" in line]
        steps, label = [line["step"] for line in lines], f"seed {summary['options']['seed']}"
        left.plot(steps, smooth([line.get("gfpo/reward_all", line["reward"]) for line in lines]), label=label)
        right.plot(steps, smooth([line["completions/mean_length"] for line in lines]), label=label)
    left.set(xlabel="optimizer step", ylabel="reward of all completions", ylim=(0, 1))
    right.set(xlabel="optimizer step", ylabel="tokens per completion")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("GFPO on SmolLM2-135M-Instruct, mean over the last 5 steps")
    figure.savefig(HERE / "results.png", dpi=110)

    first = summaries[0]
    options = ", ".join(f"{k} {v}" for k, v in first["options"].items() if k not in ("seed", "model"))
    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items())
    out = ["# What the demo showed", "", f"Model {first['options']['model']}; {options}.", ""]
    out += [f"Machine: {first['machine']}. Versions: {versions}. {arguments.note}", "", "![curves](results.png)", ""]
    out += ["| seed | " + " | ".join(f"{text} before → after" for _, text in COLUMNS) + " | training s | in all s |"]
    out += ["|---|" + "---|" * (len(COLUMNS) + 2)]
    for summary in summaries:
        cells = [f"{summary['before'][key]:.2f} → {summary['after'][key]:.2f}" for key, _ in COLUMNS]
        times = [f"{summary[key]:.0f}" for key in ("train_seconds", "total_seconds")]
        out.append("| " + " | ".join([str(summary["options"]["seed"]), *cells, *times]) + " |")
    cells = []
    for key, _ in COLUMNS:
        before, after = ([summary[when][key] for summary in summaries] for when in ("before", "after"))
        gains = [new - old for old, new in zip(before, after, strict=True)]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        told = f"{statistics.mean(before):.2f} → {statistics.mean(after):.2f}"
        cells.append(f"{told} (change {statistics.mean(gains):+.2f} ± {error:.2f})")
    out.append("| mean | " + " | ".join(cells) + " | | |")
    count = first["options"]["eval_size"]
    out += [
        "",
        "± is one standard error of the mean over seeds.",
        f"Accuracies are shares of {count} held-out problems, one completion each; the sampling error of one",
        f"is up to {(0.25 / count) ** 0.5:.2f}. The held-out problems are the same for all seeds; none is trained on,",
        "not with its terms swapped either. The gain is mostly that the model answers before its tokens are used up,",
        "which it learns in a few dozen steps: it shows that training works, it is no evidence that GFPO beats GRPO.",
        "",
    ]
    (HERE / "RESULTS.md").write_text("\n".join(out))
    print("\n".join(out))


if __name__ == "__main__":
    main()
