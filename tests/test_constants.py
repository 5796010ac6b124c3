"""The mathematics of GRPO and its relatives in numbers worked out elsewhere, and in what must hold for any numbers."""

import math

import pytest
import torch

from trl_core.stages import (
    PolicyLossOptions,
    TokenMean,
    aggregate,
    group_advantages,
    high_entropy_mask,
    kl_penalty,
    normalize_then_sum,
    off_policy_mask,
    policy_loss,
    sampler_ratio,
    sequence_log_ratio,
    token_weights,
    weighted_reward,
)
from trl_core.stages.advantages import group_std
from trl_core.stages.aggregate import Counters
from trl_core.stages.policy_loss import clip_metrics, vespo_weight

from .helpers_online import completions, flat, make_rows, make_trainer, weights

NAN = float("nan")


def approx(values, digits=6):
    return pytest.approx(values, abs=0.6 * 10**-digits)


# -- advantages -------------------------------------------------------------------------------------------------------
def two_groups():
    return make_rows([1] * 8, group=[0] * 4 + [1] * 4)


@pytest.mark.parametrize(
    ("scale", "value"),
    [
        ("group", 0.865875),  # 0.5 / (0.577350 + 1e-4)
        ("batch", 1.322526),  # 0.5 / (0.377964 + 1e-4)
        ("none", 0.5),
    ],
)
def test_advantages_equal_the_constants(scale, value):
    reward = torch.tensor([1.0, 0, 0, 1, 0.5, 0.5, 0.5, 0.5])
    advantages = group_advantages(two_groups(), reward, scale=scale)
    assert advantages.tolist() == approx([value, -value, -value, value, 0, 0, 0, 0])


