"""Replay through its trainer, on given completions whose rewards are written into their tokens."""

import copy
import logging
import math
import runpy
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from trl_core import errors, get_config, hookimpl
from trl_core.testing import tiny_model, tiny_tokenizer

from .helpers import EOS, Selected, batch, buffer, lines, make_trainer, same, seen, tags, weights

CLOCKS = ("time/", "step_time", "train_runtime", "train_samples", "train_steps", "replay/")
BEST, LESS, FLAT = [1, 0, 0, 1], [1, 0, 0, 0], [0.5] * 4


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def close(values, tolerance=1e-6):
    return pytest.approx(values, abs=tolerance)


def trained(folder, batches, algorithm="replay", arguments=None, **options):
    trainer = make_trainer(folder, batches, algorithm, arguments, **options)
    trainer.train()
    return trainer


def selected(folder, batches, *callbacks, **options):
    """A trained trainer, and what `select` returned for each generation batch."""
    noted = Selected()
    trainer = trained(folder, batches, arguments={"callbacks": [*callbacks, noted]}, **options)
    return trainer, noted.batches


def scores(trainer):
    return [score for score, _, _ in buffer(trainer).entries()]


def logged(trainer):
    """All that is logged, without clocks and the metrics of replay."""
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in trainer.state.log_history]


def row_advantages(rows):
    return rows.mean_per_row(rows.advantages)


def equal_rows(one, other):
    """Whether two sets of rows agree in all that they hold, but for place and number."""
    one, other = ({k: v for k, v in rows.tensors().items() if k not in ("position", "group")} for rows in (one, other))
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# -- scores ------------------------------------------------------------------------------------------------------------
def test_score_is_the_sum_of_advantages_times_the_groups_std(tmp_path):
    trainer = trained(tmp_path, [batch(LESS, BEST)])
    assert scores(trainer) == close([1.999654, 1.499700])
    assert buffer(trainer).sampling_probabilities().tolist() == close([0.571435, 0.428565])


@pytest.mark.parametrize(
    ("scale", "expected"),
    # Deviations of 0.5, and 0.75 and 0.25 thrice: they add up to 2 and 1.5. The std of the groups are sqrt(1 / 3) and
    # 0.5, that of all eight rewards sqrt(15 / 56).
    [
        ("none", [2 * math.sqrt(1 / 3), 1.5 * 0.5]),
        ("batch", [2 * math.sqrt(1 / 3) / (math.sqrt(15 / 56) + 1e-4), 1.5 * 0.5 / (math.sqrt(15 / 56) + 1e-4)]),
    ],
)
def test_score_takes_the_groups_std_however_rewards_are_scaled(scale, expected, tmp_path):
    assert scores(trained(tmp_path, [batch(BEST, LESS)], scale_rewards=scale)) == close(expected)


class PerToken(TrainerCallback):
    """Advantages that differ inside a row: times 1, -3, 1, -3, ..."""

    @hookimpl(wrapper=True)
    def advantages(self, rollouts):
        result = yield
        place = torch.arange(int(rollouts.completion_lengths.sum()))
        return (rollouts.expand(result) * torch.where(place % 2 == 0, 1.0, -3.0))[:, None]


def test_score_takes_the_mean_size_of_advantages_of_single_tokens(tmp_path):
    four_tokens = [[*row[:3], EOS] for row in batch(BEST)]
    trainer = trained(tmp_path, [four_tokens], arguments={"callbacks": [PerToken()]})
    assert scores(trainer) == close([2 * 1.999654])


def test_row_without_reward_counts_in_no_std(tmp_path):
    # Of 1 and 0: mean 0.5, std sqrt(0.5).
    trainer = trained(tmp_path, [batch([1, None, 0, None])])
    assert scores(trainer) == close([math.sqrt(0.5) / (math.sqrt(0.5) + 1e-4)])


