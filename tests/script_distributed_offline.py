"""SFT, reward models and DPO in as many processes as this is started with; the first writes what they end with.

`torchrun --nproc-per-node 2 script_distributed_offline.py FOLDER`: all of `helpers_offline.FIXED`, then a resumed run.
"""

import gc
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from helpers_offline import FIXED, make_fixed_trainer
from helpers_train import CLOCKS, end_state

RESUMED = "dpo_precomputed"


def ended(trainer, resume=None):
    """Train and evaluate; everything the run leaves."""
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    return {**end_state(trainer), "metrics": {k: v for k, v in metrics.items() if not k.startswith(CLOCKS)}}


def main():
    folder, processes = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    gc.freeze()  # each training collects garbage
    ends = {name: ended(make_fixed_trainer(folder / name, name, processes)) for name in FIXED}
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = ended(make_fixed_trainer(folder / "saved", RESUMED, processes, **saving))
    resumed = make_fixed_trainer(folder / "resumed", RESUMED, processes)
    ends["resumed"] = [whole, ended(resumed, str(folder / "saved" / "checkpoint-2"))]
    if PartialState().is_main_process:
        torch.save(ends, folder / "ends.pt")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
