"""Two processes train as one does on the same rows, sample apart, resume exactly and fail together."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch

from trl_core.testing import tiny_model

from .helpers_train import FIXED, differences, end_state, make_fixed_trainer, run_in_two


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two processes that have run the script: the folder they wrote to, the exit code and the error output."""
    folder = tmp_path_factory.mktemp("two")
    return folder, *run_in_two(Path(__file__).with_name("script_distributed.py"), folder)


@pytest.fixture(scope="module")
def two(job):
    """The folder with what two processes wrote."""
    folder, _, errors = job
    assert all((folder / f"finished-{rank}.json").exists() for rank in (0, 1)), errors[-6000:]
    return folder


@pytest.fixture(scope="module")
def pair(two, tmp_path_factory):
    """The ends of a scenario in one and in two processes, by name."""

    @functools.cache
    def ends(name):
        trainer, metrics = make_fixed_trainer(tmp_path_factory.mktemp("one"), name, 1)
        return {**end_state(trainer), "metrics": metrics}, torch.load(two / f"{name}.pt", weights_only=False)

    return ends


def far_apart(one, two, tolerance):
    """Names of numbers that differ, or that only one of them has."""
    names = [*one, *(name for name in two if name not in one)]
    missing = math.nan
    return {
        name: (one.get(name), two.get(name))
        for name in names
        # The extreme over processes of a mean in each process: theirs by definition.
        if name not in ("clip_ratio/low_min", "clip_ratio/high_max")
        and one.get(name, missing) != pytest.approx(two.get(name, missing), rel=tolerance, abs=tolerance)
    }


def distance(one, two):
    assert one.keys() == two.keys()
    return max((float((value - two[name]).abs().max()) for name, value in one.items()), default=0.0)


@pytest.mark.parametrize("name", FIXED)
def test_two_processes_reach_the_weights_of_one(name, pair, record_property):
    one, two = pair(name)
    apart = distance(one["weights"], two["weights"])
    record_property("largest_weight_difference", apart)
    print(f"largest weight difference {apart:.2e}")
    assert apart < 1e-5 and distance(one["reference"], two["reference"]) < 1e-5


@pytest.mark.parametrize("name", FIXED)
def test_one_process_moves_the_weights_far_enough_to_compare(name, pair):
    start = FIXED[name].get("model", tiny_model)().state_dict()
    now = {key: value for key, value in pair(name)[0]["weights"].items() if ".ref." not in key}
    assert distance(now, start) > 1e-3


@pytest.mark.parametrize("name", FIXED)
def test_two_processes_log_the_metrics_of_one(name, pair):
    one, two = pair(name)
    assert len(one["log"]) == len(two["log"]) > 0
    different = [far_apart(*lines, 1e-4) for lines in zip(one["log"], two["log"], strict=True)]
    assert not any(different), different


@pytest.mark.parametrize("name", [name for name in FIXED if "evaluate" in FIXED[name]])
def test_two_processes_evaluate_as_one(name, pair):
    one, two = (end["metrics"] for end in pair(name))
    assert {"eval_reward", "eval_loss", "eval_kl"} <= one.keys() and not far_apart(one, two, 1e-4)


def test_processes_sample_different_completions_of_a_prompt(two):
    first, second = (json.loads((two / f"sampled-{rank}.json").read_text()) for rank in (0, 1))
    shared = {prompt for prompt, _ in first} & {prompt for prompt, _ in second}
    assert shared
    for prompt in shared:
        of_first, of_second = ([text for other, text in rows if other == prompt] for rows in (first, second))
        assert of_first != of_second


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_resume_exactly(two, rank):
    whole, resumed = torch.load(two / f"resumed-{rank}.pt", weights_only=False)
    assert differences(resumed, whole) == []


def test_reward_error_in_one_process_stops_all_with_its_name(two):
    other, own = (json.loads((two / f"flaky-{rank}.json").read_text()) for rank in (0, 1))
    assert own[0] == "RewardError" and "'flaky' raised KeyError" in own[1]
    assert "Process 1 failed: The reward function 'flaky' raised KeyError" in other[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_go_on_after_a_mended_reward(two, rank):
    whole, _ = torch.load(two / f"resumed-{rank}.pt", weights_only=False)
    mended = torch.load(two / f"mended-{rank}.pt", weights_only=False)
    # The log differs in the name of the reward function.
    assert differences(mended["weights"], whole["weights"]) == []
    assert differences(mended["optimizer"], whole["optimizer"]) == []


def test_nonfinite_loss_of_one_process_stops_all(two):
    other, own = (json.loads((two / f"nan-{rank}.json").read_text()) for rank in (0, 1))
    assert "loss at step 3 is nan; the 3 rows" in own and "process-1.json" in own
    assert "loss at step 3 is bad in another process" in other
    assert [path.name for path in (two / "nan" / "nonfinite").iterdir()] == ["step-3-process-1.json"]
    assert (two / "nan" / "checkpoint-2" / "trl_core_state.json").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_filter_that_differs_between_processes_is_refused(two, rank):
    assert "keep answered differently in different processes" in json.loads(
        (two / f"disagreement-{rank}.json").read_text()
    )


def test_crash_of_one_process_ends_the_job(job, two):
    _, code, errors = job
    assert code != 0
    assert "MemoryError: one process only" in errors
