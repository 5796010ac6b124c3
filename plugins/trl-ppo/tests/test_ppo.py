"""PPO: its hooks on rows written by hand, whose numbers are known, and its real trainer."""

import copy
import dataclasses
import itertools
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from trl_core import HookContext, Rollouts, Samples, errors, hookimpl, stages
from trl_core.testing import FixedRollouts, tiny_classifier, tiny_model, tiny_tokenizer
from trl_ppo import PPOConfig, PPOTrainer, algorithm
from trl_ppo.estimates import gae, kl_estimate, value_loss, whiten

peft = pytest.importorskip("peft")

EOS = 1
ENDS = [EOS, *range(40, 90)]
"""With so many terminators completions get all lengths."""
CLOCKS = ("time/", "step_time", "eps", "train_runtime", "train_s", "eval_runtime", "eval_s", "eval_time/")
TOKENIZER = tiny_tokenizer()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- trainers ----------------------------------------------------------------------------------------------------------
def reward(completion_ids, **_):
    """Differs between rows."""
    return [sum(ids) % 7 / 2 for ids in completion_ids]


def scores(*values):
    """A reward function that gives each row of a batch its own value."""

    def by_place(completions, **_):
        return [values[i % len(values)] for i in range(len(completions))]

    return by_place


def policy(ends=EOS, **overrides):
    model = tiny_model(**overrides)
    model.generation_config.eos_token_id = ends
    return model


def prompts(rows=8):
    return Dataset.from_list([{"prompt": "say " + "x" * (row + 1)} for row in range(rows)])


def lora():
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def rows_of(*lengths, start=10):
    """Completions of these lengths, different everywhere; one that is shorter than 6 ends with the terminator."""
    return [[*range(start + 10 * i, start + 10 * i + n - (n < 6)), *[EOS] * (n < 6)] for i, n in enumerate(lengths)]


class Watch(TrainerCallback):
    """Notes what the loss gets, and where optimizer steps begin and end."""

    def __init__(self):
        self.steps, self.pending, self.logps, self.optimizer_steps = [], [], [], 0

    @hookimpl
    def loss_terms(self, samples, logps):
        self.pending.append(samples)
        self.logps.append(logps.detach())
        return {}

    def on_optimizer_step(self, args, state, control, **_):
        self.optimizer_steps += 1

    def on_step_end(self, args, state, control, **_):
        self.steps.append(self.pending)
        self.pending = []

    def on_evaluate(self, args, state, control, **_):
        self.pending = []

    @property
    def places(self):
        """The places in the batch of the rows of each optimizer step."""
        return [[place for rows in step for place in rows.position.tolist()] for step in self.steps]


def make_trainer(folder, completions=None, arguments=None, **options):
    """A trainer that samples, or is given the completions of each batch, again and again."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "response_length": 6,
        "num_ppo_epochs": 2,
        "stop_token": "eos",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    given = {"model": None, "reward_funcs": reward, "train_dataset": prompts(), "processing_class": TOKENIZER}
    given |= arguments or {}
    given["model"] = policy() if given["model"] is None else given["model"]
    if completions is not None:
        given["rollouts"] = FixedRollouts([{"completion_ids": batch} for batch in completions], cycle=True)
    return PPOTrainer(args=PPOConfig(**{**defaults, **options}), **given)


def trained(folder, completions=None, arguments=None, **options):
    """(trainer, what a `Watch` saw) after training."""
    watch = Watch()
    arguments = {**(arguments or {})}
    arguments["callbacks"] = [watch, *arguments.get("callbacks", [])]
    trainer = make_trainer(folder, completions, arguments, **options)
    trainer.train()
    return trainer, watch


def lines(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def states(trainer):
    """Copies of all weights, by model."""
    models = {"policy": trainer.model, **trainer.extra_models}
    return {
        f"{of}.{name}": value.detach().clone()
        for of, model in models.items()
        for name, value in model.state_dict().items()
    }


def changed(one, other, prefix=""):
    """Names of weights that differ."""
    assert one.keys() == other.keys()
    return [name for name in one if name.startswith(prefix) and not torch.equal(one[name], other[name])]


def plain_logps(model, prompt, completion, temperature):
    """Log-probabilities of one completion from one forward over its row."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]


def split(rows, values):
    """A (T,) tensor by row, in the order of the batch."""
    parts = values.split(rows.lengths.tolist())
    return [parts[i] for i in torch.argsort(rows.position).tolist()]


def close(values, tolerance=1e-6):
    return pytest.approx(values, abs=tolerance)


# -- the constants of the specification --------------------------------------------------------------------------------
NAN = float("nan")
OLD, REF = [[-1, -2], [-0.5, -0.6, -0.7, -0.8]], [[-1.1, -1.8], [-0.4, -0.6, -0.9, -0.8]]
NEW = [[-0.9, -2.3], [-0.5, -0.8, -0.6, -0.8]]
VALUES, NEW_VALUES = [[0.1, 0.2, 0.3], [0, 0.1, 0.2, 0.3]], [[0.4, 0.1, 0.3], [0.1, 0.1, 0.5, 0.2]]


def flat(rows):
    return torch.tensor([float(value) for row in rows for value in row])


def hooks(**options):
    """The hooks of PPO; as a critic the one number that is given as a hidden state."""
    args = PPOConfig(response_length=4, gamma=1.0, lam=0.95, use_cpu=True, **options)
    context = HookContext(args, {"reward_model": None, "value_model": None})
    context.models["value_model"] = torch.nn.Identity()
    context.processing_class = TOKENIZER
    return algorithm.hooks(context)


def hand_made(kind, **fields):
    """The rows of the constants: one that ended after two tokens, one of full length."""
    completions = [[20, EOS], [30, 31, 32, 33]]
    return kind.from_lists([[5, 6], [5, 6, 7]], completions, old_logps=flat(OLD), ref_logps=flat(REF), **fields)


def rollouts(**fields):
    given = {
        "prompts": ["a", "b"],
        "completions": ["a", "b"],
        "truncated": torch.tensor([False, True]),
        "reward": torch.tensor([1.0, -0.5]),
        "notes": {
            "values": flat([VALUES[0][:2], VALUES[1]]),
            # After the last token there is room in the first row only.
            "end_values": flat([[NAN, VALUES[0][2]], [NAN] * 4]),
        },
    }
    return hand_made(Rollouts, **{**given, **fields})


def advantages(rows, **options):
    return hooks(**options).advantages(rows, torch.ones(2, dtype=torch.bool)).reshape(-1)


def test_returns_and_whitened_advantages_are_those_of_the_specification():
    rows = rollouts()
    whitened = advantages(rows, kl_coef=0.05)
    expected = [1.307922, 1.231715, -0.366499, -0.545095, -0.725960, -0.902082]
    assert whitened.tolist() == close(expected)
    assert rows.notes["returns"].tolist() == close([0.931250, 0.975000, -0.404675, -0.436500, -0.470000, -0.500000])
    assert rows.notes["end_returns"].tolist() == pytest.approx([NAN, 1.0, NAN, NAN, NAN, NAN], nan_ok=True)
    raw = [0.831250, 0.775000, -0.404675, -0.536500, -0.670000, -0.800000]
    assert (rows.notes["returns"] - rows.notes["values"]).tolist() == close(raw)


