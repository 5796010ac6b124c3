"""`benchmarks/chaos.py`: kills are survived bit for bit, and a resume that forgets something is found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def chaos_of(tmp_path, *words):
    """The exit code and what is printed."""
    command = [sys.executable, str(FOLDER / "chaos.py"), "--out", str(tmp_path / "out"), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHONHASHSEED": "0"}
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def chaos():
    sys.path.insert(0, str(FOLDER))
    before = dict(os.environ)
    try:
        import chaos

        yield chaos
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop("chaos", None)
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.slow
def test_killed_runs_end_as_the_one_left_alone(tmp_path):
    code, said = chaos_of(tmp_path, "--short")
    assert code == 0, said
    (total,) = [line.split() for line in said.splitlines() if line.startswith("all ")]
    kills, resumed, equal, of = int(total[1]), int(total[2]), int(total[3]), int(total[5])
    assert (kills >= 20, resumed > 20, equal) == (True, True, of)
    for name in ("sft", "reward", "dpo", "bema", "grpo", "gfpo", "gspo", "gspo_token", "replay", "ppo"):
        assert any(line.split()[0] == name for line in said.splitlines()), f"{name} was not killed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "differs"), [("hooks", "state"), ("optimizer", "optimizer"), ("random numbers", "random numbers")]
)
def test_a_resume_that_forgets_something_is_found(fault, differs, tmp_path):
    code, said = chaos_of(tmp_path, "--kills", "4", "--only", "replay", "--fault", fault)
    assert code == 1, said
    assert any(line.startswith("replay, ") and differs in line for line in said.splitlines()), said


def test_every_subject_is_killed_at_every_moment(chaos):
    jobs = chaos.plan(list(chaos.SUBJECTS), 200)
    killed = [job for job in jobs if job.moment != "finished"]
    assert len(killed) == 200
    assert len({job.number for job in jobs}) == len(jobs)
    for subject in chaos.SUBJECTS:
        assert {job.moment for job in jobs if job.subject == subject} == set(chaos.MOMENTS)


def test_fingerprints_tell_every_bit_apart(chaos):
    one = {"a": [torch.tensor([0.1, float("nan")]), {"b": 1.0}], "c": None}
    same = {"c": None, "a": [torch.tensor([0.1, float("nan")]), {"b": 1.0}]}
    assert chaos._digest(one) == chaos._digest(same)
    bit = torch.nextafter(torch.tensor(0.1), torch.tensor(1.0)).item()
    for other in (
        {**one, "a": [torch.tensor([bit, float("nan")]), {"b": 1.0}]},
        {**one, "a": [torch.tensor([0.1, float("nan")]), {"b": 1.0000000000000002}]},
        {**one, "a": [torch.tensor([0.1, float("nan")]).double(), {"b": 1.0}]},
        {**one, "c": 0},
        {**one, "a": one["a"] * 2},
    ):
        assert chaos._digest(one) != chaos._digest(other)


@pytest.mark.parametrize(
    ("jobs", "expected"), [([{}], "1 of   1"), ([{"differs": ["log"]}, {}], "1 of   2"), ([{"error": "x"}], "0 of   1")]
)
def test_the_table_counts_what_differs(jobs, expected, chaos):
    table = chaos.report([chaos.Job("sft", "any time", i, 1, **job) for i, job in enumerate(jobs)])
    assert next(line for line in table.splitlines() if line.startswith("all ")).count(expected) == 1
