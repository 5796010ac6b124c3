"""GSPO and GSPO-token: in the numbers of the specification, and through their trainers on given completions."""

import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

import trl_gspo
from trl_core import GRPOConfig, HookContext, Samples, errors, get_config, get_trainer, hookimpl
from trl_core.testing import FixedRollouts, tiny_model, tiny_tokenizer

EOS = 1
CLIPPED = ["grpo", "dapo", "bnpo", "dr_grpo", "luspo"]
CLOCKS = ("time/", "step_time", "train_runtime", "train_samples", "train_steps", "eval_runtime", "eval_s")

# Two groups of four.
LENGTHS = [6, 2, 4, 3, 5, 1, 7, 3]
REWARDS = [1.0, 0.0, 0.5, -1.0, 0.2, 0.9, -0.3, 0.1]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(values):
    return pytest.approx(values, abs=0.6e-6)


def completions(lengths):
    """Token lists of these lengths, different everywhere, that end with the terminator."""
    return [[*range(10 + 9 * row, 9 + 9 * row + length), EOS] for row, length in enumerate(lengths)]


BATCH = completions(LENGTHS)


def table(rewards):
    def reward(completions, **_):
        return [rewards[i % len(rewards)] for i in range(len(completions))]

    return reward


class Gradients(TrainerCallback):
    """Notes the gradient of each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))


def make_trainer(folder, algorithm="gspo_token", *, batch=BATCH, rewards=REWARDS, config=None, arguments=(), **options):
    """A trainer of plain gradient descent that takes four steps on one generation batch."""
    defaults = {
        "max_steps": 4,
        "num_iterations": 4,
        "num_generations": 4,
        "per_device_train_batch_size": len(batch),
        "max_completion_length": 8,
        "optim": "sgd",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "epsilon": 0.05,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    if algorithm == "gspo":
        defaults["epsilon_high"] = None
    rows = [{"prompt": "p" * (i + 1), "level": i} for i in range(len(batch) // 4)]
    given = {"reward_funcs": table(rewards), "rollouts": FixedRollouts([{"completion_ids": batch}], cycle=True)}
    return get_trainer(algorithm)(
        tiny_model(),
        args=(config or get_config(algorithm))(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        **{**given, **dict(arguments)},
    )


def run(folder, algorithm="gspo_token", **options):
    """(trainer, gradient of each step, loss of each step, share of clipped ratios in each step) of a training."""
    trainer, gradients = make_trainer(folder, algorithm, **options), Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    clipped = [line["clip_ratio/region_mean"] for line in lines]
    return trainer, gradients.steps, [line["loss"] for line in lines], clipped


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def logged(trainer):
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in trainer.state.log_history]


def by_position(answer):
    """An advantage function: that of the row, less at early tokens than at late ones."""

    def function(completion_ids, advantages):
        pairs = zip(completion_ids, advantages, strict=True)
        return [[advantage * answer(i, len(ids)) for i in range(len(ids))] for ids, advantage in pairs]

    return {"advantage_func": function}


LATE = by_position(lambda i, length: 2 * (i + 1) / (length + 1))
"""Per token, with the row's advantage as their mean."""
SAME = by_position(lambda i, length: 1.0)


# -- the constants of the specification: two rows of 2 and 3 tokens ----------------------------------------------------
LOG_RATIO = torch.tensor([0.1, 0.3, -0.4, 0.0, 0.6])
LOGPS = torch.tensor([-1.0, -0.5, -2.0, -1.0, -0.7])
REF_LOGPS = torch.tensor([-1.2, -0.4, -1.9, -1.3, -0.7])


def two_rows(advantages=(1.0, 1.0, -1.0, -1.0, -1.0), log_ratio=LOG_RATIO):
    return Samples.from_lists(
        [[5, 6], [5, 6]],
        [[11, 12], [13, 14, 15]],
        advantages=torch.tensor(advantages),
        position=torch.arange(2),
        reward=torch.zeros(2),
        generation=torch.zeros(2, dtype=torch.long),
        old_logps=LOGPS - log_ratio,
        ref_logps=REF_LOGPS,
        entropy=torch.ones(5),
    )


def hooks_of(folder, algorithm, **options):
    given = {"epsilon_high": None, "epsilon": 0.2, **options}
    args = get_config(algorithm)(str(folder), report_to=[], use_cpu=True, **given)
    return get_trainer(algorithm).composition.instantiate(HookContext(args, {"advantage_func": None}))