def rewards_of(monkeypatch, **options):
    """The rewards that go into the advantages, a line per row, padded with 0."""
    seen = []
    monkeypatch.setattr("trl_ppo.ppo.gae", lambda rewards, *more: seen.append(rewards.clone()) or gae(rewards, *more))
    advantages(rollouts(), **options)
    (found,) = seen
    return found[:, :4].tolist()


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({"kl_estimator": "k1"}, [-0.005, 0.010, 1.0, 0.0], [0.005, 0.0, -0.010, -0.500]),
        (
            {"kl_estimator": "k3"},
            [-0.05 * 0.004837, -0.05 * 0.021403, 1.0, 0.0],
            [-0.05 * 0.005171, 0.0, -0.05 * 0.018731, -0.5],
        ),
        (
            {"whiten_rewards": True, "per_device_train_batch_size": 8},
            [-0.098445, -0.065105, 2.135315, 0.0],
            [-0.076219, -0.087332, -0.109558, -1.198655],
        ),
        ({"kl_coef": 0.0}, [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, -0.5]),
    ],
    ids=["k1", "k3", "whiten_rewards", "kl_coef=0"],
)
def test_rewards_are_those_of_the_specification(options, first, second, monkeypatch):
    found = rewards_of(monkeypatch, **{"kl_coef": 0.05, **options})
    assert found == [close(first), close(second)]


def test_score_at_last_token_leaves_no_step_behind_it(monkeypatch):
    notes = {"values": flat([VALUES[0][:2], VALUES[1]]), "end_values": torch.full((6,), NAN)}
    rows = rollouts(notes=notes)
    advantages(rows, kl_coef=0.05, score_at_last_token=True)
    # -0.005 + 0.95 * (1.010 - 0.2) + (0.2 - 0.1) + 0.1, and 1.010
    assert rows.notes["returns"][:2].tolist() == close([0.9645, 1.010])
    assert rows.notes["end_returns"].isnan().all()


def terms(**options):
    notes = {
        "values": flat([VALUES[0][:2], VALUES[1]]),
        "end_values": flat([[NAN, VALUES[0][2]], [NAN] * 4]),
        "returns": flat([[0.931250, 0.975000], [-0.404675, -0.436500, -0.470000, -0.500000]]),
        "end_returns": flat([[NAN, 1.0], [NAN] * 4]),
    }
    rows = hand_made(
        Samples,
        notes=notes,
        advantages=flat([[1.307922, 1.231715], [-0.366499, -0.545095, -0.725960, -0.902082]]),
        position=torch.arange(2),
        generation=torch.zeros(2, dtype=torch.long),
        reward=torch.tensor([1.0, -0.5]),
    )
    rows.entropy = torch.ones(6)
    rows.states = flat([NEW_VALUES[0][:2], NEW_VALUES[1]])[:, None]
    # The second row has no step left.
    rows.last_states = torch.tensor([[NEW_VALUES[0][2]], [99.0]], requires_grad=True)
    ours = hooks(**options)
    return rows, ours.loss_terms(rows, flat(NEW), flat(NEW) - flat(OLD))


def test_losses_are_those_of_the_specification():
    rows, found = terms(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1)
    assert found["policy"].mean().item() == close(0.026537)
    assert found["value"].values.mean().item() / 0.1 == close(0.259109)
    counters = SimpleNamespace(rows=2, tokens=6, completion_tokens=6, slices=1)
    weights = stages.token_weights(rows, "bnpo", counters, max_completion_length=4)
    assert stages.aggregate(found, weights).item() == close(0.052448)


def test_critic_is_asked_for_the_step_behind_the_end_only_where_there_is_room():
    rows, found = terms()
    assert found["value"].values.shape == (7,)
    found["value"].values.sum().backward()
    # 0.1 times the error of 0.3 against the return of 1; nothing for the row without a step left
    assert rows.last_states.grad.flatten().tolist() == close([-0.07, 0.0])


# -- estimates ---------------------------------------------------------------------------------------------------------
REWARDS = torch.tensor([[0.1, -0.2, 0.5], [1.0, 0.0, 0.0]])
GUESSES = torch.tensor([[0.3, 0.2, 0.1], [0.4, 0.0, 0.0]])


def test_with_lambda_1_returns_are_what_follows():
    returns = gae(REWARDS, GUESSES, gamma=1.0, lam=1.0) + GUESSES
    assert returns[0].tolist() == close([0.4, 0.3, 0.5])
    discounted = gae(REWARDS, GUESSES, gamma=0.5, lam=1.0) + GUESSES
    assert discounted[0].tolist() == close([0.1 - 0.1 + 0.125, -0.2 + 0.25, 0.5])


def test_with_lambda_0_advantages_are_the_errors_of_one_step():
    found = gae(REWARDS, GUESSES, gamma=0.9, lam=0.0)
    assert found[0].tolist() == close([0.1 + 0.18 - 0.3, -0.2 + 0.09 - 0.2, 0.5 - 0.1])
    assert found[1].tolist() == close([0.6, 0.0, 0.0])


def test_whitened_values_have_mean_0_and_sample_variance_1():
    values = torch.tensor([1.0, 4.0, -2.0, 0.5])
    assert whiten(values).mean().item() == close(0.0)
    assert whiten(values).var().item() == close(1.0)
    kept = whiten(values, shift_mean=False)
    assert kept.mean().item() == close(values.mean().item()) and kept.var().item() == close(1.0)


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0, 2.0]])
def test_whitening_values_without_spread_stays_finite(values):
    assert whiten(torch.tensor(values)).tolist() == [0.0] * len(values)


def test_value_clip_acts_only_beyond_its_range():
    old, returns = torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, -1.0])
    values = torch.tensor([0.1, 0.2, 0.5, 0.5])
    losses, clipped = value_loss(values, old, returns, 0.2)
    # The third runs ahead towards its return, and is held back; the fourth is far off either way.
    assert losses.tolist() == close([0.5 * 0.81, 0.5 * 0.64, 0.5 * 0.64, 0.5 * 2.25])
    assert clipped.tolist() == [False, False, True, False]


def test_k3_is_never_negative_and_k1_is_the_log_ratio():
    logps, ref = torch.randn(100, generator=torch.Generator().manual_seed(0)).split(50)
    assert (kl_estimate(logps, ref, "k3") >= 0).all()
    assert torch.equal(kl_estimate(logps, ref, "k1"), logps - ref)
    assert kl_estimate(logps, logps, "k3").abs().max() == 0


# -- a step through the trainer ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("critic", [None, tiny_classifier], ids=["head", "network"])
def test_first_micro_batch_is_on_policy(critic, tmp_path):
    trainer, _ = trained(tmp_path, arguments={"value_model": critic and critic(), "model": policy(ENDS)})
    first, second = lines(trainer)
    assert first["val/ratio"] == close(1.0, 1e-5) and first["policy/clipfrac_avg"] == 0
    assert first["policy/approxkl_avg"] == close(0.0) and first["val/clipfrac_avg"] == 0
    assert first["loss/policy_avg"] == close(0.0, 1e-5)  # minus the mean of what is whitened
    assert first["objective/kl"] == close(0.0, 1e-5)  # the policy is the reference
    assert first["loss"] == close(trainer.args.vf_coef * first["loss/value_avg"], 1e-5)
    assert second["val/ratio"] != close(1.0, 1e-3) and second["policy/approxkl_avg"] > 1e-4


def rewards_by_row(rows, args):
    """The reward of each step, as the formula says, from what the models said: a list per row."""
    found = []
    parts = (split(rows, values) for values in (rows.old_logps, rows.ref_logps))
    scored = rows.reward[torch.argsort(rows.position)].tolist()
    for old, ref, score in zip(*parts, scored, strict=True):
        steps = (-args.kl_coef * (old - ref)).tolist()
        if len(steps) < args.response_length and not args.score_at_last_token:
            steps.append(0.0)
        steps[-1] += score
        found.append(steps)
    return found


