"""Runs of the reference on datasets, repeated step by step: SFT, reward models, DPO, and DPO with a BEMA reference.

See tests/parity/README.md for the cases. Where trl-core does not do as the reference did, `EXPLAINED` says why.
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from trl_core import get_config, get_trainer

from .conftest import PARITY
from .helpers_parity import differing_parameters, differing_steps, differing_weights, noise_of

CASES = sorted(path.stem for path in (PARITY / "offline").glob("*.json"))
NAMES = {"bema_dpo": "bema"}
EXPLAINED = {}


def load(case):
    return json.loads((PARITY / "offline" / f"{case}.json").read_text())


def run(case, models, folder, **options):
    """Train; returns the trainer, the log lines of its steps and the weights at the start."""
    data = load(case)
    name = NAMES.get(data["algorithm"], data["algorithm"])
    config = get_config(name)
    known = {f.name for f in dataclasses.fields(config)}
    # What has no counterpart here must not shape the run.
    left_out = {key: value for key, value in data["algorithm_arguments"].items() if key not in known}
    assert not any(left_out.values()), left_out
    given = {key: value for key, value in data["algorithm_arguments"].items() if key in known}
    args = config(
        output_dir=str(folder),
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        train_sampling_strategy="sequential",
        use_cpu=True,
        disable_tqdm=True,
        **{**given, **data["hyperparameters"], **data.get("bema", {}), "activation_checkpointing": False, **options},
    )
    extra = {}
    if data.get("ref_model", data["model"]) != data["model"]:
        extra["ref_model"] = str(models / data["ref_model"])
    trainer = get_trainer(name)(
        model=str(models / data["model"]), args=args, train_dataset=Dataset.from_list(data["dataset"]), **extra
    )
    start = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    references = []
    if "ref_over_steps" in data["expected"]:
        trainer.add_callback(_Watch(trainer, references))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return SimpleNamespace(data=data, trainer=trainer, lines=lines, start=start, references=references)


class _Watch(TrainerCallback):
    """Copies the reference's weights at the end of each step, after all hooks."""

    def __init__(self, trainer, copies):
        self.trainer, self.copies = trainer, copies

    def on_step_end(self, *_, **__):
        weights = self.trainer.reference.module.named_parameters()
        self.copies.append({name: value.detach().clone() for name, value in weights})


def differing_references(result):
    found = []
    expected = result.data["expected"].get("ref_over_steps", [])
    assert len(expected) == len(result.references)
    for step, weights in zip(expected, result.references, strict=True):
        differing = differing_weights(weights, result.start, step["ref_params"], noise_of(result))
        found += [(step["step"], *entry) for entry in differing]
    return found


@pytest.mark.parametrize("case", CASES)
def test_run_equals_the_reference(case, parity_models, tmp_path):
    result = run(case, parity_models, tmp_path)
    # With equal policy and reference, whether a reward is above the other is rounding.
    skip = {(1, "rewards/accuracies")} if result.data.get("ref_model") == "model" else ()
    assert differing_steps(result, skip) == []
    assert differing_references(result) == []
    assert differing_parameters(result) == []
