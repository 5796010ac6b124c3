"""What options take: bad values are named when a configuration is made, and the values beside them act.

All through the public API: configuration classes, trainers, and `trl-core train`.
"""

import dataclasses
import enum
import functools
import math
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import TrainerCallback, TrainingArguments

from trl_core import check_options, errors, get_config, get_trainer, list_algorithms, option
from trl_core.options import fields_of, kinds
from trl_core.testing import tiny_model, tiny_tokenizer

from .helpers_cli import train
from .helpers_offline import pairs, texts
from .helpers_online import prompts, table

NAN, INF = math.nan, math.inf
NOWHERE = "no/such-model"


class Kind(enum.Enum):
    REVERSE_KL = "reverse_kl"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


config_class, trainer_class = functools.cache(get_config), functools.cache(get_trainer)


def config(algorithm, folder="unused", **options):
    return config_class(algorithm)(output_dir=str(folder), use_cpu=True, report_to=[], **options)


def several(algorithm, **options):
    """(algorithm, option, value) for each value of each option."""
    return [(algorithm, name, value) for name, values in options.items() for value in values]


# -- values that are refused ------------------------------------------------------------------------------------------
COUNT = [0, -1, 2.5, NAN, INF, "4", True, None, [4], 10**30]
SHARE = [-0.1, 1.1, NAN, "0.5", True]
BAD = [
    # of the trainers that generate
    *several("grpo", num_generations=[*COUNT, 1, {}], max_completion_length=COUNT, num_iterations=COUNT),
    *several(
        "grpo", steps_per_generation=[-1, 0, 1.5, "2"], generation_batch_size=[-8, 0, 8.5], generation_rows=[0, -3]
    ),
    *several("grpo", temperature=[0, -1.0, INF, NAN, "1", None, True], top_p=[0, *SHARE], min_p=SHARE),
    *several("grpo", top_k=[-1, 0.5, NAN, None], repetition_penalty=[0, -1, INF], num_generations_eval=[0, 1.5]),
    *several("grpo", reward_weights=[[1, NAN], [INF], ["1"], [True], 1.0, "1", {"a": 1}, [None]]),
    *several("grpo", reward_timeout=[0, -1, NAN, "5"], reward_processes=[-1, 1.5, None]),
    *several("grpo", dynamic_sampling=["false", 0, 1, None, "yes"], dynamic_sampling_max_rounds=[0, 1.5]),
    *several("grpo", loss_type=["gpro", "", None, 1, ["grpo"]], token_normalizer=["epoch", None]),
    *several("grpo", generation_kwargs=["x", "{", "[1]", 5, ["a"]], chat_template_kwargs=["{'a': 1}", True]),
    *several("grpo", num_completions_to_print=[-1, 2.5], log_completions=["no"]),
    # of every trainer
    *several("sft", learning_rate=[-1e-5, NAN, INF, "1e-5", None, True, [1e-5]], weight_decay=[-0.1, NAN]),
    *several(
        "sft", adam_beta1=[1, 1.5, -0.1], adam_beta2=[1.0, NAN], adam_epsilon=[-1e-8, INF], max_grad_norm=[-1, NAN]
    ),
    *several("sft", num_train_epochs=[-1, NAN, INF, "3", None], max_steps=[-2, 1.5, NAN, "10"]),
    *several("sft", warmup_steps=[-1, 1.5, NAN, "10"], logging_steps=[0, -1, 2.5, NAN, "10", True]),
    *several("sft", save_steps=[0, -1, 1.5, INF], eval_steps=[0, -5, 1.5], save_total_limit=[0, -3, 1.5]),
    *several("sft", per_device_train_batch_size=COUNT, per_device_eval_batch_size=[0, -1, 1.5]),
    *several("sft", gradient_accumulation_steps=COUNT, seed=[-1, 2**32, 1.5, "1", NAN], data_seed=[-1, 2**32]),
    *several("sft", dataloader_num_workers=[-1, 0.5], dataloader_prefetch_factor=[0], label_smoothing_factor=SHARE),
    *several("sft", lr_scheduler_type=["cosin", 5, None], optim=["adamm", 1], eval_strategy=["step", False, 1]),
    *several(
        "sft", save_strategy=["sometimes"], report_to=[5, ["x", 1], "wanb"], bf16=["false", 1], fp16=["yes", None]
    ),
    *several("sft", accelerator_config=["nofile", 5], lr_scheduler_kwargs=["x", [1]], model_init_kwargs=["x", 3]),
    *several(
        "sft", log_level=["loud"], train_sampling_strategy=["shuffled"], debug=["everything"], output_dir=[5, ["a"]]
    ),
    *several("sft", pad_to_multiple_of=[0, -8, 1.5, "8", "automatic"], max_tokens_per_forward=[0, -1, 0.5]),
    *several(
        "sft", on_nonfinite_loss=["ignore", None], resume_check=["lax", True], trust_remote_code=["false", "true"]
    ),
    # of those of datasets
    *several("sft", max_length=[0, 1, -1, 8.5, "8"], truncation_mode=["keep_middle", 0], dataset_num_proc=[0, 1.5]),
    *several("sft", packing=["false", 1, "bfd", None], packing_strategy=["ffd", True], loss_type=["mse", None]),
    *several("sft", dataset_text_field=[5, None], eos_token=[1], router_aux_loss_coef=[-1, NAN]),
    *several("dpo", beta=[0, -0.1, NAN, INF, "0.1", None, [0.1]], label_smoothing=[0.5, -0.1, 1, NAN, "0"]),
    *several("dpo", loss_type=["dpo", [], ["sigmoid", "x"], {"sigmoid": 1}, 5, [5]], ld_alpha=SHARE),
    *several("dpo", loss_weights=[[NAN], [INF], ["1"], 1.0, [[1.0]]], rpo_alpha=[-1, NAN], discopop_tau=[0, INF]),
    *several("dpo", f_divergence_type=["kl", 5], f_alpha_divergence_coef=[NAN, INF, "1"], bco_shift=[NAN, None]),
    *several("dpo", wpo_max_weight=[0, -1], ref_model_sync_steps=[0, -1, 1.5, True], ref_model_mixup_alpha=SHARE),
    *several("dpo", precompute_ref_batch_size=[0], sync_ref_model=["false"]),
    *several("reward", center_rewards_coefficient=[-0.01, NAN, "0"], max_length=[1], disable_dropout=["no"]),
    # of GRPO and what extends it
    *several("grpo", beta=[-0.1, NAN, "0"], epsilon=[-0.5, NAN, INF, None], epsilon_high=[-1, INF], delta=[0, NAN]),
    *several("grpo", scale_rewards=["row", 1, None], top_entropy_quantile=SHARE, entropy_coef=[NAN, "0"]),
    *several("grpo", multi_objective_aggregation=["max"], sapo_temperature_pos=[0]),
    *several("grpo", vespo_k_pos=[-1], vllm_importance_sampling_mode=["row_mask"]),
    *several("grpo", vllm_importance_sampling_clip_max=[0, NAN], off_policy_mask_threshold=[-1, INF]),
    *several("gfpo", num_remains_in_group=[2.5, 1, 0, -2, "4", True, NAN], gfpo_std=["x"], gfpo_denominator=[None]),
    *several("gfpo", k_hard=[1, 2.5], difficulty_warmup=[-1], adaptive_difficulty=["false"]),
    *several("replay", replay_buffer_size=[-1, 0.5, NAN, "64", None], sample_before_add=["no"]),
    *several(
        "bema", update_freq=[0, 1.5], ema_power=[-1, NAN], lag=[1.5, "10"], min_ema_multiplier=[1.5], multiplier=[INF]
    ),
    *several("bema", ref_model_update_freq=[0, -1], update_after=[-1], bema_device=[5]),
    *several("ppo", response_length=COUNT[:-3], num_ppo_epochs=[0, 1.5], num_mini_batches=[0, -1, "2"], gamma=SHARE),
    *several("ppo", lam=SHARE, cliprange=[-0.1, NAN], vf_coef=[-1, INF], kl_estimator=["k2"], stop_token=["pad", 1]),
    *several("ppo", missing_eos_penalty=[0, -1, NAN], total_episodes=[0, 1.5], value_learning_rate=[-1, "x"]),
    *several("gspo", epsilon=[-1e-4]),
    *several("gspo_token+gfpo+replay", num_remains_in_group=[2.5], replay_buffer_size=[2.5], beta=[NAN]),
]