def by_row(rows, name):
    """The notes of each row, with the one of the step after its last token, if it has one."""
    ends = split(rows, rows.notes[f"end_{name}"])
    inside = split(rows, rows.notes[name])
    return [
        [*values.tolist(), *([] if end[-1].isnan() else [end[-1].item()])]
        for values, end in zip(inside, ends, strict=True)
    ]


@pytest.mark.parametrize("score_at_last_token", [False, True])
def test_with_lambda_1_a_return_is_the_sum_of_what_follows(score_at_last_token, tmp_path):
    arguments = {"value_model": tiny_classifier(), "reward_funcs": scores(1.0, -2.0, 0.5, 3.0)}
    options = {"max_steps": 4, "gamma": 1.0, "lam": 1.0, "score_at_last_token": score_at_last_token}
    trainer, watch = trained(tmp_path, [rows_of(3, 6, 1, 5)], arguments, **options)
    (rows,) = watch.steps[2]  # of the second batch: the policy is not the reference any more
    rewards = rewards_by_row(rows, trainer.args)
    assert [len(steps) for steps in rewards] == ([3, 6, 1, 5] if score_at_last_token else [4, 6, 2, 6])
    assert min(abs(x) for x in rewards[0][:3]) > 1e-4
    for steps, returns in zip(rewards, by_row(rows, "returns"), strict=True):
        assert returns == close([sum(steps[i:]) for i in range(len(steps))], 1e-5)


def test_with_lambda_0_an_advantage_is_the_error_of_one_step(tmp_path):
    arguments = {"value_model": tiny_classifier(), "reward_funcs": scores(1.0, -2.0, 0.5, 3.0)}
    trainer, watch = trained(tmp_path, [rows_of(3, 6, 1, 5)], arguments, max_steps=4, gamma=0.9, lam=0.0)
    (rows,) = watch.steps[2]
    table = zip(rewards_by_row(rows, trainer.args), by_row(rows, "values"), by_row(rows, "returns"), strict=True)
    deltas = []
    for steps, values, returns in table:
        following = [*values[1:], 0.0]
        expected = [r + 0.9 * after - now for r, now, after in zip(steps, values, following, strict=True)]
        assert [r - v for r, v in zip(returns, values, strict=True)] == close(expected, 1e-5)
        deltas.append(expected)
    # The step behind the last token is no place of the policy, so it is not whitened with the others.
    inside = torch.tensor([x for part, n in zip(deltas, [3, 6, 1, 5], strict=True) for x in part[:n]])
    assert torch.cat(split(rows, rows.advantages)).tolist() == close(whiten(inside).tolist(), 1e-4)


def test_critic_may_have_a_learning_rate_of_its_own(tmp_path):
    def train(folder, **options):
        trainer = make_trainer(tmp_path / folder, max_steps=1, optim="sgd", **options)
        trainer.train()
        head = trainer.extra_models["value_model"]
        return torch.cat([head.weight.detach().flatten(), head.bias.detach()]), trainer.model.state_dict()

    same, tenfold = train("same"), train("tenfold", value_learning_rate=0.1)
    assert torch.allclose(tenfold[0], 10 * same[0], atol=1e-7) and bool(same[0].any())
    assert all(torch.equal(value, tenfold[1][name]) for name, value in same[1].items())


def test_values_are_the_critics_before_each_token_and_after_the_last(tmp_path):
    critic = tiny_classifier(seed=3)
    completions = rows_of(3, 6, 1, 5)
    trainer = make_trainer(tmp_path, [completions], {"value_model": critic}, learning_rate=0.0, max_steps=1)
    trainer.train()
    rows = trainer.window.samples
    for i, (completion, values) in enumerate(zip(completions, by_row(rows, "values"), strict=True)):
        prompt = TOKENIZER(f"say {'x' * (i + 1)}")["input_ids"]
        with torch.no_grad():
            states = critic.model(torch.tensor([[*prompt, *completion]])).last_hidden_state
            expected = critic.score(states)[0, len(prompt) - 1 :, 0].tolist()
        assert values == close(expected[: min(len(completion) + 1, 6)], 1e-5)


@pytest.mark.parametrize(
    "parts", [{}, {"num_mini_batches": 4}, {"num_mini_batches": 2, "local_rollout_forward_batch_size": 3}]
)
def test_advantages_are_whitened_over_the_whole_batch(parts, tmp_path):
    options = {"gradient_accumulation_steps": 2, "max_steps": 1, **parts}
    trainer = make_trainer(tmp_path, arguments={"model": policy(ENDS)}, **options)
    trainer.train()
    advantages = trainer.window.samples.advantages
    assert trainer.window.samples.num_rows == 8
    assert advantages.mean().item() == close(0.0, 1e-5) and advantages.var().item() == close(1.0, 1e-4)


def test_objective_adds_up(tmp_path):
    trainer, watch = trained(tmp_path, arguments={"reward_funcs": scores(1.0, 0.0, 0.5, 2.0)}, max_steps=4, kl_coef=0.2)
    line, (rows,) = lines(trainer)[2], watch.steps[2]
    kl = rows.sum_per_row(rows.old_logps - rows.ref_logps).mean().item()
    assert abs(kl) > 0.01
    assert line["objective/kl"] == close(kl, 1e-4)
    assert line["objective/scores"] == close(0.875)
    assert line["objective/non_score_reward"] == close(-0.2 * kl, 1e-4)
    assert line["objective/rlhf_reward"] == close(0.875 - 0.2 * kl, 1e-4)
    assert line["objective/entropy"] == close(-rows.sum_per_row(rows.old_logps).mean().item(), 1e-3)


def test_metrics_of_a_later_pass(tmp_path):
    arguments = {"value_model": tiny_classifier()}
    trainer, watch = trained(tmp_path, [rows_of(3, 6, 2, 5)], arguments, learning_rate=3e-4)
    line, (rows,), difference = lines(trainer)[1], watch.steps[1], watch.logps[1] - watch.steps[1][0].old_logps
    ratio, advantages = difference.exp(), rows.advantages
    clipped = -advantages * ratio.clamp(0.8, 1.2) > -advantages * ratio
    assert line["val/ratio"] == close(ratio.mean().item(), 1e-5)
    assert line["policy/approxkl_avg"] == close(0.5 * difference.square().mean().item(), 1e-5)
    assert 0 < line["policy/clipfrac_avg"] == close(clipped.float().mean().item(), 1e-5)
    assert line["policy/entropy_avg"] == close(rows.entropy.mean().item(), 1e-5)
    assert line["loss"] == close(line["loss/policy_avg"] + 0.1 * line["loss/value_avg"], 1e-5)


def test_kl_estimator_k3_is_the_penalty(tmp_path):
    trainer, watch = trained(tmp_path, max_steps=4, kl_estimator="k3")
    (rows,) = watch.steps[2]
    difference = rows.ref_logps - rows.old_logps
    estimate = rows.sum_per_row(difference.exp() - 1 - difference).mean().item()
    assert estimate > 0 and lines(trainer)[2]["objective/kl"] == pytest.approx(estimate, rel=1e-4)


def test_log_probabilities_are_at_the_sampling_temperature(tmp_path):
    completions = rows_of(3, 6, 2, 5)
    trainer = make_trainer(tmp_path, [completions], temperature=0.5, learning_rate=0.0)
    trainer.train()
    rows = trainer.window.samples
    for i, (old, ref) in enumerate(zip(split(rows, rows.old_logps), split(rows, rows.ref_logps), strict=True)):
        expected = plain_logps(policy(), TOKENIZER(f"say {'x' * (i + 1)}")["input_ids"], completions[i], 0.5)
        assert torch.allclose(old, expected, atol=1e-5) and torch.allclose(ref, expected, atol=1e-5)


