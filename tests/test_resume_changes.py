"""A run is resumed with what it was started with; anything else is refused by name, or acts when that is asked for."""

import json

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from trl_core.errors import CheckpointError
from trl_core.testing import tiny_model

from .helpers_offline import make_trainer, texts
from .helpers_train import lora_config

BASE = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "random",
}


def made(folder, trainer=None, **options):
    return make_trainer(folder, "SFT", trainer, **{**BASE, "output_dir": str(folder), **options})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoint after step 2 of 3."""
    folder = tmp_path_factory.mktemp("saved")
    made(folder, save_strategy="steps", save_steps=2).train()
    return folder / "checkpoint-2"


def group(trainer):
    return trainer.optimizer.param_groups[0]


def rate(trainer):
    """The learning rate of the third step, the only one of the resumed run."""
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line][-1]


# Options, what the error names, and what the run does with them: a value and what it must be.
CHANGES = {
    "learning_rate": ({"learning_rate": 4e-3}, "learning_rate: 0.01 then, 0.004 now", lambda t: (rate(t), 4e-3 / 3)),
    "weight_decay": (
        {"weight_decay": 0.25},
        "weight_decay: 0.0 then, 0.25 now",
        lambda t: (group(t)["weight_decay"], 0.25),
    ),
    "adam_beta1": ({"adam_beta1": 0.5}, "adam_beta1: 0.9 then, 0.5 now", lambda t: (group(t)["betas"], (0.5, 0.999))),
    "adam_beta2": ({"adam_beta2": 0.9}, "adam_beta2: 0.999 then, 0.9 now", lambda t: (group(t)["betas"], (0.9, 0.9))),
    "adam_epsilon": ({"adam_epsilon": 1e-3}, "adam_epsilon: 1e-08 then, 0.001 now", lambda t: (group(t)["eps"], 1e-3)),
    "max_grad_norm": (
        {"max_grad_norm": 1e-9},
        "max_grad_norm: 1.0 then, 1e-09 now",
        lambda t: (t.args.max_grad_norm, 1e-9),
    ),
    "lr_scheduler_type": (
        {"lr_scheduler_type": "constant"},
        "lr_scheduler_type: 'linear' then, 'constant' now",
        lambda t: (rate(t), 1e-2),
    ),
    "lr_scheduler_kwargs": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-3}},
        "lr_scheduler_kwargs: None then, {'min_lr': 0.005} now",
        # 1/4 of the cosine is left after two of three steps.
        lambda t: (rate(t), 5e-3 + 5e-3 * 0.25),
    ),
    "another kind of schedule": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
        "lr_scheduler_type: 'linear' then, 'reduce_lr_on_plateau' now",
        lambda t: (rate(t), 1e-2),
    ),
    "warmup_steps": ({"warmup_steps": 8}, "warmup_steps: 0 then, 8 now", lambda t: (rate(t), 1e-2 * 2 / 8)),
    "optim": ({"optim": "sgd"}, "optim: 'adamw_torch' then, 'sgd' now", lambda t: ("betas" in group(t), False)),
    "optim of the same class": (
        {"optim": "adamw_torch_fused"},
        "optim: 'adamw_torch' then, 'adamw_torch_fused' now",
        lambda t: (t.optimizer.state_dict()["state"][0]["step"].item(), 3.0),
    ),
    "seed": ({"seed": 7}, "seed: 42 then, 7 now", lambda t: (t.args.seed, 7)),
    "data_seed": ({"data_seed": 7}, "data_seed: None then, 7 now", lambda t: (t.args.data_seed, 7)),
    "neftune_noise_alpha": (
        {"neftune_noise_alpha": 5.0},
        "neftune_noise_alpha: None then, 5.0 now",
        lambda t: (t.neftune_noise_alpha, 5.0),
    ),
    "label_smoothing_factor": ({"label_smoothing_factor": 0.5}, "label_smoothing_factor: 0.0 then, 0.5 now", None),
    "gradient_accumulation_steps": (
        {"gradient_accumulation_steps": 2},
        "gradient_accumulation_steps: 1 then, 2 now",
        None,
    ),
    "dataloader_drop_last": ({"dataloader_drop_last": True}, "dataloader_drop_last: False then, True now", None),
    "accelerator_config": (
        {"accelerator_config": {"split_batches": True}},
        "accelerator_config.split_batches: False then, True now",
        None,
    ),
    "precision": ({"bf16": True}, "bf16: False then, True now", None),
    "an option of ours": ({"max_length": 4}, "max_length: 1024 then, 4 now", None),
}
INPUTS = {
    "rows": (
        {"train_dataset": lambda: texts(9, 3, 14, 6, 11, 4, 8, 6)},
        r"train_dataset\.content: '\w+' then, '\w+' now",
    ),
    "number of rows": ({"train_dataset": lambda: texts(9, 3, 14, 6)}, r"train_dataset\.rows: 8 then, 4 now"),
    "columns": (
        {"train_dataset": lambda: texts().add_column("more", [1] * 8)},
        r"train_dataset\.columns: \['text'\] then, \['more', 'text'\] now",
    ),
    "a stream": (
        {"train_dataset": lambda: texts().to_iterable_dataset()},
        r"train_dataset\.stream: None then, True now",
    ),
    "formatting_func": (
        {"formatting_func": lambda row: row["text"] + "!"},
        r"formatting_func: None then, \{'name': '<lambda>', 'code': '\w+'\} now",
    ),
    "dropout": (
        {"model": lambda: tiny_model(attention_dropout=0.5)},
        r"model\.attention_dropout: 0\.0 then, 0\.5 now",
    ),
    "heads": (
        {"model": lambda: tiny_model(num_attention_heads=2, num_key_value_heads=1, head_dim=16)},
        r"model\.num_attention_heads: 4 then, 2 now",
    ),
}
QUICK = ("learning_rate", "lr_scheduler_type", "optim", "accelerator_config")


def slow_unless(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_unless(CHANGES, QUICK))
def test_changed_option_is_refused_or_acts(name, saved, tmp_path, caplog):
    options, told, acts = CHANGES[name]
    extra = {"eval_dataset": texts(4, 6)} if "eval_strategy" in options else {}
    trainer = made(tmp_path, extra, **options)
    with pytest.raises(CheckpointError) as refused:
        trainer.train(resume_from_checkpoint=str(saved))
    assert told in str(refused.value) and "resume_check='warn'" in refused.value.mend
    trainer.args.resume_check, trainer.args.save_strategy = "warn", "steps"
    trainer.train(resume_from_checkpoint=str(saved))
    assert told in caplog.text and trainer.state.global_step == 3
    if acts is not None:
        found, expected = acts(trainer)
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", slow_unless(INPUTS, ("rows", "formatting_func", "heads")))
def test_changed_input_is_refused_or_told(name, saved, tmp_path, caplog):
    trainer, told = INPUTS[name]
    changed = made(tmp_path, trainer)
    with pytest.raises(CheckpointError, match=told):
        changed.train(resume_from_checkpoint=str(saved))
    changed.args.resume_check = "warn"
    changed.train(resume_from_checkpoint=str(saved))
    assert changed.state.global_step == 3 and "with other options" in caplog.text


@pytest.mark.parametrize("change", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_model_of_another_architecture_is_refused_whatever_is_allowed(change, saved, tmp_path):
    size = {"hidden_size": 64, "vocab_size": 300, "num_hidden_layers": 1}[change]
    trainer = made(tmp_path, {"model": lambda: tiny_model(**{change: size})}, resume_check="warn")
    with pytest.raises(CheckpointError, match="weights"):
        trainer.train(resume_from_checkpoint=str(saved))


def test_adapter_is_compared_with_its_base_and_never_exchanged(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    made(tmp_path, {"peft_config": lora_config()}, **options).train()

    def resumed(config, model=tiny_model, **more):
        again = made(tmp_path / "again", {"peft_config": config, "model": model}, max_steps=2, **more)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    resumed(lora_config())
    for name, value, told in (("lora_alpha", 16, "8 then, 16 now"), ("r", 2, "4 then, 2 now")):
        config = lora_config()
        setattr(config, name, value)
        with pytest.raises(CheckpointError, match=rf"adapter\.{name}: {told}"):
            resumed(config, resume_check="warn")
    with pytest.raises(CheckpointError, match=r"adapter: \{.*\} then, None now"):
        resumed(None, resume_check="warn")
    with pytest.raises(CheckpointError, match=r"base_model\.weights: '\w+' then, '\w+' now"):
        resumed(lora_config(), lambda: tiny_model(seed=1))


def test_trained_parameters_are_compared_and_never_exchanged(saved, tmp_path):
    trainer = made(tmp_path, resume_check="warn")
    trainer.model.lm_head.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"trained_parameters\.tensors: 21 then, 20 now"):
        trainer.train(resume_from_checkpoint=str(saved))


def test_longer_run_takes_the_learning_rates_of_its_length_and_says_so(saved, tmp_path, caplog):
    trainer = made(tmp_path, max_steps=10)
    trainer.train(resume_from_checkpoint=str(saved))
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert rates[2:] == pytest.approx([1e-2 * (10 - step) / 10 for step in range(2, 10)])
    assert "10 steps now, 3 when checkpoint-2 was written" in caplog.text and "'linear'" in caplog.text
    caplog.clear()
    with pytest.raises(CheckpointError, match="is at step 2; this run ends at step 1"):
        made(tmp_path, max_steps=1).train(resume_from_checkpoint=str(saved))


def test_length_of_a_constant_schedule_is_no_matter(tmp_path, caplog):
    options = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    made(tmp_path / "short", **options, max_steps=2).train()
    whole, longer = made(tmp_path / "whole", **options, max_steps=4), made(tmp_path / "longer", **options, max_steps=4)
    whole.train()
    longer.train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-2"))
    assert all(map(torch.equal, whole.model.state_dict().values(), longer.model.state_dict().values()))
    assert not caplog.records


def test_record_of_a_run_that_goes_on_with_new_values_says_the_new_ones(saved, tmp_path):
    options = {"learning_rate": 4e-3, "weight_decay": 0.5, "save_strategy": "steps", "save_steps": 1}
    made(tmp_path, resume_check="warn", **options).train(resume_from_checkpoint=str(saved))
    record = json.loads((tmp_path / "checkpoint-3" / "trl_core_state.json").read_text())
    assert (record["options"]["learning_rate"], record["options"]["weight_decay"], record["step"]) == (4e-3, 0.5, 3)
    made(tmp_path, max_steps=4, **options).train(resume_from_checkpoint=True)


def test_weights_that_are_saved_under_other_names_are_resumed(tmp_path):
    """A mixture of experts: transformers saves each expert on its own, and its loop cannot read that back."""
    config = MixtralConfig(
        vocab_size=261,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )

    def model(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MixtralForCausalLM(config)

    def run(folder, seed=0, **options):
        return made(tmp_path / folder, {"model": model(seed)}, save_strategy="steps", save_steps=2, **options)

    whole, resumed = run("whole"), run("resumed", seed=1)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    other, same = resumed.model.state_dict(), whole.model.state_dict()
    assert [name for name, value in same.items() if not torch.equal(value, other[name])] == []


def test_checkpoint_may_be_named_in_the_options(saved, tmp_path):
    trainer = made(tmp_path, resume_from_checkpoint=str(saved))
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 3]
    assert trainer._resume[0] == str(saved)
    trainer.train(resume_from_checkpoint=False)
    assert trainer._resume is None


def test_run_that_is_given_its_own_checkpoint_as_model_goes_on(saved, tmp_path, caplog):
    given = {"model": str(saved), "processing_class": None}
    made(tmp_path, given).train(resume_from_checkpoint=str(saved))
    assert not [line for line in caplog.messages if "compared" in line or "other" in line]


def test_given_optimizer_and_schedule_are_compared_and_act(tmp_path):
    def run(folder, rate, decay=0.5, **options):
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
        given = {"model": model, "optimizers": (optimizer, schedule)}
        return made(tmp_path / folder, given, save_strategy="steps", save_steps=2, **options)

    whole, again = run("whole", 1e-2), run("again", 1e-2)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    again.train(resume_from_checkpoint=checkpoint)
    assert all(map(torch.equal, whole.model.state_dict().values(), again.model.state_dict().values()))
    for folder, changed, told in (
        ("rate", (2e-2,), r"groups\[0\]\.(initial_)?lr: 0\.01 then, 0\.02 now"),
        ("decay", (1e-2, 0.9), r"gamma: 0\.5 then"),
    ):
        trainer = run(folder, *changed)
        with pytest.raises(CheckpointError, match=r"optimizers\[\d\]\..*" + told):
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.args.resume_check = "warn"
        trainer.train(resume_from_checkpoint=checkpoint)
        assert rate(trainer) == pytest.approx(changed[0])  # it starts anew


def test_optimizer_with_other_groups_starts_anew(saved, tmp_path, caplog):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    options = {"resume_check": "warn", "lr_scheduler_type": "constant"}
    trainer = made(tmp_path, {"model": model, "optimizers": (optimizer, None)}, **options)
    trainer.train(resume_from_checkpoint=str(saved))
    assert "The optimizer has other groups of parameters: its state starts anew." in caplog.messages
    assert rate(trainer) == 2e-2 and trainer.optimizer.state_dict()["state"][0]["step"] == 1
