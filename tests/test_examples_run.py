"""The scripts of the examples, with a tiny model and a step or two, so that none falls behind the interface."""

import json

import pytest

from .helpers_examples import give, loaded
from .test_house import ROOT

OPTIONS = {
    "examples/shell-helper/sft.py": {"epochs": 0.01, "batch_size": 2, "eval_size": 2},
    "examples/shell-helper/reward.py": {"epochs": 0.01, "batch_size": 2, "eval_size": 2},
    "examples/shell-helper/dpo.py": {"epochs": 0.01, "batch_size": 2, "eval_size": 2},
    "plugins/trl-bema/examples/moving_reference.py": {"steps": 2, "every": 1, "pairs": 2},
}


@pytest.mark.parametrize("script", OPTIONS)
def test_script_trains_and_leaves_what_it_says(script, tmp_path, monkeypatch):
    give(monkeypatch, script, tmp_path, **OPTIONS[script])
    with loaded(ROOT / script) as module:
        if hasattr(module, "main"):
            module.main()
            results = json.loads((tmp_path / "out" / "results.json").read_text())
            assert results["before"].keys() == results["after"].keys()
        else:
            assert module.results.keys() == {"before", "trained", "averaged"}
            assert (tmp_path / "out" / "bema" / "model.safetensors").is_file()