# -- batches, mini-batches, optimizer steps ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "accumulation", "parts", "micro", "per_step", "slices"),
    [
        (4, 1, 1, 4, 1, 1),
        (4, 2, 1, 4, 2, 2),
        (4, 2, 2, 4, 1, 2),
        (4, 2, 4, 2, 1, 4),
        (4, 3, 2, 2, 3, 6),  # mini-batches of 6 rows do not divide into micro-batches of 4
        (6, 2, 4, 3, 1, 4),
        (4, 3, 4, 1, 3, 12),
    ],
)
def test_micro_batches_make_up_a_mini_batch(rows, accumulation, parts, micro, per_step, slices):
    args = PPOConfig(
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        num_mini_batches=parts,
        use_cpu=True,
    )
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (micro, per_step)
    assert args.steps_per_generation == slices
    assert args.generation_batch_size == rows * accumulation


@pytest.mark.parametrize(("rows", "accumulation", "parts"), [(4, 2, 2), (4, 3, 2), (4, 1, 4), (2, 4, 1)])
def test_an_optimizer_step_follows_each_mini_batch(rows, accumulation, parts, tmp_path):
    batch = rows * accumulation
    options = {"gradient_accumulation_steps": accumulation, "num_mini_batches": parts, "num_ppo_epochs": 3}
    steps = 2 * 3 * parts
    trainer, watch = trained(
        tmp_path,
        arguments={"train_dataset": prompts(2 * batch)},
        per_device_train_batch_size=rows,
        shuffle_dataset=True,
        max_steps=steps,
        **options,
    )
    assert watch.optimizer_steps == steps and trainer.generations == 2
    assert [len(places) for places in watch.places] == [batch // parts] * steps
    passes = [list(itertools.chain(*watch.places[i : i + parts])) for i in range(0, steps, parts)]
    assert [sorted(places) for places in passes] == [list(range(batch))] * 6
    if batch // trainer.args.per_device_train_batch_size > 1:
        assert len({tuple(places) for places in passes}) == 6  # each pass in an order of its own


def test_without_shuffling_every_pass_has_the_order_of_the_dataset(tmp_path):
    _, watch = trained(tmp_path, num_mini_batches=2, max_steps=8)
    assert watch.places == [[0, 1], [2, 3]] * 4


def test_mini_batches_do_not_change_the_advantages(tmp_path):
    found = []
    for parts in (1, 2, 4):
        trainer = make_trainer(tmp_path, [rows_of(3, 6, 1, 5)], num_mini_batches=parts, max_steps=1)
        trainer.train()
        found.append(trainer.window.samples.advantages)
    assert all(torch.allclose(other, found[0], atol=1e-5) for other in found[1:])


def test_several_completions_of_a_prompt(tmp_path):
    trainer, watch = trained(tmp_path, num_generations=2, num_mini_batches=2, shuffle_dataset=True, max_steps=4)
    assert trainer.window.samples.group.tolist() == [0, 0, 1, 1]
    assert {tuple(sorted(places)) for places in watch.places} == {(0, 1), (2, 3)}  # whole groups


@pytest.mark.parametrize(("episodes", "batches"), [(1, 1), (8, 2), (9, 3), (40, 10)])
def test_total_episodes_are_completions(episodes, batches, tmp_path):
    args = PPOConfig(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_mini_batches=2,
        num_ppo_epochs=3,
        total_episodes=episodes,
        use_cpu=True,
    )
    assert args.max_steps == batches * 3 * 2


def test_a_run_generates_its_total_episodes(tmp_path):
    trainer = make_trainer(tmp_path, total_episodes=10, num_mini_batches=2, max_steps=-1)
    trainer.train()
    assert trainer.generations == 3 and trainer.state.global_step == 3 * 2 * 2
    assert [line["episode"] for line in lines(trainer)] == [4] * 4 + [8] * 4 + [12] * 4


def test_total_episodes_beside_max_steps_warns(caplog):
    PPOConfig(total_episodes=8, max_steps=3, num_ppo_epochs=2, use_cpu=True)
    assert "total_episodes=8 sets max_steps to 2" in caplog.text


def test_without_a_limit_a_run_goes_over_the_dataset(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.generations == 4 and trainer.state.global_step == 8


# -- options -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("names", [("response_length", "max_completion_length"), ("num_ppo_epochs", "num_iterations")])
def test_two_names_of_one_option(names):
    for given in ({names[0]: 7}, {names[1]: 7}, dict.fromkeys(names, 7)):
        args = PPOConfig(**given, use_cpu=True)
        assert [getattr(args, name) for name in names] == [7, 7]
    with pytest.raises(errors.ConfigError, match=f"{names[0]}=7 and {names[1]}=8 differ"):
        PPOConfig(**dict(zip(names, (7, 8), strict=True)), use_cpu=True)


def test_defaults_are_those_of_trl():
    args = PPOConfig(use_cpu=True)
    expected = {
        "learning_rate": 3e-6,
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "gamma": 1.0,
        "lam": 0.95,
        "whiten_rewards": False,
        "response_length": 53,
        "temperature": 0.7,
        "missing_eos_penalty": None,
        "stop_token": None,
        "stop_token_id": None,
        "total_episodes": None,
        "local_rollout_forward_batch_size": 64,
        "num_sample_generations": 10,
    }
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.num_generations == 1 and args.max_grad_norm == 0.0


WITH_ALL = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 6,
    "num_mini_batches": 2,
    "max_completion_length": 9,
    "num_iterations": 3,
    "total_episodes": 50,
    "whiten_rewards": True,
    "use_cpu": True,
}


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, dataclasses.replace], ids=lambda f: f.__name__)
def test_a_copy_of_the_config_is_equal(again, caplog):
    args = PPOConfig(**WITH_ALL)
    other = again(args)
    assert type(other) is type(args) and other.to_dict() == args.to_dict()
    assert other.slices == args.slices == 6 and other.max_steps == args.max_steps == 3 * 3 * 2
    assert "sets max_steps" not in caplog.text