@pytest.mark.parametrize("value", [0.1, 1.2, -0.7, 1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("size", [3, 6, 7, 8, 16])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_no_advantage_at_all(value, size, scale):
    # The mean of equal numbers in single precision may be off by a bit, which a small deviation would blow up.
    rows = make_rows([1] * size)
    reward = torch.full((size,), value)
    assert group_advantages(rows, reward, scale=scale).tolist() == [0.0] * size
    assert group_std(rows, reward).tolist() == [0.0]
    columns = torch.stack([reward, reward / 3], 1)
    assert normalize_then_sum(rows, columns, torch.tensor([1.0, 0.3])).tolist() == [0.0] * size


def test_advantages_of_unequal_rewards_equal_the_constants():
    advantages = group_advantages(make_rows([1] * 4), torch.tensor([1.0, 0, 2, 1]))
    assert advantages.tolist() == approx([0, -1.224595, 1.224595, 0])


def test_normalize_then_sum_equals_the_constants():
    rewards = torch.tensor([[1.0, 0], [0, 2], [0, 0], [1, 2]])
    advantages = normalize_then_sum(make_rows([1] * 4), rewards, torch.tensor([1.0, 0.5]))
    assert advantages.tolist() == approx([0.387223, -0.387223, -1.161804, 1.161804])


def test_normalize_then_sum_with_one_missing_score_uses_the_others():
    # The row without a second score counts 0 for it, and does not enter that function's mean: (0 + 2) / 2.
    rewards = torch.tensor([[1.0, 0], [0, 2], [0, NAN], [1, NAN]])
    advantages = normalize_then_sum(make_rows([1] * 4), rewards, torch.tensor([1.0, 0.5]))
    # z: first +-0.865875, second -+0.707057 (1 / 1.414314); sums 0.512347, -0.512347, -0.865875, 0.865875;
    # their std is sqrt((2 * 0.262499 + 2 * 0.749740) / 3) = 0.821478.
    assert advantages.tolist() == approx([0.623613, -0.623613, -1.053916, 1.053916], 5)


@pytest.mark.parametrize(
    ("keep", "correction", "expected"),
    [
        # Rewards 1, 0, 1, 0; lengths 10, 4, 6, 8. The two shortest, the two most efficient, the three shortest.
        ([1, 2], 1, [0, -0.707007, 0.707007, 0]),
        ([0, 2], 1, [0, 0, 0, 0]),
        ([1, 2, 3], 1, [0, -0.577250, 1.154501, -0.577250]),
        ([1, 2, 3], 0, [0, -0.706957, 1.413914, -0.706957]),  # population: std 0.471405, here also + 1e-4
    ],
)
def test_advantages_of_kept_rows_equal_the_constants(keep, correction, expected):
    mask = torch.zeros(4, dtype=torch.bool)
    mask[keep] = True
    advantages = group_advantages(make_rows([10, 4, 6, 8]), torch.tensor([1.0, 0, 1, 0]), mask, correction=correction)
    assert advantages.tolist() == approx(expected, 5)


@pytest.mark.parametrize(("tokens", "loss"), [(10, -0.141401), (28, -0.050501)])
def test_loss_of_kept_rows_equals_the_constants(tokens, loss):
    # The two shortest are kept: -(4 * -0.707007 + 6 * 0.707007) over the kept tokens, or over those of all rows.
    rows = make_rows([4, 6])
    advantages = rows.expand(torch.tensor([-0.707007, 0.707007]))
    logps = torch.zeros(10)
    terms = {"policy": policy_loss(rows, advantages, logps, logps, logps, PolicyLossOptions())}
    counters = Counters(rows=2, tokens=tokens, completion_tokens=tokens)
    assert aggregate(terms, token_weights(rows, "dapo", counters, max_completion_length=10)).item() == approx(loss)


def random_rewards(seed=0):
    return torch.randn(8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_a_group_add_up_to_zero(scale):
    advantages = group_advantages(two_groups(), random_rewards(), scale=scale)
    assert advantages.abs().min() > 0.01
    assert advantages.reshape(2, 4).sum(1).tolist() == approx([0, 0])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_do_not_change_with_a_constant_added_to_rewards(scale):
    rows, reward = two_groups(), random_rewards()
    shifted = reward + torch.tensor([3.0] * 4 + [-2.0] * 4)
    if scale == "batch":
        shifted = reward + 3.0  # the std of the batch knows about the difference of groups
    expected = group_advantages(rows, reward, scale=scale)
    assert group_advantages(rows, shifted, scale=scale).tolist() == approx(expected.tolist(), 5)


def test_group_scaled_advantages_do_not_change_with_the_unit_of_rewards():
    rows, reward = two_groups(), random_rewards()
    # The 1e-4 beside the std is all that can be seen of the unit.
    torch.testing.assert_close(
        group_advantages(rows, reward * 100), group_advantages(rows, reward), rtol=5e-4, atol=0.0
    )


def test_unscorable_row_leaves_the_others_those_of_the_smaller_group():
    reward = torch.tensor([1.0, NAN, 0.0, 4.0])
    smaller = group_advantages(make_rows([1] * 3), torch.tensor([1.0, 0.0, 4.0]))
    advantages = group_advantages(make_rows([1] * 4), reward)
    assert advantages[1] == 0
    assert advantages[[0, 2, 3]].tolist() == approx(smaller.tolist())


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [[NAN] * 4, [NAN, NAN, NAN, 7.0]])
def test_group_with_at_most_one_score_teaches_nothing(scale, reward):
    assert group_advantages(make_rows([1] * 4), torch.tensor(reward), scale=scale).tolist() == [0] * 4


def test_weighted_reward_adds_the_scores_there_are():
    rewards = torch.tensor([[1.0, 2.0], [NAN, 2.0], [NAN, NAN]])
    total = weighted_reward(rewards, torch.tensor([1.0, 0.5])).tolist()
    assert total[:2] == [2.0, 1.0]
    assert math.isnan(total[2])


# -- losses: two rows of 2 and 3 tokens -------------------------------------------------------------------------------
LOG_RATIO = flat([[0.1, 0.3], [-0.4, 0.0, 0.6]])
LOGPS = flat([[-1.0, -0.5], [-2.0, -1.0, -0.7]])
REF_LOGPS = flat([[-1.2, -0.4], [-1.9, -1.3, -0.7]])
COUNTERS = Counters(rows=2, tokens=5, completion_tokens=5)


def two_rows(advantages=(1.0, -1.0)):
    rows = make_rows([2, 3])
    values = torch.tensor(advantages)
    rows.advantages = rows.expand(values)
    return rows


def token_losses(rows, loss_type, level="token", correction=None, **options):
    log_ratio = LOG_RATIO if level == "token" else sequence_log_ratio(rows, LOG_RATIO)
    chosen = PolicyLossOptions(loss_type=loss_type, **options)
    return policy_loss(rows, rows.advantages, LOGPS, LOGPS - LOG_RATIO, log_ratio, chosen, correction)


def scalar(rows, loss_type, terms):
    return aggregate(terms, token_weights(rows, loss_type, COUNTERS, max_completion_length=4)).item()


def loss_of(loss_type, level="token", advantages=(1.0, -1.0), **options):
    rows = two_rows(advantages)
    return scalar(rows, loss_type, {"policy": token_losses(rows, loss_type, level, **options)})


def test_clipped_token_losses_equal_the_constants():
    losses = token_losses(two_rows(), "grpo").tolist()
    assert losses == approx([-1.105171, -1.200000, 0.800000, 1.000000, 1.822119])


@pytest.mark.parametrize(
    ("loss_type", "options", "expected"),
    [
        ("grpo", {}, 0.027394),
        ("bnpo", {}, 0.263390),
        ("dapo", {}, 0.263390),
        ("dr_grpo", {}, 0.164618),
        ("dapo", {"delta": 1.5}, 0.198966),
        ("dapo", {"epsilon_high": 0.28}, 0.247390),
        ("cispo", {"epsilon_high": 1.5}, -0.322108),
        ("cispo", {"epsilon_high": 5.0}, -0.367205),
        ("sapo", {}, -0.085774),
        ("vespo", {}, -0.713291),
    ],
)
def test_losses_equal_the_constants(loss_type, options, expected):
    assert loss_of(loss_type, **options) == approx(expected)


@pytest.mark.parametrize(
    ("loss_type", "options", "expected"),
    [
        ("grpo", {}, -0.065530),
        ("dapo", {}, 0.161363),
        ("bnpo", {}, 0.161363),
        ("luspo", {}, 0.403409),
        ("grpo", {"epsilon": 3e-4, "epsilon_high": 4e-4}, 0.034270),
    ],
)
def test_sequence_level_losses_equal_the_constants(loss_type, options, expected):
    assert loss_of(loss_type, level="sequence", **options) == approx(expected)


def test_sequence_ratios_equal_the_constants():
    ratio = sequence_log_ratio(two_rows(), LOG_RATIO).exp().tolist()
    assert ratio == approx([1.221403] * 2 + [1.068939] * 3)


def test_sequence_level_loss_with_an_advantage_per_token_equals_the_constant():
    assert loss_of("grpo", level="sequence", advantages=(1.0, 0.5, -1.0, -0.5, 0.5)) == approx(-0.271843)


def test_sapo_token_losses_equal_the_constants():
    losses = token_losses(two_rows(), "sapo").tolist()
    assert losses == approx([-2.105074, -2.346333, 1.578335, 1.904762, 2.679367])


def test_vespo_weights_equal_the_constants():
    rows = two_rows()
    phi = vespo_weight(rows, rows.advantages, LOG_RATIO, PolicyLossOptions(loss_type="vespo"))
    assert phi.tolist() == approx([0.508915] * 2 + [1.170223] * 3)


def test_vespo_counts_the_ratio_of_a_sampler_once_per_token():
    # Token ratios of 1.1 and 1.2 are a row ratio of 1.32 on top of log w = 0.1 + 0.3.
    rows = two_rows()
    correction = flat([[1.1, 1.2], [1.0, 1.0, 1.0]])
    phi = vespo_weight(rows, rows.advantages, LOG_RATIO, PolicyLossOptions(loss_type="vespo"), correction)
    log_w = 0.4 + math.log(1.32)
    assert phi[0].item() == approx(math.exp(3 + 2 * log_w - 3 * math.exp(log_w)))
    assert phi[2].item() == approx(1.170223)


def test_vespo_counts_the_ratio_of_a_sampler_once_per_row():
    rows = two_rows()
    correction = flat([[1.32, 1.32], [1.0, 1.0, 1.0]])
    phi = vespo_weight(rows, rows.advantages, LOG_RATIO, PolicyLossOptions(loss_type="vespo"), correction)
    log_w = 0.4 + math.log(1.32)
    assert phi[0].item() == approx(math.exp(3 + 2 * log_w - 3 * math.exp(log_w)))


def test_k3_equals_the_constants():
    assert kl_penalty(LOGPS, REF_LOGPS).tolist() == approx([0.018731, 0.005171, 0.005171, 0.040818, 0.0])


@pytest.mark.parametrize(
    ("loss_type", "corrected", "expected"),
    [("grpo", False, 0.027939), ("dapo", False, 0.263949), ("dapo", True, 0.263965)],
)
def test_losses_with_kl_equal_the_constants(loss_type, corrected, expected):
    rows = two_rows()
    kl = kl_penalty(LOGPS, REF_LOGPS, LOG_RATIO.exp() if corrected else None)
    assert scalar(rows, loss_type, {"policy": token_losses(rows, loss_type), "kl": 0.04 * kl}) == approx(expected)


def test_top_entropy_mask_equals_the_constants():
    # Threshold 1.4: the linearly interpolated 0.6-quantile.
    entropy = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0])
    assert high_entropy_mask(entropy, entropy, 0.4).tolist() == [False, False, False, True, True]
    just_above = torch.tensor([1.3999, 1.4001])
    assert high_entropy_mask(just_above, entropy, 0.4).tolist() == [False, True]