def terms_of(folder, algorithm, samples, logps=LOGPS, **options):
    """The loss terms (T,) of these rows, by name."""
    call = hooks_of(folder, algorithm, **options).call
    log_ratio = call.log_ratio(samples=samples, logps=logps)
    (terms,) = call.loss_terms(samples=samples, logps=logps, log_ratio=log_ratio)
    return terms


@pytest.mark.parametrize("algorithm", ["gspo", "gspo_token"])
def test_ratios_equal_the_constants(algorithm, tmp_path):
    log_ratio = hooks_of(tmp_path, algorithm).call.log_ratio(samples=two_rows(), logps=LOGPS)
    assert log_ratio.exp().tolist() == close([1.221403] * 2 + [1.068939] * 3)


@pytest.mark.parametrize("algorithm", ["gspo", "gspo_token"])
def test_losses_equal_the_constants(algorithm, tmp_path):
    samples = two_rows()
    losses = terms_of(tmp_path, algorithm, samples)["policy"]
    assert samples.mean_per_row(losses).mean().item() == close(-0.065530)  # grpo
    assert losses.mean().item() == close(0.161363)  # dapo, bnpo
    assert samples.sum_per_row(losses).mean().item() == close(0.403409)  # luspo


@pytest.mark.parametrize("algorithm", ["gspo", "gspo_token"])
def test_loss_with_the_clip_widths_of_the_paper_equals_the_constant(algorithm, tmp_path):
    samples = two_rows()
    losses = terms_of(tmp_path, algorithm, samples, epsilon=3e-4, epsilon_high=4e-4)["policy"]
    assert samples.mean_per_row(losses).mean().item() == close(0.034270)


def test_loss_with_an_advantage_per_token_equals_the_constant(tmp_path):
    samples = two_rows((1.0, 0.5, -1.0, -0.5, 0.5))
    losses = terms_of(tmp_path, "gspo_token", samples)["policy"]
    assert samples.mean_per_row(losses).mean().item() == close(-0.271843)


@pytest.mark.parametrize(("corrected", "factors"), [(True, [1.221403] * 2 + [1.068939] * 3), (False, [1.0] * 5)])
def test_bias_correction_multiplies_the_kl_by_the_ratio_of_the_row(corrected, factors, tmp_path):
    options = {"beta": 0.04, "use_bias_correction_kl": corrected}
    kl = terms_of(tmp_path, "gspo_token", two_rows(), **options)["kl"] / 0.04
    k3 = [0.018731, 0.005171, 0.005171, 0.040818, 0.0]
    assert kl.tolist() == pytest.approx([x * factor for x, factor in zip(k3, factors, strict=True)], abs=2e-6)


# -- the ratio ---------------------------------------------------------------------------------------------------------
def test_ratio_of_gspo_token_is_that_of_gspo_to_the_last_bit(tmp_path):
    answers = [
        hooks_of(tmp_path, algorithm).call.log_ratio(samples=two_rows(), logps=LOGPS)
        for algorithm in ("gspo", "gspo_token")
    ]
    assert torch.equal(*answers)


def test_gradient_of_the_ratio_is_of_the_token_alone_or_spread_over_the_row(tmp_path):
    gradients = {}
    for algorithm in ("gspo", "gspo_token"):
        logps = LOGPS.clone().requires_grad_()
        hooks_of(tmp_path, algorithm).call.log_ratio(samples=two_rows(), logps=logps).exp()[:3].sum().backward()
        gradients[algorithm] = logps.grad.tolist()
    # Both tokens of row 0 with s = 1.221403, and the first of row 1 with s = 1.068939.
    assert gradients["gspo_token"] == close([1.221403, 1.221403, 1.068939, 0, 0])
    assert gradients["gspo"] == close([1.221403, 1.221403, *[1.068939 / 3] * 3])


@pytest.mark.parametrize("algorithm", ["gspo", "gspo_token"])
def test_order_of_the_tokens_does_not_matter_to_the_ratio(algorithm, tmp_path):
    swapped = two_rows(log_ratio=LOG_RATIO[[1, 0, 4, 2, 3]])
    answer = hooks_of(tmp_path, algorithm).call.log_ratio(samples=swapped, logps=LOGPS)
    assert answer.exp().tolist() == close([1.221403] * 2 + [1.068939] * 3)