def test_there_are_many_of_them():
    assert len(BAD) >= 300
    assert len({(algorithm, name) for algorithm, name, _ in BAD}) >= 100


@pytest.mark.parametrize(("algorithm", "name"), sorted({(algorithm, name) for algorithm, name, _ in BAD}))
def test_value_that_cannot_be_is_named(algorithm, name):
    known = {"output_dir": "unused", "use_cpu": True, "report_to": []}
    for value in (value for *of, value in BAD if of == [algorithm, name]):
        with pytest.raises(errors.ConfigError) as caught:
            config_class(algorithm)(**known | {name: value})
            pytest.fail(f"{name}={value!r} was taken")
        assert name in caught.value.what
        assert "To mend:" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("steps_per_generation", -1, "steps_per_generation=-1 is not a whole number of at least 1, or None"),
        ("temperature", INF, "temperature=inf is not a finite number above 0"),
        ("epsilon", -0.5, "epsilon=-0.5 is not a finite number of at least 0"),
        ("learning_rate", "1e-5", "learning_rate='1e-5' (str) is not a finite number of at least 0"),
        ("min_p", 2, "min_p=2 is not a finite number of at least 0 and at most 1, or None"),
        ("logging_steps", 0, "logging_steps=0 is not a whole number of at least 1, or a share of the run"),
        ("use_bias_correction_kl", "false", "use_bias_correction_kl='false' (str) is not True or False"),
        ("scale_rewards", "grup", "scale_rewards='grup' (str) is not one of 'group', 'batch', 'none', True, False"),
        ("reward_weights", [1, NAN], "reward_weights=[1, nan] (list) is not a list of finite numbers, or None"),
        ("num_generations", 10**30, "in 64 bits"),
        ("beta", NAN, "it is an option of GRPOConfig in trl_core.algorithms.grpo"),
        ("max_completion_length", 0, "it is an option of OnlineConfig in trl_core.training.config"),
        ("weight_decay", -1, "it is an option of TrainingArguments in transformers.training_args"),
    ],
)
def test_message_has_value_what_is_expected_and_whose_option_it_is(name, value, told):
    with pytest.raises(errors.ConfigError, match=re.escape(told)):
        config("grpo", **{name: value})