def test_top_entropy_zero_keeps_the_maximum():
    entropy = torch.tensor([0.1, 3.0, 1.0])
    assert high_entropy_mask(entropy, entropy, 0.0).tolist() == [False, True, False]


DIFFERENCE = flat([[0.1, 0.2], [0.5, 0.4, 0.5]])


@pytest.mark.parametrize(
    ("mode", "bounds", "expected"),
    [
        ("sequence_mask", (None, 3.0), [1.349859] * 2 + [0.0] * 3),
        ("sequence_truncate", (None, 3.0), [1.349859] * 2 + [3.0] * 3),
        ("sequence_mask", (None, None), [1.349859] * 2 + [4.055200] * 3),
        ("sequence_truncate", (1.5, None), [1.5] * 2 + [4.055200] * 3),
        ("token_truncate", (None, 1.6), [1.105171, 1.221403, 1.6, 1.491825, 1.6]),
        ("token_truncate", (1.2, 1.6), [1.2, 1.221403, 1.6, 1.491825, 1.6]),
        ("token_mask", (None, 1.6), [1.105171, 1.221403, 0.0, 1.491825, 0.0]),
        ("token_mask", (1.2, None), [0.0, 1.221403, 1.648721, 1.491825, 1.648721]),
    ],
)
def test_sampler_ratios_equal_the_constants(mode, bounds, expected):
    assert sampler_ratio(make_rows([2, 3]), DIFFERENCE, mode, *bounds).tolist() == approx(expected)


