"""The classic PPO trainer: the numbers of the specification, one step against a plain computation, what it refuses."""

import math
import statistics
import warnings

import numpy
import pytest
import torch
from torch.nn.functional import log_softmax, pad

from trl_core import TokenRows, errors
from trl_core.testing import tiny_model, tiny_tokenizer
from trl_ppo.classic import (
    AdaptiveKLController,
    AutoModelForCausalLMWithValueHead,
    FixedKLController,
    PPOConfig,
    PPOTrainer,
    StepInputError,
    create_reference_model,
)
from trl_ppo.classic.trainer import estimates, kl_penalty, ppo_loss, token_rewards
from trl_ppo.estimates import gae


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def policy(seed=0, **options):
    """A tiny model with a head whose values differ from place to place."""
    torch.manual_seed(seed)
    return AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny_model(seed, **options).eval(), v_head_init_strategy="normal", v_head_initializer_range=0.05
    )


def make_trainer(model=None, ref_model=None, *, rate=0.05, optimizer="sgd", **options):
    """A trainer that descends plainly, all rows at once, unless told otherwise."""
    size = options.setdefault("batch_size", 2)
    model = model or policy()
    settings = {"mini_batch_size": size, "ppo_epochs": 1, "adap_kl_ctrl": False, **options}
    chosen = (
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate) if optimizer == "sgd" else None
    )
    return PPOTrainer(PPOConfig(learning_rate=rate, **settings), model, ref_model, tiny_tokenizer(), optimizer=chosen)


