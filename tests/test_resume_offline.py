"""SFT, reward models and DPO: a run resumed from any of its steps ends as the run that was not stopped, bit for bit."""

import pytest
import torch
from peft import LoraConfig

from trl_core.testing import tiny_model

from .helpers_offline import lines, make_trainer, pairs, texts, tiny_classifier
from .helpers_train import adapted_model, differences, end_state, lora_config

SCORING = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
"""A batch of a stream that goes over the end of an epoch."""


def shuffled(dataset):
    return lambda: dataset.to_iterable_dataset().shuffle(seed=1, buffer_size=3)


def language_model(seed=0):
    return tiny_model(seed=seed, attention_dropout=0.2)


def classifier(seed=0):
    return tiny_classifier(seed=seed, attention_dropout=0.2)


# Trainer, its arguments, options. Five rows, two a step: each third step has one row, and epochs end there.
SCENARIOS = {
    "sft": ("SFT", {"model": language_model}, {}),
    "sft_packed": (
        "SFT",
        {"model": language_model, "train_dataset": texts},
        {"packing": True, "max_length": 16, "shuffle_dataset": True},
    ),
    "sft_stream": ("SFT", {"model": language_model, "train_dataset": shuffled(texts(9, 3, 14, 6, 11))}, TWO),
    "sft_evaluated": (
        "SFT",
        {"model": language_model, "eval_dataset": texts(4, 6)},
        {"eval_strategy": "steps", "eval_steps": 2, "activation_checkpointing": True},
    ),
    "reward": ("Reward", {"model": classifier}, {}),
    "reward_adapter": ("Reward", {"peft_config": SCORING}, {}),
    "dpo": ("DPO", {"model": language_model}, {}),
    "dpo_moving_reference": ("DPO", {"model": language_model}, {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "dpo_precomputed": (
        "DPO",
        {"model": language_model, "eval_dataset": pairs(3)},
        {"precompute_ref_log_probs": True, "eval_strategy": "steps", "eval_steps": 3},
    ),
    "dpo_adapter": ("DPO", {"peft_config": lora_config()}, {}),
    "dpo_continued_adapter": ("DPO", {"model": adapted_model}, {}),
    "dpo_explicit_reference": ("DPO", {"model": language_model, "ref_model": lambda: tiny_model(seed=4)}, {}),
    "dpo_stream": ("DPO", {"model": language_model, "train_dataset": shuffled(pairs(5))}, TWO),
}
SAMPLES = {"SFT": lambda: texts(9, 3, 14, 6, 11), "Reward": lambda: pairs(5), "DPO": lambda: pairs(5)}


def run(folder, name, resume=None, seed=0):
    """The trainer after the run, and all it leaves; the model that is passed has weights of the given seed."""
    kind, trainer, options = SCENARIOS[name]
    trainer = {"train_dataset": SAMPLES[kind], **trainer}
    if trainer.get("model") in (language_model, classifier):
        build = trainer["model"]
        trainer = {**trainer, "model": lambda: build(seed)}
    settings = {
        "max_steps": 7,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random",
        "disable_dropout": False,
        "optim": "adamw_torch",
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "save_strategy": "no" if resume else "steps",
        "save_steps": 1,
        "seed": 3,
        **options,
    }
    made = make_trainer(folder, kind, trainer, **settings)
    made.train(resume_from_checkpoint=resume)
    return made, {**end_state(made), "random": torch.get_rng_state()}


@pytest.mark.parametrize("name", SCENARIOS)
def test_resume_from_every_step_equals_the_uninterrupted_run(name, tmp_path):
    whole, expected = run(tmp_path / "whole", name)
    assert len({line["loss"] for line in lines(whole)}) == 7
    if whole.args.__dict__.get("sync_ref_model"):
        assert differences(expected["reference"], dict(tiny_model().state_dict()))
    # Weights that the checkpoint must replace, those of the reference included.
    found = {
        step: differences(
            run(tmp_path / "resumed", name, str(tmp_path / "whole" / f"checkpoint-{step}"), 9)[1], expected
        )
        for step in range(1, 7)
    }
    assert found == {step: [] for step in found}


@pytest.mark.parametrize("name", ["sft", "sft_stream", "dpo"])
def test_runs_with_dropout_and_shuffling_are_repeated_by_their_seed(name, tmp_path):
    ends = [run(tmp_path / str(i), name)[1] for i in range(2)]
    assert differences(*ends) == []
    other = run(tmp_path / "other", name, seed=1)[1]
    assert differences(other["weights"], ends[0]["weights"])