def test_group_without_loss_tokens_is_not_stored(tmp_path):
    cut = [row[:3] for row in batch(BEST)] + batch(LESS)
    assert scores(trained(tmp_path, [cut])) == close([1.999654, 1.499700])
    assert scores(trained(tmp_path, [cut], mask_truncated_completions=True)) == close([1.499700])


# -- what is replaced --------------------------------------------------------------------------------------------------
SCRIPT = [
    # A quarter of the groups, another one each time, has equal rewards.
    batch([1, 0, 0.5, 0.2], [0.4, 0.1, 0.1, 0.2], FLAT, [0.3, 0.9, 0.1, 0], tag=0),
    batch(FLAT, [0.4, 0.1, 0.1, 0.2], [0.3, 0.9, 0.1, 0], [1, 0, 0.5, 0.2], tag=1),
    batch([1, 0, 0.5, 0.2], FLAT, [0.4, 0.1, 0.1, 0.2], [0.3, 0.9, 0.1, 0], tag=2),
]


@pytest.mark.parametrize("before_add", [False, True])
def test_groups_with_equal_rewards_are_replaced(before_add, tmp_path):
    trainer, batches = selected(tmp_path, SCRIPT, sample_before_add=before_add)
    places = [2, 0, 1]
    replaced = [line["replay/replaced_groups"] for line in lines(trainer)]
    assert replaced == ([0, 1, 1] if before_add else [1, 1, 1])
    assert [line["replay/size"] for line in lines(trainer)] == [3, 6, 9]
    for number, (rows, place) in enumerate(zip(batches, places, strict=True)):
        assert rows.position.tolist() == list(range(16))
        assert rows.group.tolist() == [i // 4 for i in range(16)]
        own = [tag % 20 == number for tag in tags(rows)]
        changed = [group for group in range(4) if rows.reward[4 * group : 4 * group + 4].unique().numel() == 1]
        # What stays in that place has equal rewards.
        assert changed == ([place] if replaced[number] == 0 else [])
        outside = [i for i in range(16) if i // 4 != place]
        assert all(own[i] for i in outside)
        if before_add and number:
            assert not any(own[4 * place : 4 * place + 4])


def test_replayed_group_brings_all_but_place_and_number(tmp_path):
    options = {"beta": 0.1, "replay_buffer_size": 1, "num_iterations": 2, "max_steps": 4}
    generations = [batch(LESS, BEST, tag=1), batch(FLAT, [0.1, 0, 0, 0], tag=5)]
    given = [
        {"completion_ids": rows, "logps": [[logp] * len(row) for row in rows]}
        for logp, rows in zip((-3.0, -4.0), generations, strict=True)
    ]
    _, (first, second) = selected(tmp_path, given, **options)
    replayed, original = second.take(range(4)), first.take(range(4, 8))
    assert equal_rows(replayed, original)
    assert {"ref_logps", "old_logps", "sampling_logps"} < replayed.tensors().keys()
    assert replayed.generation.tolist() == [0] * 4 and replayed.sampling_logps.unique().tolist() == [-3.0]
    assert replayed.position.tolist() == [0, 1, 2, 3] and replayed.group.tolist() == [0] * 4
    assert second.take(range(4, 8)).generation.tolist() == [1] * 4
    assert replayed.group.unique().numel() == 1 and second.group.unique().numel() == 2


def test_stored_group_is_that_of_the_batch(tmp_path):
    # In two passes, for otherwise the trainer forgets the log-probabilities of fresh rows.
    options = {"num_iterations": 2, "beta": 0.1, "sample_before_add": True}
    trainer, (rows,) = selected(tmp_path, [batch(LESS, FLAT, BEST)], **options)
    (_, _, best), (_, _, less) = buffer(trainer).entries()
    assert equal_rows(type(rows).from_tensors(best), rows.take(range(8, 12)))
    assert equal_rows(type(rows).from_tensors(less), rows.take(range(4)))


@pytest.mark.parametrize("rewards", [[None] * 4, [0.3, None, None, None], [0.3, None, 0.3, None]])
def test_group_with_less_than_two_different_rewards_is_replaced(rewards, tmp_path):
    _, (rows,) = selected(tmp_path, [batch(rewards, BEST)])
    assert tags(rows) == [20] * 8


def test_group_is_replaced_though_rounding_gives_equal_rewards_a_std(tmp_path):
    assert torch.full((8,), 1.2).std() > 0
    _, (rows,) = selected(tmp_path, [batch([1.2] * 8, [1, 0, 0, 0, 0, 0, 0, 0])], num_generations=8)
    assert tags(rows) == [20] * 16


def test_groups_that_nothing_fits_stay(tmp_path):
    _, (rows,) = selected(tmp_path, [batch(FLAT, FLAT, BEST)], sample_before_add=True)
    assert tags(rows) == [0] * 4 + [20] * 4 + [40] * 4


def test_one_stored_group_fills_all_places(tmp_path):
    trainer, (rows,) = selected(tmp_path, [batch(FLAT, BEST, FLAT, FLAT)])
    assert tags(rows) == [20] * 16
    assert rows.group.tolist() == [i // 4 for i in range(16)]
    assert lines(trainer)[0]["replay/replaced_groups"] == 3


def test_enough_stored_groups_fill_places_once_each(tmp_path):
    _, (rows,) = selected(tmp_path, [batch(FLAT, BEST, LESS, FLAT)])
    assert sorted(tags(rows)) == [20] * 8 + [40] * 8


class Drop(TrainerCallback):
    """Lets only the rows of each generation batch pass that are listed."""

    def __init__(self, *kept):
        self.kept = iter(kept)

    @hookimpl
    def keep(self, rollouts):
        keep = torch.zeros(rollouts.num_rows, dtype=torch.bool)
        keep[next(self.kept)] = True
        return keep


def test_group_is_replaced_by_one_of_as_many_rows(tmp_path):
    # Groups of 4 and 3 rows are stored; then groups of 2, 3 and 4 rows have equal rewards.
    kept = [[0, 1, 2, 3, 4, 5, 6, 8], [1, 3, 4, 6, 7, 8, 9, 10, 11]]
    batches = [batch(BEST, BEST, FLAT, tag=0), batch(FLAT, FLAT, FLAT, tag=1)]
    _, (first, rows) = selected(tmp_path, batches, Drop(*kept))
    assert tags(first) == [0] * 4 + [20] * 3 + [40]
    assert tags(rows) == [1] * 2 + [20] * 3 + [0] * 4
    assert rows.position.tolist() == kept[1]
    assert rows.group.tolist() == [0] * 2 + [1] * 3 + [2] * 4


def test_batch_of_which_nothing_is_kept_is_left_alone(tmp_path):
    trainer, (first, second) = selected(tmp_path, [batch(BEST, FLAT)] * 2, Drop(range(8), []))
    assert (first.num_rows, second.num_rows, len(buffer(trainer))) == (8, 0, 1)
    assert "replay/size" in lines(trainer)[0] and "replay/size" not in lines(trainer)[1]


def test_rows_are_used_in_the_steps_of_those_they_replace(tmp_path):
    # Three micro-batches of four rows to a generation batch of two groups of six, so that groups lie across them.
    flat, best, less = [0.5] * 6, [1, 0, 0, 1, 0, 1], [0.1, 0, 0, 0, 0, 0]
    generations = [batch(best, flat, tag=0), batch(less, flat, tag=1)]
    options = {"per_device_train_batch_size": 4, "num_generations": 6, "steps_per_generation": 3, "max_steps": 6}
    trainer = trained(tmp_path, generations, replay_buffer_size=1, **options)
    assert [rows.position.tolist() for rows, _ in seen(trainer)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] * 2
    assert [tags(rows) for rows, _ in seen(trainer)[3:]] == [[1] * 4, [1, 1, 0, 0], [0] * 4]


def test_metrics_of_rewards_and_lengths_are_of_what_was_generated(tmp_path):
    generations = [batch(BEST, FLAT, tag=0), batch(FLAT, [0.5, 0.5, 0.5, 0.9], tag=1)]
    ours = trained(tmp_path / "replay", generations, learning_rate=0.0)
    base = trained(tmp_path / "grpo", generations, "grpo", learning_rate=0.0)
    of_rollouts = ("reward", "rewards/", "frac_", "completions/", "num_tokens")
    for one, other in zip(lines(ours), lines(base), strict=True):
        names = [name for name in other if name.startswith(of_rollouts)]
        assert len(names) > 10 and all(one[name] == other[name] for name in names)


def test_age_counts_generation_batches(tmp_path):
    # Only the first generation has a signal.
    generations = [batch(BEST, BEST, tag=0), *(batch(FLAT, FLAT, tag=i) for i in (1, 2, 3))]
    trainer = trained(tmp_path, generations)
    assert [line.get("replay/mean_age") for line in lines(trainer)] == [None, 1, 2, 3]
    generations = [batch(BEST, FLAT, tag=0), batch(FLAT, BEST, tag=1)]
    trainer = trained(tmp_path, generations, num_iterations=2, max_steps=4, replay_buffer_size=1)
    # A group of the batch itself is 0 old; what is logged is logged when a batch is generated.
    assert [line.get("replay/mean_age") for line in lines(trainer)] == [0, None, 1, None]


# -- off-policy correctness --------------------------------------------------------------------------------------------
def test_replayed_rows_are_compared_with_the_policy_that_generated_them(tmp_path):
    generations = [batch([0.1, 0, 0, 0], BEST, tag=0), batch(FLAT, [0, 0.1, 0, 0], tag=1)]
    trainer = trained(tmp_path, generations, replay_buffer_size=1, loss_type="dapo")
    (first, first_ratios), (second, ratios) = seen(trainer)
    assert first_ratios.unique().tolist() == [1.0]
    replayed = (second.generation == 0)[second.row_of_token]
    assert ratios[~replayed].unique().tolist() == [1.0]
    assert (ratios[replayed] - 1).abs().min() > 1e-3
    # The log-probabilities of the time of the first step, before which nothing was trained.
    then = first.take(range(4, 8)).old_logps
    torch.testing.assert_close(second.take(range(4)).old_logps, then, rtol=0, atol=1e-5)
    by_hand = torch.minimum(ratios * second.advantages, ratios.clamp(0.8, 1.2) * second.advantages)
    assert lines(trainer)[1]["loss"] == close(-by_hand.mean().item())
    assert abs(lines(trainer)[1]["loss"] + second.advantages.mean().item()) > 1e-3


def test_group_replayed_at_once_is_on_policy(tmp_path):
    trainer = trained(tmp_path, [batch(FLAT, BEST)])
    ((rows, ratios),) = seen(trainer)
    assert tags(rows) == [20] * 8
    assert ratios.unique().tolist() == [1.0]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_replaced_group_repeats_its_loss_while_the_weights_are_the_same(loss_type, tmp_path):
    options = {"loss_type": loss_type, "learning_rate": 0.0, "beta": 0.1}
    trainer = trained(tmp_path, [batch(LESS), batch(FLAT, tag=1)], **options)
    first, second = lines(trainer)
    assert second["replay/replaced_groups"] == 1
    assert second["loss"] == close(first["loss"]) and second["grad_norm"] == close(first["grad_norm"])
    assert first["grad_norm"] > 0.01 and (loss_type == "grpo" or abs(first["loss"]) > 0.01)


def test_denominator_counts_the_tokens_of_the_rows_that_came_out(tmp_path):
    # Rows of 4, 5, 6, 7 tokens in each group, and a group of 8 tokens a row with equal rewards.
    long = [[*row[:2], *range(200, 205), EOS] for row in batch(FLAT)]
    trainer = trained(tmp_path, [long + batch(LESS)], learning_rate=0.0)
    # Both groups are LESS now: advantages 1.4997 on 4 tokens and -0.4999 on 18, of 22.
    assert lines(trainer)[0]["loss"] == close(-(4 * 1.499700 - 18 * 0.499900) / 22)
    assert trainer.window.counters.tokens == 44


# -- when it is GRPO ---------------------------------------------------------------------------------------------------
INFORMATIVE = [batch(BEST, LESS, tag=0), batch([0.1, 0.2, 0.3, None], BEST, tag=1), batch(LESS, [0, 0, 0, 1], tag=2)]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1, "num_iterations": 2, "max_steps": 6},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 6},
    ],
    ids=["on-policy", "two passes", "two steps"],
)
def test_without_equal_rewards_it_equals_grpo_bit_for_bit(options, loss_type, tmp_path):
    options = {"loss_type": loss_type, **options}
    ours = trained(tmp_path / "replay", INFORMATIVE, **options)
    base = trained(tmp_path / "grpo", INFORMATIVE, "grpo", **options)
    assert len(buffer(ours)) == 6
    assert same(weights(ours), weights(base)) and not same(weights(ours), tiny_model().state_dict())
    assert logged(ours) == logged(base)
    assert ours.window.counters == base.window.counters