def test_a_config_is_restored_from_its_dictionary():
    args = PPOConfig(**WITH_ALL)
    assert PPOConfig(**args.to_dict()).to_dict() == args.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_mini_batches": 3, "per_device_train_batch_size": 4}, "num_mini_batches=3 does not divide the 4 rows"),
        ({"num_mini_batches": 0}, "num_mini_batches=0"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs=0"),
        ({"response_length": 0}, "response_length=0"),
        ({"total_episodes": 0}, "total_episodes=0"),
        ({"local_rollout_forward_batch_size": 0}, "local_rollout_forward_batch_size=0"),
        ({"num_sample_generations": -1}, "num_sample_generations=-1"),
        ({"kl_estimator": "k2"}, "kl_estimator='k2'"),
        ({"stop_token": "period"}, "stop_token='period'"),
        ({"stop_token": "eos", "stop_token_id": 5}, "both given"),
        ({"missing_eos_penalty": 0.0}, "missing_eos_penalty=0.0"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty=-1.0"),
        ({"loss_type": "cispo", "steps_per_generation": None}, "loss_type='cispo'"),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, "4 micro-batches, but .* is 2"),
        ({"whiten_rewards": True, "per_device_train_batch_size": 4}, "mini-batches of 4 rows"),
        (
            {"whiten_rewards": True, "per_device_train_batch_size": 8, "num_mini_batches": 2},
            "mini-batches of 4 rows",
        ),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(errors.ConfigError, match=message):
        PPOConfig(**options, use_cpu=True)


def test_whitened_rewards_need_eight_rows_per_mini_batch():
    PPOConfig(whiten_rewards=True, per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True)
    PPOConfig(
        whiten_rewards=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_mini_batches=2,
        use_cpu=True,
    )


@pytest.mark.parametrize(
    ("loss_type", "weights"),
    [
        ("bnpo", [1 / 16] * 4),
        ("dapo", [1 / 16] * 4),
        ("grpo", [1 / 12, 1 / 24, 1 / 8, 1 / 20]),
        ("dr_grpo", [1 / 24] * 4),  # four rows of at most six tokens
        ("luspo", [1 / 4] * 4),
    ],
)
def test_the_policy_term_may_be_averaged_otherwise(loss_type, weights, tmp_path):
    options = {"loss_type": loss_type, "vf_coef": 0.0, "max_steps": 2, "learning_rate": 3e-4}
    trainer, watch = trained(tmp_path, [rows_of(3, 6, 2, 5)], **options)
    (rows,) = watch.steps[1]
    ratio = (watch.logps[1] - rows.old_logps).exp()
    terms = torch.maximum(-rows.advantages * ratio, -rows.advantages * ratio.clamp(0.8, 1.2))
    assert 0 < lines(trainer)[1]["policy/clipfrac_avg"] < 1
    assert lines(trainer)[1]["loss"] == close((terms * rows.expand(torch.tensor(weights))).sum().item(), 1e-5)


def test_losses_are_means_over_micro_batches(tmp_path):
    """So with completions of one length it does not matter how a step is cut."""
    ends = []
    for rows, accumulation in ((8, 1), (2, 4)):
        arguments = {"value_model": tiny_classifier(), "train_dataset": prompts(8)}
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        trainer, _ = trained(tmp_path, [rows_of(*[6] * 8)], arguments, learning_rate=0.1, **options)
        ends.append((states(trainer), [line["loss"] for line in lines(trainer)]))
    assert ends[0][1] == close(ends[1][1], 1e-5)
    assert all(torch.allclose(value, ends[1][0][name], atol=1e-5) for name, value in ends[0][0].items())


# -- where completions end ---------------------------------------------------------------------------------------------
def hot(**options):
    """Options under which every token is about equally likely."""
    return {
        "temperature": 1e3,
        "response_length": 40,
        "num_ppo_epochs": 1,
        "max_steps": 1,
        "learning_rate": 0.0,
        **options,
    }


def completions_of(trainer):
    trainer.train()
    rows = trainer.window.samples
    parts = rows.completion_ids.split(rows.completion_lengths.tolist())
    return [part.tolist() for part in parts]


def test_without_a_stop_token_completions_go_on_behind_the_end_of_sequence(tmp_path, caplog):
    arguments = {"model": policy(ENDS), "train_dataset": prompts(16)}
    trainer = make_trainer(tmp_path, None, arguments, **hot(stop_token=None, per_device_train_batch_size=16))
    found = completions_of(trainer)
    assert [len(row) for row in found] == [40] * 16
    assert any(EOS in row[:-1] for row in found) and all(set(ENDS) & set(row[:-1]) for row in found)
    assert "every completion has response_length=40 tokens" in caplog.text
    assert trainer.model.generation_config.eos_token_id == ENDS


def test_stop_token_eos_ends_completions(tmp_path, caplog):
    arguments = {"model": policy(ENDS), "train_dataset": prompts(16)}
    trainer = make_trainer(tmp_path, None, arguments, **hot(per_device_train_batch_size=16))
    found = completions_of(trainer)
    assert len({len(row) for row in found}) > 3
    assert all(row[-1] in ENDS and not set(ENDS) & set(row[:-1]) for row in found)
    assert "every completion has" not in caplog.text


def test_stop_token_id_ends_completions_and_nothing_else_does(tmp_path):
    arguments = {"model": policy(ENDS), "train_dataset": prompts(16)}
    options = hot(stop_token=None, stop_token_id=55, per_device_train_batch_size=16, response_length=100)
    found = completions_of(make_trainer(tmp_path, None, arguments, **options))
    ended = [row for row in found if len(row) < 100]
    assert ended and all(row[-1] == 55 and 55 not in row[:-1] for row in ended)
    assert any(set(ENDS) & set(row[:-1]) for row in found)


OTHER_END = 45
ENDINGS = [[20, 21, EOS], [30, 31, 32, 33, 34, 35], [40, EOS, 42, 43, 44, 46], [50, OTHER_END]]


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        # As in TRL: what is missing is the end-of-sequence token of the tokenizer.
        ({"stop_token": None}, [1, 3]),
        ({"stop_token": None, "stop_token_id": OTHER_END}, [1, 3]),
        # Here a row that ended with another terminator of the model has ended.
        ({"stop_token": "eos"}, [1]),
    ],
    ids=["none", "stop_token_id", "eos"],
)
def test_penalty_is_taken_from_completions_without_end_of_sequence(options, missing, tmp_path):
    arguments = {"reward_funcs": scores(1.0, 2.0, 3.0, 4.0), "model": policy([EOS, OTHER_END])}
    options = {"missing_eos_penalty": 8.0, "kl_coef": 0.0, "lam": 1.0, "max_steps": 1, **options}
    trainer = make_trainer(tmp_path, [ENDINGS], arguments, **options)
    trainer.train()
    # With lambda 1 the first return of a row is its score.
    found = [values[0] for values in by_row(trainer.window.samples, "returns")]
    expected = [score - 8.0 * (row in missing) for row, score in enumerate([1.0, 2.0, 3.0, 4.0])]
    assert found == close(expected, 1e-5)
    assert lines(trainer)[0]["objective/scores"] == close(sum(expected) / 4)
    assert lines(trainer)[0]["reward"] == close(2.5)
    assert lines(trainer)[0]["val/num_eos_tokens"] == 2


# -- rewards -----------------------------------------------------------------------------------------------------------
def test_rows_that_nothing_scored_are_left_out(tmp_path):
    arguments = {"reward_funcs": scores(1.0, None, 0.5, -1.0)}
    trainer, watch = trained(tmp_path, [rows_of(3, 6, 2, 5)], arguments, max_steps=2)
    assert watch.places == [[0, 2, 3]] * 2
    advantages = trainer.window.samples.advantages
    assert advantages.numel() == 10 and advantages.mean().item() == close(0.0) and advantages.var().item() == close(1.0)
    assert lines(trainer)[0]["objective/scores"] == lines(trainer)[0]["reward"] == close(0.5 / 3)


@pytest.mark.parametrize("critic", [None, tiny_classifier], ids=["head", "network"])
def test_a_batch_that_nothing_scored_changes_nothing(critic, tmp_path):
    arguments = {"reward_funcs": scores(None), "value_model": critic and critic()}
    trainer = make_trainer(tmp_path, None, arguments, max_steps=4, num_mini_batches=2, weight_decay=0.0)
    before = states(trainer)
    trainer.train()
    assert changed(states(trainer), before) == []
    assert [line["loss"] for line in lines(trainer)] == [0.0] * 4


