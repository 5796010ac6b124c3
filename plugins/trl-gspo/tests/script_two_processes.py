"""Trains with an advantage function in as many processes as this is started with, which write their ends to a folder.

`torchrun --nproc-per-node 2 script_two_processes.py FOLDER`. Three groups of four rows: the second straddles the two.
"""

import sys
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from test_gspo import completions, make_trainer, weights


def reward(completion_ids, **_):
    return [sum(ids) % 7 / 2 for ids in completion_ids]


def share_of_the_longest(completion_ids, advantages):
    """Knows the rows of all processes: the unit of a token's place is the longest completion of the batch."""
    longest = max(map(len, completion_ids))
    pairs = zip(completion_ids, advantages, strict=True)
    return [[advantage * (i + 1) / longest for i in range(len(ids))] for ids, advantage in pairs]


def trained(folder, processes):
    batch = completions([6, 2, 4, 3, 5, 1, 7, 3, 2, 4, 8, 3])
    trainer = make_trainer(
        folder,
        batch=batch,
        arguments={"reward_funcs": reward, "advantage_func": share_of_the_longest},
        per_device_train_batch_size=len(batch) // processes,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    folder, state = Path(sys.argv[1]), PartialState(cpu=True)
    trainer = trained(folder / "two", state.num_processes)
    end = {"weights": weights(trainer), "advantages": trainer.window.samples.advantages}
    save_file(end, folder / f"process-{state.process_index}.safetensors")
    state.destroy_process_group()
