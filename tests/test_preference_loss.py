"""The mathematics of supervised, reward and preference losses in numbers worked out elsewhere, and in what must hold
for any numbers."""

import enum
import math
from types import SimpleNamespace

import pytest
import torch

from trl_core import HookContext, Pairs, get_config
from trl_core.algorithms.dpo import DPO, DPOConfig
from trl_core.errors import ConfigError, TRLDeprecationWarning
from trl_core.stages.preference_loss import (
    LOSSES,
    ON_DIFFERENCE,
    SMOOTHED,
    PreferenceLossOptions,
    bradley_terry,
    f_divergence_score,
    pair_quantities,
    wpo_weight,
)
from trl_core.stages.supervised_loss import dft, token_nll

LN2 = math.log(2)
POLICY = ([[-1.5, -2.5], [-1, -2, -3]], [[-1, -1, -1.5, -1.5], [-2.5, -3]])
REFERENCE = ([[-1.7, -2.8], [-0.9, -2.1, -2.8]], [[-1.1, -0.9, -1.4, -1.4], [-2.6, -3]])
LOG_COLLISION = ([[-1, -1.2], [-0.8, -1, -1.4]], [[-0.9, -0.7, -1.1, -1], [-1.3, -1.2]])
NEEDS_REWARDS = sorted(set(LOSSES) - {"sft"})


def approx(values, digits=6):
    return pytest.approx(values, abs=0.6 * 10**-digits)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def interleaved(sides):
    """(chosen rows, rejected rows) as one flat tensor: row 2i chosen, row 2i + 1 rejected."""
    rows = [row for pair in zip(*sides, strict=True) for row in pair]
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def make_pairs(sides, **fields):
    """Pairs with as many loss tokens as these rows have values."""
    rows = [row for pair in zip(*sides, strict=True) for row in pair]
    group = [i // 2 for i in range(len(rows))]
    return Pairs.from_lists([[7]] * len(rows), [[5] * len(row) for row in rows], group=group, **fields).validate()


def options_of(loss, **options):
    """With a label smoothing where it cannot be 0."""
    return {"label_smoothing": 1e-3, **options} if loss == "exo_pair" else options


def evaluate(loss_type="sigmoid", policy=POLICY, reference=REFERENCE, collision=None, **options):
    """The hook's (P,) losses, its metrics as {name: (value, weight)}, and the policy's log-probs with gradient."""
    config = DPOConfig(loss_type=loss_type, **options_of(loss_type, **options))
    hooks, metrics = make_hooks(config)
    pairs = make_pairs(policy, log_collision=None if collision is None else interleaved(collision))
    logps = interleaved(policy).requires_grad_()
    return hooks.pair_loss(pairs, logps, interleaved(reference)), metrics, logps


def make_hooks(config):
    context, metrics = HookContext(config, {}), {}
    context._log = lambda name, value, weight, reduce: metrics.update({name: (float(value), weight)})
    return DPO(context), metrics


def quantities(chosen_ratio, rejected_ratio, **options):
    """Of one-token completions with these log-ratios, and the options to evaluate losses with."""
    chosen, rejected = torch.as_tensor(chosen_ratio), torch.as_tensor(rejected_ratio)
    pairs = make_pairs(([[0]] * len(chosen), [[0]] * len(rejected)))
    policy = torch.stack([chosen, rejected], 1).reshape(-1)
    given = PreferenceLossOptions(**options)
    return pair_quantities(pairs, policy, torch.zeros_like(policy), given), given


def random_sides(seed, lengths=((3, 2, 4), (2, 5, 4))):
    generator = torch.Generator().manual_seed(seed)
    return tuple([(-torch.rand(n, generator=generator) * 3).tolist() for n in side] for side in lengths)


# -- supervised -------------------------------------------------------------------------------------------------------
def test_supervised_losses_equal_the_constants():
    logps = doubles(-0.5, -1.0, -2.0)
    assert token_nll(logps).mean().item() == approx(1.166667)
    assert dft(logps).tolist() == approx([0.303265, 0.367879, 0.270671])
    assert dft(logps).mean().item() == approx(0.313938)


def test_mean_over_tokens_is_not_the_mean_of_means():
    parts = token_nll(doubles(-0.5, -1.0)), token_nll(doubles(-2.0))
    assert torch.cat(parts).mean().item() == approx(1.166667)
    assert torch.stack([part.mean() for part in parts]).mean().item() == approx(1.375)


def test_dft_weights_the_gradient_of_each_token_by_its_probability():
    logps = (-torch.rand(9, dtype=torch.float64) * 5).requires_grad_()
    (of_dft,) = torch.autograd.grad(dft(logps).sum(), logps)
    (of_nll,) = torch.autograd.grad(token_nll(logps).sum(), logps)
    torch.testing.assert_close(of_dft, of_nll * logps.detach().exp())
    assert (dft(logps) <= token_nll(logps)).all()


@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
def test_label_smoothing_is_that_of_cross_entropy(eps):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(11, (5,), generator=generator)
    log_p = logits.log_softmax(-1)
    logps = log_p.gather(1, labels[:, None]).squeeze(1)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=eps, reduction="none")
    torch.testing.assert_close(token_nll(logps, log_p.mean(-1), eps), expected)