def rows(lengths=((3, 2), (5, 4)), seed=7):
    """Queries and responses of these lengths, random tokens."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [[torch.randint(5, 261, (size,), generator=generator) for size in row] for row in lengths]
    return [query for query, _ in drawn], [response for _, response in drawn]


def numbers(*values):
    return [torch.tensor(value) for value in values]


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def furthest(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# -- the numbers of the specification ----------------------------------------------------------------------------------
OLD = [[-1.0, -2.0], [-0.5, -0.6, -0.7, -0.8]]
REF = [[-1.1, -1.8], [-0.4, -0.6, -0.9, -0.8]]
VALUES = [[0.1, 0.2], [0.0, 0.1, 0.2, 0.3]]
NEW = [[-0.9, -2.3], [-0.5, -0.8, -0.6, -0.8]]
NEW_VALUES = [[0.4, 0.1], [0.1, 0.1, 0.5, 0.2]]


def flat(per_row):
    return torch.tensor([value for row in per_row for value in row])


def constants():
    made = TokenRows.from_lists([[5], [5]], [[6, 7], [6, 7, 8, 9]])
    made.notes |= {"logps": flat(OLD), "ref_logps": flat(REF), "values": flat(VALUES)}
    made.notes["kls"] = kl_penalty("kl", flat(OLD), flat(REF), None, None)
    return made, token_rewards(made, torch.tensor([1.0, -0.5]), 0.2, False)


def test_rewards_are_those_of_the_specification():
    _, rewards = constants()
    assert rewards.tolist() == pytest.approx([-0.02, 1.04, 0.02, 0, -0.04, -0.5], abs=1e-6)


def test_advantages_and_returns_are_those_of_the_specification():
    made, rewards = constants()
    found = estimates(made, rewards, 1.0, 0.95)
    raw = found["returns"] - made.notes["values"]
    assert raw.tolist() == pytest.approx([0.878, 0.84, -0.41675, -0.565, -0.7, -0.8], abs=1e-6)
    assert found["returns"].tolist() == pytest.approx([0.978, 1.04, -0.41675, -0.465, -0.5, -0.5], abs=1e-6)
    whitened = [1.297357, 1.248317, -0.373554, -0.564875, -0.739096, -0.868149]
    assert found["advantages"].tolist() == pytest.approx(whitened, abs=1e-6)
    assert float(found["advantages"].mean()) == pytest.approx(0, abs=1e-6)
    assert float(found["advantages"].var()) == pytest.approx(1, abs=1e-6)


def test_losses_are_those_of_the_specification():
    made, rewards = constants()
    made.notes |= estimates(made, rewards, 1.0, 0.95)
    loss, found = ppo_loss(made, flat(NEW), flat(NEW_VALUES), PPOConfig())
    assert float(found["loss/policy"]) == pytest.approx(0.027072, abs=1e-6)
    assert float(found["loss/value"]) == pytest.approx(0.284962, abs=1e-6)
    assert float(loss) == float(found["loss/total"]) == pytest.approx(0.055568, abs=1e-6)


@pytest.mark.parametrize(("kl", "value"), [(9, 0.200512), (3, 0.199488), (6.3, 0.200128)])
def test_the_kl_controller_moves_as_the_specification_says(kl, value):
    controller = AdaptiveKLController(0.2, 6, 10000)
    controller.update(kl, 128)
    assert controller.value == pytest.approx(value, abs=1e-6)
    fixed = FixedKLController(0.2)
    fixed.update(kl, 128)
    assert fixed.value == 0.2


def test_options_have_the_defaults_of_the_specification():
    found = vars(PPOConfig())
    expected = {
        "batch_size": 128,
        "mini_batch_size": 128,
        "gradient_accumulation_steps": 1,
        "ppo_epochs": 4,
        "init_kl_coef": 0.2,
        "adap_kl_ctrl": True,
        "target": 6,
        "horizon": 10000,
        "kl_penalty": "kl",
        "gamma": 1,
        "lam": 0.95,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "ratio_threshold": 10,
        "early_stopping": False,
        "target_kl": 1,
        "use_score_scaling": False,
        "use_score_norm": False,
        "score_clip": None,
        "whiten_rewards": False,
        "learning_rate": 1.41e-5,
        "seed": 0,
        "max_grad_norm": None,
        "remove_unused_columns": True,
    }
    assert {name: found[name] for name in expected} == expected


# -- one step against a plain computation ------------------------------------------------------------------------------
def plain_step(model, reference, queries, responses, scores, masks, rate, kind, left, whitened):
    """The weights after one pass over all rows, computed over padded lines of the full width; PPO's first update."""
    width = max(len(q) + len(r) for q, r in zip(queries, responses, strict=True))
    lines, attended, learned = [], [], []
    for query, response, mask in zip(queries, responses, masks, strict=True):
        line = torch.cat([query, response])
        gap = width - len(line)
        sides = (gap, 0) if left else (0, gap)
        lines.append(pad(line, sides, value=2))
        attended.append(pad(torch.ones_like(line), sides))
        # Index j of the shifted arrays predicts token j + 1.
        predicts = torch.cat([torch.zeros(len(query) - 1), mask.float()])
        learned.append(pad(predicts, sides))
    ids, attended, learned = torch.stack(lines), torch.stack(attended), torch.stack(learned).bool()
    positions = (attended.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": attended, "position_ids": positions}

    def seen(of):
        logits, _, values = of(**inputs)
        every = log_softmax(logits[:, :-1], -1)
        return every, every.gather(-1, ids[:, 1:, None])[..., 0], values[:, :-1]

    every, logps, values = seen(model)
    with torch.no_grad():
        ref_every, ref_logps, _ = seen(reference)
        difference = logps - ref_logps
        kls = {
            "kl": difference,
            "abs": difference.abs(),
            "mse": 0.5 * difference**2,
            "full": (every.exp() * (every - ref_every)).sum(-1),
        }[kind] * learned
        rewards = -0.2 * kls
        for row, score in enumerate(scores):
            rewards[row, learned[row].nonzero()[-1]] += score
        if whitened:
            used = rewards[learned]
            rewards[learned] = (used - used.mean()) / (used.var() + 1e-8).sqrt() + used.mean()
        old = values * learned
        advantages = torch.zeros_like(old)
        running = torch.zeros(len(old))
        for t in reversed(range(width - 1)):
            ahead = old[:, t + 1] if t + 1 < width - 1 else torch.zeros(len(old))
            running = rewards[:, t] + ahead - old[:, t] + 0.95 * running
            advantages[:, t] = running
        returns = (advantages + old)[learned]
        used = advantages[learned]
        used = (used - used.mean()) / (used.var() + 1e-8).sqrt()
    ratio = (logps - logps.detach()).exp()[learned]
    loss = -(used * ratio).mean() + 0.1 * 0.5 * (values[learned] - returns).square().mean()
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    moved = {n: p.detach() - rate * g for n, p, g in zip(names, model.parameters(), gradients, strict=True)}
    return moved, float(kls.sum(1).mean()), float(loss.detach())


@pytest.mark.parametrize("left", [False, True], ids=["padded_right", "padded_left"])
@pytest.mark.parametrize(
    ("kind", "whitened", "holes"),
    [("kl", False, False), ("abs", True, True), ("mse", False, True), ("full", True, False)],
)
def test_a_step_is_that_of_padded_lines(kind, whitened, holes, left):
    queries, responses = rows(((3, 2), (5, 4), (1, 6)))
    masks = [torch.ones_like(response) for response in responses]
    if holes:
        masks[1] = torch.tensor([1, 0, 1, 0])
        masks[2] = torch.tensor([0, 1, 1, 1, 1, 0])
    options = {"batch_size": 3, "kl_penalty": kind, "whiten_rewards": whitened}
    model, reference = policy(), policy(1)
    scores = [1.0, -0.5, 0.25]
    moved, kl, loss = plain_step(model, reference, queries, responses, scores, masks, 0.05, kind, left, whitened)
    trainer = make_trainer(model, reference, **options)
    stats = trainer.step(queries, responses, numbers(*scores), masks if holes else None)
    assert stats["objective/kl"] == pytest.approx(kl, rel=1e-5, abs=1e-5)
    assert stats["ppo/loss/total"] == pytest.approx(loss, abs=1e-5)
    found = {name: value.detach() for name, value in model.named_parameters()}
    assert max(float((found[name] - moved[name]).abs().max()) for name in moved) < 2e-6
    untouched = dict(policy().named_parameters())
    assert max(float((found[name] - untouched[name].detach()).abs().max()) for name in moved) > 1e-3


def test_the_reference_may_come_without_a_head():
    queries, responses = rows()
    headless, headed = tiny_model(1), policy(1)
    stats = [make_trainer(ref_model=ref).step(queries, responses, numbers(1.0, 0.0)) for ref in (headless, headed)]
    assert stats[0]["objective/kl"] == stats[1]["objective/kl"] != 0


def test_the_first_ratio_is_one_and_nothing_is_clipped():
    queries, responses = rows()
    stats = make_trainer().step(queries, responses, numbers(1.0, -1.0))
    assert numpy.abs(stats["ppo/policy/ratio"] - 1).max() < 1e-6
    assert stats["ppo/policy/clipfrac"] == stats["ppo/val/clipfrac"] == 0
    assert stats["ppo/policy/approxkl"] == pytest.approx(0, abs=1e-10)
    assert stats["ppo/loss/policy"] == pytest.approx(0, abs=1e-6)  # the mean of whitened advantages


def test_policy_that_is_its_reference_earns_nothing_without_a_score():
    model = policy()
    for parameter in model.v_head.parameters():
        torch.nn.init.zeros_(parameter)
    trainer = make_trainer(model)
    before = weights(trainer)
    stats = trainer.step(*rows(), numbers(0.0, 0.0))
    for name in ("objective/kl", "ppo/mean_non_score_reward", "ppo/returns/mean", "ppo/returns/var", "ppo/loss/total"):
        assert stats[name] == pytest.approx(0, abs=1e-9), name
    assert furthest(before, weights(trainer)) == 0


def test_without_a_rate_only_the_controller_moves():
    trainer = make_trainer(policy(), policy(1), rate=0.0, adap_kl_ctrl=True, ppo_epochs=2, target=1e-6)
    before = weights(trainer)
    coefficients = []
    for _ in range(3):
        stats = trainer.step(*rows(), numbers(1.0, -1.0))
        assert numpy.abs(stats["ppo/policy/ratio"] - 1).max() < 1e-6
        coefficients.append(stats["objective/kl_coef"])
    sign = math.copysign(1, stats["objective/kl"])
    assert coefficients == pytest.approx([0.2 * (1 + sign * 0.2 * 2 / 10000) ** i for i in range(3)], rel=1e-12)
    assert furthest(before, weights(trainer)) == 0


def test_full_kl_is_never_negative():
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 50, 30, generator=generator) * 3
    found = kl_penalty("full", torch.zeros(50), torch.zeros(50), logits, ref_logits)
    p, q = torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=ref_logits)
    assert (found >= 0).all()
    assert torch.allclose(found, torch.distributions.kl_divergence(p, q), atol=1e-5)


