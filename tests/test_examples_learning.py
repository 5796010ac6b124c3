"""`examples/learning`: its parts, and a very small run of everything it does."""

import json
import random
from pathlib import Path

import pytest

from .helpers_examples import loaded

pytest.importorskip("matplotlib", reason="the picture needs the extra 'demo'")
FOLDER = Path(__file__).resolve().parent.parent / "examples" / "learning"
GENERATIONS = 2


@pytest.fixture(scope="module")
def script():
    with loaded(FOLDER / "run.py") as module:
        yield module


@pytest.fixture(scope="module")
def results(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning")
    sizes = {"seeds": 0, "generations": GENERATIONS, "rows": 32, "problems": 200, "held_out": 20, "start_steps": 5}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    script.main([*words, "--output", str(folder), "--cache", str(folder / "cache"), "--report", str(folder / "report")])
    return folder


# -- parts ------------------------------------------------------------------------------------------------------------
def test_no_held_out_problem_is_a_rearrangement_of_a_trained_one(script):
    train, held_out = script.problems(1000, 200)
    assert len(train) == len(set(train["prompt"])) == 1000 and len(held_out) == len(set(held_out["prompt"])) == 200
    assert not {*train["answer"]} & {*held_out["answer"]}
    for row in held_out:
        assert row["answer"] == "".join(sorted(row["prompt"].removesuffix("=")))


def test_the_teacher_is_careless_about_the_last_digit_only(script):
    train, _ = script.problems(2000, 10)
    wrong = [row for row in train if row["demonstration"] != row["answer"]]
    assert 0.4 < len(wrong) / len(train) < 0.8  # four in five, but for last digits that belong there
    for row in wrong:
        digits = row["prompt"].removesuffix("=")
        assert row["demonstration"] == "".join(sorted(digits[:-1])) + digits[-1]


def test_reward_wants_exactly_the_right_characters(script):
    assert script.correct(["01247", "0124", "012477", "01274", ""], ["01247"] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_tokenizer_gives_one_token_per_character_and_back(script):
    from digits import character_tokenizer

    tokenizer = character_tokenizer()
    ids = tokenizer("40712=")["input_ids"]
    assert len(ids) == len(set(ids)) == 6 and tokenizer.decode(ids) == "40712="
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "40712="


def test_filter_keeps_right_and_wrong_answers(script):
    (scores,) = script.right_and_wrong([["x"] * 6], [[1.0, 1.0, 1.0, 0.0, 0.0, 1.0]])
    assert scores == [0.0, -1.0, -2.0, 0.0, -1.0, -3.0]  # the best four are two of each


def test_credit_blames_from_the_first_wrong_character_on(script):
    texts, ids = ["01247", "01724", "1"], [[0] * 6, [0] * 6, [0] * 2]
    found = script.from_first_error(texts, ids, ["01247"] * 3, [0.5, -0.25, -1.0])
    assert found == [[0.5] * 6, [0.0] * 2 + [-0.25] * 4, [-1.0] * 2]


def test_shuffled_rewards_are_the_same_in_another_order(script):
    random.seed(0)
    rewards = script.Rewards(shuffled=True)
    texts, answers = ["1"] * 10 + ["2"] * 10, ["1"] * 20
    found = rewards(completions=texts, answer=answers)
    assert sorted(found) == [0.0] * 10 + [1.0] * 10 and found != script.correct(texts, answers)
    assert rewards.means == [0.5]


# -- all of it, small -------------------------------------------------------------------------------------------------
def test_every_algorithm_runs_and_its_rewards_are_kept(script, results):
    found = json.loads((results / "results.json").read_text())
    assert [run["algorithm"] for run in found["runs"]] == list(script.algorithms(32))
    assert found["before"].keys() == {"sampled", "greedy"}
    for run in found["runs"]:
        assert len(run["rewards"]) == GENERATIONS, run["algorithm"]
        assert all(0 <= value <= 1 for value in [*run["rewards"], run["sampled"], run["greedy"]])
    for run in found["runs"]:
        assert ("groups replaced" in run["reported"]) == ("replay" in run["algorithm"])


def test_table_and_picture_are_written(script, results):
    lines = (results / "report" / "RESULTS.md").read_text().splitlines()
    for name in script.algorithms(32):
        assert sum(line.startswith(f"| {name} |") for line in lines) == 3, name  # rewards, held out, options
    assert (results / "report" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert not (results / "RESULTS.md").exists()


def test_the_first_model_is_made_once(script, results):
    (folder,) = (results / "cache").iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    rows, _ = script.problems(200, 20)
    start = script.Start(steps=5, problems=200)
    assert script.start_model(start, rows, results / "cache") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_rise_and_spread_of_the_table_are_those_of_the_rewards(script):
    from curves import report

    rewards = {0: [0.1, 0.3, *[0.7] * 5], 1: [0.2, 0.2, *[0.9] * 5]}
    runs = [
        {"rewards": r, "seed": s, "sampled": 0.5, "greedy": 0.5, "seconds": 1.0, "reported": {"clipped": s / 2}}
        for s, r in rewards.items()
    ]
    at = {"generations": 7, "rows": 8, "groups": 1, "seeds": [0, 1], "held_out": 1, "draws": 1, "temperature": 1.0}
    at |= {"start": {"parameters": 1, "steps": 1}, "machine": "", "versions": {}, "options": {}}
    lines = report({"conditions": at, "before": {"sampled": 0.1, "greedy": 0.1}}, {"grpo": runs})
    assert "| grpo | 0.20, 0.20 | 0.70, 0.90 | 0.50 | 0.20 | clipped 0.25 |" in lines