# -- reward models ----------------------------------------------------------------------------------------------------
CHOSEN_REWARD, REJECTED_REWARD, MARGIN = doubles(1.0, 0.2), doubles(0.5, 0.4), doubles(0.5, 0.0)


@pytest.mark.parametrize(
    ("margin", "center", "expected"),
    [(None, None, 0.636108), (MARGIN, None, 0.745643), (MARGIN, 0.01, 0.758693), (None, 0.01, 0.649158)],
)
def test_reward_loss_equals_the_constants(margin, center, expected):
    assert bradley_terry(CHOSEN_REWARD, REJECTED_REWARD, margin, center).mean().item() == approx(expected)


def test_reward_loss_of_equal_scores_is_ln_2():
    assert bradley_terry(CHOSEN_REWARD, CHOSEN_REWARD).tolist() == approx([LN2, LN2])


def test_constant_added_to_all_rewards_changes_only_the_centering():
    moved = CHOSEN_REWARD + 3, REJECTED_REWARD + 3
    expected = bradley_terry(CHOSEN_REWARD, REJECTED_REWARD, MARGIN)
    torch.testing.assert_close(bradley_terry(*moved, MARGIN), expected)
    centering = bradley_terry(*moved, MARGIN, 0.01) - expected
    torch.testing.assert_close(centering, 0.01 * (CHOSEN_REWARD + REJECTED_REWARD + 6) ** 2)


def test_margin_belongs_to_the_preferred_side():
    turned = bradley_terry(REJECTED_REWARD, CHOSEN_REWARD, -MARGIN)
    assert (turned - bradley_terry(CHOSEN_REWARD, REJECTED_REWARD, MARGIN)).abs().max() > 0.01


def test_gradient_of_the_reward_loss():
    chosen = CHOSEN_REWARD.clone().requires_grad_()
    bradley_terry(chosen, REJECTED_REWARD, MARGIN).mean().backward()
    torch.testing.assert_close(chosen.grad, -torch.sigmoid(-(CHOSEN_REWARD - REJECTED_REWARD - MARGIN)) / 2)