def test_sampler_ratio_of_an_unknown_log_probability_is_one():
    difference = flat([[0.1, NAN], [0.0, 0.0, 0.0]])
    assert sampler_ratio(make_rows([2, 3]), difference, "sequence_mask", None, 3.0)[0].item() == approx(1.105171)
    assert sampler_ratio(make_rows([2, 3]), difference, "token_mask", None, 3.0)[1].item() == 1.0


def test_off_policy_mask_drops_negative_rows_that_drifted():
    # Mean drift, old minus current: 0.3 | 0.3 | 0.1; the first has a positive advantage.
    rows = make_rows([2, 2, 2])
    rows.advantages = rows.expand(torch.tensor([1.0, -1.0, -1.0]))
    rows.old_logps = flat([[-1.0, -1.0]] * 3)
    logps = flat([[-1.2, -1.4], [-1.2, -1.4], [-1.0, -1.2]])
    assert off_policy_mask(rows, logps, 0.2).tolist() == [True, True, False, False, True, True]


def test_off_policy_mask_compares_with_the_sampler_if_it_reports():
    rows = make_rows([2])
    rows.advantages = torch.tensor([-1.0, -1.0])
    rows.old_logps = torch.tensor([-1.3, -1.3])
    rows.sampling_logps = torch.tensor([-1.0, -1.0])
    assert off_policy_mask(rows, torch.tensor([-1.3, -1.3]), 0.2).tolist() == [False, False]


def test_clip_metrics_count_tokens_or_rows():
    rows = two_rows()
    # Ratios 1.105, 1.350 (A > 0) and 0.670, 1.0, 1.822 (A < 0): one above 1.2 of 5, one below 0.8 of 5.
    tokens = clip_metrics(rows, rows.advantages, LOG_RATIO, PolicyLossOptions(), sequence_level=False)
    assert {name.rpartition("/")[2]: value.item() for name, (value, *_) in tokens.items()} == approx(
        {"low_mean": 0.2, "low_min": 0.2, "high_mean": 0.2, "high_max": 0.2, "region_mean": 0.4}
    )
    # Row ratios 1.221 (A > 0) and 1.069 (A < 0): one above 1.2 of two.
    ratio = sequence_log_ratio(rows, LOG_RATIO)
    by_row = clip_metrics(rows, rows.advantages, ratio, PolicyLossOptions(), sequence_level=True)
    assert by_row["clip_ratio/high_mean"][0].item() == approx(0.5)
    assert by_row["clip_ratio/low_mean"][0].item() == approx(0.0)


# -- what holds for any numbers ---------------------------------------------------------------------------------------
CLIPPED = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]