def test_a_mini_batch_without_rows_is_passed_over(tmp_path):
    arguments = {"reward_funcs": scores(None, None, 0.5, -1.0), "value_model": tiny_classifier()}
    trainer, watch = trained(tmp_path, None, arguments, num_mini_batches=2, max_steps=4)
    assert [len(places) for places in watch.places] == [1, 2] * 2  # 1: a row without loss tokens in their place
    assert [rows.lengths.sum().item() for step in watch.steps for rows in step][::2] == [0, 0]
    assert [line["loss"] == 0 for line in lines(trainer)] == [True, False] * 2


def test_unscored_rows_count_nowhere_in_evaluation(tmp_path):
    arguments = {"reward_funcs": scores(3.0, None)}
    trainer = make_trainer(tmp_path, None, arguments, per_device_eval_batch_size=4, gamma=1.0, lam=1.0, kl_coef=0.0)
    metrics = trainer.evaluate(prompts(4))
    assert metrics["eval_objective/scores"] == metrics["eval_reward"] == 3.0
    assert metrics["eval_loss/policy_avg"] == close(0.0)
    # Half of the tokens miss their return by 3, the others have none.
    assert 0 < metrics["eval_loss/value_avg"] < 4.5


def test_conversations(tmp_path):
    seen = []

    def roles(prompts, completions, **_):
        seen.extend(zip(prompts, completions, strict=True))
        return [1.0, 0.0, 2.0, 0.5]

    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "x" * n}]} for n in range(1, 5)])
    arguments = {"reward_funcs": roles, "reward_model": tiny_classifier(), "train_dataset": dataset}
    trainer = make_trainer(tmp_path, [rows_of(3, 6, 2, 5)], arguments, max_steps=1)
    trainer.train()
    assert seen[1][0] == [{"role": "user", "content": "xx"}] and seen[1][1][0]["role"] == "assistant"
    rows = trainer.window.samples
    prompt = TOKENIZER.apply_chat_template(dataset[0]["prompt"], add_generation_prompt=True)["input_ids"]
    assert rows.prompt_ids[: rows.prompt_lengths[0]].tolist() == prompt


def score_of(model, ids):
    with torch.no_grad():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0].item()


COMPLETIONS = rows_of(3, 6, 2, 5)
PROMPT_IDS = [TOKENIZER(f"say {'x' * n}")["input_ids"] for n in range(1, 5)]


@pytest.mark.parametrize("form", ["path", "module"])
def test_reward_model_scores_the_sampled_tokens(form, tmp_path):
    model = tiny_classifier(seed=5, attention_dropout=0.5)
    model.save_pretrained(tmp_path / "reward")
    given = model if form == "module" else str(tmp_path / "reward")
    arguments = {"reward_funcs": None, "reward_model": given}
    trainer = make_trainer(tmp_path, [COMPLETIONS], arguments, max_steps=1, local_rollout_forward_batch_size=3)
    trainer.train()
    expected = [score_of(model.eval(), [*p, *c]) for p, c in zip(PROMPT_IDS, COMPLETIONS, strict=True)]
    assert trainer.window.samples.reward.tolist() == close(expected, 1e-4)
    assert lines(trainer)[0]["rewards/reward_model/mean"] == close(sum(expected) / 4, 1e-4)
    assert not any(p.requires_grad for p in trainer.reward_functions.functions[0].model.parameters())


def test_reward_model_may_be_a_function(tmp_path):
    arguments = {"reward_funcs": None, "reward_model": scores(1.0, 2.0, 3.0, 4.0)}
    trainer = make_trainer(tmp_path, [COMPLETIONS], arguments, max_steps=1)
    trainer.train()
    assert trainer.window.samples.reward.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_rewards_are_added_with_their_weights(tmp_path):
    model = tiny_classifier(seed=5)
    arguments = {"reward_model": model, "reward_funcs": [scores(1.0), scores(1.0, 2.0, 3.0, 4.0)]}
    trainer = make_trainer(tmp_path, [COMPLETIONS], arguments, max_steps=1, reward_weights=[2.0, 0.5, 1.0])
    trainer.train()
    pairs = zip(PROMPT_IDS, COMPLETIONS, range(1, 5), strict=True)
    expected = [2 * score_of(model, [*p, *c]) + 0.5 + n for p, c, n in pairs]
    assert trainer.window.samples.reward.tolist() == close(expected, 1e-4)


def test_classifiers_among_reward_funcs_score_the_text(tmp_path):
    model = tiny_classifier(seed=5)
    arguments = {"reward_funcs": [model], "reward_processing_classes": [TOKENIZER]}
    trainer = make_trainer(tmp_path, [COMPLETIONS], arguments, max_steps=1)
    trainer.train()
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in COMPLETIONS]
    expected = [score_of(model, [*p, *TOKENIZER(t)["input_ids"]]) for p, t in zip(PROMPT_IDS, texts, strict=True)]
    assert trainer.window.samples.reward.tolist() == close(expected, 1e-4)


def test_reward_model_with_too_few_tokens_is_an_error(tmp_path):
    arguments = {"reward_funcs": None, "reward_model": tiny_classifier(vocab_size=150)}
    trainer = make_trainer(tmp_path, [[[5, 160], [5], [6], [7]]], arguments)
    with pytest.raises(errors.RewardError, match=r"(?s)knows 150 tokens, but number 225.*reward_funcs"):
        trainer.train()


def test_reward_model_with_two_outputs_is_refused(tmp_path):
    with pytest.raises(errors.ConfigError, match="2 outputs"):
        make_trainer(tmp_path, arguments={"reward_model": tiny_classifier(num_labels=2)})


def test_no_reward_at_all_is_refused(tmp_path):
    with pytest.raises(errors.ConfigError, match="No reward"):
        make_trainer(tmp_path, arguments={"reward_funcs": None})


# -- the critic --------------------------------------------------------------------------------------------------------
def head_weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.extra_models["value_model"].parameters()])


def test_default_head_starts_at_zero_and_learns(tmp_path):
    trainer, watch = trained(tmp_path, max_steps=2)
    (first,) = watch.steps[0]
    assert first.notes["values"].abs().max() == 0
    assert head_weights(trainer).shape == (33,) and head_weights(trainer).abs().min() > 0


def test_gradient_of_the_head_reaches_the_trunk(tmp_path):
    ends = {}
    for steps in (1, 2):
        for vf_coef in (0.0, 0.5):
            options = {
                "optim": "sgd",
                "learning_rate": 0.1,
                "vf_coef": vf_coef,
                "max_steps": steps,
                "max_grad_norm": 0.0,
            }
            trainer, _ = trained(tmp_path, [rows_of(3, 6, 2, 5)], **options)
            ends[steps, vf_coef] = states(trainer)
    # A head of zeros passes nothing on in the first step.
    assert changed(ends[1, 0.0], ends[1, 0.5], "policy") == []
    differing = changed(ends[2, 0.0], ends[2, 0.5], "policy")
    assert "policy.model.layers.0.self_attn.q_proj.weight" in differing
    assert changed(ends[1, 0.0], ends[1, 0.5]) == ["value_model.weight", "value_model.bias"]


def test_a_network_of_its_own_leaves_the_policy_alone(tmp_path):
    found = []
    for vf_coef in (0.0, 0.5):
        trainer, _ = trained(tmp_path, [COMPLETIONS], {"value_model": tiny_classifier()}, vf_coef=vf_coef, max_steps=2)
        found.append(states(trainer))
    assert changed(*found, "policy") == []
    moved = changed(*found, "value_model")
    assert {"value_model.score.weight", "value_model.model.layers.0.self_attn.q_proj.weight"} <= set(moved)