def test_mend_suggests_the_nearest_choice_and_says_what_the_option_does():
    with pytest.raises(errors.ConfigError) as caught:
        config("grpo", scale_rewards="grup")
    assert "Did you mean 'group'?" in caught.value.mend
    assert "Divide advantages by the std" in caught.value.mend
    with pytest.raises(errors.ConfigError) as caught:
        config("dpo", loss_type=["sft", "sigmod"])
    assert "Did you mean 'sigmoid'?" in caught.value.mend
    with pytest.raises(errors.ConfigError) as caught:
        config("grpo", learning_rate="1e-5")
    assert "without quotes" in caught.value.mend


def test_value_of_a_secret_is_not_told():
    with pytest.raises(errors.ConfigError) as caught:
        config("sft", model_init_kwargs=[{"token": "hf_planted"}])
    assert "planted" not in str(caught.value)
    with pytest.raises(errors.ConfigError) as caught:
        config("sft", hub_token=b"hf_planted")
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "options", "told"),
    [
        ("grpo", {"vllm_importance_sampling_clip_min": 4.0}, "vllm_importance_sampling_clip_min=4.0 is above"),
        ("grpo", {"entropy_coef_min": 2.0}, "entropy_coef_min=2.0 is above entropy_coef_max=1.0"),
        ("grpo", {"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau requires an eval strategy"),
        ("sft", {"load_best_model_at_end": True, "eval_strategy": "epoch"}, "load_best_model_at_end"),
        ("sft", {"fp16": True, "bf16": True}, "fp16 and bf16"),
        ("sft", {"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor"),
        ("sft", {"lr_scheduler_kwargs": {"bogus": 1}}, "lr_scheduler_kwargs has ['bogus']"),
        ("sft", {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"power": 1}}, "lr_scheduler_kwargs has"),
        ("sft", {"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
        ("sft", {"optim_args": "foo"}, "optim_args='foo' is not of the form"),
        ("sft", {"optim": "sgd", "optim_args": "momentum=0.9,momentun=1"}, "'momentun=1', which optim='sgd' does not"),
        ("dpo", {"optim": "adafactor", "optim_args": "scale_parameter=1"}, "optim='adafactor' does not take"),
        (
            "grpo",
            {"generation_kwargs": {"max_new_token": 5}},
            "'max_new_token', which generation does not take. Did",
        ),
        ("grpo", {"generation_kwargs": {"max_new_tokens": -5}}, "generation_kwargs={'max_new_tokens': -5} cannot be"),
        ("grpo", {"generation_kwargs": '{"top_k": -5}'}, "top_k=-5 is not"),
        ("grpo", {"generation_kwargs": {"eos_token_id": "x"}}, "eos_token_id='x'"),
        ("grpo", {"generation_kwargs": {"eos_token_id": [1, -2]}}, "eos_token_id=[1, -2]"),
        ("grpo", {"generation_kwargs": {"typical_p": NAN}}, "typical_p=nan"),
    ],
)
def test_options_that_do_not_fit_each_other_are_named(algorithm, options, told):
    with pytest.raises(errors.ConfigError, match=re.escape(told)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config(algorithm, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": "two"}}, "'two'"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": NAN}},
            "make learning rates of [0.0, 0.1, nan",
        ),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1}}, "cannot be"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}}, "smaller than initial lr"),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}}, "cannot be"),
        ({"gradient_checkpointing_kwargs": {"use_rentrant": True}}, "Did you mean 'use_reentrant'?"),
        ({"activation_checkpointing_kwargs": {"every_n_layers": "2"}}, "every_n_layers='2'"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": 5}}, "use_reentrant=5"),
        ({"fsdp": "nonsense"}, "Change one of the options given: output_dir, report_to, use_cpu, fsdp."),
    ],
)
def test_what_the_first_step_would_fail_with_is_told_when_the_configuration_is_made(options, told):
    with pytest.raises(errors.ConfigError, match=re.escape(told)):
        config("sft", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler_type": "polynomial", "learning_rate": 1e-2, "lr_scheduler_kwargs": {"lr_end": 5e-3}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5000}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-7}},
        {"activation_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": True, "every_n_layers": 2}},
        {"report_to": None},
    ],
)
def test_schedules_checkpointing_and_no_tracker_are_taken(options):
    assert config_class("sft")(output_dir="unused", use_cpu=True, **options).report_to == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"use_liger_kernel": True}, "liger-kernel is not installed"),
        ({"fsdp": "full_shard"}, "this is a single one"),
        ({"torch_compile_mode": "fastest"}, "torch_compile_mode='fastest' cannot be"),
        ({"torch_compile_backend": "none"}, "torch_compile_backend='none'"),
        ({"push_to_hub": True, "hub_model_id": "a b"}, "hub_model_id='a b' is no name"),
    ],
)
def test_option_that_asks_for_what_is_not_here_is_told_before_a_model_is_loaded(options, told, monkeypatch):
    monkeypatch.setattr("trl_core.training.arguments.is_liger_kernel_available", lambda: False)
    args = config("sft", **options)  # as transformers, which may run it elsewhere
    with pytest.raises(errors.ConfigError, match=told):
        get_trainer("sft")(NOWHERE, args, texts())