def test_a_short_response_is_not_touched_by_its_neighbours():
    queries, responses = rows(((3, 2), (9, 12)))
    alone = make_trainer(policy(), policy(1), batch_size=1).step(queries[:1], responses[:1], numbers(1.0))
    both = make_trainer(policy(), policy(1)).step(queries, responses, numbers(1.0, 0.0))
    for name in ("objective/logprobs", "objective/ref_logprobs"):
        assert both[name][:2] == pytest.approx(alone[name], abs=1e-5)
    assert both["objective/kl_dist"][0] == pytest.approx(alone["objective/kl_dist"][0], abs=1e-5)


def test_the_padding_of_the_tokenizer_does_not_matter():
    found = []
    for side in ("left", "right"):
        trainer = make_trainer()
        trainer.tokenizer.padding_side = side
        trainer.step(*rows(), numbers(1.0, 0.0))
        found.append(weights(trainer))
    assert furthest(*found) == 0


def test_accumulated_mini_batches_are_one():
    queries, responses = rows(((3, 4), (5, 4), (2, 4), (4, 4)))  # of one length: the mean is over a mini-batch's tokens
    found = []
    for mini_batch_size, accumulation in ((2, 1), (1, 2)):
        trainer = make_trainer(
            batch_size=4, mini_batch_size=mini_batch_size, gradient_accumulation_steps=accumulation, ppo_epochs=2
        )
        trainer.step(queries, responses, numbers(1.0, 0.0, -1.0, 0.5))
        found.append(weights(trainer))
    assert furthest(*found) < 1e-6
    assert furthest(found[0], weights(make_trainer())) > 1e-3


