"""Loading an example script as a module, with what it sets for the whole process put back afterwards."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import datasets
import transformers

from trl_core.testing import tiny_model, tiny_tokenizer


@contextlib.contextmanager
def loaded(file):
    """The script's module; what lies beside it can be imported, as when Python runs it."""
    path, verbosity, known = list(sys.path), transformers.logging.get_verbosity(), set(sys.modules)
    sys.path.insert(0, str(file.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"examples_{file.parent.name}_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in set(sys.modules) - known:  # two folders of examples may have modules of one name
            if "examples" in Path(getattr(sys.modules[name], "__file__", None) or "").parts:
                del sys.modules[name]
        sys.path[:] = path
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        datasets.enable_progress_bars()


def give(monkeypatch, script, folder, **options):
    """Let the script find a tiny model, a run folder and these options on its command line."""
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    options = {"model": folder / "model", "output": folder / "out", **options}
    monkeypatch.setattr(sys, "argv", [script, *(f"--{name}={value}" for name, value in options.items())])