def test_hub_that_cannot_be_reached_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    args = config("sft", tmp_path, push_to_hub=True, hub_model_id="a/b")
    with pytest.raises(errors.ConfigError, match="push_to_hub: the repository cannot be made"):
        get_trainer("sft")(tiny_model(), args, texts(), processing_class=tiny_tokenizer())


def test_metric_of_the_best_model_that_is_not_there_is_told_with_those_that_are(tmp_path):
    given = {"metric_for_best_model": "rewrad", "save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1}
    args = config("sft", tmp_path, max_steps=1, **given)
    trainer = get_trainer("sft")(tiny_model(), args, texts(), texts(), processing_class=tiny_tokenizer())
    with pytest.raises(errors.ConfigError, match=r"'rewrad' is none of .*\n.*eval_loss"):
        trainer.train()


def test_policy_that_cannot_be_sampled_from_is_told(tmp_path):
    args = config("grpo", tmp_path, per_device_train_batch_size=8, temperature=1e-300, max_completion_length=2)
    trainer = get_trainer("grpo")(
        tiny_model(), args=args, train_dataset=prompts(), reward_funcs=table(1.0), processing_class=tiny_tokenizer()
    )
    with pytest.raises(errors.NonFiniteLossError, match="no probabilities to sample from"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "named"),
    [({"dtype": "float31"}, "there is no dtype 'float31'"), ({"bogus": 1}, "unexpected keyword argument 'bogus'")],
)
def test_argument_of_the_model_that_cannot_be_is_named(options, named, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(errors.ConfigError, match=named):
        get_trainer("sft")(tmp_path / "model", config("sft", tmp_path, model_init_kwargs=options), texts())


def test_optimizer_that_is_not_installed_is_named(tmp_path):
    args = config("sft", tmp_path, optim="lomo", max_steps=1)
    trainer = get_trainer("sft")(tiny_model(), args, texts(), processing_class=tiny_tokenizer())
    with pytest.raises(errors.ConfigError, match="optim='lomo' cannot be made"):
        trainer.train()


# -- values that are taken --------------------------------------------------------------------------------------------
GOOD = [
    *several("grpo", num_generations=[2, 4, 2.0, np.int64(4)], max_completion_length=[1, 4096], num_iterations=[1, 3]),
    *several("grpo", temperature=[1e-3, 1, 2.5], top_p=[1e-6, 1, 1.0], min_p=[0, 1, 0.05, None], top_k=[0, 1, 50]),
    *several("grpo", reward_weights=[[1, -0.5], (1.0, 2.0), [0], None], reward_timeout=[0.1, 60, None]),
    *several("grpo", reward_weights=[np.array([1.0, 2.0]), torch.tensor([1, -0.5])]),
    *several("grpo", reward_processes=[0], num_completions_to_print=[0, None], repetition_penalty=[0.5, 1.2]),
    *several(
        "grpo", beta=[0, 0.0, 0.04, np.float32(0.5), torch.tensor(0.25)], epsilon=[0, 0.2, 1.0], delta=[1.5, None]
    ),
    *several("grpo", scale_rewards=[True, False, "batch"], epsilon_high=[0.28, None], entropy_coef=[-0.01, 0]),
    *several("grpo", importance_sampling_level=["sequence", "sequence_token"], top_entropy_quantile=[0, 1, 0.2]),
    *several("grpo", generation_kwargs=['{"do_sample": true}', {"top_k": 5}, None]),
    *several("sft", learning_rate=[0, 1, 1e-6], weight_decay=[0], adam_beta1=[0, 0.999], max_grad_norm=[0, 0.0]),
    *several("sft", num_train_epochs=[0, 0.5, 1, 100], max_steps=[-1, 0, 1, 7.0], warmup_steps=[0, 0.1, 10, 10.0]),
    *several("sft", logging_steps=[1, 0.1, 10.0], save_steps=[1, 0.5], save_total_limit=[1, None], eval_delay=[0, 1.5]),
    *several("sft", seed=[0, 2**32 - 1, np.int64(3)], data_seed=[0, None], dataloader_num_workers=[0, 2]),
    *several("sft", bf16=[None, False, np.bool_(False)], report_to=["none", []], label_smoothing_factor=[0, 1]),
    *several(
        "sft", lr_scheduler_type=["cosine"], eval_strategy=["epoch"], accelerator_config=['{"even_batches": false}']
    ),
    *several("sft", pad_to_multiple_of=["auto", 1, 8, None], max_length=[2, None], output_dir=[Path("somewhere")]),
    *several("sft", loss_type=["dft", "chunked_nll"], model_init_kwargs=[{"dtype": "float32"}], debug=[""]),
    *several("dpo", beta=[1e-3, 5], loss_type=["ipo", ["sigmoid", "sft"], ("sigmoid", "hinge")], label_smoothing=[0.0]),
    *several("dpo", f_divergence_type=["forward_kl", Kind.REVERSE_KL], ld_alpha=[0, 1, None], bco_shift=[-2.0]),
    *several("dpo", ref_model_mixup_alpha=[0, 1], ref_model_sync_steps=[1], rpo_alpha=[None]),
    *several("reward", center_rewards_coefficient=[0, 0.01, None]),
    *several("gfpo", num_remains_in_group=[2, 8, None], difficulty_warmup=[0]),
    *several("replay", replay_buffer_size=[0, 1]),
    *several("bema", update_freq=[1], ema_power=[0, 1], lag=[1, 100], min_ema_multiplier=[0, 1]),
    *several("ppo", response_length=[1], gamma=[0, 1], lam=[0, 1.0], stop_token=["eos", None], kl_coef=[0]),
]


@pytest.mark.parametrize(
    ("algorithm", "name", "value"),
    [
        ("sft", "label_names", ["labels"]),
        ("grpo", "include_for_metrics", ["loss"]),
        ("reward", "batch_eval_metrics", True),
        ("grpo", "train_sampling_strategy", "group_by_length"),
    ],
)
def test_option_of_transformers_that_does_nothing_here_is_refused(algorithm, name, value):
    with pytest.raises(errors.ConfigError, match=f"{name}=.* has no effect here") as caught:
        config(algorithm, **{name: value})
    assert len(caught.value.mend) > 20
    config(algorithm, **{name: getattr(config(algorithm), name)})


def test_there_are_many_neighbours():
    assert len(GOOD) >= 100


@pytest.mark.parametrize(("algorithm", "name"), sorted({(algorithm, name) for algorithm, name, _ in GOOD}))
def test_value_at_the_border_is_taken_and_becomes_a_plain_one(algorithm, name):
    known = {"output_dir": "unused", "use_cpu": True, "report_to": [], "disable_tqdm": True}
    # Rows that every count of generations above divides.
    known |= {"per_device_train_batch_size": 8} if algorithm in ("grpo", "gfpo", "replay") else {}
    for value in (value for *of, value in GOOD if of == [algorithm, name]):
        made = config_class(algorithm)(**known | {name: value})
        found = getattr(made, name)
        if isinstance(value, np.ndarray | torch.Tensor) and value.ndim:
            assert found == value.tolist() and type(found) is list
        elif isinstance(value, np.generic | torch.Tensor):
            assert type(found) in (bool, int, float)
        if isinstance(value, int | float | np.generic) and name != "scale_rewards":
            assert found == value
        if isinstance(value, tuple):
            assert found == list(value)
        check_options(made)  # what it becomes is good as well
        assert getattr(dataclasses.replace(made), name) == found


def test_numbers_of_other_libraries_become_pythons():
    made = config("grpo", num_generations=np.int64(4), beta=np.float32(0.5), learning_rate=torch.tensor(0.25))
    assert [type(made.num_generations), type(made.beta), type(made.learning_rate)] == [int, float, float]
    assert (made.num_generations, made.beta, made.learning_rate) == (4, 0.5, 0.25)
    assert type(config("grpo", num_generations=4.0).num_generations) is int
    assert config("dpo", f_divergence_type=Kind.REVERSE_KL).f_divergence_type == "reverse_kl"
    assert config("sft", folder=Path("a") / "b").output_dir == str(Path("a") / "b")


def anything(draw):
    """A value of any type."""
    number = draw.choice([0, 1, -1, 2, 7, 10**19, 0.5, 1.5, -2.0, 1e300, NAN, INF, draw.uniform(-3, 3)])
    text = draw.choice(["", "a", "1", "true", "none", "grpo", "{", "{}", "\0", "\ud800"])
    simple = [None, True, False, number, number, number, text, text, b"1", object(), Kind, len]
    held = [[number], [text, None], (number,), {text: number}, {number}, np.float32(1.5), np.zeros(2), torch.ones(())]
    return draw.choice([*simple, *held])


def test_whatever_is_given_is_taken_or_named():
    draw = random.Random(0)
    outcomes = {True: 0, False: 0}
    for _ in range(500):
        algorithm = draw.choice(["sft", "dpo", "gfpo", "ppo", "bema"])
        names = [f.name for f in fields_of(config_class(algorithm)) if f.metadata["owner"] is not TrainingArguments]
        name, value = draw.choice(names), anything(draw)
        try:
            made = config(algorithm, **{name: value})
        except errors.ConfigError as error:
            assert "To mend:" in str(error)
            outcomes[False] += 1
        else:
            check_options(made)
            found = getattr(made, name)
            assert not isinstance(found, float) or math.isfinite(found)
            outcomes[True] += 1
    assert min(outcomes.values()) > 50


# -- names ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("algorithm", "name", "meant"),
    [
        ("grpo", "num_generation", "num_generations"),
        ("grpo", "temprature", "temperature"),
        ("gfpo", "num_remain_in_group", "num_remains_in_group"),
        ("sft", "max_seq_length", "max_length"),
        ("dpo", "learning_rat", "learning_rate"),
        ("ppo", "kl_coeff", "kl_coef"),
    ],
)
def test_unknown_option_suggests_the_nearest(algorithm, name, meant):
    with pytest.raises(errors.UnknownOptionError, match=f"no option '{name}'. Did you mean '{meant}'"):
        config(algorithm, **{name: 1})
    assert issubclass(errors.UnknownOptionError, TypeError)  # as a dataclass would raise