def test_buffer_of_no_group_is_grpo(tmp_path):
    ours = trained(tmp_path / "replay", SCRIPT, replay_buffer_size=0)
    base = trained(tmp_path / "grpo", SCRIPT, "grpo")
    assert same(weights(ours), weights(base)) and logged(ours) == logged(base)
    assert not any(name.startswith("replay/") for line in ours.state.log_history for name in line)


@pytest.mark.parametrize(("size", "passes"), [(0, 1), (1, 2)])
def test_buffer_of_no_group_costs_no_pass_through_the_policy(size, passes, tmp_path):
    calls = []

    class SecondStep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):  # in the first, layouts are tried as well
            model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))

    generations = INFORMATIVE[:2]  # a group without a signal would go by itself
    make_trainer(tmp_path, generations, arguments={"callbacks": [SecondStep()]}, replay_buffer_size=size).train()
    assert len(calls) == passes


def test_nothing_to_replay_gives_no_gradient(tmp_path):
    trainer = trained(tmp_path, [batch(FLAT, FLAT)] * 2)
    assert [(line["loss"], line["grad_norm"]) for line in lines(trainer)] == [(0.0, 0.0)] * 2
    assert [line["replay/size"] for line in lines(trainer)] == [0, 0]
    assert same(weights(trainer), tiny_model().state_dict())


