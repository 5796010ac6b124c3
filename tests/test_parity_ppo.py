"""Runs of the reference's PPO trainer, repeated: scores, values, advantages, metrics and both models' final weights.

See tests/parity/README.md for the cases. The reference averages some statistics over padding too; those are compared
after taking that out, or, where it cannot be taken out, not at all (`NOT_COMPARED`).
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trl_core import get_config, get_trainer

from .conftest import PARITY
from .helpers_online import Recorder
from .helpers_parity import close, differing_weights, noise_of

CASES = sorted(path.stem for path in (PARITY / "ppo").glob("ppo_*.json"))
# At the start the critic equals the reward model, so that its error at the place after the end of sequence is 0 but for
# rounding. Adam makes a step of full length out of that rounding, where no other gradient reaches the weight. The
# reference pads all micro-batches to one width and rounds alike each time; trl-core does not. In double precision the
# rounding is far below Adam's epsilon.
ROUNDS_OTHERWISE = {"ppo_ga2", "ppo_minibatches"}
NOT_COMPARED = {
    "policy/entropy_avg": "the reference averages over the places behind the end too, which trl-core never computes",
}


def run(case, models, folder, **options):
    """Train; the options are those of the record, and no clipping of gradients: the reference's loop has none."""
    data = json.loads((PARITY / "ppo" / f"{case}.json").read_text())
    config = get_config("ppo")
    known = {f.name for f in dataclasses.fields(config)}
    given = {name: value for name, value in data["algorithm_arguments"].items() if name in known}
    asked = {name: value for name, value in data["hyperparameters"].items() if name in known}
    ignored = {"max_steps", "max_grad_norm"}
    given |= {name: value for name, value in asked.items() if name not in ignored}
    args = config(
        output_dir=str(folder),
        logging_steps=given["num_ppo_epochs"] * given["num_mini_batches"],
        report_to=[],
        save_strategy="no",
        activation_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=True,
        disable_tqdm=True,
        **given | options,
    )
    recorder = Recorder(data["rollouts"])
    dtype = torch.float64 if case in ROUNDS_OTHERWISE else torch.float32
    trainer = get_trainer("ppo")(
        model=AutoModelForCausalLM.from_pretrained(models / data["model"], dtype=dtype),
        reward_model=AutoModelForSequenceClassification.from_pretrained(models / data["reward_model"], dtype=dtype),
        value_model=AutoModelForSequenceClassification.from_pretrained(models / "reward_model", dtype=dtype),
        args=args,
        train_dataset=Dataset.from_list(data["dataset"]),
        rollouts=recorder,
    )
    models = {"policy": trainer.model, "value_model": trainer.extra_models["value_model"]}
    start = {name: {k: v.detach().clone() for k, v in m.named_parameters()} for name, m in models.items()}
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return SimpleNamespace(data=data, trainer=trainer, lines=lines, recorder=recorder, start=start)


def batches(result):
    """The rows of each batch in the order of the dataset, as the first pass over it saw them."""
    args, seen = result.trainer.args, result.recorder.micro_batches
    for first in range(0, len(seen), args.micro_steps):
        rows = type(seen[0]).concat([without_states(rows) for rows in seen[first : first + args.slices]])
        yield rows.take(torch.argsort(rows.position))


def without_states(rows):
    return dataclasses.replace(rows, states=None, last_states=None)


def padded(rows, values, width):
    grid = torch.zeros(rows.num_rows, width)
    for row, part in enumerate(values.split(rows.lengths.tolist())):
        grid[row, : len(part)] = part
    return grid


def as_ours(line, rows, width, micro_batches):
    """The reference's metrics without what padding adds to them."""
    tokens, places = int(rows.lengths.sum()), rows.num_rows * width
    expected = dict(line["metrics"])
    # A place behind the end has log-probability 1 there.
    expected["objective/entropy"] += (places - tokens) / rows.num_rows
    share = places / tokens
    expected["policy/approxkl_avg"] *= share
    expected["val/ratio"] = 1 + (expected["val/ratio"] - 1) * share
    expected["val/ratio_var"] *= share**2
    skipped = set(NOT_COMPARED)
    if micro_batches > 1:  # each has a share of padding of its own, which the average does not tell
        skipped |= {"policy/approxkl_avg", "val/ratio", "val/ratio_var"}
    return {name: value for name, value in expected.items() if name not in skipped}


@pytest.mark.parametrize("case", CASES)
def test_run_equals_the_reference(case, parity_models, tmp_path):
    result = run(case, parity_models, tmp_path)
    data, args = result.data, result.trainer.args
    recorded = [generation["prompt_ids"] for generation in data["rollouts"]]
    assert result.recorder.prompts == recorded
    noise, differing = noise_of(result), []
    found = list(
        zip(result.lines, batches(result), data["expected"]["updates"], data["expected"]["steps"], strict=True)
    )
    assert len(found) == data["hyperparameters"]["updates"]
    for line, rows, update, expected in found:
        assert torch.allclose(rows.reward, torch.tensor(update["scores_from_reward_model"]), atol=1e-4)
        width = args.response_length
        advantages = padded(rows, rows.advantages, width)
        assert torch.allclose(advantages, torch.tensor(update["advantages_whitened_masked"]), rtol=1e-3, atol=1e-4)
        values = torch.tensor(update["values_unmasked"])
        inside = padded(rows, torch.ones_like(rows.advantages), width).bool()
        assert torch.allclose(padded(rows, rows.notes["values"], width)[inside], values[inside], rtol=1e-3, atol=1e-4)
        differing += [
            (expected["step"], name, line.get(name), value)
            for name, value in as_ours(expected, rows, width, args.slices).items()
            if name not in line or not close(line[name], value, 1e-3, 1e-4, noise["metrics_rel"].get(name, 0.0), 1e-2)
        ]
    assert differing == []
    policy = dict(result.trainer.model.named_parameters())
    critic = dict(result.trainer.extra_models["value_model"].named_parameters())
    assert differing_weights(policy, result.start["policy"], data["expected"]["final_params"], noise) == []
    expected = data["expected"]["final_value_model_params"]
    assert differing_weights(critic, result.start["value_model"], expected, noise) == []


def test_there_are_six_cases():
    assert len(CASES) == 6
