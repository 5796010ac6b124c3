"""The log of completions: columns, few files, each step once whatever happens to the run, and rows on the screen."""

import os
import signal
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import load_dataset

from trl_core.batch import Rollouts
from trl_core.errors import OutputDirError
from trl_core.testing import tiny_model
from trl_core.training import completions as module
from trl_core.training.completions import CompletionLog

from .helpers_online import TOKENIZER, Recorder, completions, make_trainer, prompts, table

pytestmark = pytest.mark.filterwarnings("ignore::trl_core.TRLExperimentalWarning")
LENGTHS = completions(6, 2, 4, 3)
FIXED = ["step", "prompt", "completion", "reward", "advantage", "kept", "length", "truncated"]


def trained(folder, algorithm="grpo", trainer=None, resume=None, **options):
    recorded = Recorder(LENGTHS, cycle=True)
    options = {"log_completions": True, "num_completions_to_print": 0, **options}
    made = make_trainer(folder, algorithm, {"rollouts": recorded, **(trainer or {})}, **options)
    made.train(resume_from_checkpoint=resume)
    return made


def files(folder):
    return sorted(path.name for path in (folder / "completions").iterdir())


def read(folder):
    """As the documentation says."""
    pattern = str(folder / "completions" / "*.parquet")
    return load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(folder / "cache"))


def length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def test_completions_are_written_with_rewards_and_advantages(tmp_path):
    trained(
        tmp_path,
        "gfpo",
        {"group_filter_func": "shortest", "reward_funcs": [table(1.0, 0.0, 0.5, -1.0), length]},
        num_remains_in_group=2,
        reward_weights=[1.0, 0.1],
        scale_rewards="none",
    )
    assert files(tmp_path) == ["part-00001.parquet"]
    written = read(tmp_path).to_dict()
    assert sorted(written) == sorted([*FIXED, "rewards/reward", "rewards/length"])
    assert written["step"] == [1] * 4 + [2] * 4
    assert written["prompt"] == ["say a"] * 4 + ["say ab"] * 4
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in LENGTHS["completion_ids"]]
    assert written["completion"] == texts * 2
    assert written["length"][4:] == [6, 2, 4, 3]
    assert written["rewards/length"][4:] == [6.0, 2.0, 4.0, 3.0]
    assert written["reward"][4:] == pytest.approx([1.6, 0.2, 0.9, -0.7])
    assert written["kept"][4:] == [False, True, False, True]
    assert written["advantage"][4:] == pytest.approx([0.0, 0.45, 0.0, -0.45])
    assert written["truncated"] == [False] * 8


# -- columns cannot clash, text is text -------------------------------------------------------------------------------
HOSTILE = [
    "[/b]",
    "[/INST] [INST]",
    "[red",
    "\x1b[31mred\x07",
    "\ud83d",
    "nul\0",
    "\u202eab",
    "a\n" * 500,
    "x" * 9999,
    "",
]


def named(name, values):
    function = table(*values)
    function.__name__ = name
    return function


@pytest.mark.parametrize("name", ["prompt", "reward", "step", "kept", "[/b]", "\ud83d", "", "a/b"])
def test_a_reward_function_overwrites_no_column(name, tmp_path, capsys):
    functions = [named(name, [1.0, 2.0, 3.0, 4.0]), named(name, [5.0, 6.0, 7.0, 8.0])]
    columns = {column: ["theirs"] * 4 for column in ("step", "completion_", "reward")}
    given = {"reward_funcs": functions, "train_dataset": prompts(4, **columns)}
    trained(tmp_path, trainer=given, max_steps=1, num_completions_to_print=4)
    written = pyarrow.parquet.read_table(tmp_path / "completions" / "part-00001.parquet").to_pydict()
    shown = name.encode("utf-8", "backslashreplace").decode()
    assert list(written) == [*FIXED, f"rewards/{shown}", f"rewards/{shown}_2"]
    assert written["prompt"] == ["say a"] * 4 and written["step"] == [1] * 4
    assert written[f"rewards/{shown}"] == [1.0, 2.0, 3.0, 4.0]
    assert written[f"rewards/{shown}_2"] == [5.0, 6.0, 7.0, 8.0]
    assert written["reward"] == [6.0, 8.0, 10.0, 12.0]
    assert "best: reward 12, advantage" in capsys.readouterr().out


def rollouts_of(texts, rewards=None, truncated=None):
    rows = len(texts)
    rewards = torch.tensor(rewards if rewards is not None else [float(i) for i in range(rows)])
    return Rollouts(
        prompt_ids=torch.zeros(rows, dtype=torch.long),
        prompt_lengths=torch.ones(rows, dtype=torch.long),
        completion_ids=torch.zeros(rows, dtype=torch.long),
        completion_lengths=torch.ones(rows, dtype=torch.long),
        loss_mask=torch.ones(rows, dtype=torch.bool),
        group=torch.zeros(rows, dtype=torch.long),
        prompts=list(texts),
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        columns={},
        truncated=torch.tensor(truncated if truncated is not None else [False] * rows),
        rewards=rewards[:, None],
        reward=rewards,
    )


