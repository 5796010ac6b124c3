"""Runs of the reference on datasets, repeated step by step: SFT, reward models, DPO, and DPO with a BEMA reference.

See tests/parity/README.md for the cases. Where trl-core does not do as the reference did, `EXPLAINED` says why.
"""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from trl_core import get_config, get_trainer

from .conftest import PARITY
from .helpers_parity import differing_parameters, differing_steps, differing_weights, noise_of

CASES = sorted(path.stem for path in (PARITY / "offline").glob("*.json"))
NAMES = {"bema_dpo": "bema"}
FULL_LOSS = (
    "sft_conversational",
    "sft_cosine",
    "sft_prompt_completion_full",
    "sft_text",
    "sft_truncated",
    "sft_weight_decay",
)
EXPLAINED = {
    "sft entropy": (
        "The reference averages entropy over every token of a row, trl-core over those that are learned, as the loss."
    ),
    **dict.fromkeys(
        FULL_LOSS,
        "The reference's denominator counts the first token of each row, which nothing predicts (so did transformers "
        "up to 5.3); trl-core counts the tokens that are predicted. token_normalizer='labels' counts as the reference.",
    ),
    "dpo_maxlen_keep_start": (
        "The reference keeps pairs whose completions are cut away: their loss is ln 2, their gradient 0, and they "
        "count in every mean. trl-core leaves them out. Here the loss is weighted by the share that is left."
    ),
}


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
    """Copies the weights of the reference, and of its average, at the end of each step, after all hooks."""

    def __init__(self, trainer, copies):
        self.trainer, self.copies = trainer, copies

    def on_step_end(self, *_, **__):
        weights = {"ref_params": self.trainer.reference.module.named_parameters()}
        if "bema" in self.trainer.hooks.objects:
            weights["bema_running_params"] = self.trainer.hooks.objects["bema"].copies["published"].items()
        copies = {kind: {name: value.detach().clone() for name, value in of} for kind, of in weights.items()}
        self.copies.append(copies)


def differing_references(result):
    found = []
    expected = result.data["expected"].get("ref_over_steps", [])
    assert len(expected) == len(result.references)
    for step, weights in zip(expected, result.references, strict=True):
        assert set(weights) == set(step) - {"step"}
        for kind, of in weights.items():
            differing = differing_weights(of, result.start, step[kind], noise_of(result))
            found += [(step["step"], kind, *entry) for entry in differing]
    return found


def keep_rows_without_completion(result, share):
    """What the run would have logged if the pairs that were left out had counted."""
    for line in result.lines:
        line["loss"] += (1 - share) * math.log(2)
        for name in line:
            if name.startswith(("rewards/", "logps/")):
                line[name] *= share


@pytest.mark.parametrize("case", CASES)
def test_run_equals_the_reference(case, parity_models, tmp_path):
    options = {"token_normalizer": "labels"} if case in FULL_LOSS else {}
    share = 0.5 if case == "dpo_maxlen_keep_start" else 1.0  # of the pairs keep a completion
    if share < 1:
        options["loss_weights"] = [share]
    result = run(case, parity_models, tmp_path, **options)
    keep_rows_without_completion(result, share)
    # With equal policy and reference, whether a reward is above the other is rounding.
    skip = {(1, "rewards/accuracies")} if result.data.get("ref_model") == "model" else set()
    steps = range(1, len(result.lines) + 1)
    skip |= {(step, "entropy") for step in steps if result.data["algorithm"] == "sft"}
    skip |= {(step, "num_tokens") for step in steps if share < 1}
    assert differing_steps(result, skip) == []
    assert differing_references(result) == []
    assert differing_parameters(result) == []
