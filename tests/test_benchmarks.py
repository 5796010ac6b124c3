"""`benchmarks/`: what is counted, what is drawn, what becomes of the measurements; never how long something takes."""

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.generation.stopping_criteria import EosTokenCriteria

from trl_core.testing import tiny_model, tiny_tokenizer

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = ("works", "flops", "machine", "report", "run", "worker")


@pytest.fixture(scope="module")
def bench():
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


# -- what the mathematics needs ----------------------------------------------------------------------------------------
def test_the_size_of_a_model_is_what_its_matrix_products_say(bench):
    model = tiny_model(attn_implementation="eager")
    size, tokens = bench.flops.size_of(model), 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, tokens, dtype=torch.long))
    attention = 4 * size.layers * size.width * tokens * tokens  # nothing is left out above the diagonal
    assert counter.get_total_flops() == 2 * (size.body + size.head) * tokens + attention
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_operations_of_a_group_and_of_a_pair(bench):
    size = bench.flops.size_of(tiny_model())
    assert (size.body, size.head, size.layers, size.width) == (18432, 261 * 32, 2, 32)
    # Prompt of 3, completions of 2 and 1: 3 + 1 + 0 tokens, 3 logits, 6 + 4 pairs of tokens.
    once = 2 * 18432 * 4 + 2 * 8352 * 3 + 4 * 2 * 32 * 10
    assert bench.flops.forward(size, 3, [2, 1]) == once
    assert bench.flops.grpo(size, [(3, [2, 1]), (3, [2, 1])]) == {"generate": 2 * once, "update": 6 * once}
    assert bench.flops.dpo(size, [(3, [2, 1])]) == {"update": 4 * once}
    assert bench.flops.least_bytes(size, 5)["generate"] == 5 * 4 * (18432 + 8352)


# -- lengths that are set beforehand -----------------------------------------------------------------------------------
def sampled(ends, lengths, *, leaves):
    """Lengths of rows of tokens 5 and 6, some of them equal; those that end may leave, and the others turn round."""
    ids, numbers, done = torch.tensor([[7, 7], [7, 7], [7, 7]]), [0, 1, 2], {}
    for step in range(max(lengths)):
        ids = torch.cat([ids, torch.tensor([[5 + number * step % 2] for number in numbers])], 1)
        ends.end(ids)
        done |= {number: row for number, row in zip(numbers, ids.tolist(), strict=True)}
        if leaves:
            stay = [i for i in range(len(numbers)) if ids[i, -1] != 0][::-1]
            ids, numbers = ids[stay], [numbers[i] for i in stay]
    return [row.index(0) - 1 for row in done.values()]


@pytest.mark.parametrize("leaves", [False, True])
def test_rows_end_where_they_should_whether_they_stay_in_the_batch_or_leave_it(bench, leaves):
    asked = []

    def lengths(prompt):
        asked.append(prompt)
        return [2, 1, 4] if len(asked) == 1 else [1, 3, 3]

    ends = bench.worker.Ends(lengths, terminator=0)
    assert sorted(sampled(ends, [2, 1, 4], leaves=leaves)) == [1, 2, 4]
    assert sorted(sampled(ends, [1, 3, 3], leaves=leaves)) == [1, 3, 3]
    assert asked == [[7, 7]] * 2 and ends.ended == 6


def test_lengths_vary_and_depend_on_the_prompt_alone(bench):
    drawn = [bench.works.various_lengths([9, 9, number, 4], pad=9, group=4) for number in range(100)]
    assert drawn[3] == bench.works.various_lengths([3, 4], pad=9, group=4) != drawn[4]
    every = [length for lengths in drawn for length in lengths]
    assert 16 <= min(every) < 18 and 240 < max(every) <= 256


def test_the_worker_trains_on_completions_of_the_set_lengths(bench, tmp_path, monkeypatch, capsys):
    tokenizer, criterion = tiny_tokenizer(), EosTokenCriteria
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(criterion, "__call__", criterion.__call__)  # put back afterwards
    monkeypatch.setattr(bench.works, "LONGEST", 24)
    monkeypatch.setattr(sys, "argv", ["worker.py", "trl_core", "--work", "d", "--model", str(tmp_path), "--steps", "2"])
    bench.worker.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in bench.works.cases(24, 1)[8:]]
    assert result["new"] == pytest.approx(sum(sum(bench.works.various_lengths(ids, 2, 4)) for ids in prompts) / 2)
    assert len(result["seconds"]) == 2 and len(result["losses"]) == 3
    assert result["forwarded"] < 2 * result["tokens"]
    assert sum(result["phases"].values()) == pytest.approx(sum(result["seconds"]) / 2, rel=0.5)


# -- results -----------------------------------------------------------------------------------------------------------
CONDITIONS = {"model": "tiny", "dtype": "float32", "checkpointing": False, "cpu": "a processor", "cores": 2}


def record(work, library, seconds, peak, **more):
    version = {library.replace("_", "-"): "9.9"}
    return {
        **CONDITIONS,
        **{"date": "2026-01-01T00:00:00+00:00", "device": "CPU", "threads": 1, "versions": version},
        **{"work": work, "library": library, "seconds": seconds, "peak_gib": peak, "phases": {"rest": seconds[0]}},
        **{"tokens": 100.0, "forwarded": 50.0 if library == "trl_core" else 200.0},
        **more,
    }