def test_gradients_are_clipped_to_the_norm():
    # Steps of plain descent show the norm of the gradient.
    moved = {}
    for norm in (None, 1e-3):
        trainer = make_trainer(rate=1.0, max_grad_norm=norm)
        before = weights(trainer)
        trainer.step(*rows(), numbers(1.0, -1.0))
        moved[norm] = math.sqrt(
            sum(float((value - before[name]).square().sum()) for name, value in weights(trainer).items())
        )
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert moved[None] > 0.01


def test_dropout_does_not_act():
    model = policy(attention_dropout=0.5)
    assert model.v_head.dropout.p == 0.1
    trainer = make_trainer(model)
    model.train()
    modes = set()
    model.pretrained_model.register_forward_pre_hook(lambda module, _: modes.add(module.training))
    stats = trainer.step(*rows(), numbers(1.0, -1.0))
    assert modes == {False}
    assert numpy.abs(stats["ppo/policy/ratio"] - 1).max() < 1e-6
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-6)


# -- small batches -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [((1, 1),), ((1, 1), (4, 1)), ((3, 5),)], ids=["one_token", "two_rows", "one_row"])
def test_small_batches_give_finite_losses(lengths):
    trainer = make_trainer(batch_size=len(lengths), mini_batch_size=1, ppo_epochs=2, rate=1e-3, whiten_rewards=True)
    queries, responses = rows(lengths)
    stats = trainer.step(queries, responses, [torch.tensor([1.0])] * len(lengths))
    undefined = {name for name, value in stats.items() if not numpy.isfinite(value).all()}
    # Where all returns are one number there is no variance to explain.
    assert undefined <= {"ppo/val/var_explained"}
    assert all(value.isfinite().all() for value in weights(trainer).values())


# -- passes that end early ---------------------------------------------------------------------------------------------
def passes(stats, tokens=6):
    return len(stats["ppo/policy/ratio"]) // tokens


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 4), ({"early_stopping": True, "target_kl": 0.34}, 2), ({"early_stopping": True, "target_kl": 0.36}, 4)],
)
def test_early_stopping_ends_the_passes(options, expected):
    # On these rows policykl is 0 in the first pass, 0.526 in the second, and 0.527 and 0.525 in the others.
    stats = make_trainer(ppo_epochs=4, rate=0.03, **options).step(*rows(seed=3), numbers(1.0, -1.0))
    assert passes(stats) == expected