def test_tokens_outside_the_loss_do_not_enter_the_ratio(tmp_path):
    samples = two_rows()
    samples.loss_mask = torch.tensor([True, True, True, False, True])
    for name in ("advantages", "old_logps", "ref_logps", "entropy"):
        setattr(samples, name, getattr(samples, name)[samples.loss_mask])
    answer = hooks_of(tmp_path, "gspo_token").call.log_ratio(samples=samples, logps=LOGPS[samples.loss_mask])
    assert answer.tolist() == close([0.2, 0.2, 0.1, 0.1])


# -- GSPO-token is GSPO ------------------------------------------------------------------------------------------------
SAME_IN_BOTH = {
    "plain": {},
    "epsilon_high": {"epsilon_high": 0.5},
    "delta": {"delta": 0.97},
    "beta": {"beta": 0.1, "use_bias_correction_kl": False},
    "off_policy_mask": {"off_policy_mask_threshold": 0.02, "epsilon": 0.3},
    "entropy": {"entropy_coef": 0.02},
    "micro_batches": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
}


def norm(values):
    return float(values.double().norm())


@pytest.mark.parametrize(
    ("loss_type", "name"),
    [*((loss_type, "plain") for loss_type in CLIPPED), *(("grpo", name) for name in SAME_IN_BOTH if name != "plain")],
)
def test_with_an_advantage_per_row_it_has_loss_and_gradient_of_gspo(loss_type, name, tmp_path):
    options = {"loss_type": loss_type, "learning_rate": 0.003 if loss_type == "luspo" else 0.01, **SAME_IN_BOTH[name]}
    (_, theirs, their_losses, _), (_, ours, losses, clipped) = (
        run(tmp_path / algorithm, algorithm, **options) for algorithm in ("gspo", "gspo_token")
    )
    # The ratios have left 1, and some of them the clip range.
    assert max(clipped) > 0.1 and min(clipped[1:]) < 0.9
    assert losses == pytest.approx(their_losses, abs=2e-6)
    for mine, other in zip(ours, theirs, strict=True):
        assert norm(mine - other) <= 1e-5 * norm(other)


@pytest.mark.parametrize("name", [name for name in SAME_IN_BOTH if name not in ("plain", "micro_batches")])
def test_options_of_grpo_act(name, tmp_path):
    given = SAME_IN_BOTH[name]
    without = {"epsilon": given["epsilon"]} if "epsilon" in given else {}
    plain, changed = (run(tmp_path / str(i), **options)[1] for i, options in enumerate((without, given)))
    assert max(norm(a - b) / norm(a) for a, b in zip(plain, changed, strict=True)) > 1e-3


@pytest.mark.parametrize(
    ("options", "off"),
    [
        ({"top_entropy_quantile": 0.5}, {}),
        ({"beta": 0.1, "use_bias_correction_kl": True}, {"beta": 0.1, "use_bias_correction_kl": False}),
    ],
)
def test_what_differs_between_tokens_is_spread_by_gspo_only(options, off, tmp_path):
    gspo = run(tmp_path / "gspo", "gspo", **options)[1]
    ours = run(tmp_path / "ours", **options)[1]
    without = run(tmp_path / "without", **off)[1]
    last = [steps[1] for steps in (gspo, ours, without)]
    assert all(bool(gradient.isfinite().all()) for gradient in last)
    assert norm(last[1] - last[0]) > 1e-3 * norm(last[0])
    assert norm(last[1] - last[2]) > 1e-3 * norm(last[2])


def test_with_advantages_per_token_it_differs_from_gspo(tmp_path):
    # On policy already: GSPO gives every token the mean of the row's advantages.
    options = {"arguments": LATE, "max_steps": 1}
    spread, own, row = (
        run(tmp_path / str(number), **given)[1][0]
        for number, given in enumerate(
            (
                {**options, "importance_sampling_level": "sequence"},
                options,
                {"max_steps": 1, "importance_sampling_level": "sequence"},
            )
        )
    )
    assert norm(spread - row) <= 1e-5 * norm(row)
    assert norm(own - row) > 0.05 * norm(row)


