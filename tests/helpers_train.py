"""Small trainings on a tiny model that several tests, and the scripts they start, share."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model

from trl_core import get_config, get_trainer
from trl_core.testing import FixedRollouts, tiny_model, tiny_tokenizer
from trl_core.training.state import newest_sound

TOKENIZER = tiny_tokenizer()
CLOCKS = ("time/", "step_time", "train_runtime", "train_s", "eval_runtime", "eval_s", "eval_time/", "eval_step_time")
"""Beginnings of the names of logged values that no run repeats."""


def reward(completions, **_):
    """A number that depends on every character."""
    return [float(sum(map(ord, text)) % 7) + 0.1 * len(text) for text in completions]


def coarse_reward(completions, **_):
    """Equal for all completions of a group often enough to be refilled."""
    return [float(len(text) % 2) for text in completions]


def one_flat_group(prompts, completions, **_):
    """`reward`, but equal for all completions of every second prompt."""
    return [0.5 if len(p) % 2 else r for p, r in zip(prompts, reward(completions), strict=True)]


def prompt_dataset(rows: int = 5) -> Dataset:
    """Prompts of different lengths."""
    return Dataset.from_list([{"prompt": "ask " + "x" * (i + 1)} for i in range(rows)])


def prompt_stream(rows: int = 9) -> IterableDataset:
    """The same without a length, in another order each epoch."""
    return prompt_dataset(rows).to_iterable_dataset().shuffle(seed=1, buffer_size=4)


def adapted_model(seed: int = 0) -> Any:
    """A tiny model that already carries an adapter with weights of its own."""
    model = get_peft_model(tiny_model(seed=seed), lora_config())
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def lora_config() -> LoraConfig:
    """A small adapter with dropout."""
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def make_trainer(folder: Path | str, algorithm: str = "grpo", trainer: dict[str, Any] | None = None, **options: Any):
    """A trainer of `algorithm` that logs and saves every step; options and arguments override the small defaults."""
    torch.set_num_threads(1)
    defaults = {
        "output_dir": str(folder),
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "max_completion_length": 6,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "seed": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    arguments = {"reward_funcs": reward, "processing_class": TOKENIZER, **(trainer or {})}
    # Made for each trainer, as a user who starts again would.
    arguments = {name: value() if name in ("model", "train_dataset") else value for name, value in arguments.items()}
    arguments.setdefault("model", None)
    arguments["model"] = arguments["model"] or tiny_model(seed=0, attention_dropout=0.2)
    arguments.setdefault("train_dataset", prompt_dataset())
    return get_trainer(algorithm)(args=get_config(algorithm)(**{**defaults, **options}), **arguments)


def end_state(trainer: Any) -> dict[str, Any]:
    """All that a run leaves: weights, reference, optimizer, schedule, state of the algorithms, log without clocks."""
    reference = trainer.reference.module if trainer.reference is not None else None
    history = [
        {name: value for name, value in line.items() if not name.startswith(CLOCKS)}
        for line in trainer.state.log_history
    ]
    return copy.deepcopy(
        {
            "weights": dict(trainer.accelerator.unwrap_model(trainer.model).state_dict()),
            "reference": dict(reference.state_dict()) if reference is not None else {},
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "run": trainer.state_of_run(),
            "log": [line for line in history if "train_loss" not in line],
        }
    )


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested structures of tensors and plain values are not identical."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        same = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        missing = object()
        return [d for key in keys for d in differences(a.get(key, missing), b.get(key, missing), f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    return [] if a == b else [f"{path}: {a!r} != {b!r}"]


# -- killing a run from inside ----------------------------------------------------------------------------------------
KILLED = (
    "in_a_step",
    "in_save_before_optimizer",
    "in_save_half_optimizer",
    "in_save_before_reference",
    "in_save_before_state",
    "in_save_before_manifest",
    "after_save_while_deleting",
)
"""Moments at which `kill_at` ends the process; all but the first are in the save of the fourth step."""


def kill_at(trainer: Any, where: str) -> None:
    """Let the process be killed, without any clean-up, at one of the moments `KILLED`."""
    from trl_core.training import checkpoints, state

    def now() -> bool:
        return trainer.state.global_step == 4

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: Any, name: str, action: Any = die) -> None:
        real = getattr(owner, name)
        setattr(owner, name, lambda *a, **k: action(*a) if now() else real(*a, **k))

    def half(value: Any, path: Any) -> None:
        Path(path).write_bytes(b"half of a file")
        die()

    if where == "in_a_step":
        before(trainer.hooks.objects["grpo"], "_log_clipping")
    elif where == "in_save_before_optimizer":
        before(trainer, "_save_optimizer_and_scheduler")
    elif where == "in_save_half_optimizer":
        before(torch, "save", half)
    elif where == "in_save_before_reference":
        before(checkpoints, "save_file")
    elif where == "in_save_before_state":
        before(checkpoints, "write_tensors")
    elif where == "in_save_before_manifest":
        before(state.os, "replace")
    else:
        before(shutil, "rmtree", lambda path, *_: ((Path(path) / "model.safetensors").unlink(), die()))


# -- the same rollouts in any number of processes ---------------------------------------------------------------------
FIXED: dict[str, dict[str, Any]] = {
    # 8 rows a micro-batch, 16 a generation batch.
    "dapo": {"rows": 8, "beta": 0.1, "max_steps": 6},
    "grpo": {"rows": 8, "loss_type": "grpo", "beta": 0.1, "gradient_accumulation_steps": 2, "max_steps": 4},
    # 6 rows a micro-batch, groups of 4: with two processes a group lies across both.
    "gfpo": {"rows": 6, "algorithm": "gfpo", "num_remains_in_group": 2, "beta": 0.1, "max_steps": 6},
    "entropy_quantile": {"rows": 8, "top_entropy_quantile": 0.3, "max_steps": 4},
    # Row 2 of a group is alone in its micro-batch, so that one of two processes has none.
    "process_without_rows": {
        "rows": 2,
        "algorithm": "gfpo",
        "filter": lambda completions, rewards: [[1.0, 1.0, 1.0, 0.0] for _ in rewards],
        "num_remains_in_group": 3,
        "shuffle_dataset": False,
        "beta": 0.1,
        "top_entropy_quantile": 0.5,
        "max_steps": 4,
    },
    # A process may have rows without advantage alone, and another none of them.
    "rows_without_advantage": {"rows": 8, "reward": lambda **rows: one_flat_group(**rows), "max_steps": 4},
    "rows_in_parts": {
        "rows": 8,
        "reward": lambda **rows: one_flat_group(**rows),
        "beta": 0.1,
        "max_tokens_per_forward": 12,
        "max_steps": 4,
    },
    "adapter": {"rows": 8, "model": lambda: adapted_model(), "beta": 0.1, "max_steps": 4, "disable_dropout": True},
    "moving_reference": {"rows": 8, "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 5},
    # One row a batch with the sampler's log-probabilities: a second process has no row at all.
    "evaluation": {"rows": 8, "evaluate": 1, "beta": 0.1, "max_steps": 1},
    "evaluation_of_groups": {"rows": 8, "evaluate": 4, "beta": 0.1, "max_steps": 1},
}
"""Runs that must not depend on the number of processes; `rows` are those of a micro-batch over all processes."""


def fixed_rollouts(rows: int, logps: bool = False) -> FixedRollouts:
    """Two generations of random completions, some ended and some cut off."""
    generator = torch.Generator().manual_seed(rows)

    def row() -> list[int]:
        length = int(torch.randint(1, 6, (1,), generator=generator))
        ended = [1] if length < 4 else []
        return torch.randint(5, 261, (length,), generator=generator).tolist() + ended

    entries = [{"completion_ids": [row() for _ in range(rows)]} for _ in range(2)]
    if logps:
        entries = [{**entry, "logps": [[-5.0] * len(ids) for ids in entry["completion_ids"]]} for entry in entries]
    return FixedRollouts(entries, cycle=True)


def make_fixed_trainer(folder: Path | str, name: str, processes: int) -> tuple[Any, dict[str, float]]:
    """Run one of `FIXED` to its end; the trainer and the metrics of its evaluation."""
    # Plain gradient descent: Adam would blow up the rounding of gradients near 0.
    options = {
        "save_strategy": "no",
        "algorithm": "grpo",
        "optim": "sgd",
        "learning_rate": 0.02,
        "max_grad_norm": 0.0,
        **FIXED[name],
    }
    rows, algorithm, evaluate = options.pop("rows"), options.pop("algorithm"), options.pop("evaluate", 0)
    slices = options["steps_per_generation"] = 4 if rows == 2 else 2
    trainer = {"rollouts": fixed_rollouts(rows * slices)}
    if "reward" in options:
        trainer["reward_funcs"] = options.pop("reward")
    if algorithm == "gfpo":
        trainer["group_filter_func"] = options.pop("filter", "shortest")
    trainer["model"] = options.pop("model", tiny_model)
    if evaluate:
        options["num_generations_eval"] = evaluate
        options["per_device_eval_batch_size"] = (1 if evaluate == 1 else 8) // (1 if evaluate == 1 else processes)
    made = make_trainer(folder, algorithm, trainer, per_device_train_batch_size=rows // processes, **options)
    made.train()
    if not evaluate:
        return made, {}
    prompts = 1 if evaluate == 1 else 4
    backend = made.hooks.objects["rollouts"]
    backend.generations = fixed_rollouts(1 if evaluate == 1 else 8, logps=True).generations
    metrics = made.evaluate(prompt_dataset(prompts))
    return made, {name: value for name, value in metrics.items() if not name.startswith(CLOCKS)}


def run_in_two(script: Path, folder: Path, *, forked: bool = False) -> tuple[int, str]:
    """Run a script in two processes that train together; the exit code and the error output.

    They are started by torchrun; or forked from one that has imported what they need, which takes a third of the time.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    if forked:
        command = [sys.executable, str(Path(__file__).with_name("script_two.py")), str(script)]
    with open(folder / "stderr", "w+") as errors:
        job = subprocess.Popen([*command, str(folder)], stderr=errors, start_new_session=True)
        try:
            code = job.wait(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            raise
    return code, (folder / "stderr").read_text()


def newest_checkpoint(folder):
    """The checkpoint of the highest step, read whole; None if there is none that can be resumed from."""
    return newest_sound(folder)[0]