def on_policy_gradient(loss_type, **options):
    rows = two_rows()
    logps = LOGPS.clone().requires_grad_()
    chosen = PolicyLossOptions(loss_type=loss_type, **options)
    terms = policy_loss(rows, rows.advantages, logps, logps.detach(), logps - logps.detach(), chosen)
    aggregate({"policy": terms}, token_weights(rows, "dapo", COUNTERS, max_completion_length=4)).backward()
    return logps.grad


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        *((loss_type, {"epsilon": epsilon}) for loss_type in CLIPPED for epsilon in (1e-6, 0.2)),
        ("cispo", {"epsilon_high": 5.0}),
        ("sapo", {}),
        ("sapo", {"sapo_temperature_pos": 3.0, "sapo_temperature_neg": 0.5}),
    ],
)
def test_on_policy_gradient_is_the_plain_policy_gradient(loss_type, options):
    # d/dlogp of the token mean: -A / 5.
    assert on_policy_gradient(loss_type, **options).tolist() == approx([-0.2, -0.2, 0.2, 0.2, 0.2])


def test_bnpo_equals_grpo_for_equal_lengths():
    rows = make_rows([2, 2])
    values = torch.tensor([0.3, -1.2, 2.5, 0.7])
    counters = Counters(rows=2, tokens=4, completion_tokens=4)
    losses = [
        aggregate({"x": values}, token_weights(rows, t, counters, max_completion_length=4)) for t in ("bnpo", "grpo")
    ]
    assert losses[0].item() == approx(losses[1].item())
    assert losses[0].item() == approx(2.3 / 4)


def test_dapo_equals_bnpo_in_one_process_and_one_micro_batch():
    assert loss_of("dapo") == approx(loss_of("bnpo"))


def test_dr_grpo_is_bnpo_times_tokens_over_the_constant_length():
    assert loss_of("dr_grpo") == approx(loss_of("bnpo") * 5 / (2 * 4))


def test_infinite_delta_equals_none():
    assert loss_of("grpo", delta=float("inf")) == loss_of("grpo")


def test_delta_bounds_only_negative_advantages():
    # Only the last ratio, 1.822, is above 1.5, and the min already took the clipped branch where A > 0.
    losses = token_losses(two_rows(), "grpo", delta=1.5).tolist()
    assert losses == approx([-1.105171, -1.2, 0.8, 1.0, 1.5])


def test_clip_is_inactive_inside_its_bounds():
    plain = (-two_rows().advantages * LOG_RATIO.exp()).tolist()
    assert token_losses(two_rows(), "grpo", epsilon=0.9).tolist() == approx(plain)


def test_top_entropy_one_keeps_every_token():
    entropy = torch.tensor([0.1, 0.1, 3.0])
    assert high_entropy_mask(entropy, entropy, 1.0).all()


@pytest.mark.parametrize("corrected", [True, False])
def test_kl_and_its_gradient_are_zero_where_policy_and_reference_agree(corrected):
    logps = LOGPS.clone().requires_grad_()
    kl = kl_penalty(logps, LOGPS, (logps - LOGPS).exp() if corrected else None)
    assert kl.abs().max() == 0
    kl.sum().backward()
    assert logps.grad.abs().max() < 1e-7


def test_bias_correction_gives_the_gradient_of_the_reverse_kl():
    # On policy the estimate times the ratio has the gradient d = logp - ref per token; without: 1 - exp(-d).
    d = LOGPS - REF_LOGPS
    for corrected, expected in ((True, d), (False, 1 - (-d).exp())):
        logps = LOGPS.clone().requires_grad_()
        kl_penalty(logps, REF_LOGPS, (logps - LOGPS).exp() if corrected else None).sum().backward()
        assert logps.grad.tolist() == approx(expected.tolist())


def test_row_of_one_token_has_the_same_ratio_at_both_levels():
    rows = make_rows([1, 1])
    log_ratio = torch.tensor([0.3, -0.2])
    assert sequence_log_ratio(rows, log_ratio).tolist() == approx(log_ratio.tolist())


def test_on_policy_gradient_of_sequence_level_equals_token_level():
    gradients = []
    for level in ("token", "sequence"):
        rows, logps = two_rows(), LOGPS.clone().requires_grad_()
        ratio = logps - LOGPS
        ratio = sequence_log_ratio(rows, ratio) if level == "sequence" else ratio
        losses = policy_loss(rows, rows.advantages, logps, LOGPS, ratio, PolicyLossOptions(loss_type="grpo"))
        aggregate({"policy": losses}, token_weights(rows, "grpo", COUNTERS, max_completion_length=4)).backward()
        gradients.append(logps.grad.tolist())
    assert gradients[0] == approx(gradients[1])


