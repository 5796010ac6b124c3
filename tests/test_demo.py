"""The demo's task: its sums, its reward, and what it says where another task cannot be had."""

import json
import re
import sys

import pytest

from .helpers_examples import give, loaded
from .test_house import ROOT


@pytest.fixture(scope="module")
def demo():
    with loaded(ROOT / "examples" / "demo" / "task.py") as module:
        yield module


def terms(row):
    asked = re.fullmatch(r"What is (\d+) \+ (\d+)\?", row["prompt"][-1]["content"])
    return sorted(map(int, asked.groups()))


def test_held_out_sums_are_never_trained_on_not_even_swapped(demo):
    train, held_out = demo.make_datasets(demo.Task(), seed=1)
    other, same = demo.make_datasets(demo.Task(), seed=2)
    assert held_out.to_list() == same.to_list() and train.to_list() != other.to_list()
    unseen = [terms(row) for row in held_out]
    assert len(unseen) == 48 and len({tuple(pair) for pair in unseen}) == 48
    assert not [row for data in (train, other) for row in data if terms(row) in unseen]
    assert all(int(row["answer"]) == sum(terms(row)) for data in (train, held_out) for row in data)


@pytest.mark.parametrize(
    ("text", "reward"),
    [("13", 1), (" The answer is 13.", 1), ("4 + 9 = 13", 1), ("13 or 14", 0), ("thirteen", 0), ("", 0)],
)
def test_last_number_is_the_answer(demo, text, reward):
    problem = json.dumps({"question": "What is 4 + 9?", "answer": "13"})
    assert demo.correct([text, [{"role": "assistant", "content": text}]], [problem] * 2, demo.Task()) == [reward] * 2


def test_task_of_a_package_that_is_not_there_says_what_it_needs(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(demo.MissingTaskError, match="reasoning-gym") as caught:
        demo.find_task("chain_sum")
    assert "C compiler" in str(caught.value) and "-m pip install -c constraints.txt -e '.[tasks]'" in str(caught.value)


def test_too_small_a_task_is_refused(demo):
    with pytest.raises(demo.MissingTaskError, match=r"found 0 of 512 for training besides \d+ of 400"):
        demo.make_datasets(demo.Task(), eval_size=400)


def test_script_trains_with_the_reward_of_its_task_and_leaves_its_files(tmp_path, monkeypatch):
    give(monkeypatch, "run.py", tmp_path, steps=1, prompts=1, eval_size=2)
    with loaded(ROOT / "examples" / "demo" / "run.py") as module:
        module.main()
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left >= {"metrics.jsonl", "completions", "curves.png", "before_after.json", "summary.json", "model"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "rewards/correct/mean" in line] == [1]
