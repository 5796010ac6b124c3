"""A folder belongs to one run: nothing in it is mixed with another one's, and what is not ours stays as it is."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from trl_core.errors import CheckpointError, OutputDirError
from trl_core.training import folder as folder_module
from trl_core.training.callbacks import JsonlMetricsCallback
from trl_core.training.folder import LOCK_FILE, RunFolder
from trl_core.training.state import PARTIAL, RUN_FILE, read_run

from . import helpers_cli
from .helpers_offline import make_trainer, texts
from .helpers_train import differences, end_state, newest_checkpoint

SLOW = pytest.mark.slow
RUN = {
    "max_steps": 4,
    "train_sampling_strategy": "random",
    "optim": "adamw_torch",
    "save_strategy": "steps",
    "save_steps": 1,
    "seed": 3,
}


def run(folder, **options):
    return make_trainer(folder, "SFT", {"callbacks": [JsonlMetricsCallback()]}, **{**RUN, **options})


def seen(folder):
    """Every file with its content and time, but for the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def steps(folder):
    return [line["step"] for line in helpers_cli.metrics(folder) if "loss" in line]


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    trainer = run(folder)
    trainer.train()
    trainer.save_model()
    return folder, end_state(trainer)


@pytest.fixture
def done(finished, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished[0], tmp_path / "done")


# -- finished runs ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("resume", [True, *(pytest.param(given, marks=SLOW) for given in ("auto", "checkpoint-4"))])
def test_finished_run_is_left_as_it_is(resume, finished, done, capsys):
    before = seen(done)
    trainer = run(done, save_total_limit=1)
    given = str(done / resume) if resume == "checkpoint-4" else resume
    output = trainer.train(resume_from_checkpoint=given)
    assert seen(done) == before
    assert "The run is finished (step 4 of 4): nothing is left to train." in capsys.readouterr().out
    assert differences(end_state(trainer), finished[1]) == []
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert output.global_step == 4 and output.training_loss == pytest.approx(sum(logged) / 4)
    assert output.metrics["train_loss"] == output.training_loss


@pytest.mark.parametrize("fewer", [3, pytest.param(0, marks=SLOW)])
def test_finished_run_is_not_called_finished_where_fewer_steps_are_asked_for(fewer, done, capsys):
    before = seen(done)
    with pytest.raises(CheckpointError, match=f"is at step 4; this run ends at step {fewer}"):
        run(done, max_steps=fewer).train(resume_from_checkpoint="auto")
    told = capsys.readouterr()
    assert "finished" not in told.out and "stops after" not in told.err and seen(done) == before


def test_finished_run_goes_on_with_more_steps(done, tmp_path):
    # The schedule of the examples is constant, so that the longer run is the same as far as the shorter one goes.
    trainer = run(done, max_steps=7)
    trainer.train(resume_from_checkpoint=True)
    whole = run(tmp_path / "whole", max_steps=7)
    whole.train()
    assert differences(end_state(trainer), end_state(whole)) == []
    assert steps(done) == [1, 2, 3, 4, 5, 6, 7]


@SLOW
def test_finished_run_of_epochs_goes_on_with_more_of_them(tmp_path):
    run(tmp_path, max_steps=-1, num_train_epochs=1).train()
    assert run(tmp_path, max_steps=-1, num_train_epochs=1).train(resume_from_checkpoint=True).global_step == 2
    assert run(tmp_path, max_steps=-1, num_train_epochs=2).train(resume_from_checkpoint=True).global_step == 4


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"max_steps": -1, "num_train_epochs": 0}])
def test_no_steps_train_nothing(options, tmp_path, capsys):
    trainer = run(tmp_path, **options)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.train().global_step == 0
    assert differences(dict(trainer.model.state_dict()), start) == []
    assert not checkpoints(tmp_path) and "nothing is left to train" in capsys.readouterr().out


@SLOW
def test_final_model_is_the_best_one_also_when_the_finished_run_is_resumed(tmp_path):
    def made():
        options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
        trainer = make_trainer(tmp_path, "SFT", {"eval_dataset": texts(4, 5)}, **{**RUN, **options})
        scores = iter([1.0, 0.5, 2.0, 3.0])
        evaluate = trainer.evaluate
        trainer.evaluate = lambda *a, **k: {**evaluate(*a, **k), "eval_loss": next(scores)}
        return trainer

    first, again = made(), made()
    first.train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert first.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    again.train(resume_from_checkpoint=True)
    assert differences(end_state(again)["weights"], end_state(first)["weights"]) == []


