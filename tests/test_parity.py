"""Runs of the reference, repeated step by step: losses, gradients, metrics, advantages and final weights agree.

See tests/parity/README.md for the cases. Where trl-core does not do as the reference did, `EXPLAINED` says why, and the
case runs with what makes the two alike.
"""

import dataclasses
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from trl_core import get_config, get_trainer, hookimpl
from trl_replay import ReplayBuffer

from .conftest import PARITY
from .helpers_online import Recorder
from .helpers_parity import differing_parameters, differing_steps

CASES = sorted(path.stem for path in (PARITY / "cases").glob("*.json"))
CASES.remove("replay_buffer_function")  # of a class, not of a run

EXPLAINED = {
    "grpo_mask_truncated_dapo": (
        "The reference divides by all completion tokens, although truncated ones are masked out of the loss; trl-core "
        "by the loss tokens. token_normalizer='generation' divides as the reference."
    ),
    "grpo_steps_per_generation": (
        "The reference divides each of the two steps that share a generation batch by the tokens of the whole batch; "
        "trl-core (and later releases of the reference) by the tokens of one step. token_normalizer='generation' "
        "divides as the reference."
    ),
    "gfpo_shortest": (
        "The reference hands the filter the texts of rows i to i+G as group i, but group i are rows i*G to (i+1)*G. "
        "The filter of this test takes the same wrong rows."
    ),
    "gfpo_efficiency": "As gfpo_shortest; the rewards that the filter gets are grouped rightly.",
    "replay_as_shipped": (
        "The reference takes the batch for one group, and replaces nothing while any two rewards of a group differ, so "
        "it is GRPO here. So is trl-core with replay_buffer_size=0."
    ),
    **dict.fromkeys(
        ("replay_all_zero_first", "replay_size1", "replay_size1_bnpo"),
        "With one pass over each generation the reference stores no log-probabilities of the policy that generated a "
        "row, and takes replayed rows for on-policy. trl-core stores them; a hook of this test removes them.",
    ),
}
ALGORITHMS = {"grpo_with_replay_buffer": "replay"}
"""What the reference calls otherwise."""


# -- running a case ---------------------------------------------------------------------------------------------------
def load(case):
    return json.loads((PARITY / "cases" / f"{case}.json").read_text())


def text_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def shortest(completions, rewards):
    return [[-len(text_of(text)) for text in group] for group in completions]


def reward_per_character(completions, rewards):
    pairs = zip(completions, rewards, strict=True)
    return [[r / max(len(text_of(t)), 1) for t, r in zip(*pair, strict=True)] for pair in pairs]


FILTERS = {"shortest": shortest, "reward_per_character": reward_per_character, "reward": lambda texts, rewards: rewards}


def with_wrong_rows(function):
    """The filter on the texts that the reference gave it: group i is rows i to i+G."""

    def wrong(completions, rewards):
        size, flat = len(completions[0]), [text for group in completions for text in group]
        return function([flat[i : i + size] for i in range(len(completions))], rewards)

    return wrong


def make_filter(case, recipe, as_reference):
    if recipe["kind"] == "table":
        tables = iter(recipe["scores_per_generation"])
        return lambda group_completions, group_rewards: next(tables)
    function = FILTERS[recipe["kind"]]
    return with_wrong_rows(function) if case in EXPLAINED and as_reference else function


def make_reward(name, generations):
    tables = iter([generation["rewards"][name] for generation in generations])

    def reward(completions, **_):
        return next(tables)

    reward.__name__ = name
    return reward