def test_critic_from_a_path_equals_the_module(tmp_path):
    tiny_classifier(seed=4).save_pretrained(tmp_path / "critic")
    ends = []
    for given in (str(tmp_path / "critic"), tiny_classifier(seed=4)):
        trainer, _ = trained(tmp_path / "out", arguments={"value_model": given}, max_steps=4)
        ends.append(states(trainer))
    # How loaded weights are aligned in memory may round products otherwise.
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def test_critic_learns_the_returns(tmp_path):
    arguments = {"value_model": tiny_classifier(), "reward_funcs": scores(3.0, -1.0, 1.0, 2.0)}
    options = {
        "max_steps": 60,
        "vf_coef": 1.0,
        "kl_coef": 0.0,
        "lam": 1.0,
        "cliprange_value": 10.0,
        "num_ppo_epochs": 4,
    }
    trainer, _ = trained(tmp_path, [COMPLETIONS], arguments, **options)
    losses = [line["loss/value_avg"] for line in lines(trainer)]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("whose", ["model", "reward_model", "ref_model", "reward_funcs"])
def test_critic_that_is_another_model_of_the_run_is_refused(whose, tmp_path):
    shared = tiny_classifier()
    given = (
        {"reward_funcs": [shared], "reward_processing_classes": [TOKENIZER]}
        if whose == "reward_funcs"
        else {whose: shared}
    )
    with pytest.raises(errors.ConfigError, match="value_model is also"):
        make_trainer(tmp_path, arguments={**given, "value_model": shared})


def test_critic_and_reward_model_may_start_from_one_folder(tmp_path):
    folder = str(tmp_path / "model")
    tiny_classifier(seed=4).save_pretrained(folder)
    arguments = {"reward_funcs": None, "reward_model": folder, "value_model": folder}
    trainer = make_trainer(tmp_path, None, arguments, max_steps=1)
    before = copy.deepcopy(trainer.reward_functions.functions[0].model.state_dict())
    trainer.train()
    scorer = trainer.reward_functions.functions[0].model.state_dict()
    assert changed(scorer, before) == []
    assert changed(scorer, dict(trainer.extra_models["value_model"].state_dict())) != []


@pytest.mark.parametrize(
    "given", [tiny_model, lambda: tiny_classifier(num_labels=3)], ids=["language model", "3 labels"]
)
def test_critic_without_one_output_is_refused(given, tmp_path):
    with pytest.raises(errors.ConfigError, match="one"):
        make_trainer(tmp_path, arguments={"value_model": given()}).train()


def test_critic_has_optimizer_state_and_gradients_of_one_step(tmp_path):
    seen = []

    class Gradients(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            seen.append([p.grad is None or not p.grad.any() for p in trainer.extra_models["value_model"].parameters()])

    trainer = make_trainer(tmp_path, None, {"callbacks": [Gradients()], "value_model": tiny_classifier()}, max_steps=3)
    trainer.train()
    assert len(seen) == 3 and all(map(all, seen))
    critic = list(trainer.extra_models["value_model"].parameters())
    assert all(trainer.optimizer.state[p]["exp_avg"].any() for p in critic)


@pytest.mark.parametrize("limit", [0.0, 1e-3])
def test_gradients_are_clipped_only_if_asked_over_both_models_together(limit, tmp_path):
    norms = []

    class Norm(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            parameters = [p for m in (trainer.model, *trainer.extra_models.values()) for p in m.parameters()]
            norms.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())

    arguments = {"callbacks": [Norm()], "value_model": tiny_classifier()}
    trainer = make_trainer(tmp_path, [COMPLETIONS], arguments, max_grad_norm=limit, max_steps=2)
    trainer.train()
    logged = [line["grad_norm"] for line in lines(trainer)]
    assert min(logged) > 0.01
    assert norms == pytest.approx([limit] * 2, rel=1e-2) if limit else norms == pytest.approx(logged, rel=1e-4)


# -- the reference, adapters -------------------------------------------------------------------------------------------
def test_without_kl_no_reference_is_loaded(tmp_path):
    trainer, _ = trained(tmp_path, kl_coef=0.0)
    assert trainer.reference is None
    assert "objective/kl" not in lines(trainer)[0] and lines(trainer)[0]["objective/non_score_reward"] == 0


def test_reference_without_kl_is_refused(tmp_path):
    with pytest.raises(errors.ConfigError, match="ref_model"):
        make_trainer(tmp_path, arguments={"ref_model": tiny_model(seed=1)}, kl_coef=0.0)


def test_reference_that_is_given_is_used(tmp_path):
    trainer, _ = trained(tmp_path, [COMPLETIONS], {"ref_model": tiny_model(seed=1)}, learning_rate=0.0)
    rows = trainer.window.samples
    for prompt, completion, found in zip(PROMPT_IDS, COMPLETIONS, split(rows, rows.ref_logps), strict=True):
        assert torch.allclose(found, plain_logps(tiny_model(seed=1), prompt, completion, 0.7), atol=1e-5)


@pytest.mark.parametrize("critic", [None, tiny_classifier], ids=["head", "network"])
def test_adapter_and_critic_are_trained_and_the_reference_is_the_model_without_adapter(critic, tmp_path):
    arguments = {"peft_config": lora(), "value_model": critic and critic(), "train_dataset": prompts(4)}
    trainer = make_trainer(tmp_path, [COMPLETIONS], arguments, max_steps=4)
    before = states(trainer)
    trainer.train()
    moved = changed(states(trainer), before)
    assert {name for name in moved if name.startswith("policy")} == {
        name for name in before if "lora_" in name and name.startswith("policy")
    }
    assert [name for name in moved if name.startswith("value_model")]
    assert trainer.reference.module is None
    rows = trainer.window.samples  # of the second batch: the adapter has moved
    assert (rows.old_logps - rows.ref_logps).abs().max() > 1e-3
    for prompt, completion, found in zip(PROMPT_IDS, COMPLETIONS, split(rows, rows.ref_logps), strict=True):
        assert torch.allclose(found, plain_logps(policy(), prompt, completion, 0.7), atol=1e-5)


def test_activations_may_be_recomputed(tmp_path):
    ends = []
    for recompute in (False, True):
        arguments = {"value_model": tiny_classifier(), "model": policy(ENDS)}
        trainer, _ = trained(tmp_path, None, arguments, activation_checkpointing=recompute)
        assert trainer.extra_models["value_model"].is_activation_checkpointing is recompute
        ends.append(states(trainer))
    assert all(torch.allclose(value, ends[1][name], atol=1e-5) for name, value in ends[0].items())


# -- evaluation --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({"num_sample_generations": 2}, [4, 8]),
        ({"num_sample_generations": 100}, [2, 4, 6, 8]),  # once a batch at most
        ({"num_sample_generations": 0}, []),
        ({"eval_strategy": "steps", "eval_steps": 4}, [4, 8]),
    ],
)
def test_a_run_evaluates(options, at, tmp_path):
    trainer, _ = trained(tmp_path, None, {"eval_dataset": prompts(3)}, max_steps=8, **options)
    found = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert [line["step"] for line in found] == at
    for line in found:
        assert {"eval_objective/kl", "eval_objective/scores", "eval_loss/value_avg", "eval_reward"} <= line.keys()


def test_evaluation_changes_nothing(tmp_path):
    ends = []
    for evaluation in (None, prompts(3)):
        arguments = {"eval_dataset": evaluation, "value_model": tiny_classifier()}
        trainer, _ = trained(tmp_path, None, arguments, max_steps=6, num_mini_batches=2, eval_strategy="no")
        ends.append(states(trainer))
    assert changed(*ends) == []