# -- aggregation ------------------------------------------------------------------------------------------------------
def test_rows_without_loss_tokens_count_in_the_mean_over_rows():
    rows = make_rows([2, 3], loss_mask=torch.tensor([True, True, False, False, False]))
    counters = Counters(rows=2, tokens=2, completion_tokens=5)
    values = torch.tensor([1.0, 3.0])
    by_type = {
        t: aggregate({"x": values}, token_weights(rows, t, counters, max_completion_length=4)).item()
        for t in ("grpo", "dapo", "bnpo", "dr_grpo", "luspo")
    }
    assert by_type == approx({"grpo": 1.0, "dapo": 2.0, "bnpo": 2.0, "dr_grpo": 0.5, "luspo": 2.0})


def test_generation_normalizer_counts_masked_tokens_and_all_slices():
    rows = make_rows([2, 3], loss_mask=torch.tensor([True, True, False, False, False]))
    counters = Counters(rows=4, tokens=7, completion_tokens=10, slices=2)
    values = torch.tensor([1.0, 3.0])
    for normalizer, expected in (("generation", 4 / 10), ("step", 4 / (7 / 2))):
        given = token_weights(rows, "dapo", counters, max_completion_length=4, normalizer=normalizer)
        assert aggregate({"x": values}, given).item() == approx(expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"])
def test_two_processes_with_one_row_equal_one_with_two(loss_type):
    rows, values = make_rows([2, 3]), torch.tensor([0.3, -1.2, 2.5, 0.7, 0.1])
    whole = aggregate({"x": values}, token_weights(rows, loss_type, COUNTERS, max_completion_length=4))
    parts = [
        aggregate({"x": part}, token_weights(rows.take([i]), loss_type, COUNTERS, max_completion_length=4, processes=2))
        for i, part in enumerate(values.split([2, 3]))
    ]
    assert (sum(parts) / 2).item() == approx(whole.item())  # data-parallel training averages


def test_token_mean_ignores_the_aggregation_of_the_algorithm():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    masked = TokenMean(values, torch.tensor([True, False, False, False, True]))
    for loss_type in ("grpo", "dr_grpo"):
        given = token_weights(make_rows([2, 3]), loss_type, COUNTERS, max_completion_length=4, accumulation=2)
        assert aggregate({"x": TokenMean(values)}, given, 2).item() == approx(1.5)
        assert aggregate({"x": masked}, given, 2).item() == approx(1.5)


ACCUMULATION_FREE = ["dapo", "grpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]


def change_of_one_step(folder, rows, micro_batches, loss_type):
    """What one step of plain gradient descent does to the weights; completions of 6, 2, 4 and 3 tokens."""
    trainer = make_trainer(
        folder,
        trainer={"rollouts": completions(6, 2, 4, 3)},
        max_steps=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=micro_batches,
        loss_type=loss_type,
        epsilon_high=5.0 if loss_type == "cispo" else None,
        beta=0.1,
        optim="sgd",
        learning_rate=10.0,  # so that the change is large beside the rounding of the weights
        max_grad_norm=0.0,
    )
    before = weights(trainer)
    trainer.train()
    return weights(trainer) - before


@pytest.mark.parametrize("loss_type", ACCUMULATION_FREE)
def test_one_micro_batch_of_four_rows_equals_four_of_one(loss_type, tmp_path):
    whole, parts = (change_of_one_step(tmp_path / str(rows), rows, 4 // rows, loss_type) for rows in (4, 1))
    assert whole.norm() > 1e-3
    assert (whole - parts).norm() <= 1e-6 * whole.norm()


def test_bnpo_is_a_mean_of_means_by_definition(tmp_path):
    whole, parts = (change_of_one_step(tmp_path / str(rows), rows, 4 // rows, "bnpo") for rows in (4, 1))
    assert (whole - parts).norm() > 1e-2 * whole.norm()
    # One row in each micro-batch: the mean of the rows' means, which is what grpo computes.
    by_row = change_of_one_step(tmp_path / "grpo", 4, 1, "grpo")
    assert (parts - by_row).norm() <= 1e-6 * by_row.norm()
    # Equal to the exact token mean when everything is in one micro-batch.
    by_token = change_of_one_step(tmp_path / "dapo", 4, 1, "dapo")
    assert (whole - by_token).norm() <= 1e-6 * whole.norm()