class Log(CompletionLog):
    """One that is driven by hand."""

    def __init__(self, folder, **options):
        settings = {"output_dir": str(folder), "log_completions": True, "num_completions_to_print": None, **options}
        super().__init__(type("Args", (), settings))
        self.begin(0)

    def begin(self, step):
        self.on_train_begin(None, type("State", (), {"global_step": step}), None)

    def step(self, number, texts=("a", "b"), **more):
        rollouts = rollouts_of(texts, **more)
        keep = torch.ones(rollouts.num_rows, dtype=torch.bool)
        self.write(rollouts, keep, torch.zeros(rollouts.num_rows), ["judge"], number - 1)


def test_any_text_is_written_and_shown_as_what_it_is(tmp_path, capsys):
    log = Log(tmp_path, num_completions_to_print=len(HOSTILE))
    log.step(1, HOSTILE)
    log.flush()
    log.on_log(None, None, None)
    written = read(tmp_path)["prompt"]
    assert [text for text in written if text != "\\ud83d"] == [text for text in HOSTILE if text != "\ud83d"]
    assert "\\ud83d" in list(written)
    shown = capsys.readouterr().out
    assert "[/b]" in shown and "[/INST] [INST]" in shown and "\\x1b[31mred\\x07" in shown and "\\u202eab" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert len(shown.splitlines()) < 80 and max(map(len, shown.splitlines())) < 500


def test_what_functions_add_has_columns_of_its_own(tmp_path):
    log = Log(tmp_path)
    added = [
        {"prompt": ["x", "y"], "n": [1, 2], "odd": [[1], {"a": None}]},
        {"n": [0.5, torch.tensor(2)], "odd": [None, None], "new": [True, None]},
        {"n": ["text", 2**70], "wrong length": [1]},
        {},
    ]
    for step, columns in enumerate(added, 1):
        for name, values in columns.items():
            log.extra(name, values)
        log.step(step)
        log.flush()
    written = read(tmp_path).to_dict()
    assert written["prompt"] == ["a", "b"] * 4
    assert written["extra/prompt"] == ["x", "y", *[None] * 6]
    assert written["extra/odd"] == ["[1]", '{"a": null}', *[None] * 6]
    assert written["extra/new"] == [None, None, True, None, *[None] * 4]
    assert written["extra/n"] == ["1", "2", "0.5", "2", "text", str(2**70), None, None]
    assert "extra/wrong length" not in written


def test_what_an_evaluation_adds_does_not_reach_the_next_batch(tmp_path):
    def judge(completions, log_extra, **_):
        log_extra("guess", ["g"] * len(completions))
        return [1.0, 0.0, 0.5, -1.0][: len(completions)]

    trained(
        tmp_path,
        trainer={"reward_funcs": judge, "eval_dataset": prompts(1), "rollouts": Recorder(LENGTHS, cycle=True)},
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
    )
    assert read(tmp_path)["extra/guess"] == ["g"] * 8


# -- files ------------------------------------------------------------------------------------------------------------
def test_files_are_few_and_of_one_schema(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_A_TIME", 10)
    monkeypatch.setattr(module, "_ROWS_OF_PART", 30)
    log = Log(tmp_path)
    for step in range(1, 51):
        if step == 40:
            log.extra("late", [1, 2])
        log.step(step)
    assert len(files(tmp_path)) == 4  # before the end of the run
    log.flush()
    written = read(tmp_path)
    assert written["step"] == [step for step in range(1, 51) for _ in range(2)]
    assert [value for value in written["extra/late"] if value is not None] == [1, 2]


def test_a_large_text_does_not_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BYTES_AT_A_TIME", 1000)
    monkeypatch.setattr(module, "_BYTES_OF_PART", 5000)
    log = Log(tmp_path)
    for step in range(1, 13):
        log.step(step, ("x" * 600, "y"))
        assert sum(table.nbytes for table in log._new) < 3000
    assert 2 <= len(files(tmp_path)) <= 6
    assert log._part is None or log._part.nbytes < 5000


@pytest.mark.parametrize("resumed_at", [0, 3, 4, 7, 30])
def test_each_step_is_there_once_after_a_resume(resumed_at, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_A_TIME", 4)
    monkeypatch.setattr(module, "_ROWS_OF_PART", 6)
    log = Log(tmp_path)
    for step in range(1, 10):
        log.step(step)
    again = Log(tmp_path / "elsewhere")  # begins a run of its own
    assert not (tmp_path / "elsewhere" / "completions").exists()
    again = Log.__new__(Log)
    CompletionLog.__init__(again, log.args)
    again.begin(resumed_at)
    for step in range(resumed_at + 1, 12):
        again.step(step, ("new", "rows"))
    again.flush()
    last = 8 if resumed_at == 30 else 11  # step 9 was not yet written
    written = read(tmp_path)
    assert written["step"] == [step for step in range(1, last + 1) for _ in range(2)]
    kept = min(resumed_at, 8)
    assert written["prompt"] == ["a", "b"] * kept + ["new", "rows"] * (last - kept)


def test_resumed_run_equals_the_whole_one(tmp_path):
    trainer = {"rollouts": None, "model": tiny_model}
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2, "temperature": 1.0}

    def run(folder, resume=None, stop=None):
        given = {name: make() for name, make in trainer.items() if make}
        made = make_trainer(folder, "grpo", given, log_completions=True, num_completions_to_print=0, **options)
        if stop:
            made.hooks.objects["grpo"]._log_clipping = stop_at(made, stop)
        made.train(resume_from_checkpoint=resume)

    def stop_at(made, step):
        real = made.hooks.objects["grpo"]._log_clipping

        def check(*args, **named):
            if made.state.global_step == step:
                raise KeyboardInterrupt
            return real(*args, **named)

        return check

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop=4)
    whole, stopped = (read(tmp_path / name).to_dict() for name in ("whole", "stopped"))
    assert sorted(set(whole["step"])) == [1, 3, 5]
    assert stopped == whole  # what was generated before the stop is written
    run(tmp_path / "stopped", resume=str(tmp_path / "stopped" / "checkpoint-2"))
    assert read(tmp_path / "stopped").to_dict() == whole
    assert files(tmp_path / "stopped") == ["part-00001.parquet"]