# -- evaluation, randomness --------------------------------------------------------------------------------------------
def test_evaluation_neither_stores_nor_replaces(tmp_path):
    trainer = make_trainer(tmp_path, [batch(BEST, FLAT), batch(LESS, FLAT, tag=1)], max_steps=1)
    trainer.train()
    before = copy.deepcopy(buffer(trainer).state_dict())
    metrics = trainer.evaluate(trainer.train_dataset.select(range(2)))
    assert metrics["eval_frac_reward_zero_std"] == 0.5
    assert not any("replay" in name for name in metrics)
    assert str(before) == str(buffer(trainer).state_dict())


def flat_after_many(folder, **options):
    generations = [batch(BEST, LESS, [0, 0, 1, 1], [0, 0, 0, 1], tag=0), batch(FLAT, FLAT, FLAT, [0.1, 0, 0, 0], tag=1)]
    _, (_, rows) = selected(folder, generations, **options)
    return tuple(tags(rows)[:12:4])


def test_draws_depend_on_the_seed_of_the_data(tmp_path):
    by_seed = [flat_after_many(tmp_path, seed=seed) for seed in range(5)]
    assert len(set(by_seed)) > 2
    assert flat_after_many(tmp_path, seed=3) == by_seed[3]
    assert flat_after_many(tmp_path, seed=100, data_seed=3) == by_seed[3]


