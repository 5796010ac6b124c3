"""Training on groups sends each prompt through the model once, and computes what padded rows would give."""

import pytest
import torch
from datasets import Dataset

from trl_core.models.layout import SHARED
from trl_core.testing import tiny_model

from .helpers_online import completions, make_trainer, weights
from .test_layout import MODELS, OTHERS, make

PROMPTS = Dataset.from_list([{"prompt": text} for text in ("abcdefghij", "klm", "nopqrst", "uv")])
ROLLOUTS = completions(3, 9, 5, 1, 4, 4, 2, 7)


def pad(trainer):
    """Every row in a line of its own from now on, as models are called that know nothing else."""
    trainer.layouts._exact = set()
    if trainer.reference is not None:
        trainer.reference._make_layouts = None


def run(trainer, padded):
    """(trainer, weights before, weights after)."""
    if padded:
        pad(trainer)
    before = weights(trainer)
    trainer.train()
    return trainer, before, weights(trainer)


def gap(one, other):
    return float((one[2] - other[2]).norm() / (other[2] - other[1]).norm())


# Plain gradient descent: Adam and clipping would hide a factor, and make steps of rounding.
PLAIN = {"per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_it_trains_as_on_padded_rows(name, tmp_path):
    def train(padded):
        given = {"model": make({**MODELS, **OTHERS}[name]), "train_dataset": PROMPTS, "rollouts": ROLLOUTS}
        options = {**PLAIN, "max_completion_length": 9, "num_iterations": 2, "disable_dropout": True}
        return run(make_trainer(tmp_path / str(padded), trainer=given, **options), padded)

    usual = train(False)
    assert gap(usual, train(True)) < 1e-5
    assert (usual[0].layouts.choose(usual[0].window.samples) == SHARED) is (name in MODELS)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"beta": 0.1},
        {"entropy_coef": 0.01, "top_entropy_quantile": 0.5},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "shuffle_dataset": True, "num_generations": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"padding_free": True},
        {"pad_to_multiple_of": 16},
        {"share_prompts": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_change_nothing_about_that(options, tmp_path):
    rollouts = ROLLOUTS if "steps_per_generation" not in options else completions(*range(1, 17))

    def train(padded):
        given = {"train_dataset": PROMPTS, "rollouts": rollouts}
        return run(
            make_trainer(tmp_path / str(padded), trainer=given, **{**PLAIN, "max_completion_length": 16, **options}),
            padded,
        )

    assert gap(train(False), train(True)) < 1e-5


def test_adapter_trains_as_on_padded_rows(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def train(padded):
        torch.manual_seed(0)  # of the adapter
        given = {"train_dataset": PROMPTS, "rollouts": ROLLOUTS, "peft_config": config}
        return run(make_trainer(tmp_path / str(padded), trainer=given, **PLAIN, beta=0.1), padded)

    assert gap(train(False), train(True)) < 1e-5


@pytest.mark.parametrize(
    ("options", "tokens"), [({}, 10 + 3 + 35), ({"share_prompts": False}, 4 * 10 + 4 * 3 + 35), ({"beta": 0.1}, 48)]
)
def test_a_prompt_goes_through_the_policy_once_per_group(options, tokens, tmp_path):
    model = tiny_model()
    trainer = make_trainer(
        tmp_path,
        trainer={"model": model, "train_dataset": PROMPTS, "rollouts": ROLLOUTS},
        per_device_train_batch_size=8,
        max_completion_length=9,
        max_steps=1,
        padding_free=True,
        **options,
    )
    seen = []

    def count(module, args, output):
        if model.training:  # the layouts are tried in evaluation mode
            seen.append(args[0].numel())

    model.get_input_embeddings().register_forward_hook(count)
    trainer.train()
    assert seen == [tokens]
