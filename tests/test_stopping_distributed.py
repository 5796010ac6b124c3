"""Processes that train together stop together, at the same step, with one whole checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl_core.training.state import read_manifest

from .helpers_train import newest_checkpoint

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("script_stopping.py")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder, what each process saw, and the error output of a job whose launcher got SIGTERM at its end."""
    folder = tmp_path_factory.mktemp("stopped")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    with open(folder / "stderr", "w+") as errors:
        job = subprocess.Popen([*command, str(folder)], stdout=errors, stderr=errors, start_new_session=True)
        try:
            for _ in range(2400):
                if (folder / "under-way").exists() or job.poll() is not None:
                    break
                time.sleep(0.1)
            job.terminate()
            job.wait(timeout=120)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    text = (folder / "stderr").read_text()
    seen = [json.loads((folder / f"seen-{process}.json").read_text()) for process in (0, 1)]
    return folder, seen, text


def test_signal_to_one_process_stops_both_at_the_same_step(stopped):
    folder, seen, _ = stopped
    assert [process["signal"] for process in seen] == [["SystemExit(143)", 3]] * 2
    assert read_manifest(folder / "signal" / "checkpoint-3")["options"]["num_processes"] == 2
    assert [process["signal resumed"] for process in seen] == [process["whole resumed"] for process in seen]


def test_callback_that_fails_in_one_process_stops_both(stopped):
    folder, seen, _ = stopped
    assert [process["failure"] for process in seen] == [["SystemExit(1)", 3], ["LookupError('mine')", 3]]
    assert newest_checkpoint(folder / "failure") is not None
    assert [process["failure resumed"] for process in seen] == [process["whole resumed"] for process in seen]


def test_signal_before_the_first_step_waits_for_its_end(stopped):
    _, seen, _ = stopped
    assert [process["early"] for process in seen] == [["KeyboardInterrupt()", 1]] * 2


def test_signal_of_the_launcher_leaves_one_whole_checkpoint(stopped):
    folder, _, text = stopped
    (line,) = [line for line in text.splitlines() if line.startswith("Stopped by SIGTERM") and "launched" in line]
    (checkpoint,) = (folder / "launched").glob("checkpoint-*")
    assert f"Checkpoint: {checkpoint}." in line
    read_manifest(checkpoint)
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
