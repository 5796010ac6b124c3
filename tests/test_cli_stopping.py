"""`trl-core train` that is stopped, resumed, or started in the folder of another run."""

import argparse
import functools
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl_core.cli.main import main
from trl_core.cli.train import _resume_call
from trl_core.testing import tiny_model, tiny_tokenizer
from trl_core.training.folder import LOCK_FILE
from trl_core.training.online import OnlineTrainer
from trl_core.training.state import PARTIAL, STATE_FILE, checkpoints, number_of

from . import helpers_cli
from .helpers_cli import flags

FUNCTIONS = """
import os, signal, time

calls = []

def interrupting(completions, **_):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(len(text)) for text in completions]

def slow(completions, **_):
    time.sleep(0.5)
    return [float(len(text)) for text in completions]
"""
SMALL = {
    "max_completion_length": 4,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "activation_checkpointing": False,
    "use_cpu": True,
}
NEEDED = flags(model="model", dataset="prompts.jsonl", reward_funcs="functions.py:interrupting", **SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, prompts and functions."""
    folder = tmp_path_factory.mktemp("stopping")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in range(1, 5)))
    for name in ("functions.py", "stopping_functions.py"):
        (folder / name).write_text(FUNCTIONS)
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    helpers_cli.work_in(folder, monkeypatch)


def train(*words):
    return helpers_cli.train(*words, algorithm="grpo")


def test_stopped_run_says_the_command_that_goes_on_and_the_finished_one_changes_nothing(tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped = train(*NEEDED, "--output_dir", str(out))
    assert stopped.code == 143
    (line,) = [line for line in stopped.err.splitlines() if line.startswith("Stopped by")]
    command = shlex.split(line.partition("Go on: ")[2])
    assert line.startswith(f"Stopped by SIGTERM after step 2 of 3. Checkpoint: {out}/checkpoint-2. Go on: trl-core")
    assert command == ["trl-core", "train", "grpo", *NEEDED, "--output_dir", str(out), "--resume", "true"]
    assert not (out / "model.safetensors").exists()

    went_on = train(*command[3:])
    assert went_on.code == 0 and "checkpoint-2 at step 2 of 3; steps left: 1." in went_on.out
    assert [line["step"] for line in helpers_cli.metrics(out) if "loss" in line] == [1, 2, 3]

    # The one checkpoint is that of the stop; with the last step's the run is known to be finished.
    def seen():
        files = [path for path in out.rglob("*") if path.is_file() and path.name != LOCK_FILE]
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    assert train(*command[3:], "--save_strategy", "steps").code == 0
    before = seen()
    again = train(*command[3:], "--save_strategy", "steps")
    assert again.code == 0 and "The run is finished (step 3 of 3)" in again.out
    assert seen() == before

    # A new run in its folder is refused before anything is loaded.
    @functools.wraps(OnlineTrainer.__init__)
    def reached(self, **_):
        raise AssertionError("something was loaded")

    with monkeypatch.context() as patched:
        patched.setattr(OnlineTrainer, "__init__", reached)
        refused = train(*NEEDED, "--output_dir", str(out))
        with_auto = train(*NEEDED, "--output_dir", str(out), "--resume", str(tmp_path / "elsewhere" / "checkpoint-1"))
    assert refused.code == with_auto.code == 2
    assert "checkpoint-3 of another run" in refused.err and "--overwrite" in refused.err
    (out / "mine.txt").write_text("mine")
    replaced = train(*NEEDED, "--output_dir", str(out), "--overwrite", "--resume", "auto")
    assert replaced.code == 0 and (out / "mine.txt").exists()


def test_auto_starts_afresh_where_there_is_nothing(tmp_path):
    begun = train(*NEEDED, "--output_dir", str(tmp_path), "--resume", "auto", "--max_steps", "1")
    assert begun.code == 0 and "the run starts afresh" in begun.out


def test_checkpoint_that_is_not_there_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_core.cli.train._load_data", lambda *_: pytest.fail("the data was loaded"))
    broken = tmp_path / "checkpoint-2"
    broken.mkdir()
    (broken / STATE_FILE).write_text("{")
    told = {
        "true": rf"no complete checkpoint in '{tmp_path}'.\n +- The checkpoint 'checkpoint-2' is not complete",
        str(tmp_path / "checkpoint-7"): "There is no checkpoint folder '.*checkpoint-7'",
        str(broken): "The checkpoint 'checkpoint-2' is not complete",
        "checkpoint-2": f"no checkpoint folder 'checkpoint-2' here.\n.*Give '{broken}'",
    }
    for given, expected in told.items():
        missing = train(*NEEDED, "--output_dir", str(tmp_path), "--resume", given)
        assert missing.code == 2 and re.search(expected, missing.err), missing.err


def test_checkpoint_that_lacks_only_its_name_is_gone_on_from(tmp_path):
    train(*NEEDED, "--output_dir", str(tmp_path), "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "1")
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / "checkpoint-1").rename(tmp_path / PARTIAL / "checkpoint-1")
    done = train(*NEEDED, "--output_dir", str(tmp_path), "--resume", "true", "--max_steps", "2")
    assert "Resuming from" in done.out and "at step 1 of 2" in done.out


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (
            ["--config", "run.yaml", "--resume", "true", "--max_steps", "3"],
            ["--config", "run.yaml", "--max_steps", "3"],
        ),
        (["--resume", "--overwrite", "--lora", "a b"], ["--lora", "a b"]),
        (["--resume-from-checkpoint=x/checkpoint-3", "--no-overwrite"], []),
        (
            ["--eos_token", "x", "--hub_token", "hf_abc", "--bf16"],
            ["--eos_token", "x", "--hub_token", "<hidden>", "--bf16"],
        ),
        (["--hub-token=hf_abc"], ["--hub-token=<hidden>"]),
        (["--model_init_kwargs", '{"token": "hf_abc"}'], ["--model_init_kwargs", '{"token": <hidden>}']),
    ],
)
def test_command_that_goes_on_is_the_given_one_without_secrets(words, kept):
    args = argparse.Namespace(name="gfpo+replay", options=words)
    told = _resume_call(args, "out/checkpoint 7")
    assert shlex.split(told) == ["trl-core", "train", "gfpo+replay", *kept, "--resume", "out/checkpoint 7"]
    assert "hf_abc" not in told


def test_interrupt_of_any_command_is_no_traceback(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_core.cli.list.run", interrupt)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "trl-core: stopped by Ctrl-C.\n"


# -- whole processes --------------------------------------------------------------------------------------------------
SLOWLY = ("--reward_funcs", "functions.py:slow")


def command(*words):
    return [sys.executable, "-m", "trl_core.cli.main", "train", "grpo", *NEEDED, *words]


def start(*words):
    return subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def children(pid):
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_process_leaves_a_checkpoint_and_no_worker(number, code, tmp_path):
    words = flags(output_dir=tmp_path, reward_funcs="stopping_functions:slow", reward_processes=2, max_steps=500)
    process = start(*words)
    workers = []
    for line in process.stdout:
        if line.startswith("step    2/"):
            workers = children(process.pid)
            process.send_signal(number)
            break
    output = process.stdout.read()
    assert process.wait(timeout=120) == code, output
    assert "Traceback" not in output and output.count("Checkpoint: ") == 1
    assert workers
    for _ in range(100):
        if not any(map(alive, workers)):
            break
        time.sleep(0.1)
    assert not any(map(alive, workers))


@pytest.mark.slow
def test_run_whose_terminal_is_closed_leaves_a_checkpoint_to_go_on_from(tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, command("--output_dir", str(tmp_path), "--max_steps", "500", *SLOWLY))
    seen = b""
    while b"step    2/" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    (checkpoint,) = checkpoints(tmp_path)
    assert number_of(checkpoint) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after_s", [3, 8])
def test_process_that_is_stopped_at_any_time_says_so_in_a_line(number, after_s, tmp_path):
    # Where the machine is fast, the later signal comes in the middle of the training.
    process = start("--output_dir", str(tmp_path), "--max_steps", "500", *SLOWLY)
    time.sleep(after_s)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode in (128 + number, -number), output
    assert "Traceback" not in output