def test_a_damaged_part_is_set_aside(tmp_path, caplog):
    log = Log(tmp_path)
    log.step(1)
    log.flush()
    (tmp_path / "completions" / "part-00001.parquet").write_bytes(b"PAR1 half of a file")
    (tmp_path / "completions" / "notes.parquet").write_bytes(b"somebody else's")
    log.begin(1)
    log.step(2)
    log.flush()
    assert files(tmp_path) == ["notes.parquet", "part-00001.damaged", "part-00001.parquet"]
    assert "set aside" in caplog.text
    assert pyarrow.parquet.read_table(tmp_path / "completions" / "part-00001.parquet")["step"].to_pylist() == [2, 2]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "completions").write_text("a file")
    log = Log(tmp_path)
    log.step(1)
    with pytest.raises(OutputDirError, match="completions"):
        log.flush()


KILLED = """
import os, signal, sys
from tests.test_completions import Log
from trl_core.training import completions as module
log = Log(sys.argv[1])
for step in range(1, 9):
    log.step(step)
    if step in (3, 6):
        log.flush()
if sys.argv[2] == "writing":
    module.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    log.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["between", "writing"])
def test_a_killed_run_leaves_whole_files(when, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], cwd=os.getcwd(), timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert read(tmp_path)["step"] == [step for step in range(1, 7) for _ in range(2)]


# -- the screen -------------------------------------------------------------------------------------------------------
REWARDS = [0.1, 0.9, 0.2, float("nan"), 0.5, 0.3, 0.4, 0.7]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (0, {}),
        (1, {"best": ["0.9"]}),
        (2, {"best": ["0.9"], "worst": ["nan"]}),
        (4, {"best": ["0.9"], "worst": ["nan"], "cut off": ["0.4"], "median": ["0.3"]}),
        (
            100,
            {"best": ["0.9"], "worst": ["nan"], "cut off": ["0.4"], "median": ["0.3"], "between": [0.7, 0.5, 0.2, 0.1]},
        ),
    ],
)
def test_rows_on_the_screen_are_telling(most, expected, tmp_path, capsys):
    log = Log(tmp_path, num_completions_to_print=most)
    log.step(3, [f"text {i}" for i in range(8)], rewards=REWARDS, truncated=[i in (0, 6) for i in range(8)])
    log.on_log(None, None, None)
    shown = capsys.readouterr().out
    assert (f"step 3: {min(most, 8)} of 8 completions" in shown) is (most > 0)
    for why, rewards in expected.items():
        assert [line.split("reward ")[1].split(",")[0] for line in shown.splitlines() if f"  {why}: " in line] == [
            str(reward) for reward in rewards
        ]
    assert shown.count("prompt") == min(most, 8)
    assert shown.count(", truncated") == (0 if most < 4 else 1 if most == 4 else 2)
    log.on_log(None, None, None)
    assert capsys.readouterr().out == ""  # shown once


def test_the_screen_shows_a_handful_at_each_log(tmp_path, capsys):
    trained(tmp_path, max_steps=6, logging_steps=3, num_completions_to_print=None)
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("step ")] == [
        "step 3: 4 of 4 completions",
        "step 6: 4 of 4 completions",
    ]
    assert shown.count("    completion  ") == 8


def test_a_terminal_without_unicode_stops_nothing(tmp_path, monkeypatch):
    import io

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    log = Log(tmp_path)
    log.step(1, ["größer", "日本"])
    log.on_log(None, None, None)
    out.flush()
    assert b"gr\\xf6\\xdfer" in out.buffer.getvalue()


def test_another_process_writes_and_shows_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "PartialState", lambda: type("State", (), {"is_main_process": False}))
    log = Log(tmp_path)
    log.step(1)
    log.flush()
    log.on_log(None, None, None)
    assert not (tmp_path / "completions").exists() and capsys.readouterr().out == ""
