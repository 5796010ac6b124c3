"""Rewards beside other work in two processes; each writes what it ends with to FOLDER."""

import json
import os
import sys
from pathlib import Path

from helpers_rewards import awaited, half  # all that the processes of the rewards import; the rest is below

RUN = {
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 2,
    "num_generations": 4,
    "steps_per_generation": 2,
    "max_steps": 4,
    "beta": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "no",
}


def run(folder, name, functions, **options):
    from helpers_train import make_trainer, prompt_dataset

    from trl_core.errors import TRLCoreError

    trainer = {"reward_funcs": functions, "train_dataset": lambda: prompt_dataset(6), "eval_dataset": prompt_dataset(4)}
    made = make_trainer(folder / name, trainer=trainer, **{**RUN, **options})
    error = None
    try:
        made.train()
    except TRLCoreError as caught:
        error = [type(caught).__name__, str(caught)]
    return made, error


def main():
    import torch
    from helpers_train import end_state

    folder = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    ends = {}
    for overlap in (True, False):
        made, _ = run(folder, f"same-{overlap}", [awaited, half], overlap_rewards=overlap, reward_processes=1)
        ends[overlap] = end_state(made)
    torch.save(ends, folder / f"ends-{rank}.pt")

    calls = []

    async def flaky(completions, **_):
        calls.append(len(completions))
        # The fourth call is the second batch of the first evaluation.
        if rank == 1 and len(calls) == 4:
            raise KeyError("no such answer")
        return await awaited(completions)

    made, error = run(folder, "flaky", flaky)
    report = {"error": error, "step": made.state.global_step}
    (folder / f"flaky-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