def test_each_generation_batch_draws_anew(tmp_path):
    stored = batch(BEST, LESS, [0, 0, 1, 1], [0, 0, 0, 1], tag=0)
    _, (_, *others) = selected(tmp_path, [stored] + [batch(FLAT, FLAT, FLAT, FLAT, tag=1)] * 6)
    orders = [tuple(tags(rows)[::4]) for rows in others]
    assert all(sorted(order) == [0, 20, 40, 60] for order in orders)
    assert len(set(orders)) > 3


def test_draws_leave_the_random_state_alone(tmp_path):
    class Watch(TrainerCallback):
        @hookimpl(wrapper=True)
        def select(self, samples):
            before = torch.get_rng_state()
            result = yield
            assert torch.equal(before, torch.get_rng_state())
            assert result is not samples  # something was drawn
            return result

    trained(tmp_path, [batch(BEST, FLAT)], arguments={"callbacks": [Watch()]})


# -- notes and other fields --------------------------------------------------------------------------------------------
class Note(TrainerCallback):
    """Notes twice the log-probability of each token, from the generation batch `start` on."""

    def __init__(self, start=0):
        self.start = start

    @hookimpl
    def annotate(self, samples):
        return {"twice": 2 * samples.old_logps} if int(samples.generation[0]) >= self.start else {}