# -- DPO in numbers ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        ("sigmoid", {}, [0.658760, 0.708260, 0.683510]),
        ("hinge", {}, [0.93, 1.03, 0.98]),
        ("ipo", {}, [22.09, 26.180278, 24.135139]),
        ("ipo", {"ipo_length_normalization": False}, [18.49, 28.09, 23.29]),
        ("exo_pair", {"label_smoothing": 1e-3}, [2.641024, 2.813140, 2.727082]),
        ("nca_pair", {}, [1.369288, 1.393876, 1.381582]),
        ("robust", {"label_smoothing": 0.1}, [0.650010, 0.712010, 0.681010]),
        ("cdpo", {"label_smoothing": 0.1}, [0.665760, 0.705260, 0.685510]),
        ("bco_pair", {}, [1.351657, 1.401357, 1.376507]),
        ("bco_pair", {"bco_shift": 0.005}, [1.351626, 1.401376, 1.376501]),
        ("sppo_hard", {}, [43.29, 53.05, 48.17]),
        ("aot", {}, [0.708260, 0.658760, 0.683510]),
        ("aot_unpaired", {}, [0.693147, 0.673347, 0.683247]),
        ("apo_zero", {}, [0.982503, 1.0075, 0.995001]),
        ("apo_down", {}, [0.995005, 1.0025, 0.998752]),
        ("discopop", {}, [0.878265, 0.822427, 0.850346]),
        ("sft", {}, [2.0, 2.0, 2.0]),
        ("sigmoid_norm", {}, [0.678260, 0.698998, 0.688629]),
        ("sigmoid", {"f_divergence_type": "forward_kl"}, [0.662876, 0.709101, 0.685988]),
        ("sigmoid", {"f_divergence_type": "js_divergence"}, [0.677075, 0.700864, 0.688970]),
        ("sigmoid", {"f_divergence_type": "alpha_divergence"}, [0.661043, 0.708660, 0.684851]),
        (
            "sigmoid",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.25},
            [0.662011, 0.708875, 0.685443],
        ),
        ("sigmoid", {"ld_alpha": 0.5}, [0.663597, 0.703197, 0.683397]),
        ("sigmoid", {"ld_alpha": 0.5, "ld_alpha_on_reference": False}, [0.733947, 0.634946, 0.684447]),
        ("sigmoid", {"use_weighting": True, "collision": LOG_COLLISION}, [0.193516, 0.062145, 0.127831]),
    ],
)
def test_preference_losses_equal_the_constants(loss, options, expected):
    values, _, _ = evaluate(loss, **options)
    assert [*values.tolist(), values.mean().item()] == approx(expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"loss_type": ["sigmoid", "sft"]}, 2.683510),
        ({"loss_type": "sigmoid", "rpo_alpha": 1.0}, 2.683510),
        ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, 2.822109),
        ({"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2], "rpo_alpha": 1.0}, 2.822109),
    ],
)
def test_sums_of_losses_equal_the_constants(options, expected):
    values, _, _ = evaluate(**options)
    assert values.mean().item() == approx(expected)


def test_aot_sorts_policy_and_reference_apart():
    sides = {"policy": ([[1.0], [-0.5]], [[0], [0]]), "reference": ([[-0.2], [0.3]], [[0], [0]])}
    assert evaluate("aot", **sides)[0].mean().item() == approx(0.683510)
    assert evaluate("sigmoid", **sides)[0].mean().item() == approx(0.684447)


def test_bound_of_the_pair_weight():
    # The log-ratio 0.7 times beta is 0.07; the weights multiply to 1.2.
    sides = {"policy": ([[-1.0]], [[-1.0]]), "reference": ([[-1.7]], [[-1.0]])}
    collision = ([[-1.0 - math.log(1.2)]], [[-1.0]])
    weighted = {"use_weighting": True, "collision": collision, **sides}
    assert evaluate(**weighted)[0].tolist() == approx([0.790511])
    assert evaluate(wpo_max_weight=1.0, **weighted)[0].tolist() == approx([0.658760])