@pytest.mark.parametrize("name", ["", "  ", None, 5, "gfpo+", "+gfpo", "gfpo++replay", [], ["grpo"], True, "+"])
@pytest.mark.parametrize("get", [get_config, get_trainer])
def test_name_that_is_none_is_refused(get, name):
    with pytest.raises(errors.AlgorithmNotFoundError, match="is not the name of an algorithm"):
        get(name)


@pytest.mark.parametrize("name", ["grpo+grpo", "gfpo+gfpo", "gfpo+trl-gfpo:gfpo", "gfpo+replay+gfpo"])
def test_algorithm_that_is_named_twice_is_refused(name):
    with pytest.raises(errors.CompositionError, match="twice"):
        get_trainer(name)


# -- a configuration that changed -------------------------------------------------------------------------------------
def test_attribute_that_was_set_later_is_checked_by_the_trainer():
    for algorithm, name, value in (("sft", "learning_rate", NAN), ("dpo", "beta", -1), ("reward", "max_length", 1.5)):
        args = config(algorithm)
        setattr(args, name, value)
        with pytest.raises(errors.ConfigError, match=f"{name}={value}"):
            get_trainer(algorithm)(NOWHERE, args=args, train_dataset=pairs() if algorithm != "sft" else texts())


def test_configuration_of_another_algorithm_is_checked_by_the_trainer():
    args = config("grpo")
    args.beta = NAN
    with pytest.raises(errors.ConfigError, match="beta=nan"):
        get_trainer("gspo")(NOWHERE, reward_funcs=table(1.0), args=args, train_dataset=prompts())