def test_a_ratio_above_the_threshold_skips_the_mini_batch():
    trainer = make_trainer(ratio_threshold=0.5)  # the ratio is 1
    before = weights(trainer)
    with pytest.warns(UserWarning, match="mean ratio is 1"):
        stats = trainer.step(*rows(), numbers(1.0, -1.0))
    assert stats["ppo/loss/policy"] == stats["ppo/loss/value"] == stats["ppo/loss/total"] == 0
    assert furthest(before, weights(trainer)) == 0


def test_an_infinite_ratio_is_skipped_without_nan():
    made, rewards = constants()
    made.notes |= estimates(made, rewards, 1.0, 0.95)
    logps = (flat(OLD) + 200).requires_grad_()
    values = flat(NEW_VALUES).requires_grad_()
    with pytest.warns(UserWarning, match="mean ratio is inf"):
        loss, _ = ppo_loss(made, logps, values, PPOConfig())
    loss.backward()
    assert loss == 0 and (logps.grad == 0).all() and (values.grad == 0).all()


def test_a_loss_that_is_not_finite_is_an_error():
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.v_head.summary.bias.fill_(float("inf"))
    with pytest.raises(errors.NonFiniteLossError, match="To mend"):
        trainer.step(*rows(), numbers(1.0, -1.0))