def test_weights_of_completions_equal_the_constants():
    pairs, logps, collision = make_pairs(POLICY), interleaved(POLICY), interleaved(LOG_COLLISION)
    expected = [0.406570 * 0.722527, 0.393241 * 0.223130]
    assert wpo_weight(pairs, logps, collision).tolist() == approx(expected)
    # Mean log-probabilities alone: e^-2 e^-1.25 and e^-2 e^-2.75.
    assert wpo_weight(pairs, logps, torch.zeros_like(logps)).tolist() == approx([math.exp(-3.25), math.exp(-4.75)])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        *((name, LN2) for name in ("sigmoid", "sigmoid_norm", "cdpo", "robust", "aot", "aot_unpaired")),
        *((name, 1.0) for name in ("hinge", "apo_zero", "apo_down")),
        *((name, 2 * LN2) for name in ("nca_pair", "bco_pair")),
        ("discopop", 0.846574),
        ("exo_pair", 2.761231),
        ("ipo", 25.0),
        ("sppo_hard", 50.0),
    ],
)
def test_losses_of_a_policy_that_is_the_reference(loss, expected):
    values, metrics, _ = evaluate(loss, reference=POLICY)
    assert values.tolist() == approx([expected, expected])
    # A tie is no success.
    assert metrics["rewards/accuracies"] == (0.0, 2)


# -- DPO for any numbers ----------------------------------------------------------------------------------------------
def same(first, second, **sides):
    """Whether two configurations give the same losses on random pairs."""
    sides = {"policy": random_sides(1), "reference": random_sides(2), **sides}
    torch.testing.assert_close(evaluate(**first, **sides)[0], evaluate(**second, **sides)[0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"loss_type": "robust"}, {"loss_type": "sigmoid"}),
        ({"loss_type": "cdpo"}, {"loss_type": "sigmoid"}),
        ({"ld_alpha": 1.0}, {}),
        ({"ld_alpha": 1.0, "ld_alpha_on_reference": False}, {}),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, {}),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.0},
            {"f_divergence_type": "forward_kl"},
        ),
        ({"loss_type": "sigmoid", "loss_weights": [1.0]}, {}),
    ],
)
def test_options_that_mean_the_same(first, second):
    same(first, second)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_sorting_one_pair_is_plain_dpo(loss):
    lengths = ((3,), (5,))
    same({"loss_type": loss}, {}, policy=random_sides(1, lengths), reference=random_sides(2, lengths))
    smoothed = {"label_smoothing": 0.2}
    one_pair = {"policy": random_sides(1, lengths), "reference": random_sides(2, lengths)}
    same({"loss_type": loss, **smoothed}, {"loss_type": "cdpo", **smoothed}, **one_pair)


def test_length_normalised_loss_of_equal_lengths_is_plain_dpo_of_a_smaller_beta():
    sides = {"policy": random_sides(1, ((4, 4), (4, 4))), "reference": random_sides(2, ((4, 4), (4, 4)))}
    same({"loss_type": "sigmoid_norm", "beta": 2.0}, {"beta": 0.5}, **sides)


def test_swapping_the_sides_turns_the_sign_of_the_difference():
    policy, reference = random_sides(1), random_sides(2)
    delta = evaluate(policy=policy, reference=reference)[0].neg().exp().logit()
    swapped, metrics, _ = evaluate(policy=policy[::-1], reference=reference[::-1])
    torch.testing.assert_close(swapped, -torch.nn.functional.logsigmoid(-delta))
    assert metrics["rewards/margins"][0] == approx(-delta.mean().item())


def test_robust_loss_is_an_unbiased_estimate():
    delta, eps = torch.linspace(-30, 30, 13, dtype=torch.float64), 0.2
    right, given = quantities(delta, torch.zeros_like(delta), label_smoothing=eps)
    flipped, _ = quantities(-delta, torch.zeros_like(delta))
    mean = (1 - eps) * LOSSES["robust"](right, given) + eps * LOSSES["robust"](flipped, given)
    torch.testing.assert_close(mean, LOSSES["sigmoid"](right, given))


def test_gradient_of_dpo():
    values, metrics, logps = evaluate()
    values.mean().backward()
    slope = -0.1 * torch.sigmoid(doubles(-0.07, 0.03)) / 2
    tokens = [slope[0]] * 2 + [-slope[0]] * 4 + [slope[1]] * 3 + [-slope[1]] * 2
    torch.testing.assert_close(logps.grad, torch.stack(tokens))
    assert all(weight == 2 for _, weight in metrics.values())


