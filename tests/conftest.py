"""Settings and folders that several tests share."""

import importlib
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from safetensors.torch import save_file

torch.set_num_threads(1)  # the models are so small that threads would only wait for each other
transformers.logging.disable_progress_bar()

PARITY = Path(__file__).parent / "parity"


@pytest.fixture(scope="session")
def parity_model(tmp_path_factory):
    """The folder of the model of the reference runs, as `from_pretrained` wants it."""
    folder = tmp_path_factory.mktemp("parity") / "model"
    shutil.copytree(PARITY / "model", folder, ignore=shutil.ignore_patterns("weights.npz"))
    with numpy.load(PARITY / "model" / "weights.npz") as arrays:
        weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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
