"""Settings and folders that several tests share."""

import gc
import importlib
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

# The models are so small that threads would only wait for each other; in the processes that tests start too. Set before
# torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import accelerate.utils.memory
import numpy
import pytest
import torch
import transformers
from safetensors.torch import save_file

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
transformers.logging.disable_progress_bar()

PARITY = Path(__file__).parent / "parity"


def pytest_collection_finish():
    """Every training collects garbage, which would look through all of the imported libraries, for 0.3 s each time.

    Python collects by itself what there is to collect.
    """
    gc.collect()
    gc.freeze()
    accelerate.utils.memory.gc = SimpleNamespace(collect=lambda: 0)


@pytest.fixture(scope="session")
def parity_models(tmp_path_factory):
    """A folder with the models of the reference runs, as `from_pretrained` wants them."""
    base = tmp_path_factory.mktemp("parity")
    for name in ("model", "teacher_model", "reward_model"):
        shutil.copytree(PARITY / name, base / name, ignore=shutil.ignore_patterns("weights.npz"))
        with numpy.load(PARITY / name / "weights.npz") as arrays:
            weights = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        save_file(weights, base / name / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.fixture(scope="session")
def parity_model(parity_models):
    """The folder of the language model of the reference runs."""
    return parity_models / "model"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder on the import path; what is imported from it is forgotten afterwards."""
    folder = tmp_path / "packages"
    folder.mkdir()
    # Restores the list itself, so that a test may also let `site` extend it.
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]
    importlib.invalidate_caches()
