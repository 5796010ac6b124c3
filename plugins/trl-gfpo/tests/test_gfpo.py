"""GFPO through its trainer, on given completions whose rewards and lengths are written into their tokens."""

import inspect
import logging
import math
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from trl_core import GRPOConfig, GRPOTrainer, errors
from trl_core.testing import FixedRollouts, tiny_model, tiny_tokenizer
from trl_gfpo import GFPOConfig, GFPOTrainer

EOS, UNSCORED = 1, 99
CLOCKS = ("time/", "step_time", "train_runtime", "train_samples", "train_steps", "eval_runtime", "eval_s")

# The group of the specification's constants.
REWARDS, LENGTHS = [1, 0, 1, 0], [10, 4, 6, 8]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reward(completion_ids, **_):
    """What `completion` wrote into the first token."""
    return [None if ids[0] == UNSCORED else (ids[0] - 100) / 10 for ids in completion_ids]


def completion(reward, length):
    first = UNSCORED if reward is None else 100 + round(reward * 10)
    return [first, *range(200, 198 + length), EOS][:length]


def completions(rewards, lengths):
    return [completion(*row) for row in zip(rewards, lengths, strict=True)]


def make_trainer(folder, batches, *, generations=4, algorithm=(GFPOConfig, GFPOTrainer), arguments=None, **options):
    """A trainer that is given one list of completions per generation batch, and descends plainly."""
    rows = len(batches[0])
    config, trainer = algorithm
    defaults = {
        "output_dir": str(folder),
        "max_steps": len(batches),
        "num_generations": generations,
        "per_device_train_batch_size": rows,
        "max_completion_length": 16,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    prompts = rows * options.get("steps_per_generation", 1) // generations
    return trainer(
        tiny_model(),
        reward_funcs=reward,
        args=config(**{**defaults, **options}),
        train_dataset=Dataset.from_list([{"prompt": "p" * (i + 1), "level": i} for i in range(max(prompts, 1))]),
        processing_class=tiny_tokenizer(),
        rollouts=FixedRollouts([{"completion_ids": batch} for batch in batches]),
        **(arguments or {}),
    )


def filtered(folder, batches, function="shortest", **options):
    """A trainer of GFPO with this filter."""
    return make_trainer(folder, batches, arguments={"group_filter_func": function}, **options)


def after_one_step(folder, rewards=REWARDS, lengths=LENGTHS, function="shortest", **options):
    """(trainer, loss, kept places, advantage of each kept row) after a step on one generation batch."""
    trainer = filtered(folder, [completions(rewards, lengths)], function, **options)
    loss = trainer.train().training_loss
    samples = trainer.window.samples
    return trainer, loss, samples.position.tolist(), samples.mean_per_row(samples.advantages)


def kept_per_group(trainer):
    return torch.bincount(trainer.window.samples.group).tolist()


def logged(trainer):
    return {
        name: value
        for line in trainer.state.log_history
        for name, value in line.items()
        if not name.startswith((*CLOCKS, "gfpo/"))
    }


def weights(trainer):
    return dict(trainer.model.state_dict())


def same_weights(one, other):
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def close(values):
    return pytest.approx(values, abs=1e-6)


# -- the constants of the specification --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("function", "k", "kept", "advantages"),
    [
        ("shortest", 2, [1, 2], [-0.707007, 0.707007]),
        ("token_efficiency", 2, [0, 2], [0.0, 0.0]),
        ("shortest", 3, [1, 2, 3], [-0.577250, 1.154501, -0.577250]),
    ],
)
def test_filter_keeps_the_best_and_compares_them(function, k, kept, advantages, tmp_path):
    _, _, places, values = after_one_step(tmp_path, function=function, num_remains_in_group=k)
    assert places == kept
    assert values.tolist() == close(advantages)


def test_population_std_gives_the_papers_advantages(tmp_path):
    _, _, _, values = after_one_step(tmp_path, num_remains_in_group=3, gfpo_std="population")
    std = math.sqrt(2) / 3  # of 0, 1, 0
    # The paper divides by the std alone, the core always by std + 1e-4.
    assert (values * (std + 1e-4) / std).tolist() == close([-0.707107, 1.414214, -0.707107])


@pytest.mark.parametrize(
    ("denominator", "loss"),
    # The kept rows have 4 and 6 tokens: -(4 * -0.707007 + 6 * 0.707007), over 10 kept tokens or over all 28.
    [("kept", -0.141401), ("all", -0.050501)],
)
def test_denominator_counts_kept_or_all_tokens(denominator, loss, tmp_path):
    _, value, _, _ = after_one_step(tmp_path, num_remains_in_group=2, gfpo_denominator=denominator)
    assert value == close(loss)


