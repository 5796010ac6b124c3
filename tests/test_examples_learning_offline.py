"""`examples/learning/offline.py`: its data, its verdict on numbers made by hand, and a very small run of everything."""

import json
import random
from pathlib import Path

import pytest

from .helpers_examples import loaded

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "learning"


@pytest.fixture(scope="module")
def script():
    with loaded(FOLDER / "offline.py") as module:
        yield module


def runs(*figures):
    return [{"before": {"figure": before}, "after": {"figure": after}} for before, after in figures]


def test_pairs_hold_the_right_and_the_careless_answer(script):
    rows, _ = script.problems(500, 10)
    found = script.pairs(rows)
    assert 0 < len(found) < 500  # some careless answers are right
    for row in found:
        digits = row["prompt"].removesuffix("=")
        assert row["chosen"] == "".join(sorted(digits)) != row["rejected"]
        assert row["rejected"] == "".join(sorted(digits[:-1])) + digits[-1]


def test_controls_have_the_same_rows_and_say_nothing(script):
    rows, _ = script.problems(500, 10)
    given, shuffled = script.pairs(rows), script.pairs(rows, random.Random(0))
    swapped = [a["chosen"] == b["rejected"] for a, b in zip(given, shuffled, strict=True)]
    assert sum(swapped) == len(given) // 2 and given["prompt"] == shuffled["prompt"]
    given, shuffled = script.demonstrations(rows), script.demonstrations(rows, random.Random(0))
    assert sorted(given["completion"]) == sorted(shuffled["completion"]) and given["prompt"] == shuffled["prompt"]
    assert sum(a == b for a, b in zip(given["completion"], shuffled["completion"], strict=True)) < 20


def test_verdict_wants_a_rise_and_a_lead_beyond_the_spread(script):
    trained, control = runs((0.3, 0.9), (0.3, 0.8)), runs((0.3, 0.3), (0.3, 0.6))
    assert script.verdict(trained, control) == pytest.approx(
        {"held": True, "spread": 0.1, "least rise": 0.5, "least lead": 0.2}
    )
    assert not script.verdict(trained, runs((0.3, 0.75)))["held"]
    assert not script.verdict(runs((0.3, 0.9), (0.3, 0.6)), control)["held"]
    assert not script.verdict(runs((0.85, 0.9), (0.85, 0.8)), control)["held"]


@pytest.mark.slow
def test_run_writes_its_report(script, tmp_path):
    sizes = {"seeds": 0, "steps": 2, "rows": 8, "problems": 200, "held_out": 20, "start_steps": 5}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    script.main([*words, "--output", str(tmp_path), "--cache", str(tmp_path / "cache")])
    found = json.loads((tmp_path / "offline.json").read_text())
    assert list(found["runs"]) == script.NAMES and list(found["verdict"]) == ["sft", "reward", "dpo"]
    lines = (tmp_path / "OFFLINE.md").read_text().splitlines()
    for name, (run,) in found["runs"].items():
        assert 0 <= run["after"]["figure"] <= 1
        assert any(line.startswith(f"| {name} |") and f"| {run['after']['figure']:.3f} |" in line for line in lines)
