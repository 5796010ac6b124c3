"""`examples/shorter_answers.py`: its task, its verdict on numbers made by hand, and a very small run of everything."""

import importlib.util
import json
from pathlib import Path

import datasets
import pytest
import torch
import transformers

FILE = Path(__file__).parent.parent / "examples" / "shorter_answers.py"
SIZES = {
    "seeds": 5,
    "steps": 2,
    "start_steps": 2,
    "problems": 100,
    "held_out": 10,
    "prompts": 2,
    "num_generations": 4,
    "num_remains_in_group": 2,
}


@pytest.fixture(scope="module")
def script():
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("gfpo_shorter_answers", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


def arm(*pairs):
    return [{"length": length, "accuracy": accuracy} for length, accuracy in pairs]


def judged(script, **changed):
    """The verdict on two seeds, for a first model whose answers have 9 tokens."""
    runs = {
        "grpo k": arm((15.0, 0.98), (14.0, 0.97)),
        "grpo G": arm((14.0, 0.98), (14.5, 0.98)),
        "gfpo shortest": arm((10.0, 0.97), (9.0, 0.98)),
        "gfpo token efficiency": arm((12.0, 0.5), (12.0, 0.6)),
        "gfpo random": arm((14.5, 0.98), (13.5, 0.96)),
    }
    return script.verdict({"length": 9.0}, {**runs, **{name.replace("_", " "): new for name, new in changed.items()}})


# -- the task ---------------------------------------------------------------------------------------------------------
def test_demonstrations_are_running_totals_and_the_right_answer(script):
    train, held_out = script.problems(300, 50)
    assert not {*train["prompt"]} & {*held_out["prompt"]}
    sizes = set()
    for row in train:
        numbers = [int(digit) for digit in row["prompt"].removesuffix("=")]
        thinking, _, answer = row["completion"].partition("#")
        assert answer == row["answer"] == str(sum(numbers) % 5)
        assert [int(total) for total in thinking] == [sum(numbers[: i % 6 + 1]) % 5 for i in range(len(thinking))]
        sizes.add(len(thinking))
    assert sizes == set(range(13))  # from none to twice the six


def test_reward_looks_at_what_follows_the_marker_only(script):
    completions = ["012#3", "#3", "3", "012#3#3", "012#33", "012#2", "012#"]
    assert script.correct(completions, ["3"] * 7) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


# -- the verdict ------------------------------------------------------------------------------------------------------
def test_verdict_when_all_holds(script):
    found = judged(script)
    assert found["reproduced"]
    part = found["gfpo shortest against grpo k"]
    assert part["excess length reduction"] == pytest.approx([5 / 6, 1.0])
    assert part["spread of length"] == pytest.approx(1.0) and part["spread of accuracy"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    "changed",
    [
        {"grpo_k": arm((9.4, 0.98), (10.4, 0.97))},  # GRPO has not lengthened answers on one seed
        {"gfpo_shortest": arm((10.0, 0.97), (13.5, 0.98))},  # not shorter on one seed, by more than the spread
        {"gfpo_shortest": arm((10.0, 0.94), (9.0, 0.95))},  # less accurate on both seeds
        {"gfpo_random": arm((12.0, 0.98), (13.5, 0.96))},  # a filter that knows nothing shortens too
        {"gfpo_random": arm((14.5, 0.93), (13.5, 0.93))},  # ... or costs accuracy, which it cannot
    ],
)
def test_each_part_of_the_criterion_can_fail(script, changed):
    assert not judged(script, **changed)["reproduced"]


def test_no_growth_has_no_reduction(script):
    found = judged(script, grpo_k=arm((9.0, 0.9), (8.0, 0.9)))
    assert found["gfpo shortest against grpo k"]["excess length reduction"] == [None, None]


# -- a run ------------------------------------------------------------------------------------------------------------
def test_run_writes_its_report(script, tmp_path):
    words = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    script.main([*words, "--report", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["conditions"]["seeds"] == [5] and not found["verdict"]["reproduced"]
    assert all(len(runs) == 1 and len(runs[0]["length_by_tenth"]) == 2 for runs in found["runs"].values())
    text = (tmp_path / "RESULTS.md").read_text()
    assert "not reproduced" in text
    for name, (run,) in found["runs"].items():
        assert f"| {name} | {run['length']:.2f} |" in text