def test_gradients_of_all_losses_are_those_of_finite_differences():
    policy, reference, pairs = random_sides(1), interleaved(random_sides(2)), make_pairs(random_sides(1))
    logps = interleaved(policy).requires_grad_()
    for name, loss in LOSSES.items():
        for kind in ("reverse_kl", "alpha_divergence") if name in ON_DIFFERENCE else ("reverse_kl",):
            given = PreferenceLossOptions(label_smoothing=0.1, ld_alpha=0.3, beta=0.7, f_divergence_type=kind)

            def of_tokens(values, loss=loss, given=given):
                return loss(pair_quantities(pairs, values, reference, given), given)

            assert torch.autograd.gradcheck(of_tokens, logps), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [1e4, -1e4])
@pytest.mark.parametrize("loss", NEEDS_REWARDS)
def test_extreme_log_ratios_give_finite_losses_and_gradients(loss, ratio, dtype):
    chosen = torch.tensor([ratio, 0.0], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-ratio, 0.0], dtype=dtype)
    known, given = quantities(chosen, rejected, label_smoothing=0.1, beta=1.0)
    values = LOSSES[loss](known, given)
    values.sum().backward()
    assert values.dtype == dtype
    assert torch.isfinite(values).all()
    assert torch.isfinite(chosen.grad).all()


def test_each_completion_counts_with_its_own_length():
    # Tokens outside the loss change nothing: tool output in the middle of both.
    masks = [[1, 0, 1], [1, 1, 0, 1]]
    pairs = Pairs.from_lists([[7]] * 2, [[5] * 3, [5] * 4], loss_mask=masks, group=[0, 0]).validate()
    policy, reference = random_sides(1, ((2,), (3,))), random_sides(2, ((2,), (3,)))
    hooks, _ = make_hooks(DPOConfig(loss_type=["ipo", "sft"], ld_alpha=0.5))
    expected, _, _ = evaluate(["ipo", "sft"], policy, reference, ld_alpha=0.5)
    torch.testing.assert_close(hooks.pair_loss(pairs, interleaved(policy), interleaved(reference)), expected)


def test_tails_beyond_the_shorter_completion_are_discounted():
    zero = ([[0, 0], [0, 0, 0]], [[0, 0, 0, 0], [0, 0]])
    given = PreferenceLossOptions(ld_alpha=0.0)
    known = pair_quantities(make_pairs(POLICY), interleaved(POLICY), interleaved(zero), given)
    assert known.policy_chosen.tolist() == approx([-4, -3])
    assert known.policy_rejected.tolist() == approx([-2, -5.5])
    assert known.chosen_nll.item() == approx(2.0)  # the likelihood of the preferred text is left whole


def test_sft_is_a_mean_over_tokens():
    policy = ([[-1.0], [-2, -2, -2]], [[-9.0], [-9.0]])
    values, _, logps = evaluate("sft", policy, policy)
    assert values.tolist() == approx([1.75, 1.75])
    values.mean().backward()
    assert logps.grad.tolist() == approx([-0.25, 0, -0.25, -0.25, -0.25, 0])


def test_weighting_a_sum_with_sft_changes_neither_the_parts_nor_the_gradient_of_the_weight():
    weighted, metrics, logps = evaluate(["sigmoid", "sft"], use_weighting=True, collision=LOG_COLLISION)
    plain, unweighted, plain_logps = evaluate(["sigmoid", "sft"])
    weight = wpo_weight(make_pairs(POLICY), interleaved(POLICY), interleaved(LOG_COLLISION))
    torch.testing.assert_close(weighted, plain * weight)
    assert metrics == unweighted
    weighted.sum().backward()
    (plain * weight).sum().backward()
    torch.testing.assert_close(logps.grad, plain_logps.grad)


