"""SFT, reward models and DPO: two processes train as one does on the same rows."""

from pathlib import Path

import pytest
import torch

from .helpers_offline import FIXED, lines, make_fixed_trainer
from .helpers_train import CLOCKS, differences, run_in_two


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The ends of all scenarios in two processes, by name."""
    folder = tmp_path_factory.mktemp("two")
    code, errors = run_in_two(Path(__file__).with_name("script_distributed_offline.py"), folder, forked=True)
    assert code == 0, errors[-6000:]
    return torch.load(folder / "ends.pt", weights_only=False)


@pytest.mark.parametrize("name", FIXED)
def test_two_processes_train_as_one(name, two, tmp_path):
    one, other = make_fixed_trainer(tmp_path, name, 1), two[name]
    start = {key: value.clone() for key, value in one.model.state_dict().items()}
    one.train()
    weights = one.model.state_dict()
    assert max((weights[key] - value).abs().max() for key, value in other["weights"].items()) < 1e-6
    assert max((weights[key] - value).abs().max() for key, value in start.items()) > 3e-4
    reference = one.reference.module.state_dict() if one.reference and one.reference.module else {}
    assert reference.keys() == other["reference"].keys()
    assert all((reference[key] - value).abs().max() < 1e-6 for key, value in other["reference"].items())
    logged = [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines(one)]
    theirs = [line for line in other["log"] if "loss" in line]
    assert len(logged) == one.args.max_steps
    for line, their in zip(logged, theirs, strict=True):
        assert line == pytest.approx(their, rel=1e-4, abs=1e-5)
    if one.eval_dataset is not None:
        metrics = {k: v for k, v in one.evaluate().items() if not k.startswith(CLOCKS)}
        assert metrics == pytest.approx(other["metrics"], rel=1e-4, abs=1e-5)


def test_two_processes_resume_exactly(two):
    whole, resumed = two["resumed"]
    assert differences(resumed, whole) == []