def test_all_levels_are_one_where_completions_have_one_token(tmp_path):
    runs = {
        level: run(tmp_path / level, batch=[[20 + i] for i in range(8)], importance_sampling_level=level)
        for level in ("token", "sequence", "sequence_token")
    }
    _, gradients, losses, clipped = runs["token"]
    assert max(clipped) > 0.1
    for level in ("sequence", "sequence_token"):
        assert runs[level][2] == pytest.approx(losses, abs=1e-6)
        for mine, other in zip(runs[level][1], gradients, strict=True):
            assert norm(mine - other) <= 1e-5 * norm(other)


@pytest.mark.parametrize("algorithm", ["gspo", "gspo_token"])
def test_on_policy_gradient_is_that_of_grpo(algorithm, tmp_path):
    options = {"max_steps": 1, "num_iterations": 1, "loss_type": "grpo"}
    ours, base = (run(tmp_path / name, name, **options)[1][0] for name in (algorithm, "grpo"))
    assert norm(base) > 0.1
    assert norm(ours - base) <= 1e-5 * norm(base)
    later, base_later = (run(tmp_path / f"later-{name}", name, loss_type="grpo")[1][1] for name in (algorithm, "grpo"))
    assert norm(later - base_later) > 0.01 * norm(base_later)


def test_clipping_is_counted_in_tokens_by_gspo_token_and_in_rows_by_gspo(tmp_path):
    tokens, rows = (run(tmp_path / name, name)[3][1] for name in ("gspo_token", "gspo"))
    assert (rows * 8) % 1 == 0 and 0 < rows < 1
    assert tokens * sum(LENGTHS) == pytest.approx(round(tokens * sum(LENGTHS)), abs=1e-4)
    assert (tokens * 8) % 1 != 0


# -- options -----------------------------------------------------------------------------------------------------------
def test_gspo_has_the_options_of_the_paper(tmp_path):
    args = trl_gspo.GSPOConfig(str(tmp_path), report_to=[], use_cpu=True)
    names = ("importance_sampling_level", "loss_type", "beta", "epsilon", "epsilon_high")
    assert [getattr(args, name) for name in names] == ["sequence", "grpo", 0.0, 3e-4, 4e-4]


def test_gspo_token_keeps_the_clip_widths_of_grpo(tmp_path):
    args = trl_gspo.GSPOTokenConfig(str(tmp_path), report_to=[], use_cpu=True)
    names = ("importance_sampling_level", "loss_type", "beta", "epsilon", "epsilon_high")
    assert [getattr(args, name) for name in names] == ["sequence_token", "grpo", 0.0, 0.2, None]


@pytest.mark.parametrize(("loss_type", "further"), [("sapo", {}), ("vespo", {}), ("cispo", {"epsilon_high": 5.0})])
def test_loss_that_does_not_clip_is_refused_at_level_sequence_token_only(loss_type, further, tmp_path):
    with pytest.raises(errors.ConfigError, match=f"'sequence_token' with loss_type='{loss_type}'") as caught:
        make_trainer(tmp_path, loss_type=loss_type, **further)
    assert "'grpo', 'bnpo', 'dr_grpo', 'dapo', 'luspo'" in caught.value.mend
    make_trainer(tmp_path, loss_type=loss_type, importance_sampling_level="token", **further)


@pytest.mark.parametrize("algorithm", ["gspo", "gspo_token"])
@pytest.mark.parametrize(("loss_type", "warned"), [("dapo", True), ("bnpo", True), ("grpo", False)])
def test_weight_by_length_is_warned_of(algorithm, loss_type, warned, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, algorithm, loss_type=loss_type)
    assert ("weights each sequence by its length" in caplog.text) is warned


def test_unknown_level_is_refused(tmp_path):
    with pytest.raises(errors.ConfigError, match="'word' is none of this trainer's: 'token', 'sequence', 'sequence_to"):
        make_trainer(tmp_path, importance_sampling_level="word")


def test_gspo_with_gspo_token_is_refused():
    message = (
        "'trl-gspo:gspo' and 'trl-gspo:gspo_token' want different defaults for the option 'importance_sampling_level"
    )
    with pytest.raises(errors.PluginConflict, match=message):
        get_trainer("gspo+gspo_token")


# -- GRPO --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trainer_with_a_config_of_the_core_is_plain_grpo_bit_for_bit(level, tmp_path):
    options = {"config": GRPOConfig, "importance_sampling_level": level, "beta": 0.1}
    ours, base = (run(tmp_path / name, name, **options)[0] for name in ("gspo_token", "grpo"))
    assert isinstance(ours, trl_gspo.GRPOTrainer)
    assert torch.equal(weights(ours), weights(base))
    assert logged(ours) == logged(base)