def growth(library, prompt, group, seconds, peak=1.0):
    return record("f", library, [seconds], peak, point={"prompt": prompt, "group": group})


@pytest.fixture
def folder(bench, tmp_path):
    records = [
        record("a", "trl_core", [1.0, 2.0, 9.0], 2.0),
        record("a", "trl", [10.0, 8.0, 6.0], 8.0),
        record("a", "trl_core", [4.0, 3.0], 4.0),
        record("b", "trl_core", [1.0], 2.0),
        *(growth("trl_core", 256, group, 1 + 0.5 * group) for group in (2, 4, 8)),
        *(growth("trl_core", 1, group, 0.5 + 0.25 * group) for group in (8, 32)),
        {**growth("trl", 256, 32, 0.0), "skipped": "too slow"},
        record("h", "trl", [0.2, 0.1, 0.3], 0.5, command="import"),
        CONDITIONS | {"date": "2026", "work": "peak", "matmul": 2e11, "read": 1e10, "rates": {"1 x 1 x 1": 2e11}},
    ]
    bench.report.save(tmp_path, records)
    return tmp_path


def test_processes_of_one_work_are_taken_together(bench, folder):
    found = bench.report.by_work(bench.report.load(folder))
    ours, theirs = found["a"]["trl_core"], found["a"]["trl"]
    assert (ours.seconds, ours.fastest, ours.slowest, ours.steps, ours.processes) == (3.0, 1.0, 9.0, 5, 2)
    assert (ours.peak, theirs.seconds, theirs.peak) == (3.0, 8.0, 8.0)
    ratios = bench.report.ratios(ours, theirs)
    assert ratios == {"time": 3 / 8, "peak memory": 3 / 8, "tokens through the policy": 1 / 4}


def test_the_growth_of_a_group_is_compared_with_completions_almost_without_a_prompt(bench, folder):
    points = bench.report.by_point(bench.report.load(folder))["trl_core"]
    assert bench.report.slope(*bench.report.curve(points, "group", 256, "seconds")) == pytest.approx(0.5)
    assert (
        "0.500 s and 0.000 GiB; with a prompt of 1 token: 0.250 s. Ratio 2.00" in bench.report.growth_lines(points)[0]
    )


def test_the_table_says_what_was_measured_and_under_which_conditions(bench, folder):
    text = bench.report.markdown(bench.report.load(folder))
    assert "| a | trl-core 9.9 | 3.00 | 1.00-9.00 |" in text
    assert "| a | 0.38 | 0.38 | 0.25 |" in text
    assert "| TRL 9.9 | 256 | 32 | too slow |" in text
    assert "| import | TRL | 0.20 | 0.10-0.30 | 3 | 512 |" in text
    assert "a processor; cores 2" in text and "10.0 GB/s" in text
    assert text.count("## tiny") == 1  # what has no device goes with the rest


def test_rendering_writes_table_and_plot(bench, folder, capsys):
    bench.report.render(folder)
    assert "trl-core 9.9" in (folder / "results.md").read_text()
    if importlib.util.find_spec("matplotlib"):
        assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "pip install matplotlib" in capsys.readouterr().err


def test_results_are_added_to_those_of_before(bench, folder):
    before = bench.report.load(folder)
    bench.run.Results(folder, CONDITIONS).add(work="h", library="trl", command="list", seconds=[1.0], peak_gib=1.0)
    after = bench.report.load(folder)
    assert after[:-1] == before and after[-1]["command"] == "list" and after[-1]["model"] == "tiny"


# -- the command line --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "m", "--work", "a", "z"], "invalid choice: 'z'"),
        (["--model", "m"], "give --work, --peak or --render"),
        (["--work", "a"], "--model is needed"),
    ],
)
def test_what_cannot_be_run_is_refused(bench, capsys, arguments, says):
    with pytest.raises(SystemExit):
        bench.run.parse(arguments)
    assert says in capsys.readouterr().err


def test_a_library_that_is_missing_is_named_before_anything_runs(bench):
    options = bench.run.parse(["--model", "m", "--work", "g", "--libraries", "trl", "--trl-ppo-python", "/bin/false"])
    with pytest.raises(SystemExit, match=r"(?s)trl.experimental.ppo cannot be imported.*--trl-ppo-python"):
        bench.run.check(options)


def test_a_folder_without_results_is_named(bench, tmp_path):
    with pytest.raises(SystemExit, match=r"no results\.json"):
        bench.report.render(tmp_path)


def test_growth_leaves_out_what_would_be_too_much_for_the_machine(bench, monkeypatch, tmp_path):
    def train(options, results, library, work, *, prompt, group):
        tokens = group * (prompt + bench.works.GROWTH_NEW)
        seconds = [tokens / 100]  # 90 s at 9,000 tokens
        return results.add(work=work, library=library, point={}, seconds=seconds, peak_gib=1.0, memory_gib=16.0)

    monkeypatch.setattr(bench.run, "train", train)
    results = bench.run.Results(tmp_path, CONDITIONS)
    bench.run.grow(argparse.Namespace(libraries=("trl_core", "trl"), growth_seconds=90.0), results)
    done = [r["library"] for r in results.records if "skipped" not in r]
    skipped = [r for r in results.records if "skipped" in r]
    assert (done.count("trl_core"), done.count("trl")) == (10, 9)
    assert [(r["library"], r["point"]) for r in skipped] == [("trl", {"prompt": 256, "group": 32})]