def test_replacing_an_option_checks_it():
    made = config("gfpo", num_remains_in_group=4)
    assert dataclasses.replace(made, beta=0.5).beta == 0.5
    with pytest.raises(errors.ConfigError, match="beta=nan"):
        dataclasses.replace(made, beta=NAN)


# -- options of plugins -----------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Own:
    share: float = option(0.5, "A share.", gt=0, lt=1)
    count: int | None = option(None, "A count.", ge=1)
    names: list[str] = option(["a"], "Names.", choices=("a", "b"))
    level: int = option(1, "A level.", choices=(1, 2, 4))
    other: Any = option(None, "Anything.")

    def __post_init__(self):
        check_options(self)


def test_options_of_a_class_of_its_own_are_checked_and_lists_are_copied():
    assert Own().names is not Own().names
    assert Own(names=("a", "b"), level=np.int32(4)) == Own(0.5, None, ["a", "b"], 4)
    assert Own(other=len).other is len
    for bad in (
        {"share": 0},
        {"share": 1},
        {"count": 0},
        {"names": ["c"]},
        {"names": "a"},
        {"level": 3},
        {"level": "1"},
    ):
        with pytest.raises(errors.ConfigError, match=f"{next(iter(bad))}=.*option of Own in"):
            Own(**bad)


