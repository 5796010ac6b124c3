"""`trl-core train ppo`: rewards come from a model or a function, the critic from a folder."""

import functools
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_core.cli.main import main
from trl_core.testing import tiny_classifier, tiny_model, tiny_tokenizer

from . import helpers_cli
from .helpers_cli import flags, metrics

FUNCTIONS = """
def length(completions, **_):
    return [float(len(text)) for text in completions]
"""
SMALL = {
    "response_length": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "total_episodes": 8,
    "learning_rate": 0.01,
    "stop_token": "eos",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 4,
    "activation_checkpointing": False,
    "use_cpu": True,
}
train = functools.partial(helpers_cli.train, algorithm="ppo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a policy, a reward model, prompts, a function and a run."""
    folder = tmp_path_factory.mktemp("ppo")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    tiny_classifier(seed=1).save_pretrained(folder / "reward")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in range(1, 9)))
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "run.yaml").write_text(yaml.safe_dump({**SMALL, "model": "model", "dataset": "prompts.jsonl"}))
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    helpers_cli.work_in(folder, monkeypatch)


def test_run_with_reward_and_value_model(folder):
    words = flags(reward_model="reward", value_model="reward", config="run.yaml", output_dir="both")
    done = train(*words)
    assert done.code == 0, done.err
    found = [line for line in metrics("both") if "loss" in line]
    assert [line["step"] for line in found] == list(range(1, 9))
    assert {"rewards/reward_model/mean", "objective/kl", "loss/value_avg"} <= found[0].keys()
    start = tiny_classifier(seed=1).state_dict()
    critic = load_file(folder / "both" / "checkpoint-8" / "value_model.safetensors")
    assert critic.keys() == start.keys() and not torch.equal(critic["score.weight"], start["score.weight"])
    saved = AutoModelForCausalLM.from_pretrained("both").state_dict()
    assert not torch.equal(saved["lm_head.weight"], tiny_model().state_dict()["lm_head.weight"])


def test_models_may_stand_in_the_config(folder):
    given = {**yaml.safe_load((folder / "run.yaml").read_text()), "reward_model": "reward", "value_model": "reward"}
    (folder / "all.yaml").write_text(yaml.safe_dump(given))
    done = train(*flags(config="all.yaml", output_dir="yaml", total_episodes=4))
    assert done.code == 0, done.err


def test_reward_model_may_be_a_function(folder):
    words = flags(reward_model="functions.py:length", config="run.yaml", output_dir="function", total_episodes=4)
    done = train(*words)
    assert done.code == 0, done.err
    assert "rewards/length/mean" in metrics("function")[0]
    critic = load_file(folder / "function" / "checkpoint-4" / "value_model.safetensors")
    assert {name: tuple(value.shape) for name, value in critic.items()} == {"weight": (1, 32), "bias": (1,)}


def test_reward_model_beside_reward_funcs():
    words = flags(reward_model="reward", reward_funcs="functions.py:length", config="run.yaml", output_dir="beside")
    done = train(*words, *flags(total_episodes=4))
    assert done.code == 0, done.err
    assert {"rewards/reward_model/mean", "rewards/length/mean"} <= metrics("beside")[0].keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "No reward_funcs is given"),
        ({"value_model": "reward"}, "No reward_funcs is given"),
        ({"reward_model": "functions.py:lenght"}, "no 'lenght'. Did you mean 'length'"),
        ({"reward_model": "./nowhere"}, "'./nowhere' cannot be loaded"),
        ({"reward_model": "reward", "num_mini_batches": 3}, "num_mini_batches=3 does not divide"),
        ({"reward_modell": "reward"}, "Did you mean 'reward_model'"),
    ],
)
def test_what_does_not_fit_is_refused(words, message):
    done = train(*flags(**words, config="run.yaml", output_dir="refused"))
    assert done.code == 2
    assert message in done.err and "To mend:" in done.err and "Traceback" not in done.err


def test_help_shows_both_models(capsys):
    with pytest.raises(SystemExit):
        main(["train", "ppo", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "--reward_model VALUE sequence classifier" in shown
        and "--value_model VALUE critic, a sequence classifier" in shown
    )