def test_a_step_that_failed_leaves_no_gradients(monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    ends = []
    for failing in (False, True):
        trainer = make_trainer(max_grad_norm=1e9)
        if failing:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(trainer.accelerator, "clip_grad_norm_", fail)
                trainer.step(*rows(seed=1), numbers(-1.0, 1.0))
            assert any(p.grad is not None for p in trainer.model.parameters())
        trainer.step(*rows(), numbers(1.0, -1.0))
        ends.append(weights(trainer))
    assert furthest(*ends) < 1e-6


# -- scores ------------------------------------------------------------------------------------------------------------
def test_scores_are_scaled_by_what_has_been_seen():
    trainer = make_trainer(rate=0.0, use_score_scaling=True)
    batches = [(1.0, 3.0), (5.0, 4.0), (-2.0, 0.0)]
    for i, batch in enumerate(batches, start=1):
        stats = trainer.step(*rows(), numbers(*batch))
        seen = [score for each in batches[:i] for score in each]
        assert stats["ppo/mean_scores"] == pytest.approx(statistics.mean(batch) / statistics.stdev(seen), rel=1e-6)
        assert stats["ppo/std_scores"] == pytest.approx(statistics.stdev(batch) / statistics.stdev(seen), rel=1e-6)


def test_scores_are_normalised_and_clipped():
    trainer = make_trainer(rate=0.0, use_score_scaling=True, use_score_norm=True, score_clip=0.5)
    seen = [1.0, 3.0, 2.0, 6.0]
    trainer.step(*rows(), numbers(*seen[:2]))
    stats = trainer.step(*rows(), numbers(*seen[2:]))
    scaled = [(score - 3.0) / statistics.stdev(seen) for score in seen[2:]]
    assert stats["ppo/mean_scores"] == pytest.approx((max(scaled[0], -0.5) + 0.5) / 2, rel=1e-5)
    assert scaled[1] > 0.5


def test_equal_scores_are_not_blown_up():
    stats = make_trainer(use_score_scaling=True).step(*rows(), numbers(0.7, 0.7))
    assert stats["ppo/mean_scores"] == pytest.approx(0.7)


# -- statistics --------------------------------------------------------------------------------------------------------
KEYS = """
    objective/kl objective/kl_dist objective/kl_coef objective/entropy objective/logprobs objective/ref_logprobs
    ppo/mean_non_score_reward ppo/mean_scores ppo/std_scores ppo/learning_rate
    ppo/loss/policy ppo/loss/value ppo/loss/total
    ppo/policy/entropy ppo/policy/approxkl ppo/policy/policykl ppo/policy/clipfrac ppo/policy/advantages
    ppo/policy/advantages_mean ppo/policy/ratio ppo/returns/mean ppo/returns/var
    ppo/val/vpred ppo/val/error ppo/val/clipfrac ppo/val/mean ppo/val/var ppo/val/var_explained
    tokens/queries_len_mean tokens/queries_len_std tokens/responses_len_mean tokens/responses_len_std
    time/ppo/forward_pass time/ppo/compute_rewards time/ppo/compute_advantages time/ppo/optimize_step
    time/ppo/calc_stats time/ppo/total
"""


def test_every_statistic_is_there():
    stats = make_trainer().step(*rows(), numbers(1.0, -1.0))
    assert set(stats) == set(KEYS.split())
    arrays = {name: value.shape for name, value in stats.items() if isinstance(value, numpy.ndarray)}
    assert arrays == {
        "objective/kl_dist": (2,),
        "objective/logprobs": (6,),
        "objective/ref_logprobs": (6,),
        "ppo/policy/advantages": (6,),
        "ppo/policy/ratio": (6,),
    }
    assert all(isinstance(value, float) for name, value in stats.items() if name not in arrays)


def test_statistics_describe_the_rows():
    model, reference = policy(), policy(1)
    queries, responses = rows()
    logps = []
    for of in (model, reference):
        each = []
        for query, response in zip(queries, responses, strict=True):
            with torch.no_grad():
                every = log_softmax(of(torch.cat([query, response])[None])[0][0, :-1], -1)
            each.append(every.gather(-1, torch.cat([query, response])[1:, None])[len(query) - 1 :, 0])
        logps.append(each)
    stats = make_trainer(model, reference, rate=0.0, ppo_epochs=3).step(queries, responses, numbers(2.0, -1.0))
    kls = [float((a - b).sum()) for a, b in zip(*logps, strict=True)]
    assert stats["objective/kl_dist"] == pytest.approx(kls, abs=1e-4)
    assert stats["objective/kl"] == pytest.approx(statistics.mean(kls), abs=1e-4)
    assert stats["objective/entropy"] == pytest.approx(-statistics.mean(float(a.sum()) for a in logps[0]), abs=1e-4)
    assert stats["ppo/mean_non_score_reward"] == pytest.approx(-0.2 * sum(kls) / 6, abs=1e-5)
    assert (stats["ppo/mean_scores"], stats["ppo/std_scores"]) == pytest.approx((0.5, statistics.stdev([2, -1])))
    assert (stats["tokens/queries_len_mean"], stats["tokens/queries_len_std"]) == pytest.approx((4, 2**0.5))
    assert (stats["tokens/responses_len_mean"], stats["tokens/responses_len_std"]) == pytest.approx((3, 2**0.5))
    explained = 1 - stats["ppo/val/error"] / stats["ppo/returns/var"]
    assert stats["ppo/val/var_explained"] == pytest.approx(explained, rel=1e-5)
    assert stats["ppo/val/vpred"] == pytest.approx(stats["ppo/val/mean"], abs=1e-6)
    assert 0 < stats["ppo/policy/entropy"] < math.log(261)
    assert stats["time/ppo/total"] == pytest.approx(
        sum(value for name, value in stats.items() if name.startswith("time/ppo/") and "total" not in name)
    )


def test_a_very_negative_kl_warns():
    model, reference = policy(), policy(1)
    queries, _ = rows()
    responses = [
        reference.generate(query[None], max_new_tokens=6, do_sample=False)[0, len(query) :] for query in queries
    ]
    with pytest.warns(UserWarning, match=r"objective/kl is -\d"):
        make_trainer(model, reference).step(queries, responses, numbers(1.0, 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer().step(*rows(), numbers(1.0, 0.0))


# -- what is refused ---------------------------------------------------------------------------------------------------
GOOD = {"queries": rows()[0], "responses": rows()[1], "scores": numbers(1.0, 0.0)}
ONES = [torch.ones(2), torch.ones(4)]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"queries": torch.ones(2, 3, dtype=torch.long)}, "queries is no list of tensors"),
        ({"queries": [[5, 6], [7, 8]]}, "queries is no list of tensors"),
        ({"responses": tuple(GOOD["responses"])}, "responses is no list"),
        ({"scores": [1.0, 0.0]}, "scores is no list of tensors"),
        ({"scores": numbers(1.0)}, "scores has 1 entries"),
        ({"queries": GOOD["queries"] * 2}, "queries has 4 entries"),
        ({"queries": [query[None] for query in GOOD["queries"]]}, r"queries\[0\] .*\(1, 3\)"),
        ({"responses": [GOOD["responses"][0], GOOD["responses"][1][:0]]}, r"responses\[1\] .*\(0,\)"),
        ({"queries": [query.float() for query in GOOD["queries"]]}, r"queries\[0\] is a torch.float32"),
        ({"scores": [torch.tensor([1.0, 2.0]), torch.tensor(0.0)]}, r"scores\[0\] .*\(2,\)"),
        ({"scores": [torch.tensor([[1.0]]), torch.tensor(0.0)]}, r"scores\[0\] .*\(1, 1\)"),
        ({"scores": numbers(1.0, float("nan"))}, r"scores\[1\]"),
        ({"response_masks": ONES[:1]}, "response_masks has 1 entries"),
        ({"response_masks": [ONES[0], ONES[0]]}, r"response_masks\[1\]"),
        ({"response_masks": [ONES[0], torch.zeros(4)]}, r"response_masks\[1\]"),
    ],
)
def test_wrong_arguments_are_refused(wrong, named):
    trainer = make_trainer()
    before = weights(trainer)
    with pytest.raises(StepInputError, match=named) as caught:
        trainer.step(**{**GOOD, **wrong})
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, errors.TRLCoreError)
    assert "To mend: Pass" in str(caught.value)
    assert furthest(before, weights(trainer)) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 5, "mini_batch_size": 2},
        {"batch_size": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 4},
        {"batch_size": 0},
        {"ppo_epochs": 0},
        {"kl_penalty": "k3"},
        {"use_score_norm": True},
        {"score_clip": 0},
        {"target": 0},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(errors.ConfigError, match="To mend") as caught:
        PPOConfig(**options)
    assert isinstance(caught.value, ValueError)


