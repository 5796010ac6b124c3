"""How fast this machine multiplies matrices and reads memory, and what it is. Prints a JSON line.

python machine.py --model FOLDER [--device cuda] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best(run: Callable[[], Any], synchronize: Callable[[], Any], times: int = 7) -> float:
    """Least seconds of several."""
    found = []
    for _ in range(times):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        found.append(time.perf_counter() - start)
    return min(found)


def measure(device: str, dtype_name: str, widths: tuple[int, int] | None) -> dict[str, Any]:
    """Operations per second of square products, and of one with the model's widths; bytes per second read."""
    import torch

    dtype = getattr(torch, dtype_name)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    rates = {}
    shapes = [(n, n, n) for n in ((2048, 4096, 8192) if device == "cuda" else (512, 1024, 2048))]
    if widths:
        shapes.append((512, *widths))
    for rows, inner, columns in shapes:
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(inner, columns, device=device, dtype=dtype)
        seconds = best(lambda left=left, right=right: left @ right, synchronize)
        rates[f"{rows} x {inner} x {columns}"] = 2 * rows * inner * columns / seconds
    weights = torch.randn(8192, 8192, device=device, dtype=dtype)
    vector = torch.randn(8192, device=device, dtype=dtype)
    seconds = best(lambda: weights @ vector, synchronize)
    squares = list(rates.values())[:3]
    return {
        "matmul": max(squares),
        "rates": rates,
        "read": weights.numel() * weights.element_size() / seconds,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    config = json.loads((Path(options.model) / "config.json").read_text())
    widths = (config["hidden_size"], config["intermediate_size"]) if "intermediate_size" in config else None
    print("RESULT " + json.dumps(measure(options.device, options.dtype, widths)))


if __name__ == "__main__":
    main()