def test_notes_travel_with_their_rows(tmp_path):
    generations = [batch(LESS, BEST, tag=0), batch(FLAT, [0.1, 0, 0, 0], tag=1)]
    trainer, (first, second) = selected(tmp_path, generations, Note(), replay_buffer_size=1)
    assert torch.equal(second.take(range(4)).notes["twice"], first.take(range(4, 8)).notes["twice"])
    rows, _ = seen(trainer)[1]
    torch.testing.assert_close(rows.notes["twice"], 2 * rows.old_logps, rtol=0, atol=1e-5)


def test_stored_groups_with_other_fields_are_forgotten(tmp_path, caplog):
    generations = [batch(BEST, LESS, tag=0), batch(FLAT, LESS, tag=1), batch(FLAT, FLAT, tag=2)]
    with caplog.at_level(logging.WARNING, "trl_replay"):
        trainer, batches = selected(tmp_path, generations, Note(start=1), sample_before_add=True)
    assert [tags(rows) for rows in batches] == [[0] * 4 + [20] * 4, [1] * 4 + [21] * 4, [21] * 8]
    assert [line["replay/size"] for line in lines(trainer)] == [2, 1, 1]
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("trl_replay")]
    assert "Forgot 2 stored groups" in message and "notes.twice" in message


# -- state -------------------------------------------------------------------------------------------------------------
LONG = [*SCRIPT, batch(FLAT, [0.4, 0.3, 0.1, 0.2], FLAT, FLAT, tag=3), batch(FLAT, FLAT, BEST, FLAT, tag=4)]


def end(trainer):
    """Weights, buffer and log of a run."""
    held = [(score, number, item) for score, number, item in buffer(trainer).heap]
    return weights(trainer), held, logged(trainer)


def same_end(one, other):
    (first, held, log), (second, other_held, other_log) = one, other
    assert same(first, second)
    assert [entry[:2] for entry in held] == [entry[:2] for entry in other_held]
    assert all(same(entry[2], other_entry[2]) for entry, other_entry in zip(held, other_held, strict=True))
    assert [{**line, "train_loss": 0} for line in log] == [{**line, "train_loss": 0} for line in other_log]


