"""Small trainings in as many processes as this is started with; each writes what it ends with to FOLDER.

`torchrun --nproc-per-node 2 script_distributed.py FOLDER`: all of `helpers_train.FIXED`, sampling, resume, failures
that are handled (then `finished-<process>.json` is written), and last one that is not, which must end the job.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from helpers_train import FIXED, end_state, make_fixed_trainer, make_trainer, reward

from trl_core.errors import HookResultError, NonFiniteLossError, TRLCoreError

RUN = {
    "per_device_train_batch_size": 3,
    "steps_per_generation": 2,
    "max_steps": 6,
    "beta": 0.1,
    "sync_ref_model": True,
    "ref_model_sync_steps": 2,
}


def note(folder, name, content):
    """Write what this process has to say."""
    (folder / f"{name}-{PartialState().process_index}.json").write_text(json.dumps(content))


def scenarios(folder):
    for name in FIXED:
        trainer, metrics = make_fixed_trainer(folder / name, name, int(os.environ["WORLD_SIZE"]))
        if PartialState().is_main_process:
            torch.save({**end_state(trainer), "metrics": metrics}, folder / f"{name}.pt")


def sampling_and_resume(folder):
    """Real sampling, with groups that straddle processes; then the same from the middle of a generation batch."""
    seen = []

    def noted(completions, prompts, **_):
        seen.extend(zip(prompts, completions, strict=True))
        return reward(completions)

    noted.__name__ = "reward"
    whole = make_trainer(folder / "whole", trainer={"reward_funcs": noted}, **RUN)
    whole.train()
    note(folder, "sampled", seen)
    resumed = make_trainer(folder / "whole", trainer={"reward_funcs": noted}, **RUN, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    torch.save([end_state(whole), end_state(resumed)], folder / f"resumed-{PartialState().process_index}.pt")


def reward_failure(folder):
    """A reward function that fails in one process only: all stop with a checkpoint, and go on when it is mended."""
    calls, broken = [], [True]

    def flaky(completions, **_):
        calls.append(len(completions))
        if broken[0] and len(calls) == 2 and PartialState().process_index == 1:
            raise KeyError("no such answer")
        return reward(completions)

    trainer = make_trainer(folder / "flaky", trainer={"reward_funcs": flaky}, **RUN, save_strategy="no")
    try:
        trainer.train()
    except TRLCoreError as error:
        note(folder, "flaky", [type(error).__name__, str(error)])
    broken[0] = False
    mended = make_trainer(folder / "flaky", trainer={"reward_funcs": flaky}, **RUN, save_strategy="no")
    mended.train(resume_from_checkpoint=True)
    torch.save(end_state(mended), folder / f"mended-{PartialState().process_index}.pt")


def nonfinite(folder):
    """A loss that is NaN in one process only."""
    trainer = make_trainer(folder / "nan", **RUN, save_strategy="no")
    unchanged = trainer._add_router_loss

    def bad(loss, output, accumulation):
        spoilt = trainer.state.global_step == 2 and PartialState().process_index == 1
        return unchanged(loss, output, accumulation) * (float("nan") if spoilt else 1.0)

    trainer._add_router_loss = bad
    try:
        trainer.train()
    except NonFiniteLossError as error:
        note(folder, "nan", str(error))


def disagreement(folder):
    """A filter that answers differently in each process."""

    def by_process(completions, rewards):
        return [[float(i != PartialState().process_index) for i in range(len(group))] for group in rewards]

    options = {**RUN, "num_remains_in_group": 3, "save_strategy": "no"}
    try:
        make_trainer(folder / "disagreement", "gfpo", {"group_filter_func": by_process}, **options).train()
    except HookResultError as error:
        note(folder, "disagreement", str(error))


def crash(folder):
    """One process runs out of memory where the others do not expect it."""
    trainer = make_trainer(folder / "crash", **RUN, save_strategy="no")
    if PartialState().process_index == 1:

        def out_of_memory(*_):
            if trainer.state.global_step == 2:
                raise MemoryError("one process only")
            return {}

        trainer._forward_kwargs = out_of_memory
    trainer.train()


def main():
    folder = Path(sys.argv[1])
    scenarios(folder)
    sampling_and_resume(folder)
    reward_failure(folder)
    nonfinite(folder)
    disagreement(folder)
    note(folder, "finished", True)
    crash(folder)


if __name__ == "__main__":
    main()