def test_rejected_rows_have_no_advantage_when_all_tokens_count(tmp_path):
    _, _, places, values = after_one_step(tmp_path, num_remains_in_group=2, gfpo_denominator="all")
    assert places == [0, 1, 2, 3]
    assert values.tolist() == close([0.0, -0.707007, 0.707007, 0.0])


def test_token_efficiency_is_reward_per_token(tmp_path):
    # 1/10, 1/4, 1/6 and 0.5/2
    _, _, places, _ = after_one_step(
        tmp_path, [1, 1, 1, 0.5], [10, 4, 6, 2], "token_efficiency", num_remains_in_group=2
    )
    assert places == [1, 3]


# -- what filtering is -------------------------------------------------------------------------------------------------
TWO_GROUPS = {"rewards": [1, 0, 1, 0, 0.5, 0.2, 0, 0.3], "lengths": [10, 4, 6, 8, 3, 9, 5, 7]}


def one_batch(rewards, lengths):
    return [completions(rewards, lengths)]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_keeping_all_equals_grpo_bit_for_bit(loss_type, tmp_path):
    batches = one_batch(**TWO_GROUPS) * 2
    options = {"loss_type": loss_type, "beta": 0.1, "max_steps": 4, "num_iterations": 2}
    ours = filtered(tmp_path / "gfpo", batches, num_remains_in_group=4, **options)
    base = make_trainer(tmp_path / "grpo", batches, algorithm=(GRPOConfig, GRPOTrainer), **options)
    assert ours.train().training_loss == base.train().training_loss
    assert same_weights(ours, base)
    assert logged(ours) == logged(base)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_filtering_equals_grpo_on_the_kept_rows(loss_type, tmp_path):
    batch = completions(**TWO_GROUPS)
    ours = filtered(tmp_path / "gfpo", [batch], num_remains_in_group=2, loss_type=loss_type)
    kept = [batch[i] for i in (1, 2, 4, 6)]  # the two shortest of each group
    base = make_trainer(
        tmp_path / "grpo", [kept], generations=2, algorithm=(GRPOConfig, GRPOTrainer), loss_type=loss_type
    )
    assert ours.train().training_loss == close(base.train().training_loss)
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, weights(base)[name], rtol=1e-6, atol=1e-7)


def test_equal_scores_drop_the_last(tmp_path):
    def constant(group_completions, group_rewards):
        return [[0.5] * len(group) for group in group_rewards]

    _, _, places, _ = after_one_step(tmp_path, function=constant, num_remains_in_group=3)
    assert places == [0, 1, 2]


def test_permuting_completions_permutes_the_result(tmp_path):
    order = [2, 0, 3, 1]
    rewards, lengths = [0.1, 0.4, 0.9, 0.3], [10, 4, 6, 8]
    _, _, places, values = after_one_step(tmp_path / "plain", rewards, lengths, num_remains_in_group=3)
    permuted = ([rewards[i] for i in order], [lengths[i] for i in order])
    _, _, places_permuted, values_permuted = after_one_step(tmp_path / "permuted", *permuted, num_remains_in_group=3)
    by_row = dict(zip(places, values.tolist(), strict=True))
    assert {order[place]: value for place, value in zip(places_permuted, values_permuted.tolist(), strict=True)} == (
        pytest.approx(by_row, abs=1e-6)
    )
    assert set(by_row) == {1, 2, 3}


