"""Small runs of PPO in as many processes as this is started with; each writes what it ends with to FOLDER.

`torchrun --nproc-per-node 2 script_distributed_ppo.py FOLDER`
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file

from trl_core import get_config, get_trainer
from trl_core.testing import FixedRollouts, tiny_classifier, tiny_model, tiny_tokenizer

# Two rows a micro-batch. Two processes have one where a single process has two, so each step has the same means.
FIXED = {
    "head": {},
    "network": {"critic": True},
    "mini_batches": {"critic": True, "rows": 8, "num_mini_batches": 2, "max_grad_norm": 0.5},
    "adapter": {"critic": True, "adapter": True},
    # Three of four rows, one at a time: one process asks the critic twice, the other once.
    "one_row_at_a_time": {"critic": True, "unscored": [3], "local_rollout_forward_batch_size": 1},
    # One process has no row; then, in the next batch, neither has one.
    "process_without_rows": {"critic": True, "unscored": [1, 2, 3], "then": [0, 1, 2, 3]},
    "process_without_rows_head": {"unscored": [1, 2, 3], "then": [0, 1, 2, 3]},
}
"""Runs that must not depend on the number of processes."""
TOKENIZER = tiny_tokenizer()


def fixed_rollouts(rows):
    """Three batches of random completions of all lengths."""
    generator = torch.Generator().manual_seed(rows)

    def row():
        length = int(torch.randint(1, 7, (1,), generator=generator))
        return torch.randint(5, 261, (length,), generator=generator).tolist()

    return FixedRollouts([{"completion_ids": [row() for _ in range(rows)]} for _ in range(3)])


def reward(completion_ids, **_):
    """A number that depends on every token."""
    return [float(sum(ids) % 7 + 1) / 2 for ids in completion_ids]


def unscored(first, then):
    """The same, but None at some places of the first batch, and at others of the second."""
    batch = []

    def by_place(completion_ids, place, **_):
        missing = (first, then)[len(batch) % 2]
        batch.append(1)
        return [None if p in missing else x for p, x in zip(place, reward(completion_ids), strict=True)]

    return by_place


def make_trainer(folder, options, processes, *, fixed=True, **more):
    """A trainer of one of `FIXED`; it samples unless `fixed`."""
    torch.set_num_threads(1)
    options = {**options}
    critic, adapter, rows = (options.pop(name, None) for name in ("critic", "adapter", "rows"))
    rows = rows or 4
    missing = options.pop("unscored", None)
    reward_funcs = reward if missing is None else unscored(missing, options.pop("then", missing))
    args = get_config("ppo")(
        **{
            "output_dir": str(folder),
            "max_steps": 6 * options.get("num_mini_batches", 1),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": rows // 2 // processes,
            "response_length": 6,
            "num_ppo_epochs": 2,
            "stop_token": "eos",
            # Plain gradient descent: Adam would blow up the rounding of gradients near 0.
            "optim": "sgd",
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "shuffle_dataset": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "activation_checkpointing": False,
            **options,
            **more,
        }
    )
    places = [{"prompt": "say " + "x" * (i + 1), "place": i % rows} for i in range(3 * rows)]
    return get_trainer("ppo")(
        model=tiny_model(),
        args=args,
        reward_funcs=reward_funcs,
        train_dataset=Dataset.from_list(places),
        processing_class=TOKENIZER,
        value_model=tiny_classifier(seed=1) if critic else None,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if adapter else None,
        rollouts=fixed_rollouts(rows) if fixed else None,
    )


def end_weights(trainer):
    """All weights, by model."""
    models = {"policy": trainer.accelerator.unwrap_model(trainer.model), **trainer.extra_models}
    return {
        f"{of}.{name}": value.detach().contiguous().clone()
        for of, model in models.items()
        for name, value in model.state_dict().items()
    }


def log_of(trainer):
    """The log lines of all steps, without clocks."""
    clocks = ("time/", "step_time", "eps")
    return [
        {name: value for name, value in line.items() if not name.startswith(clocks)}
        for line in trainer.state.log_history
        if "loss" in line
    ]


def sampling_and_resume(folder, rank):
    """Real sampling with a clipped critic of its own; then the same from the middle of a batch."""
    options = {
        "critic": True,
        "rows": 8,
        "num_mini_batches": 2,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch",
        "shuffle_dataset": True,
    }
    whole = make_trainer(folder / "whole", options, 2, fixed=False, save_strategy="steps", save_steps=1, max_steps=6)
    whole.train()
    resumed = make_trainer(folder / "resumed", options, 2, fixed=False, max_steps=6)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    for name, trainer in (("whole", whole), ("resumed", resumed)):
        save_file(end_weights(trainer), folder / f"{name}-{rank}.safetensors")
    evaluated = whole.evaluate(Dataset.from_list([{"prompt": "x" * n, "place": n} for n in range(1, 4)]))
    (folder / f"evaluated-{rank}.json").write_text(json.dumps(evaluated))


def main():
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for name, options in FIXED.items():
        trainer = make_trainer(folder / name, options, int(os.environ["WORLD_SIZE"]))
        trainer.train()
        save_file(end_weights(trainer), folder / f"{name}-{rank}.safetensors")
        (folder / f"{name}-{rank}.json").write_text(json.dumps(log_of(trainer)))
    sampling_and_resume(folder, rank)
    (folder / f"finished-{rank}").touch()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