# A generation batch lasts for two steps, so that checkpoints of odd steps are in the middle of a window.
RUN = {"num_iterations": 2, "max_steps": 10, "beta": 0.1, "replay_buffer_size": 4, "optim": "adamw_torch"}
RUN |= {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = trained(folder, LONG, **RUN)
    assert sum(line.get("replay/replaced_groups", 0) for line in lines(trainer)) == 9
    return folder, end(trainer)


@pytest.mark.parametrize("step", range(1, 10))
def test_resumed_run_ends_as_one_that_was_not_stopped(step, whole, tmp_path):
    folder, expected = whole
    resumed = make_trainer(tmp_path, LONG, **RUN | {"save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    same_end(end(resumed), expected)


def test_buffer_is_stored_as_tensors_and_json(whole):
    folder, _ = whole
    files = {path.name for path in (folder / "checkpoint-5").iterdir()}
    # All that is pickled there is of transformers.
    assert {name for name in files if not name.endswith((".json", ".safetensors", ".jinja", ".md"))} == {
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    }


def test_smaller_buffer_may_be_resumed_with(whole, tmp_path):
    folder, _ = whole
    options = RUN | {"save_strategy": "no", "replay_buffer_size": 2, "resume_check": "warn", "max_steps": 7}
    resumed = make_trainer(tmp_path, LONG, **options)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert len(buffer(resumed)) == 2
    assert lines(resumed)[-1]["replay/size"] == 2


class FailOnce(TrainerCallback):
    """Fails in the given micro-step, and notes the state of the buffer at the start of each step."""

    def __init__(self, call):
        self.left, self.trainer, self.states = call, None, []

    def on_step_begin(self, args, state, control, **_):
        self.states.append(copy.deepcopy(buffer(self.trainer).state_dict()))

    @hookimpl
    def loss_terms(self, samples):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("once")
        return {}


def test_failing_step_leaves_the_buffer_as_it_was_before(tmp_path):
    # Each step has two generation batches; the third step fails after both.
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 3, "replay_buffer_size": 4}
    generations = [*LONG, batch(FLAT, FLAT, LESS, FLAT, tag=5)]
    expected = end(trained(tmp_path / "whole", generations, **options))
    fails = FailOnce(6)
    failing = make_trainer(tmp_path / "failing", generations, arguments={"callbacks": [fails]}, **options)
    fails.trainer = failing
    with pytest.raises(RuntimeError, match="once"):
        failing.train()
    assert [entry[1] for entry in buffer(failing).heap] == [entry[1] for entry in fails.states[-1]["heap"]]
    assert buffer(failing).pushed == fails.states[-1]["pushed"] == 10
    never = FailOnce(0)
    never.trainer = resumed = make_trainer(
        tmp_path / "failing", generations, arguments={"callbacks": [never]}, **options
    )
    resumed.train(resume_from_checkpoint=True)
    same_end(end(resumed), expected)


# -- options, scripts --------------------------------------------------------------------------------------------------
def test_negative_size_is_refused():
    with pytest.raises(errors.ConfigError, match="replay_buffer_size=-1 is not a whole number of at least 0"):
        get_config("replay")(output_dir="out", replay_buffer_size=-1)


TRL_SCRIPT = """
from datasets import Dataset
from trl_replay import GRPOWithReplayBufferConfig, GRPOWithReplayBufferTrainer


def distinct_letters(completions, **kwargs):
    return [float(len(set(text)) > 4) for text in completions]


training_args = GRPOWithReplayBufferConfig(
    output_dir="replay-output",
    max_steps=3,
    per_device_train_batch_size=4,
    num_generations=4,
    max_completion_length=6,
    replay_buffer_size=8,
    report_to="none",
    use_cpu=True,
)
trainer = GRPOWithReplayBufferTrainer(
    model="tiny",
    reward_funcs=distinct_letters,
    args=training_args,
    train_dataset=Dataset.from_dict({"prompt": ["The sky is", "The sun is"]}),
)
trainer.train()
"""


def test_script_for_trl_runs_with_another_import(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("tiny")
    tiny_tokenizer().save_pretrained("tiny")
    names = {}
    exec(TRL_SCRIPT, names)
    assert names["trainer"].state.global_step == 3
    assert type(names["trainer"]).__name__ == "GRPOWithReplayBufferTrainer"
    assert type(names["training_args"]).__name__ == "GRPOWithReplayBufferConfig"


def test_example_replays(monkeypatch, capsys):
    example = Path(__file__).parent.parent / "examples" / "rare_success.py"
    monkeypatch.setattr("sys.argv", [example.name, "--steps", "4"])
    runpy.run_path(str(example), run_name="__main__")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(printed) == 4
    assert any("replaced 0" not in line for line in printed)
