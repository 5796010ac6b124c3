"""Loading an example script as a module, with what it sets for the whole process put back afterwards."""

import contextlib
import importlib.util
import sys

import datasets
import transformers


@contextlib.contextmanager
def loaded(file):
    path, verbosity = list(sys.path), transformers.logging.get_verbosity()
    try:
        spec = importlib.util.spec_from_file_location(f"examples_{file.parent.name}_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.modules.pop(f"examples_{file.parent.name}_{file.stem}", None)
        sys.path[:] = path
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        datasets.enable_progress_bars()