@pytest.mark.parametrize("std", ["sample", "population"])
@pytest.mark.parametrize("denominator", ["kept", "all"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_the_kept_rows_of_a_group_add_up_to_zero(std, denominator, scale, tmp_path):
    options = {"gfpo_std": std, "gfpo_denominator": denominator, "scale_rewards": scale}
    trainer, _, _, values = after_one_step(tmp_path, **TWO_GROUPS, num_remains_in_group=3, **options)
    sums = torch.zeros(2).index_add(0, trainer.window.samples.group, values)
    assert sums.tolist() == close([0.0, 0.0])
    assert values.abs().max() > 0.05


def test_rows_without_reward_come_last(tmp_path):
    # The shortest row has no reward: the next two are kept.
    _, _, places, values = after_one_step(tmp_path, [1, None, 1, 0], [10, 4, 6, 8], num_remains_in_group=2)
    assert places == [2, 3]
    assert values.tolist() == close([0.707007, -0.707007])


def test_rows_without_reward_fill_up_a_group_without_advantage(tmp_path):
    _, _, places, values = after_one_step(tmp_path, [None, 1, None, None], num_remains_in_group=2)
    assert places == [0, 1]
    assert values.tolist() == [0.0, 0.0]


def test_evaluation_is_not_filtered(tmp_path):
    def never(group_completions, group_rewards):
        raise AssertionError("called in evaluation")

    evaluation = Dataset.from_list([{"prompt": "p"}])
    ours = filtered(tmp_path / "gfpo", one_batch(REWARDS, LENGTHS), never, num_remains_in_group=2)
    base = make_trainer(tmp_path / "grpo", one_batch(REWARDS, LENGTHS), algorithm=(GRPOConfig, GRPOTrainer))
    metrics = ours.evaluate(evaluation)
    expected = base.evaluate(evaluation)
    assert metrics["eval_reward"] == 0.5
    assert metrics["eval_loss"] == expected["eval_loss"]
    assert not any("gfpo" in name for name in metrics)


def test_evaluation_ignores_the_papers_options(tmp_path):
    evaluation = Dataset.from_list([{"prompt": "p"}])
    batches = [completions(REWARDS, LENGTHS)] * 2  # one to train on, one to evaluate
    options = {"max_steps": 1, "learning_rate": 0.0}
    ours = filtered(tmp_path / "gfpo", batches, num_remains_in_group=2, gfpo_std="population", **options)
    base = make_trainer(tmp_path / "grpo", batches, algorithm=(GRPOConfig, GRPOTrainer), **options)
    ours.train(), base.train()
    assert ours.evaluate(evaluation)["eval_loss"] == base.evaluate(evaluation)["eval_loss"]


def test_without_k_and_filter_it_is_grpo(tmp_path):
    ours = make_trainer(tmp_path / "gfpo", one_batch(**TWO_GROUPS))
    base = make_trainer(tmp_path / "grpo", one_batch(**TWO_GROUPS), algorithm=(GRPOConfig, GRPOTrainer))
    assert ours.train().training_loss == base.train().training_loss
    assert same_weights(ours, base)


def test_metrics_tell_kept_from_all(tmp_path):
    trainer, _, _, _ = after_one_step(tmp_path, [1, 0, 1, 1], num_remains_in_group=2)
    line = trainer.state.log_history[0]
    assert line["reward"] == 0.5  # of the kept rows, 0 and 1
    assert line["gfpo/reward_all"] == 0.75
    assert line["gfpo/kept_fraction"] == 0.5
    assert line["gfpo/mean_kept_length"] == 5  # of 4 and 6 tokens
    assert line["gfpo/k_mean"] == 2
    assert line["completions/mean_length"] == 7  # of all rows


# -- the filter's contract ---------------------------------------------------------------------------------------------
def scores_like(rewards):
    return [[float(i) for i in range(len(group))] for group in rewards]


def test_filter_is_called_once_with_all_groups_as_lists(tmp_path):
    calls = []

    def spy(group_completions, group_rewards, **kwargs):
        calls.append((group_completions, group_rewards, kwargs))
        return scores_like(group_rewards)

    batches = [completions(**TWO_GROUPS)]
    options = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 4}
    filtered(tmp_path, batches, spy, num_remains_in_group=2, **options).train()
    assert len(calls) == 1
    group_completions, group_rewards, kwargs = calls[0]
    assert group_rewards == [[1, 0, 1, 0], pytest.approx([0.5, 0.2, 0, 0.3])]
    assert [[type(text) for text in group] for group in group_completions] == [[str] * 4] * 2
    assert kwargs["group_completion_ids"] == [batches[0][:4], batches[0][4:]]
    assert kwargs["group_columns"] == {"level": [[0] * 4, [1] * 4]}
    assert set(kwargs) == {"group_completion_ids", "group_columns"}


@pytest.mark.parametrize("accepted", [[], ["group_completion_ids"], ["group_columns"]])
def test_filter_gets_only_arguments_that_it_accepts(accepted, tmp_path):
    got = []

    class Filter:
        def __call__(self, group_completions, group_rewards, **kwargs):
            got.append(set(kwargs))
            return scores_like(group_rewards)

    names = ["self", "group_completions", "group_rewards", *accepted]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    Filter.__call__.__signature__ = inspect.Signature(parameters)
    after_one_step(tmp_path, function=Filter(), num_remains_in_group=2)
    assert got == [set(accepted)]


def test_conversations_reach_the_filter_as_messages(tmp_path):
    seen = []

    def spy(group_completions, group_rewards):
        seen.extend(group_completions)
        return scores_like(group_rewards)

    trainer = filtered(tmp_path, one_batch(REWARDS, LENGTHS), spy, num_remains_in_group=2)
    trainer.train_dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "p"}]}])
    trainer.train()
    assert [[message["role"] for message in text] for text in seen[0]] == [["assistant"]] * 4


