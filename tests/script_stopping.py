"""Stops of a training in two processes; each writes what it has seen to FOLDER.

`torchrun --nproc-per-node 2 script_stopping.py FOLDER`: a signal to one process, a callback that fails in one process,
and then a run that waits for the signal of its launcher.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from accelerate import PartialState
from helpers_offline import make_trainer
from transformers import TrainerCallback

RUN = {"max_steps": 6, "per_device_train_batch_size": 1, "train_sampling_strategy": "random", "optim": "adamw_torch"}


class At(TrainerCallback):
    """Does something in one process."""

    def __init__(self, event, step, process, action):
        self.step, self.process, self.action = step, process, action
        setattr(self, event, self.event)

    def event(self, args, state, control, **_):
        if state.global_step == self.step and PartialState().process_index == self.process:
            self.action()


def fail():
    raise LookupError("mine")


def main():
    folder, seen = Path(sys.argv[1]), {}

    def stopped(name, *callbacks, **options):
        trainer = make_trainer(folder / name, "SFT", {"callbacks": [*callbacks]}, **{**RUN, **options})
        with contextlib.suppress(BaseException):
            try:
                trainer.train()
            except BaseException as error:
                seen[name] = [repr(error), trainer.state.global_step]

    stopped("signal", At("on_step_begin", 2, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    stopped("failure", At("on_log", 3, 1, fail))
    stopped("early", At("on_step_begin", 0, 1, lambda: os.kill(os.getpid(), signal.SIGINT)))
    for name, resume in (("signal", True), ("failure", True), ("whole", None)):
        trainer = make_trainer(folder / name, "SFT", **RUN)
        trainer.train(resume_from_checkpoint=resume)
        seen[f"{name} resumed"] = float(sum(p.double().abs().sum() for p in trainer.model.parameters()))
    (folder / f"seen-{PartialState().process_index}.json").write_text(json.dumps(seen))
    trainer = make_trainer(
        folder / "launched",
        "SFT",
        {"callbacks": [At("on_log", 3, 0, (folder / "under-way").touch)]},
        **RUN | {"max_steps": 10**5},
    )
    trainer.train()


if __name__ == "__main__":
    main()