def test_callback_and_classic_trainer_check_their_options_too():
    bema, classic = pytest.importorskip("trl_bema"), pytest.importorskip("trl_ppo.classic")
    for made, bad in (
        (bema.BEMACallback, {"update_freq": 0}),
        (bema.BEMACallback, {"ema_power": NAN}),
        (bema.BEMACallback, {"update_ref_model": "false"}),
        (classic.PPOConfig, {"cliprange": NAN}),
        (classic.PPOConfig, {"batch_size": 128.5}),
        (classic.PPOConfig, {"kl_penalty": "k1"}),
        (classic.PPOConfig, {"adap_kl_ctrl": "false"}),
    ):
        with pytest.raises(errors.ConfigError, match=next(iter(bad))):
            made(**bad)


# Options that may be any finite number.
ANY_NUMBER = {
    "entropy_coef": "a negative one lowers the entropy",
    "entropy_coef_min": "bounds of entropy_coef",
    "entropy_coef_max": "bounds of entropy_coef",
    "f_alpha_divergence_coef": "the alpha-divergences have one for each number",
    "bco_shift": "rewards have no origin",
    "lag": "checked together with multiplier and update_freq",
    "loss_weights": "a loss may be subtracted",
    "reward_weights": "a reward may be a penalty",
}


def test_every_numeric_option_of_ours_has_a_range():
    without = {
        f.name
        for info in list_algorithms()
        if info.distribution.startswith("trl-") and not info.broken
        for f in fields_of(get_config(info.qualified))
        if f.metadata["owner"].__module__.startswith("trl_")
        and {int, float, list[float]} & {*kinds(f.type)}
        and not f.metadata["range"]
    }
    assert without == ANY_NUMBER.keys()


def test_every_default_is_taken():
    for info in list_algorithms():
        if not info.broken:
            check_options(config(info.qualified))


# -- arguments of trainers --------------------------------------------------------------------------------------------
class NoCallback:
    pass


DATA = {"sft": texts, "dpo": pairs, "reward": pairs, "grpo": prompts, "gfpo": prompts}


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"model": None}, "model is None"),
        ({"model": 5}, "model is 5"),
        ({"model": ""}, "model '' cannot be loaded"),
        ({"model": torch.nn.Linear}, "model is <class"),
        ({"model": ["a"]}, r"model is \['a'\]"),
        ({"ref_model": 5}, "ref_model is 5"),
        ({"train_dataset": "data.json"}, "train_dataset is a str"),
        ({"train_dataset": []}, "train_dataset is a list"),
        ({"train_dataset": [{"prompt": "a"}]}, "train_dataset is a list"),
        ({"train_dataset": DatasetDict()}, "train_dataset is a DatasetDict"),
        ({"train_dataset": Dataset.from_list([])}, "train_dataset"),
        ({"eval_dataset": 5}, "eval_dataset is a int"),
        ({"eval_dataset": {}}, "eval_dataset is an empty mapping"),
        ({"eval_dataset": {"a": "b"}}, r"eval_dataset\['a'\] is a str"),
        ({"processing_class": "gpt2"}, "processing_class is 'gpt2'"),
        ({"processing_class": 5}, "processing_class is 5"),
        ({"processing_class": type(tiny_tokenizer())}, "processing_class is <class"),
        ({"callbacks": NoCallback()}, "callbacks is"),
        ({"callbacks": [NoCallback()]}, "callbacks holds"),
        ({"callbacks": [TrainerCallback, 5]}, "callbacks holds 5"),
        ({"callbacks": ["a"]}, "callbacks holds 'a'"),
        ({"optimizers": 5}, "optimizers is 5"),
        ({"optimizers": (None,)}, r"optimizers is \(None,\)"),
        ({"optimizers": ("adam", None)}, r"optimizers\[0\] is 'adam'"),
        ({"optimizers": (torch.optim.Adam, None)}, r"optimizers\[0\] is <class"),
        ({"optimizers": (None, 5)}, r"optimizers\[1\] is 5"),
        ({"peft_config": {"r": 4}}, "peft_config is {'r': 4}"),
        ({"peft_config": "lora"}, "peft_config is 'lora'"),
        ({"args": {"beta": 1}}, "args is a dict, which lacks options"),
        ({"args": "out"}, "args is a str"),
        ({"args": get_config("sft")}, "args is the class SFTConfig"),
        ({"args": TrainingArguments("unused", use_cpu=True, report_to=[])}, "args is a TrainingArguments"),
        ({"dataset": None}, "no argument 'dataset'.*Did you mean"),
        ({"proccessing_class": None}, "no argument 'proccessing_class'.*Did you mean 'processing_class'"),
        ({"tokenizer": None}, "no argument 'tokenizer'"),
        ({"learning_rate": 1.0}, "no argument 'learning_rate'.*Options belong into args"),
    ],
)
def test_argument_that_cannot_be_is_named_before_loading(algorithm, arguments, named, tmp_path):
    given = {"args": config(algorithm, tmp_path), "train_dataset": DATA[algorithm](), "model": NOWHERE}
    given |= {"reward_funcs": table(1.0)} if algorithm == "grpo" else {}
    with pytest.raises(errors.TRLCoreError, match=re.compile(named, re.DOTALL)) as caught:
        trainer_class(algorithm)(**given | arguments)
    assert "To mend:" in str(caught.value)
    assert NOWHERE not in str(caught.value)