def test_trainer_with_a_config_of_the_core_knows_sequence_token(tmp_path):
    options = {"importance_sampling_level": "sequence_token", "loss_type": "grpo"}
    theirs, ours = (
        run(tmp_path / config.__name__, config=config, **options)[0] for config in (GRPOConfig, trl_gspo.GRPOConfig)
    )
    assert torch.equal(weights(ours), weights(theirs))


# -- composition -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["gspo_token+gfpo", "gfpo+gspo_token", "gspo+gfpo"])
def test_it_trains_on_what_gfpo_keeps(name, tmp_path):
    given = {"group_filter_func": "shortest", **({} if name.startswith("gspo+") else LATE)}
    trainer, gradients, _, _ = run(tmp_path, name, arguments=given, num_remains_in_group=2)
    samples = trainer.window.samples
    assert samples.position.tolist() == [1, 3, 5, 7]
    assert trainer.args.importance_sampling_level == ("sequence" if name.startswith("gspo+") else "sequence_token")
    assert all(norm(gradient) > 0 for gradient in gradients[:1])
    spread = (samples.advantages - samples.expand(samples.mean_per_row(samples.advantages))).abs().max()
    assert (spread > 0.01) == (not name.startswith("gspo+"))


# -- the advantage function --------------------------------------------------------------------------------------------
def test_advantages_of_rows_given_per_token_change_nothing_bit_for_bit(tmp_path):
    batch = completions(LENGTHS)
    batch[6][-1] = 77  # truncated, so masked out of the loss
    options = {"batch": batch, "rewards": [1.0, None, *REWARDS[2:]], "mask_truncated_completions": True}
    evaluation = Dataset.from_list([{"prompt": "p", "level": 0}, {"prompt": "pp", "level": 1}])
    plain, given = (
        run(tmp_path / str(number), arguments=arguments, **options)[0] for number, arguments in enumerate(({}, SAME))
    )
    assert torch.equal(weights(plain), weights(given))
    assert logged(plain) == logged(given)
    results = [trainer.evaluate(evaluation) for trainer in (plain, given)]
    assert results[0]["eval_loss"] == results[1]["eval_loss"] != 0.0


def test_advantages_per_token_reach_the_loss(tmp_path):
    trainer, _, _, _ = run(tmp_path, arguments=LATE, rewards=[1.0, 0.0, 1.0, 0.0] * 2)
    # 0.5 / (0.577350 + 1e-4), times 2 (i + 1) / (L + 1) for the tokens i of completions of 6 and 2 tokens.
    expected = [0.865875 * 2 * (i + 1) / 7 for i in range(6)] + [-0.865875 * 2 * (i + 1) / 3 for i in range(2)]
    assert trainer.window.samples.advantages[:8].tolist() == pytest.approx(expected, abs=2e-6)


def test_function_is_called_once_per_generation_with_the_rows_of_all(tmp_path):
    calls = []

    def spy(**given):
        calls.append(given)
        return SAME["advantage_func"](given["completion_ids"], given["advantages"])

    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 4}
    trainer = make_trainer(tmp_path, arguments={"advantage_func": spy}, **options)
    trainer.train()
    (given,) = calls
    assert set(given) == {"prompts", "completions", "completion_ids", "advantages", "rewards", "level"}
    assert given["prompts"] == ["p"] * 4 + ["pp"] * 4
    assert given["level"] == [0] * 4 + [1] * 4
    assert given["completion_ids"] == BATCH
    assert [type(text) for text in given["completions"]] == [str] * 8
    assert given["rewards"] == pytest.approx(REWARDS)
    samples = trainer.window.samples
    assert given["advantages"] == pytest.approx(samples.mean_per_row(samples.advantages).tolist(), rel=1e-6)


def test_function_sees_rows_without_reward(tmp_path):
    seen = []

    def spy(rewards, advantages, completion_ids):
        seen.append((rewards, advantages))
        return [[2.0] * len(ids) for ids in completion_ids]

    trainer = make_trainer(tmp_path, arguments={"advantage_func": spy}, rewards=[None, *REWARDS[1:]])
    trainer.train()
    rewards, advantages = seen[0]
    assert numpy.isnan(rewards[0]) and not any(numpy.isnan(rewards[1:]))
    assert advantages[0] == 0.0
    # What it says of them is not used.
    assert trainer.window.samples.advantages.tolist() == [0.0] * LENGTHS[0] + [2.0] * sum(LENGTHS[1:])