WRONG = {
    "flat": [0.0, 1.0, 2.0, 3.0],
    "a number": 1.0,
    "nothing": None,
    "a group short": [],
    "a group too many": [[0.0] * 4] * 2,
    "a score short": [[0.0] * 3],
    "ragged": [[0.0] * 3, [0.0]],
    "text": [["a", "b", "c", "d"]],
    "None inside": [[0.0, None, 1.0, 2.0]],
    "NaN": [[0.0, math.nan, 1.0, 2.0]],
    "infinite": [[0.0, math.inf, 1.0, 2.0]],
}


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_wrong_answer_of_the_filter_is_an_error_that_names_it(answer, tmp_path):
    def my_filter(group_completions, group_rewards):
        return answer

    trainer = filtered(tmp_path, one_batch(REWARDS, LENGTHS), my_filter, num_remains_in_group=2)
    with pytest.raises(errors.HookResultError, match=r"'my_filter' .*expected 1 lists of 4 finite numbers"):
        trainer.train()


def test_error_names_the_score_that_is_not_finite(tmp_path):
    def my_filter(group_completions, group_rewards):
        return [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, math.nan, 3.0]]

    trainer = filtered(tmp_path, one_batch(**TWO_GROUPS), my_filter, num_remains_in_group=2)
    with pytest.raises(errors.HookResultError, match="nan for completion 2 of group 1"):
        trainer.train()


def test_score_of_a_row_without_reward_may_be_nan(tmp_path):
    def reward_per_token(group_completions, group_rewards, group_completion_ids):
        pairs = zip(group_rewards[0], group_completion_ids[0], strict=True)
        return [[reward / len(ids) for reward, ids in pairs]]

    _, _, places, _ = after_one_step(tmp_path, [0.9, None, 0.1, 0.5], LENGTHS, reward_per_token, num_remains_in_group=2)
    assert places == [0, 3]


# -- options -----------------------------------------------------------------------------------------------------------
def refuse(folder, what, function="shortest", **options):
    with pytest.raises(errors.ConfigError, match=what):
        filtered(folder, one_batch(REWARDS, LENGTHS), function, **options)


def test_k_without_filter_is_refused(tmp_path):
    refuse(
        tmp_path,
        "group_filter_func is None, but a filter is needed for num_remains_in_group",
        None,
        num_remains_in_group=2,
    )


def test_unknown_filter_is_refused(tmp_path):
    refuse(tmp_path, "group_filter_func is 'shortets'", "shortets", num_remains_in_group=2)


@pytest.mark.parametrize("k", [-1, 0, 1, 5])
def test_k_outside_the_group_is_refused(k, tmp_path):
    refuse(tmp_path, f"num_remains_in_group={k} is not ", num_remains_in_group=k)


def test_adaptive_k_outside_the_group_is_refused(tmp_path):
    for k in (1, 5):
        options = {"k_very_hard": 4, "k_hard": 4, "k_medium": 3, "k_easy": k}
        refuse(tmp_path, f"k_easy={k} is not ", adaptive_difficulty=True, **options)


def test_k_and_adaptive_difficulty_together_are_refused(tmp_path):
    refuse(tmp_path, "both set", adaptive_difficulty=True, num_remains_in_group=2)


@pytest.mark.parametrize("name", ["gfpo_denominator", "gfpo_std"])
def test_unknown_choice_is_refused(name, tmp_path):
    refuse(tmp_path, f"{name}='other' .str. is not one of", num_remains_in_group=2, **{name: "other"})


@pytest.mark.parametrize("option", [{"gfpo_denominator": "all"}, {"gfpo_std": "population"}])
def test_the_papers_options_are_refused_with_another_normalisation(option, tmp_path):
    options = {"multi_objective_aggregation": "normalize_then_sum", **option}
    refuse(tmp_path, "normalize_then_sum", num_remains_in_group=2, **options)