def test_wrong_models_are_refused():
    model = policy()
    with pytest.raises(errors.ConfigError, match="value head"):
        PPOTrainer(PPOConfig(), tiny_model())
    for reference in (model, model.pretrained_model):
        with pytest.raises(errors.ConfigError, match="The reference is the model"):
            PPOTrainer(PPOConfig(), model, reference)


def test_the_tag_of_the_distribution_holds(monkeypatch):
    monkeypatch.setenv("TRL_CORE_REQUIRE", "stable")
    with pytest.raises(errors.StabilityError):
        make_trainer()


# -- training ----------------------------------------------------------------------------------------------------------
def test_the_default_optimizer_is_adam_on_what_is_trained():
    model = policy()
    reference = create_reference_model(model, num_shared_layers=1)
    trainer = make_trainer(model, reference, optimizer=None, rate=1e-3)
    held = trainer.optimizer.param_groups[0]["params"]
    assert isinstance(trainer.optimizer.optimizer, torch.optim.Adam)
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert 0 < len(held) < len(list(model.parameters()))


def test_the_schedule_advances_once_per_step():
    model = policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=8e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    config = PPOConfig(batch_size=2, mini_batch_size=1, ppo_epochs=2)
    trainer = PPOTrainer(config, model, optimizer=optimizer, lr_scheduler=schedule)
    rates = [trainer.step(*rows(), numbers(1.0, 0.0))["ppo/learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([8e-4, 4e-4, 2e-4])


def test_a_rewarded_token_becomes_likelier():
    wanted = 17
    model = policy(vocab_size=40, initializer_range=0.02)
    config = PPOConfig(batch_size=16, mini_batch_size=16, learning_rate=1e-2, init_kl_coef=0.01, adap_kl_ctrl=False)
    trainer = PPOTrainer(config, model)
    queries = [torch.tensor([5 + i, 30, 35]) for i in range(16)]
    sampling = {"max_new_tokens": 6, "do_sample": True, "top_k": 0, "top_p": 1.0, "batch_size": 16}
    found = []
    for _ in range(20):
        responses = trainer.generate(queries, return_prompt=False, **sampling)
        stats = trainer.step(queries, responses, [(response == wanted).float().mean() for response in responses])
        found.append(stats["ppo/mean_scores"])
    assert statistics.mean(found[:3]) < 0.1
    assert statistics.mean(found[-3:]) > 0.5
    assert stats["objective/kl"] > 1


def test_gae_over_the_response_is_gae_over_the_full_width():
    """Values and rewards outside the response are 0, so where a row stands in its line does not matter."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 4, generator=generator)
    narrow = gae(rewards, values, 1.0, 0.95)
    wide = gae(pad(rewards, (5, 2)), pad(values, (5, 2)), 1.0, 0.95)
    assert torch.equal(narrow, wide[:, 5:9])