def test_evaluation_without_a_dataset_is_refused_before_loading(tmp_path):
    for strategy in ("steps", "epoch"):
        args = config("sft", tmp_path, eval_strategy=strategy)
        with pytest.raises(errors.ConfigError, match=rf"eval_strategy='{strategy}', but no eval_dataset"):
            get_trainer("sft")(NOWHERE, args=args, train_dataset=texts())


def test_output_folder_with_a_name_that_no_file_can_have_is_refused(tmp_path):
    with pytest.raises(errors.OutputDirError, match="cannot be written"):
        get_trainer("sft")(NOWHERE, args=config("sft", f"{tmp_path}/a\0b"), train_dataset=texts())


def test_subclass_with_a_constructor_of_its_own_is_left_alone(tmp_path):
    class Mine(get_trainer("sft")):
        def __init__(self, *args, **kwargs):
            self.name = kwargs.pop("name")
            super().__init__(*args, **kwargs)

    with pytest.raises(errors.ConfigError, match="nowhere' cannot be loaded"):
        Mine(str(tmp_path / "nowhere"), config("sft", tmp_path), texts(), name="mine")
    with pytest.raises(errors.ConfigError, match="model is 5"):
        get_trainer("sft")(5, config("sft", tmp_path), texts())


# -- on the command line ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("algorithm", "name", "value", "told"),
    [
        ("grpo", "temperature", "inf", "temperature=inf is not a finite number above 0"),
        ("grpo", "beta", "nan", "beta=nan is not a finite number of at least 0"),
        ("grpo", "num_generations", "2.5", "num_generations='2.5' (str) is not a whole number of at least 2"),
        ("grpo", "steps_per_generation", "-1", "steps_per_generation=-1 is not a whole number of at least 1, or None"),
        ("grpo", "loss_type", "gpro", "loss_type='gpro' (str) is not one of 'grpo'"),
        ("gfpo", "num_remains_in_group", "2.5", "num_remains_in_group='2.5'"),
        ("sft", "packing", "maybe", "packing='maybe' (str) is not True or False"),
        ("sft", "learning_rate", "fast", "learning_rate='fast' (str) is not a finite number of at least 0"),
        ("sft", "logging_steps", "0", "logging_steps=0"),
        ("sft", "eval_strategy", "stpes", "Did you mean 'steps'?"),
        ("dpo", "loss_weights", "nan", "loss_weights=[nan]"),
        ("sft", "test_split_size", "-1", "test_split_size=-1 is not a whole number above 0"),
    ],
)
@pytest.mark.parametrize("place", ["flag", "file"])
def test_command_line_says_the_same(algorithm, name, value, told, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    needed = ["--model", NOWHERE, "--dataset", "nowhere.jsonl", "--use_cpu"]
    needed += ["--reward_funcs", "math:sqrt"] if algorithm in ("grpo", "gfpo") else []
    Path("run.yaml").write_text(f"{name}: {value}\n")
    more = [f"--{name}={value}"] if place == "flag" else ["--config", "run.yaml"]
    done = train(*needed, *more, algorithm=algorithm)
    assert done.code == 2
    assert told in done.err
    assert "To mend:" in done.err
    assert "Traceback" not in done.err
    assert ("run.yaml: " if place == "file" else "The command line: ") in done.err


def test_help_and_info_say_what_an_option_takes(capsys):
    from trl_core.cli.main import main

    main(["info", "gfpo", "--all"])
    shown = " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main(["train", "gfpo", "--help"])
    helped = " ".join(capsys.readouterr().out.split())
    assert "Share of tokens, by entropy, that the policy term trains (0.2). At least 0 and at most 1." in helped
    for told in ("None: all. At least 2.", "Above 0 and at most 1.", "A whole number, or a share of the run below 1."):
        assert told in helped
    assert "At least 2." in shown
