"""Trains with replay in as many processes as this is started with; each writes what it ends with to FOLDER.

`torchrun --nproc-per-node 2 script_two_processes.py FOLDER`
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from helpers import ended, run_straddling
from safetensors.torch import save_file


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    whole = run_straddling(folder / "run", save_strategy="steps")
    # In the middle of a window.
    resumed = run_straddling(folder / "run", resume=str(folder / "run" / "checkpoint-7"))
    for name, trainer in {"whole": whole, "resumed": resumed}.items():
        save_file(ended(trainer), folder / f"{name}-{PartialState().process_index}.safetensors")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