class ReplayLog(TrainerCallback):
    """Notes, after each generation, the scores in the replay buffer and which groups were replaced by which."""

    def __init__(self, forgets, rollouts):
        self.forgets, self.trainer, self.noted = forgets, None, []
        groups = {(g, i // 4): tuple(rollouts[g]["completion_ids"][i]) for g in range(len(rollouts)) for i in (0, 4)}
        self.source = {completion: list(source) for source, completion in groups.items()}

    @hookimpl(wrapper=True)
    def select(self, samples):
        rows = yield
        completions = [tuple(ids.tolist()) for ids in rows.completion_ids.split(rows.completion_lengths.tolist())]
        sources = [self.source[completions[first]] for first in (0, 4)]
        now = int(samples.generation[0])
        replaced = [
            {"group": group, "by_generation_group": source}
            for group, source in enumerate(sources)
            if source != [now, group]
        ]
        scores = sorted(score for score, _, _ in self.trainer.hooks.objects["replay"].buffer.entries())
        self.noted.append({"buffer_scores_sorted": pytest.approx(scores, rel=1e-5), "replaced_groups": replaced})
        return dataclasses.replace(rows, old_logps=None) if self.forgets else rows


def run(case, model, folder, *, as_reference=True, **options):
    """Train; returns the trainer, the log lines of its steps and what the recorder noted."""
    data = load(case)
    algorithm = ALGORITHMS.get(data["algorithm"], data["algorithm"])
    config = get_config(algorithm)
    known = {f.name for f in dataclasses.fields(config)} - {"generation_batch_size"}  # follows from the others
    given = {name: value for name, value in data["algorithm_arguments"].items() if name in known}
    assert set(data["hyperparameters"]) <= known
    # Set by the case, for the default differs.
    assert "use_bias_correction_kl" in given
    args = config(
        output_dir=str(folder),
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        activation_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        **{**given, **data["hyperparameters"], **options},
    )
    recorder = Recorder(data["rollouts"])
    recipe = data.get("filter")
    replay_log = ReplayLog(case in EXPLAINED and as_reference, data["rollouts"]) if algorithm == "replay" else None
    trainer = get_trainer(algorithm)(
        model=str(model),
        reward_funcs=[make_reward(name, data["rollouts"]) for name in data["rollouts"][0]["rewards"]],
        args=args,
        train_dataset=Dataset.from_list(data["dataset"]),
        rollouts=recorder,
        callbacks=[replay_log] if replay_log else [],
        **({"group_filter_func": make_filter(case, recipe, as_reference)} if recipe else {}),
    )
    if replay_log:
        replay_log.trainer = trainer
    start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    replayed = replay_log and replay_log.noted
    return SimpleNamespace(data=data, trainer=trainer, lines=lines, recorder=recorder, start=start, replayed=replayed)


# -- comparing --------------------------------------------------------------------------------------------------------
def generations(result):
    """The rows that each generation batch trained on, in the order of the generation."""
    args = result.trainer.args
    batches = result.recorder.micro_batches
    for first in range(0, len(batches), args.micro_steps):
        rows = type(batches[0]).concat(batches[first : first + args.slices])
        yield rows.take(torch.argsort(rows.position))


def differing_generations(result):
    found = []
    kept_is_ordered_by_score = "filter" in result.data
    ours = list(generations(result))
    assert len(ours) == len(result.data["expected"]["generations"])
    for number, (rows, expected) in enumerate(zip(ours, result.data["expected"]["generations"], strict=True)):
        stale = "old_per_token_logps_sum" in expected
        columns = {
            "completion_mask_sum": (rows.lengths, 0.0),
            "advantages": (rows.mean_per_row(rows.advantages), 1e-5),
            **({"old_per_token_logps_sum": (rows.sum_per_row(rows.old_logps), 1e-3)} if stale else {}),
            **(
                {"ref_per_token_logps_sum": (rows.sum_per_row(rows.ref_logps), 1e-3)}
                if rows.ref_logps is not None
                else {}
            ),
        }
        # A row whose tokens are all masked out of the loss has no advantage to compare.
        trained = rows.lengths > 0
        for name, (values, tolerance) in columns.items():
            theirs = torch.tensor(expected[name], dtype=torch.float32)
            if theirs.shape != values.shape:
                found.append((number, name, values.tolist(), expected[name]))
                continue
            mine, theirs = values.float()[trained], theirs[trained]
            if kept_is_ordered_by_score:
                mine, theirs = mine.sort().values, theirs.sort().values
            if not torch.allclose(mine, theirs, rtol=1e-5, atol=tolerance):
                found.append((number, name, mine.tolist(), theirs.tolist()))
        tokens = int(rows.completion_lengths.sum())
        if tokens != expected["num_items_in_batch"]:
            found.append((number, "num_items_in_batch", tokens, expected["num_items_in_batch"]))
    return found


# -- the tests --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES)
def test_run_equals_the_reference(case, parity_model, tmp_path):
    alike = {"token_normalizer": "generation", "replay_buffer_size": 0}
    options = {name: value for name, value in alike.items() if name in EXPLAINED.get(case, "")}
    result = run(case, parity_model, tmp_path, **options)
    recorded = [generation["prompt_ids"] for generation in result.data["rollouts"]]
    assert result.recorder.prompts == recorded[: len(result.recorder.prompts)]  # the core's own tokenisation
    assert differing_generations(result) == []
    assert differing_steps(result) == []
    assert differing_parameters(result) == []
    if "replay_log" in result.data:
        assert result.replayed == result.data["replay_log"]


def test_every_case_of_the_folder_is_known():
    counts = Counter(case.partition("_")[0] for case in CASES)
    known = {
        "gfpo": 6,
        "grpo": 44,
        "gspo": 6,
        "replay": 5,
    }
    assert {family: counts[family] for family in known} == known
    assert set(EXPLAINED) < set(CASES)


def test_dapo_divides_by_the_tokens_that_are_trained_on(parity_model, tmp_path):
    # Generation 0: completions of 10, 12, 11, 4, 4, 11, 3 and 7 tokens; the one of 12 is truncated and masked.
    result = run("grpo_mask_truncated_dapo", parity_model, tmp_path)
    first, expected = result.lines[0], result.data["expected"]["steps"][0]
    assert first["loss"] == pytest.approx(expected["loss"] * 62 / 50, rel=1e-4)
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"] * 62 / 50, rel=1e-4)


def test_dapo_divides_by_the_tokens_of_one_step(parity_model, tmp_path):
    # Two steps share the generation, so a step has half of its tokens.
    result = run("grpo_steps_per_generation", parity_model, tmp_path)
    first, expected = result.lines[0], result.data["expected"]["steps"][0]
    assert first["loss"] == pytest.approx(expected["loss"] * 2, rel=1e-4)
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"] * 2, rel=1e-4)


def test_filter_gets_the_texts_of_its_own_group(parity_model, tmp_path):
    # Texts of 4, 17, 16, 11 | 26, 2, 6, 2 characters: the longest of each group goes. The reference kept rows 4, 5
    # and 6 of the second group, the one of 26 characters among them.
    result = run("gfpo_shortest", parity_model, tmp_path, as_reference=False)
    first = next(generations(result))
    assert first.position.tolist() == [0, 2, 3, 5, 6, 7]
    # Kept rewards 1.14, -0.57, 0.84 (mean 0.47, std 0.913072) and 0.42, -0.84, -0.28 (mean -0.233333, std 0.631295).
    by_hand = [0.733706, -1.138888, 0.405181, 1.034746, -0.960836, -0.073911]
    assert first.mean_per_row(first.advantages).tolist() == pytest.approx(by_hand, abs=1e-5)


def test_filter_by_efficiency_gets_the_texts_of_its_own_group(parity_model, tmp_path):
    # Reward per character: 0.116, 0.077, 0.023, -0.082 | -0.155, 0.061, -0.083, -0.058. The reference kept row 6.
    result = run("gfpo_efficiency", parity_model, tmp_path, as_reference=False)
    first = next(generations(result))
    assert first.position.tolist() == [0, 1, 5, 7]
    # Kept rewards 1.39, 0.23 | 0.61, -0.69, less their group's mean, over the std of all four (0.864157) + 1e-4.
    by_hand = [0.671097, -0.671097, 0.752091, -0.752091]
    assert first.mean_per_row(first.advantages).tolist() == pytest.approx(by_hand, abs=1e-5)


def test_replayed_rows_are_compared_with_the_policy_that_generated_them(parity_model, tmp_path):
    # As the reference the second group of step 3, replayed from generation 1, would be taken for on-policy.
    ours = run("replay_size1", parity_model, tmp_path / "ours", as_reference=False)
    theirs = run("replay_size1", parity_model, tmp_path / "theirs")
    for result, on_policy in ((ours, False), (theirs, True)):
        logged = [line["clip_ratio/region_mean"] for line in result.lines]
        assert logged[:2] == [0.0, 0.0]  # replayed at once
        assert (logged[2:] == [0.0, 0.0]) is on_policy
    rows = ours.recorder.micro_batches[2].take(range(4, 8))
    then = ours.recorder.micro_batches[1].take(range(4))
    torch.testing.assert_close(rows.old_logps, then.old_logps, rtol=0, atol=1e-5)


def test_replay_buffer_equals_the_reference():
    data = load("replay_buffer_function")
    buffer = ReplayBuffer(data["max_size"])
    for expected in data["expected"]["log"]:
        for score, item in expected["added"]:
            buffer.push(score, item)
        assert [[score, item] for score, _, item in buffer.entries()] == expected["held_after"]
        assert buffer.sampling_probabilities().tolist() == pytest.approx(expected["sampling_probability"], abs=1e-7)