def test_answers_that_are_not_used_may_be_anything(tmp_path):
    def function(completion_ids, rewards):
        answer = [[1.0] * len(ids) for ids in completion_ids]
        answer[0] = None  # no reward
        answer[2] = "not kept"  # GFPO keeps the two shortest
        answer[3] = [float("nan")] * len(completion_ids[3])  # truncated, so masked out of the loss
        return answer

    batch = completions(LENGTHS)
    batch[3][-1] = 77
    given = {"advantage_func": function, "group_filter_func": "shortest"}
    options = {"mask_truncated_completions": True, "num_remains_in_group": 2}
    trainer = make_trainer(
        tmp_path, "gfpo+gspo_token", batch=batch, rewards=[None, *REWARDS[1:]], arguments=given, **options
    )
    trainer.train()
    samples = trainer.window.samples
    assert samples.position.tolist() == [1, 3, 5, 7]
    assert samples.advantages.tolist() == [1.0] * (2 + 1 + 3)


@pytest.mark.parametrize(
    "convert",
    [
        lambda rows: [torch.tensor(row, requires_grad=True) for row in rows],
        lambda rows: tuple(numpy.array(row) for row in rows),
        lambda rows: [[int(value) for value in row] for row in rows],
    ],
)
def test_function_may_return_tensors_arrays_or_integers(convert, tmp_path):
    def function(completion_ids):
        return convert([[float(i) for i in range(len(ids))] for ids in completion_ids])

    trainer = make_trainer(tmp_path, arguments={"advantage_func": function}, max_steps=1)
    trainer.train()
    assert trainer.window.samples.advantages.tolist() == [float(i) for length in LENGTHS for i in range(length)]


def test_function_is_called_in_evaluation(tmp_path):
    calls = []

    def spy(completion_ids):
        calls.append(len(completion_ids))
        return [[1.0] * len(ids) for ids in completion_ids]

    options = {"batch": BATCH[:4], "rewards": REWARDS[:4], "per_device_eval_batch_size": 4}
    trainer = make_trainer(tmp_path, arguments={"advantage_func": spy}, **options)
    metrics = trainer.evaluate(Dataset.from_list([{"prompt": "p", "level": 0}]))
    assert calls == [4]
    assert metrics["eval_loss"] == close(-1.0)  # every token of ratio 1 has the advantage 1


class PerToken(FixedRollouts):
    """Replays completions, and says that token i of each has the advantage i."""

    @hookimpl
    def advantages(self, rollouts, keep):
        values = torch.cat([torch.arange(length) for length in rollouts.completion_lengths.tolist()])
        return values.float()[:, None]


def test_function_gets_the_mean_of_a_row_whose_tokens_have_advantages_already(tmp_path):
    seen = []

    def spy(advantages, completion_ids):
        seen.extend(advantages)
        return [[0.5] * len(ids) for ids in completion_ids]

    rollouts = PerToken([{"completion_ids": BATCH}])
    make_trainer(tmp_path, arguments={"advantage_func": spy, "rollouts": rollouts}, max_steps=1).train()
    assert seen == [(length - 1) / 2 for length in LENGTHS]


def ones(completion_ids):
    return [[1.0] * len(ids) for ids in completion_ids]


def replaced(row, value):
    def my_function(completion_ids):
        answer = ones(completion_ids)
        answer[row] = value
        return answer

    return my_function


