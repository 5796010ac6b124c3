"""PPO in two processes: they train as one does on the same rows, also where one has none, and resume exactly."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .helpers_train import run_in_two
from .script_distributed_ppo import FIXED, end_weights, log_of, make_trainer


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder with what two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    code, errors = run_in_two(Path(__file__).with_name("script_distributed_ppo.py"), folder, forked=True)
    assert code == 0 and all((folder / f"finished-{rank}").exists() for rank in (0, 1)), errors[-6000:]
    return folder


def distance(one, other):
    assert one.keys() == other.keys()
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


@pytest.mark.parametrize("name", FIXED)
def test_two_processes_train_as_one(name, two, tmp_path):
    one = make_trainer(tmp_path, FIXED[name], 1)
    start = end_weights(one)
    one.train()
    ends = [load_file(two / f"{name}-{rank}.safetensors") for rank in (0, 1)]
    assert distance(*ends) == 0.0
    for model in ("policy", "value_model"):
        before, after, other = (
            {key: value for key, value in weights.items() if key.startswith(model)}
            for weights in (start, end_weights(one), ends[0])
        )
        assert distance(after, before) > 1e-3  # far enough to compare
        assert distance(after, other) < 1e-5
    logs = [json.loads((two / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
    shared = ("loss", "reward", "episode", "val/num_eos_tokens", "grad_norm")
    for line, (first, second) in zip(log_of(one), zip(*logs, strict=True), strict=True):
        names = {key for key in line if key in shared or key.startswith("objective/")}
        assert names == {key for key in first if key in names}
        for key in names:
            assert first[key] == second[key]
            assert line[key] == pytest.approx(first[key], rel=1e-4, abs=1e-5, nan_ok=True), key


def test_processes_are_compared_where_one_has_no_rows(two):
    (first, *_, third) = json.loads((two / "process_without_rows-0.json").read_text())[:3]
    assert first["loss"] != 0 and third["loss"] == 0 and math.isfinite(first["grad_norm"])


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_resume_exactly(rank, two):
    whole, resumed = (load_file(two / f"{name}-{rank}.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_two_processes_evaluate(two):
    first, second = (json.loads((two / f"evaluated-{rank}.json").read_text()) for rank in (0, 1))
    for name in ("eval_reward", "eval_loss/value_avg", "eval_objective/kl"):
        assert math.isfinite(first[name]) and first[name] == second[name]