# -- divergences ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "slope"), [("reverse_kl", 1), ("forward_kl", 1), ("js_divergence", 0.5), ("alpha_divergence", 1)]
)
def test_scores_start_at_zero_and_rise(kind, slope):
    ratio = torch.tensor([0.0, -3.0, -1.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    score = f_divergence_score(ratio, kind, 0.3)
    score.sum().backward()
    assert score[0].item() == approx(0)
    assert ratio.grad[0].item() == approx(slope)
    assert (score[1:].diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_scores_are_finite_in_every_precision(kind, dtype):
    ratio = torch.tensor([-1000.0, 0.0, 1000.0], dtype=dtype, requires_grad=True)
    score = f_divergence_score(ratio, kind)
    score.sum().backward()
    assert score.dtype == dtype
    assert torch.isfinite(score).all()
    assert torch.isfinite(ratio.grad).all()


def test_alpha_of_trl_is_one_minus_alpha_of_the_paper():
    ratio, alpha = torch.linspace(-2, 2, 9, dtype=torch.float64), 0.3
    paper = (1 - torch.exp(-alpha * ratio)) / alpha
    torch.testing.assert_close(f_divergence_score(ratio, "alpha_divergence", 1 - alpha), paper)


# -- metrics ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"f_divergence_type": "js_divergence"}, {"loss_type": "sigmoid_norm"}])
def test_rewards_are_the_plain_log_ratios(options):
    _, metrics, _ = evaluate(**options)
    expected = {"chosen": 0.015, "rejected": -0.005, "margins": 0.02, "accuracies": 0.5}
    rewards = {name: value for name, value in metrics.items() if name.startswith("rewards/")}
    assert rewards == {f"rewards/{name}": (approx(value), 2) for name, value in expected.items()}


def test_log_probabilities_of_both_sides_are_logged():
    _, metrics, _ = evaluate("sigmoid")
    assert (metrics["logps/chosen"], metrics["logps/rejected"]) == ((approx(-5.0), 2), (approx(-5.25), 2))


def test_each_of_several_losses_is_logged():
    _, metrics, _ = evaluate(["sigmoid", "sft"], loss_weights=[0.5, 3.0])
    assert metrics["loss/sigmoid"] == (approx(0.683510), 2)
    assert metrics["loss/sft"] == (approx(2.0), 2)


def test_no_pairs_give_no_losses_and_no_metrics():
    hooks, metrics = make_hooks(DPOConfig(loss_type=["sigmoid", "aot", "sft"], ld_alpha=0.5))
    empty = make_pairs(POLICY).take([])
    assert hooks.pair_loss(empty, torch.zeros(0), torch.zeros(0)).shape == (0,)
    assert metrics == {}


def test_pairs_without_loss_tokens_give_finite_losses():
    empty = ([[], []], [[], []])
    for name in LOSSES:
        assert torch.isfinite(evaluate(name, empty, empty)[0]).all(), name


# -- configuration ----------------------------------------------------------------------------------------------------
def test_defaults():
    config = DPOConfig()
    assert (config.loss_type, config.loss_weights, config.beta) == (["sigmoid"], None, 0.1)
    assert (config.learning_rate, config.disable_dropout) == (1e-6, True)
    assert (config.uses_reference, config.token_statistics) == (True, ())
    assert DPOConfig(use_weighting=True).token_statistics == ("log_collision",)


def test_rpo_alpha_becomes_a_weight_once():
    config = DPOConfig(loss_type=["hinge"], rpo_alpha=0.5)
    assert config.weighted_losses == [("hinge", 1.0), ("sft", 0.5)]
    restored = DPOConfig(**{name: getattr(config, name) for name in ("loss_type", "loss_weights", "rpo_alpha")})
    assert restored.weighted_losses == config.weighted_losses


def test_a_list_given_by_the_caller_is_left_alone():
    losses = ["sigmoid"]
    DPOConfig(loss_type=losses, rpo_alpha=1.0)
    assert losses == ["sigmoid"]


def test_old_name_of_unpaired_aot_warns():
    with pytest.warns(TRLDeprecationWarning, match="'aot_pair' is now called 'aot_unpaired'") as caught:
        assert get_config("dpo")(loss_type="aot_pair").loss_type == ["aot_unpaired"]
    assert caught[0].filename == __file__


def test_enumeration_of_older_trl_is_read():
    kind = enum.Enum("Divergence", {"JS": "js_divergence"})
    assert DPOConfig(f_divergence_type=kind.JS).f_divergence_type == "js_divergence"


def test_label_smoothing_that_nothing_uses_warns_and_is_ignored(caplog):
    values, _, _ = evaluate("sigmoid", label_smoothing=0.1)
    assert "label_smoothing=0.1 has no effect on sigmoid; 'cdpo'" in caplog.text
    assert values.mean().item() == approx(0.683510)
    caplog.clear()
    for name in SMOOTHED:
        DPOConfig(loss_type=name, label_smoothing=0.1)
    assert not caplog.text


@pytest.mark.parametrize("loss", ON_DIFFERENCE)
def test_losses_of_a_difference_take_any_divergence(loss):
    config = options_of(loss, loss_type=loss, f_divergence_type="forward_kl")
    assert DPOConfig(**config).f_divergence_type == "forward_kl"


@pytest.mark.parametrize(
    ("options", "what", "mend"),
    [
        ({"beta": 0.0}, "beta=0.0 is not a finite number above 0", "above 0"),
        ({"beta": -0.1}, "beta=-0.1 is not a finite number above 0", "above 0"),
        ({"loss_type": "sigmod"}, "loss_type='sigmod' (str) is not", "Did you mean 'sigmoid'?"),
        ({"loss_type": ["hinge", "kto_pair"]}, "loss_type=['hinge', 'kto_pair'] (list) is not", "hinge"),
        ({"loss_type": []}, "loss_type is empty", "'sigmoid'"),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
            "loss_weights has 1 entries and loss_type has 2",
            "one weight per loss",
        ),
        ({"loss_weights": []}, "loss_weights has 0 entries and loss_type has 1", "one weight per loss"),
        ({"loss_type": "exo_pair"}, "'exo_pair' with label_smoothing=0 ", "0.001"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing=0.5 is not", "0.1"),
        ({"loss_type": "aot", "label_smoothing": -0.1}, "label_smoothing=-0.1 is not", "0.1"),
        ({"ld_alpha": 1.5}, "ld_alpha=1.5 is not", "0.5"),
        ({"discopop_tau": 0.0}, "discopop_tau=0.0 is not", "above 0"),
        ({"wpo_max_weight": 0.0}, "wpo_max_weight=0.0 is not", "the authors of WPO use 1"),
        ({"f_divergence_type": "kl"}, "f_divergence_type='kl' (str) is not one of", "'reverse_kl'"),
        (
            {"loss_type": ["sigmoid", "apo_zero"], "f_divergence_type": "forward_kl"},
            "f_divergence_type='forward_kl' does not go with apo_zero",
            "reverse_kl",
        ),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting=True does not go with aot", "another loss"),
        ({"loss_type": "aot_unpaired", "use_weighting": True}, "does not go with aot_unpaired", "another loss"),
        ({"loss_type": ["sigmoid", "sft"], "rpo_alpha": 1.0}, "rpo_alpha=1.0 adds the loss 'sft'", "loss_weights"),
        ({"precompute_ref_log_probs": True, "sync_ref_model": True}, "sync_ref_model=True", "Leave one of them off"),
    ],
)
def test_options_that_cannot_be(options, what, mend):
    with pytest.raises(ConfigError) as caught:
        DPOConfig(**options)
    assert what in caught.value.what
    assert mend in caught.value.mend


def test_hooks_read_no_more_than_the_options():
    # Usable with any object that has them, for example the options of an algorithm that builds on DPO.
    args = SimpleNamespace(
        weighted_losses=[("hinge", 2.0)], preference_loss_options=PreferenceLossOptions(), beta=0.1, use_weighting=False
    )
    hooks, _ = make_hooks(args)
    values = hooks.pair_loss(make_pairs(POLICY), interleaved(POLICY), interleaved(REFERENCE))
    assert values.tolist() == approx([1.86, 2.06])