def test_filter_without_k_warns_and_is_off(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = filtered(tmp_path, one_batch(REWARDS, LENGTHS))
    assert "nothing is filtered" in caplog.text
    trainer.train()
    assert trainer.window.samples.position.tolist() == [0, 1, 2, 3]


# -- adaptive difficulty -----------------------------------------------------------------------------------------------
LEVELS = {"adaptive_difficulty": True, "k_very_hard": 5, "k_hard": 4, "k_medium": 3, "k_easy": 2}


def batch_of_means(means):
    """One group of five per mean reward."""
    return completions([mean for mean in means for _ in range(5)], [3] * 5 * len(means))


def adaptive(folder, batches, **options):
    batches = [batch_of_means(means) for means in batches]
    return filtered(folder, batches, generations=5, **{**LEVELS, "difficulty_warmup": 1, **options})


def test_easier_quarters_keep_fewer(tmp_path):
    trainer = adaptive(tmp_path, [[3, 0, 2, 1]])  # quartiles 0.75, 1.5, 2.25
    trainer.train()
    assert kept_per_group(trainer) == [2, 5, 3, 4]
    assert trainer.state.log_history[0]["gfpo/k_mean"] == 3.5


def test_means_at_a_quartile_belong_to_the_easier_side(tmp_path):
    trainer = adaptive(tmp_path, [[0, 1, 2, 3, 4]])  # quartiles 1, 2, 3
    trainer.train()
    assert kept_per_group(trainer) == [5, 4, 3, 2, 2]


def test_warm_up_keeps_as_of_the_hardest(tmp_path):
    trainer = adaptive(tmp_path, [[3, 0, 2, 1]] * 2, difficulty_warmup=3)
    trainer.train()
    assert kept_per_group(trainer) == [5, 5, 5, 5]


def test_warm_up_ends_with_the_batch_it_names(tmp_path):
    trainer = adaptive(tmp_path, [[3, 0, 2, 1]] * 3, difficulty_warmup=3)
    trainer.train()
    assert kept_per_group(trainer) == [2, 5, 3, 4]


def test_means_are_added_before_quartiles_are_taken(tmp_path):
    # Of 0 0 0 0 1 2 3 4 the quartiles are 0, 0.5, 2.25. Those of the first batch alone would make all prompts easy.
    trainer = adaptive(tmp_path, [[0, 0, 0, 0], [1, 2, 3, 4]])
    trainer.train()
    assert kept_per_group(trainer) == [3, 3, 2, 2]


def test_each_prompt_counts_once_however_often_it_is_used(tmp_path):
    trainer = adaptive(tmp_path, [[3, 0, 2, 1]], max_steps=2, num_iterations=2)
    trainer.train()
    assert sorted(trainer.hooks.objects["gfpo"].seen.tolist()) == [0, 1, 2, 3]


def test_prompt_without_any_reward_counts_as_hardest_and_is_not_remembered(tmp_path):
    trainer = adaptive(tmp_path, [[3, None, 2, 1]])  # quartiles of 1, 2, 3: 1.5, 2, 2.5
    trainer.train()
    assert kept_per_group(trainer) == [2, 5, 3, 5]
    assert sorted(trainer.hooks.objects["gfpo"].seen.tolist()) == [1, 2, 3]


def test_means_seen_are_saved_and_restored(tmp_path):
    batches = [[0, 0, 0, 0], [1, 2, 3, 4]]
    saved = adaptive(tmp_path, batches, max_steps=1, save_strategy="steps", save_steps=1)
    saved.train()
    resumed = adaptive(tmp_path, batches, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert kept_per_group(resumed) == [3, 3, 2, 2]
    assert resumed.hooks.objects["gfpo"].seen.tolist() == [0, 0, 0, 0, 1, 2, 3, 4]


# -- a script written for TRL ------------------------------------------------------------------------------------------
SCRIPT = """
from datasets import Dataset
from trl_gfpo import GFPOConfig, GFPOTrainer


def distinct_letters(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


class ShortAndGood:
    def __call__(self, group_completions, group_rewards, **kwargs):
        scores = []
        for completions, rewards in zip(group_completions, group_rewards):
            scores.append([reward / (1 + len(text)) for text, reward in zip(completions, rewards)])
        return scores


training_args = GFPOConfig(
    output_dir="gfpo-output",
    max_steps=2,
    per_device_train_batch_size=4,
    num_generations=4,
    num_remains_in_group=2,
    max_completion_length=6,
    learning_rate=1e-3,
    report_to="none",
    use_cpu=True,
)
trainer = GFPOTrainer(
    model="tiny",
    reward_funcs=distinct_letters,
    train_dataset=Dataset.from_dict({"prompt": ["The sky is", "The sun is"]}),
    args=training_args,
    group_filter_func=ShortAndGood(),
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
    assert kept_per_group(names["trainer"]) == [2]


def test_example_runs(tmp_path, monkeypatch, capsys):
    example = Path(__file__).parent.parent / "examples" / "shortest_answer.py"
    monkeypatch.setattr("sys.argv", [example.name, "--steps", "2"])
    runpy.run_path(str(example), run_name="__main__")
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "of kept" in line] == [
        ["step", "1"],
        ["step", "2"],
    ]