def with_best_first(folder, **options):
    """A run whose first step is its best, and that keeps one checkpoint beside it."""
    found = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = make_trainer(folder, "SFT", {"eval_dataset": texts(4, 5)}, **{**RUN, **found, "max_steps": 2, **options})
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *a, **k: {**evaluate(*a, **k), "eval_loss": float(trainer.state.global_step)}
    return trainer


@pytest.mark.parametrize("way", ["moved", pytest.param("named from here", marks=SLOW)])
def test_best_checkpoint_is_kept_and_taken_where_the_folder_is_now(way, tmp_path, monkeypatch):
    first, place = with_best_first(tmp_path / "old"), tmp_path / "old"
    first.train()
    if way == "moved":
        place = place.rename(tmp_path / "new")
    else:
        monkeypatch.chdir(tmp_path)
        place = place.relative_to(tmp_path)
    again = with_best_first(place, max_steps=3)
    again.train(resume_from_checkpoint=True)
    assert checkpoints(place) == ["checkpoint-1", "checkpoint-3"]
    assert differences(end_state(again)["weights"], end_state(first)["weights"]) == []


@pytest.mark.parametrize("size", [None, pytest.param(1000, marks=SLOW)])
def test_best_checkpoint_that_is_damaged_is_not_taken(size, tmp_path):
    with_best_first(tmp_path).train()
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    content = bytearray(file.read_bytes()[:size])
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"best model cannot be loaded: model\.safetensors of 'checkpoint-1'"
    ) as e:
        with_best_first(tmp_path).train(resume_from_checkpoint=True)
    assert "load_best_model_at_end=False" in e.value.mend
    with_best_first(tmp_path, load_best_model_at_end=False).train(resume_from_checkpoint=True)


# -- what a resumed run says and keeps --------------------------------------------------------------------------------
@SLOW
def test_resumed_run_says_where_it_goes_on(finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    run(tmp_path).train(resume_from_checkpoint=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Resuming")]
    assert line == f"Resuming from {tmp_path}/checkpoint-3 at step 3 of 4; steps left: 1."


def test_auto_starts_afresh_only_where_there_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "checkpoint-900").mkdir()  # is of nobody known
    run(tmp_path, max_steps=2).train(resume_from_checkpoint="auto")
    assert "the run starts afresh" in capsys.readouterr().out
    run(tmp_path).train(resume_from_checkpoint="auto")
    assert "at step 2 of 4; steps left: 2." in capsys.readouterr().out
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "tail", ['{"step": 4, "lo', *(pytest.param(end, marks=SLOW) for end in ("", '{"step": 3, "loss": 1.0}'))]
)
def test_metrics_of_a_resumed_run_hold_each_step_once(tail, finished, done):
    # As if it had been killed after step 4 was logged, in the middle of a line perhaps.
    shutil.rmtree(done / "checkpoint-3")
    shutil.rmtree(done / "checkpoint-4")
    whole = (done / "metrics.jsonl").read_text()
    (done / "metrics.jsonl").write_text("a note of mine\n" + whole + tail)
    run(done).train(resume_from_checkpoint=True)
    first, *rest = (done / "metrics.jsonl").read_text().splitlines()
    assert first == "a note of mine"
    assert [line["step"] for line in map(json.loads, rest) if "loss" in line] == [1, 2, 3, 4]


@SLOW
def test_evaluation_before_the_training_stays_in_the_metrics(tmp_path):
    trainer = make_trainer(
        tmp_path, "SFT", {"callbacks": [JsonlMetricsCallback()], "eval_dataset": texts(4, 5)}, **{**RUN, "max_steps": 2}
    )
    trainer.evaluate()
    trainer.train()
    lines = helpers_cli.metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 2] and "eval_loss" in lines[0]


# -- another run in the folder ----------------------------------------------------------------------------------------
def test_new_run_in_the_folder_of_another_is_refused(done):
    before = seen(done)
    with pytest.raises(OutputDirError, match=r"holds checkpoint-4 of another run.*\n.*overwrite_output_dir=True"):
        run(done).train()
    assert seen(done) == before


