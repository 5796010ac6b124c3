"""Two processes store, draw and train as one does, with groups that lie across both, and resume exactly."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_core.testing import tiny_model

from .helpers import ended, lines, run_straddling, seen, tags

SCRIPT = Path(__file__).with_name("script_two_processes.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each process ended with, by name."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    with open(folder / "errors", "w+") as errors:
        job = subprocess.Popen([*command, str(folder)], stderr=errors, start_new_session=True)
        try:
            code = job.wait(timeout=200)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            raise
    assert code == 0, (folder / "errors").read_text()[-6000:]
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same run in one process."""
    return run_straddling(tmp_path_factory.mktemp("one"))


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_one_process_replays_groups_across_slices(one):
    replaced = [line["replay/replaced_groups"] for line in lines(one) if "replay/replaced_groups" in line]
    assert replaced == [0, 2, 3, 2]
    first_slices = [tags(rows) for rows, _ in seen(one)[::4]]
    assert all(len(set(slice_tags)) > 1 for slice_tags in first_slices)


def test_two_processes_reach_what_one_does(one, two, record_property):
    apart = largest_difference(ended(one), two["whole-0"])
    record_property("largest_difference", apart)
    print(f"largest difference {apart:.2e}")
    # Tokens and metrics of replay are among what is compared, and are whole numbers.
    assert apart < 1e-5
    assert {"0.completion_ids", "0.old_logps", "0.ref_logps", "replay/mean_age"} < two["whole-0"].keys()


def test_one_process_moves_the_weights_far_enough_to_compare(one):
    start = tiny_model().state_dict()
    assert max(float((value - start[name]).abs().max()) for name, value in one.model.state_dict().items()) > 1e-2


def test_both_processes_end_alike(two):
    assert all(torch.equal(value, two["whole-1"][name]) for name, value in two["whole-0"].items())


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_resume_exactly(rank, two):
    whole, resumed = two[f"whole-{rank}"], two[f"resumed-{rank}"]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