# -- moving from TRL ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("adapter", [False, True])
def test_a_script_of_trl_runs(adapter, tmp_path):
    """Arguments by keyword, prompts as token ids only, a pad token that the tokenizer alone knows."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    ids = [tokenizer(f"say {'x' * n}")["input_ids"] for n in range(1, 9)]
    dataset = Dataset.from_list([{"input_ids": row, "lengths": len(row)} for row in ids])
    args = PPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        total_episodes=8,
        num_ppo_epochs=2,
        response_length=5,
        missing_eos_penalty=1.0,
        stop_token="eos",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy(ENDS),
        ref_model=None if adapter else tiny_model(),
        reward_model=tiny_classifier(seed=1),
        value_model=tiny_classifier(seed=1),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(2)),
        peft_config=lora() if adapter else None,
    )
    trainer.train()
    assert trainer.generations == 2
    rows = trainer.window.samples
    assert {tuple(part.tolist()) for part in rows.prompt_ids.split(rows.prompt_lengths.tolist())} <= set(
        map(tuple, ids)
    )
    evaluations = sum("eval_loss" in line for line in trainer.state.log_history)
    trainer.save_model(args.output_dir)
    trainer.generate_completions()
    assert sum("eval_loss" in line for line in trainer.state.log_history) == evaluations + 1
    assert (tmp_path / ("adapter_model.safetensors" if adapter else "model.safetensors")).exists()


def test_generate_completions_without_a_dataset_does_nothing(tmp_path):
    make_trainer(tmp_path).generate_completions()


def test_args_of_another_trainer_are_refused(tmp_path):
    with pytest.raises(errors.ConfigError, match="takes no argument 'data_collator'"):
        make_trainer(tmp_path, arguments={"data_collator": None})


# -- checkpoints -------------------------------------------------------------------------------------------------------
def test_critic_is_in_every_checkpoint(tmp_path):
    trainer, _ = trained(
        tmp_path, None, {"value_model": tiny_classifier()}, max_steps=3, save_strategy="steps", save_steps=1
    )
    files = [load_file(tmp_path / f"checkpoint-{step}" / "value_model.safetensors") for step in (1, 2, 3)]
    assert all(torch.equal(files[2][k], v) for k, v in trainer.extra_models["value_model"].state_dict().items())
    assert not torch.equal(files[0]["score.weight"], files[1]["score.weight"])
    manifest = json.loads((tmp_path / "checkpoint-1" / "trl_core_state.json").read_text())
    assert "value_model.safetensors" in json.dumps(manifest)


@pytest.mark.parametrize("critic", [None, tiny_classifier], ids=["head", "network"])
def test_critic_of_a_checkpoint_can_be_loaded_into_a_new_run(critic, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    old, _ = trained(tmp_path / "old", None, {"value_model": critic and critic()}, **options)
    new = make_trainer(tmp_path / "new", None, {"value_model": critic and critic(seed=9)})
    new.extra_models["value_model"].load_state_dict(
        load_file(tmp_path / "old" / "checkpoint-2" / "value_model.safetensors")
    )
    assert torch.equal(head_weights(new), head_weights(old))


SCENARIOS = {
    "head": {},
    "network": {"value_model": lambda: tiny_classifier(seed=2)},
    "adapter": {"peft_config": lora, "num_mini_batches": 2},
    # A batch lasts for six steps, so that most checkpoints lie inside of one.
    "mini_batches": {
        "value_model": lambda: tiny_classifier(seed=2),
        "num_mini_batches": 3,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "max_steps": 7,
    },
    "clipped_and_scheduled": {"max_grad_norm": 0.1, "lr_scheduler_type": "linear", "weight_decay": 0.1},
}


def scenario(folder, name, reward_funcs=reward, **more):
    options = {"max_steps": 4, "shuffle_dataset": True, **SCENARIOS[name], **more}
    arguments = {key: options.pop(key)() for key in ("value_model", "peft_config") if key in options}
    watch = Watch()
    arguments |= {
        "callbacks": [watch],
        "model": policy(ENDS),
        "train_dataset": prompts(25),
        "reward_funcs": reward_funcs,
    }
    return make_trainer(folder, None, arguments, **options), watch


def end(trainer):
    """All that a run leaves, without clocks."""
    log = [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines(trainer)]
    optimizer = trainer.optimizer.state_dict()["state"]
    moments = {f"optimizer.{i}.{k}": v for i, state in optimizer.items() for k, v in state.items()}
    return {**states(trainer), **moments}, log


def same_ends(one, other):
    return changed(one[0], other[0]) == [] and one[1] == other[1]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_resumed_at_any_step_ends_as_the_whole_one(name, tmp_path):
    whole, watched = scenario(tmp_path / "whole", name, save_strategy="steps", save_steps=1)
    whole.train()
    assert any(key.startswith("optimizer.") for key in end(whole)[0])
    for step in range(1, whole.state.max_steps):
        resumed, watch = scenario(tmp_path / "resumed", name)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert same_ends(end(resumed), end(whole)), step
        assert watch.places == watched.places[step:]


def test_a_run_goes_on_after_a_mended_reward(tmp_path):
    calls, broken = [], [True]

    def fails(completion_ids, **_):
        calls.append(len(completion_ids))
        if broken[0] and len(calls) == 3:
            raise KeyError("no such answer")
        return reward(completion_ids)

    whole, _ = scenario(tmp_path / "whole", "network", fails, max_steps=8)
    broken[0] = False
    whole.train()
    calls.clear(), broken.__setitem__(0, True)
    failing, _ = scenario(tmp_path / "failing", "network", fails, max_steps=8)
    with pytest.raises(errors.RewardError, match="no such answer"):
        failing.train()
    assert (tmp_path / "failing" / "checkpoint-4" / "value_model.safetensors").exists()
    broken[0] = False
    resumed, _ = scenario(tmp_path / "failing", "network", fails, max_steps=8)
    resumed.train(resume_from_checkpoint=True)
    assert same_ends(end(resumed), end(whole))


def test_a_run_may_be_resumed_for_longer(tmp_path):
    options = {"max_steps": -1, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, total_episodes=4, **options).train()
    longer = make_trainer(tmp_path, total_episodes=12, **options)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 6


def test_episodes_per_second_are_those_of_this_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, max_steps=2, **options).train()
    resumed = make_trainer(tmp_path, max_steps=4, **options)
    resumed._began = (resumed._began[0] - 100.0, 0)  # slow to load
    resumed.train(resume_from_checkpoint=True)
    line = lines(resumed)[-1]
    assert line["episode"] == 8
    seconds = 4 / line["eps"]
    assert 0 < seconds < 20


# -- learning ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("critic", [None, tiny_classifier], ids=["head", "network"])
def test_a_reward_is_learned(critic, tmp_path):
    def low(completion_ids, **_):
        return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]

    arguments = {"model": policy(initializer_range=0.02), "reward_funcs": low, "value_model": critic and critic()}
    options = {"per_device_train_batch_size": 16, "max_steps": 40, "temperature": 1.0, "learning_rate": 2e-2}
    arguments["train_dataset"] = prompts(16)
    trainer, _ = trained(tmp_path, None, arguments, stop_token=None, kl_coef=0.01, **options)
    found = [line["reward"] for line in lines(trainer) if "reward" in line]
    assert 0.35 < sum(found[:3]) / 3 < 0.65
    assert sum(found[-3:]) / 3 > 0.85


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.parent.glob("examples/ppo_*.py")), ids=lambda path: path.stem
)
def test_example_runs(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(path), "--steps", "8"])
    runpy.run_path(str(path), run_name="__main__")
    assert "reward" in capsys.readouterr().out