def test_overwriting_deletes_what_runs_left_and_nothing_else(done, finished):
    foreign = [done / "checkpoint-2000" / "mine.bin", done / "completions" / "mine.txt", done / "notes.txt"]
    for file in foreign:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    before = read_run(done)
    run(done, max_steps=2, overwrite_output_dir=True).train()
    assert checkpoints(done) == ["checkpoint-1", "checkpoint-2", "checkpoint-2000"] and steps(done) == [1, 2]
    assert [file.read_text() for file in foreign] == ["mine"] * 3
    assert read_run(done)["run"] != before["run"]


@SLOW
def test_overwriting_does_not_touch_what_is_resumed(done):
    run(done, max_steps=5, overwrite_output_dir=True).train(resume_from_checkpoint=True)
    assert steps(done) == [1, 2, 3, 4, 5]


@SLOW
def test_folder_with_metrics_or_a_model_of_a_finished_run_is_another_ones_too(tmp_path):
    options = {"max_steps": 1, "save_strategy": "no"}
    run(tmp_path / "metrics", **options).train()
    trainer = make_trainer(tmp_path / "model", "SFT", **options)
    trainer.train()
    trainer.save_model()
    for name in ("metrics", "model"):
        with pytest.raises(OutputDirError, match="holds another run"):
            run(tmp_path / name).train()
    (tmp_path / "metrics" / RUN_FILE).unlink()
    with pytest.raises(OutputDirError, match="holds another run"):
        run(tmp_path / "metrics").train()