def shorter(completion_ids):
    return ones(completion_ids)[:-1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completion_ids: None, "'<lambda>' returned None; expected 8 lists, one per completion"),
        (lambda completion_ids: 1.0, "returned 1.0; expected 8 lists"),
        (lambda advantages: advantages, r"returned [\d.-]+ for row 0, whose completion has 6 tokens"),
        (shorter, r"'shorter' returned \[.*\]; expected 8 lists"),
        (replaced(2, [1.0] * 5), "'my_function' returned 5 numbers for row 2, whose completion has 4 tokens"),
        (replaced(2, []), "returned 0 numbers for row 2, whose completion has 4 tokens"),
        (replaced(2, None), "returned None for row 2"),
        (replaced(1, [[1.0], [2.0]]), r"returned \[\[1.0\], \[2.0\]\] for row 1, whose completion has 2 tokens"),
        (replaced(1, ["a", "b"]), r"returned \['a', 'b'\] for row 1"),
        (replaced(1, [None, 1.0]), r"returned \[None, 1.0\] for row 1"),
        (replaced(4, [0.0, 1.0, float("nan"), 0.0, 0.0]), "returned nan at token 2 for row 4"),
        (replaced(1, [0.0, float("-inf")]), "returned -inf at token 1 for row 1"),
        (lambda completion_ids, answers: None, r"wants the arguments \['answers'\], which there are not"),
    ],
)
def test_answer_that_does_not_fit_is_refused(function, message, tmp_path):
    trainer = make_trainer(tmp_path, arguments={"advantage_func": function})
    with pytest.raises(errors.HookResultError, match=message):
        trainer.train()


def test_unknown_argument_of_the_function_is_answered_with_those_there_are(tmp_path):
    trainer = make_trainer(tmp_path, arguments={"advantage_func": lambda ids: None})
    with pytest.raises(errors.HookResultError) as caught:
        trainer.train()
    assert "advantages, completion_ids, completions, level, prompts, rewards" in caught.value.mend


def test_what_cannot_be_called_is_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(errors.ConfigError, match="advantage_func='late' cannot be called"):
        make_trainer(tmp_path, arguments={"advantage_func": "late"})


def test_function_gets_the_same_rows_in_two_processes_as_in_one(tmp_path):
    script = Path(__file__).with_name("script_two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    one = runpy.run_path(str(script))["trained"](tmp_path / "one", 1)
    start = weights(make_trainer(tmp_path / "start"))
    for name, value in (("weights", weights(one)), ("advantages", one.window.samples.advantages)):
        for rank in (0, 1):
            two = load_file(tmp_path / f"process-{rank}.safetensors")[name]
            torch.testing.assert_close(two, value, rtol=0.0, atol=1e-6)
    assert (weights(one) - start).abs().max() > 1e-3


# -- a script written for TRL ------------------------------------------------------------------------------------------
SCRIPT = """
from datasets import Dataset
from trl_core import GRPOConfig
from trl_gspo import GRPOTrainer


def distinct_letters(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


trainer = GRPOTrainer(
    model="tiny",
    reward_funcs=distinct_letters,
    args=GRPOConfig(
        output_dir="gspo-output",
        importance_sampling_level="sequence_token",
        loss_type="grpo",
        beta=0.0,
        epsilon=3e-4,
        epsilon_high=4e-4,
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-3,
        steps_per_generation=2,
        report_to="none",
        use_cpu=True,
    ),
    train_dataset=Dataset.from_dict({"prompt": ["The sky is", "The sun is", "The sea is", "The end is"]}),
)
trainer.train()
"""


def test_script_for_trl_runs_with_another_import(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("tiny")
    tiny_tokenizer().save_pretrained("tiny")
    names = {}
    exec(SCRIPT, names)
    assert names["trainer"].state.global_step == 2
    assert names["trainer"].args.importance_sampling_level == "sequence_token"


def test_public_names_lead_to_the_two_algorithms():
    assert trl_gspo.GRPOTrainer is trl_gspo.GSPOTokenTrainer is get_trainer("gspo_token")
    assert trl_gspo.GRPOConfig is trl_gspo.GSPOTokenConfig is get_config("gspo_token")
    assert (trl_gspo.GSPOTrainer, trl_gspo.GSPOConfig) == (get_trainer("gspo"), get_config("gspo"))
    assert trl_gspo.GSPOTokenTrainer.__name__ == "GSPOTokenTrainer"
    with pytest.raises(AttributeError, match="no attribute 'GSPO'"):
        _ = trl_gspo.GSPO


def test_example_runs(monkeypatch, capsys):
    example = Path(__file__).parent.parent / "examples" / "credit_per_token.py"
    for option in ([], ["--rows"]):
        monkeypatch.setattr("sys.argv", [example.name, "--steps", "5", *option])
        runpy.run_path(str(example), run_name="__main__")
        assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "share of digits" in line] == [
            ["step", "1"],
            ["step", "5"],
        ]