def test_run_that_left_nothing_to_go_on_from_may_be_started_again(tmp_path):
    # As a run that was killed before its first checkpoint leaves it.
    (tmp_path / RUN_FILE).write_text(json.dumps({"run": "abc"}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "los')
    (tmp_path / PARTIAL / "checkpoint-2").mkdir(parents=True)
    run(tmp_path, max_steps=2).train()
    assert steps(tmp_path) == [1, 2] and not (tmp_path / PARTIAL).exists()
    assert read_run(tmp_path)["run"] != "abc"


@pytest.mark.parametrize("name", [RUN_FILE, "metrics.jsonl"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_in_the_place_of_one_is_named(make, name, tmp_path):
    make(tmp_path / name)
    with pytest.raises(OutputDirError, match=f"{name} in output_dir=.* is no file"):
        RunFolder(tmp_path).check(None, overwrite=True)


def test_file_where_checkpoints_are_written_is_in_nobodys_way(tmp_path):
    (tmp_path / PARTIAL).write_text("")
    run(tmp_path, max_steps=1).train()
    assert checkpoints(tmp_path) == ["checkpoint-1"]


def test_metrics_of_a_run_that_cannot_be_read_are_no_error(tmp_path):
    RunFolder(tmp_path).begin("sft")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n')
    RunFolder(tmp_path).check(None, overwrite=True)


def test_metrics_of_somebody_else_are_not_written_to(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("epoch,loss\n1,0.5\n")
    for options in ({}, {"overwrite_output_dir": True}):
        with pytest.raises(OutputDirError, match=r"metrics\.jsonl .* was not written by trl-core"):
            run(tmp_path, **options).train()
    assert (tmp_path / "metrics.jsonl").read_text() == "epoch,loss\n1,0.5\n"


def test_same_trainer_may_train_again(tmp_path):
    trainer = run(tmp_path)
    trainer.train()
    trainer.args.max_steps = 2
    trainer.train()
    # From its first checkpoint on, the second training takes the place of the first.
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"] and steps(tmp_path) == [1, 2]
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=True)
    assert steps(tmp_path) == [1, 2, 3]


def test_checkpoint_of_another_folder_is_where_a_new_run_begins(done, finished, tmp_path):
    trainer = run(tmp_path / "new")
    trainer.train(resume_from_checkpoint=str(done / "checkpoint-2"))
    assert differences(end_state(trainer), finished[1]) == []
    record = read_run(tmp_path / "new")
    assert record["from"] == {"run": read_run(done)["run"], "checkpoint": "checkpoint-2"}
    assert steps(tmp_path / "new") == [3, 4]


def test_going_on_from_an_earlier_checkpoint_replaces_the_later_ones(done):
    run(done, save_steps=3).train(resume_from_checkpoint=str(done / "checkpoint-1"))
    assert checkpoints(done) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"] and steps(done) == [1, 2, 3, 4]
    assert read_run(done / "checkpoint-3")["run"] == read_run(done)["run"]


def test_identity_holds_no_path_and_no_secret(done):
    record = read_run(done)
    assert set(record) == {"run", "composition", "trl_core", "started", "steps", "model"}
    assert record["composition"] == "sft" and record["steps"] == record["model"] == 4
    assert str(done.parent) not in json.dumps(record)


# -- two at once ------------------------------------------------------------------------------------------------------
HOLD = """
import sys
from trl_core.training.folder import RunFolder
with RunFolder(sys.argv[1]).held():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(done):
    """Another process that trains in the folder, as far as the lock can tell."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(done)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@SLOW
def test_second_run_at_the_same_time_is_refused_until_the_first_is_gone(other, done):
    before = seen(done)
    for options, resume in (({}, True), ({"overwrite_output_dir": True}, None)):
        with pytest.raises(OutputDirError, match="Another run is training"):
            run(done, max_steps=5, **options).train(resume_from_checkpoint=resume)
    assert seen(done) == before
    other.kill()
    other.wait()
    run(done, max_steps=5).train(resume_from_checkpoint=True)


def test_second_run_of_another_thread_is_refused_while_the_first_goes_on(tmp_path):
    with ThreadPoolExecutor(1) as threads, RunFolder(tmp_path).held():
        with pytest.raises(OutputDirError, match="Another run is training"):
            threads.submit(_lockable, str(tmp_path)).result()
        assert _lockable(str(tmp_path))  # the one that holds it may enter again


def test_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folder_module.FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match="cannot be locked .*Operation not supported"):
        run(tmp_path, max_steps=1).train()


@SLOW
def test_lock_is_let_go_when_the_training_ends_or_fails(tmp_path):
    trainer = run(tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(Exception, match="checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nothing"))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_lockable, (str(tmp_path),))


def _lockable(path):
    with RunFolder(path).held():
        return True


# -- foreign checkpoints ----------------------------------------------------------------------------------------------
def test_folders_that_the_run_did_not_write_are_neither_counted_nor_deleted(finished, tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "pytorch_model.bin").write_text("mine")
    run(tmp_path, save_total_limit=1, max_steps=2).train()
    shutil.copytree(finished[0] / "checkpoint-4", tmp_path / "checkpoint-90")  # of another run
    before = seen(tmp_path / "checkpoint-500") | seen(tmp_path / "checkpoint-90")
    run(tmp_path, save_total_limit=1).train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-500", "checkpoint-90"]
    assert before.items() <= seen(tmp_path).items()
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"


@pytest.mark.parametrize(("step", "period"), [(4, 3), pytest.param(2, 2, marks=SLOW)])
def test_name_that_is_taken_is_refused_before_training(step, period, tmp_path):
    taken = tmp_path / f"checkpoint-{step}"
    taken.mkdir()
    (taken / "mine.bin").write_text("mine")
    with pytest.raises(OutputDirError, match=f"checkpoint-{step} is not of this run"):
        run(tmp_path, save_steps=period).train()
    assert (taken / "mine.bin").read_text() == "mine"
    assert steps(tmp_path) == [] if (tmp_path / "metrics.jsonl").exists() else True
    run(tmp_path, save_steps=3, max_steps=3).train()
    assert (taken / "mine.bin").read_text() == "mine"


@SLOW
def test_name_that_turns_out_to_be_taken_is_left_and_said(tmp_path, caplog):
    (tmp_path / "checkpoint-2").mkdir()
    run(tmp_path, save_strategy="epoch").train()
    assert not [*(tmp_path / "checkpoint-2").iterdir()]
    assert "checkpoint-2 is not of this run and stays as it is" in caplog.text
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"


def test_checkpoint_that_was_complete_but_for_its_name_gets_it(done):
    (done / PARTIAL).mkdir()
    (done / "checkpoint-4").rename(done / PARTIAL / "checkpoint-4")
    shutil.copytree(done / "checkpoint-3", done / PARTIAL / "checkpoint-7")
    (done / PARTIAL / "checkpoint-7" / "model.safetensors").unlink()
    assert run(done).train(resume_from_checkpoint=True).global_step == 4
    assert checkpoints(done) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert not (done / PARTIAL).exists()


@SLOW
def test_nothing_is_warned_of_in_a_usual_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(tmp_path, max_steps=1).train()
