"""Reward functions that nobody thought of: what they may be, take, change, answer and log."""

import asyncio
import copy
import functools
import math
import signal
from collections import deque
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset

from trl_core import Rollouts
from trl_core.errors import ConfigError, RewardError
from trl_core.stages.rewards import RewardFunctions

from . import helpers_rewards as functions
from .helpers_online import EOS, Recorder, log_lines, make_trainer, prompts, table

CHAT = [[{"role": "user", "content": "hi", "parts": [{"text": "a"}]}]] * 2 + [[{"role": "user", "content": "you"}]]


def rollouts(rows=3, **columns):
    """Conversations; the first two rows are completions of one prompt, so share it."""
    return Rollouts.from_lists(
        [[5, 6]] * rows,
        [[7, 8, EOS]] * rows,
        truncated=torch.zeros(rows),
        prompts=CHAT[:rows],
        completions=[[{"role": "assistant", "content": f"answer {i}"}] for i in range(rows)],
        columns={"answer": [{"text": "x", "steps": [1, [2]]} for _ in range(rows)], **columns},
    )


def scored(*listed, **context):
    return RewardFunctions(list(listed))(rollouts(), **context)


def judge(result):
    def judge(completions):
        return result

    return judge


# -- what it may be ---------------------------------------------------------------------------------------------------
class Judge:
    """Scores when an object of it is called."""

    def __call__(self, completions, **_):
        return [1.0] * len(completions)


def by_position(completions, /):
    return [0.0]


def yields(completions):
    yield 0.0


async def yields_later(completions):
    yield 0.0


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (Judge, "'Judge' is a class"),
        (torch.nn.Linear, "'Linear' is a class"),
        (functools.partial(Judge), None),
        (type, "'type' is a class"),
        (max, "'max' does not say what it takes"),
        (by_position, r"'by_position' takes \['completions'\] by position only"),
        (yields, "'yields' yields its values"),
        (yields_later, "'yields_later' yields its values"),
        ({"judge": judge([0.0])}, "got dict"),
        ([judge([0.0])], "got list"),
        ("", "The reward model '' cannot be loaded: there is no such folder"),
        ("./nothere", "The reward model './nothere' cannot be loaded: there is no such folder"),
        ("functions.py:judge", "'functions.py:judge' cannot be loaded: there is no such folder .* and it is no Hub id"),
        (__file__, "it is a file"),
        (torch.nn.Linear(2, 1), "'Linear' is no sequence classifier with one output"),
    ],
)
def test_what_cannot_score_is_refused_when_the_trainer_is_made(function, named, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_core.training.base.load_policy", lambda *_: pytest.fail("a model was loaded"))
    if named is None:  # calling it makes an object; only the call can tell
        with pytest.raises(RewardError, match="'Judge'"):
            scored(function)
        return
    with pytest.raises(ConfigError, match=named):
        make_trainer(tmp_path, trainer={"reward_funcs": [function], "model": "some/model"})


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        RewardFunctions(str(tmp_path))


def test_functions_of_one_name_have_metrics_of_their_own(tmp_path):
    same = [table(1.0), table(3.0), functools.partial(table(5.0)), lambda completions: [7.0] * len(completions)]
    backend = Recorder({"completion_ids": [[9, EOS]] * 4})
    trainer = make_trainer(tmp_path, trainer={"reward_funcs": [*same, Judge()], "rollouts": backend}, max_steps=1)
    names = ["reward", "reward_2", "reward_3", "<lambda>", "Judge"]
    assert trainer.reward_functions.names == names
    trainer.train()
    assert [log_lines(trainer)[0][f"rewards/{name}/mean"] for name in names] == [1.0, 3.0, 5.0, 7.0, 1.0]


# -- what it takes ----------------------------------------------------------------------------------------------------
def misspelt(completions, answr):
    return [0.0] * len(completions)


def misspelt_but_takes_all(completions, answr, **_):
    return [0.0] * len(completions)


def takes_prompt(prompt, completions):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "meant", "split"),
    [
        (misspelt, "answer", "train_dataset"),
        (misspelt, "answer", "eval_dataset"),
        (misspelt, "answer", "named"),
        (misspelt_but_takes_all, "answer", "train_dataset"),
        (takes_prompt, "prompts", "train_dataset"),
    ],
)
def test_misspelt_argument_is_told_before_anything_is_loaded(function, meant, split, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_core.training.base.load_policy", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr("trl_core.stages.reward_models.ClassifierReward.load", lambda *_: pytest.fail("loaded"))
    wrong = prompts(4, answer=["a"] * 4)
    data = {"train_dataset": wrong}
    if split != "train_dataset":
        data = {"train_dataset": prompts(4, answr=["b"] * 4)}
        data["eval_dataset"] = wrong if split == "eval_dataset" else {"named": wrong}
    arguments = {"reward_funcs": ["some/classifier", function], "model": "some/model", **data}
    with pytest.raises(RewardError, match=f"'{function.__name__}' wants .*{split}.* Did you mean '{meant}'"):
        make_trainer(tmp_path, trainer=arguments)


def test_columns_of_a_stream_are_looked_at_where_they_are_known(tmp_path):
    known = prompts(4, answer=["a"] * 4).to_iterable_dataset()
    with pytest.raises(RewardError, match="Did you mean 'answer'"):
        make_trainer(tmp_path, trainer={"reward_funcs": misspelt, "train_dataset": known})
    unknown = known.map(lambda row: row)
    assert unknown.column_names is None
    trainer = make_trainer(tmp_path, trainer={"reward_funcs": misspelt, "train_dataset": unknown})
    with pytest.raises(RewardError, match="Did you mean 'answer'"):
        trainer.train()


def test_what_the_trainer_gives_need_be_no_column(tmp_path):
    def all_of_it(prompts, completions, completion_ids, prompt_ids, trainer_state, log_extra, log_metric, *more):
        return [0.0] * len(completions)

    backend = Recorder({"completion_ids": [[9, EOS]] * 4})
    make_trainer(tmp_path, trainer={"reward_funcs": all_of_it, "rollouts": backend}, max_steps=1).train()


def judged(completions, task, scale=1.0):
    return [task * scale] * len(completions)


def judged_by(task):
    """A decorated function, which gets an argument of the decorator's."""

    @functools.wraps(judged)
    def wrapper(completions, **others):
        return judged(completions, task=task, **others)

    return wrapper


def handed_on(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    "function",
    [
        functools.partial(judged, task=3.0),
        functools.update_wrapper(functools.partial(judged, task=3.0), judged),
        functools.update_wrapper(functools.partial(handed_on(judged), task=3.0), judged),
        functools.partial(functools.update_wrapper(functools.partial(judged, task=3.0), judged)),
        judged_by(3.0),
        handed_on(functools.partial(judged, task=3.0)),
    ],
)
def test_what_is_bound_is_neither_asked_for_nor_replaced(function, tmp_path):
    # Of the dataset's columns, a function that takes **others gets the one of that name.
    columns = {"task": ["of the dataset"] * 4} if isinstance(function, functools.partial) else {}
    trainer = make_trainer(tmp_path, trainer={"reward_funcs": function, "train_dataset": prompts(4, **columns)})
    assert trainer.reward_functions(rollouts(**columns)).tolist() == [[3.0]] * 3


def test_function_that_is_handed_on_to_gets_what_it_takes():
    taken = {}

    def takes(completions, answer):
        taken.update(locals())
        return [1.0] * len(completions)

    scored(handed_on(takes))
    assert taken.keys() >= {"completions", "answer"}


def test_function_behind_a_wrapper_in_c_is_asked_what_it_takes():
    @functools.lru_cache
    def cached(trainer_state):
        return [1.0] * 3

    assert scored(cached, trainer_state=None).tolist() == [[1.0]] * 3


# -- what it changes --------------------------------------------------------------------------------------------------
def spoils(prompts, completions, completion_ids, prompt_ids, answer, **others):
    prompts[0][0]["content"] = "spoilt"
    prompts[0][0].setdefault("parts", [{}])[0]["text"] = "spoilt"
    assert len(prompts) < 2 or prompts[1][0]["content"] == "hi"  # another row of the same prompt
    completions[0][0]["content"] = "spoilt"
    completions.append("spoilt")
    completion_ids[0].append(99)
    prompt_ids.clear()
    answer[0]["steps"][1].append("spoilt")
    answer[-1].clear()
    others["array"][0][...] = 5.0
    others["trainer_state"].global_step = 99
    others["trainer_state"].log_history.clear()
    values = ["seen"] * (len(completions) - 1)
    others["log_extra"]("note", values)
    values.clear()
    others.clear()
    return [1.0] * (len(completions) - 1)


async def spoils_later(**arguments):
    return spoils(**arguments)


@pytest.mark.parametrize("function", [spoils, spoils_later])
def test_what_a_function_changes_nobody_else_sees(function):
    from transformers import TrainerState

    seen, extra = {}, []

    def looks(**arguments):
        seen.update(arguments)
        return [2.0] * 3

    rows = rollouts(array=[np.zeros(2) for _ in range(3)])
    state = TrainerState(global_step=4, log_history=[{"loss": 1.0}])
    before = copy.deepcopy([rows.prompts, rows.completions, rows.columns["answer"], rows.completion_ids.tolist()])
    given = {"trainer_state": state, "log_metric": None, "log_extra": lambda *line: extra.append(line)}
    rewards = RewardFunctions([function, looks])(rows, **given)
    assert rewards.tolist() == [[1.0, 2.0]] * 3
    after = [rows.prompts, rows.completions, rows.columns["answer"], rows.completion_ids.tolist()]
    assert after == before and not any(array.any() for array in rows.columns["array"])
    assert [seen["prompts"], seen["completions"], seen["answer"]] == before[:3]
    assert seen["completion_ids"] == [[7, 8, EOS]] * 3 and seen["prompt_ids"] == [[5, 6]] * 3
    assert seen["trainer_state"].global_step == state.global_step == 4
    assert state.log_history == seen["trainer_state"].log_history == [{"loss": 1.0}]
    assert extra == [("note", ["seen"] * 3)]


def test_run_is_the_same_beside_a_function_that_spoils_its_arguments(tmp_path, monkeypatch):
    """The prompts are trained on again in the second epoch."""

    def spoils(prompts, completions, answer, **_):
        for message in prompts:
            message[0]["content"] = "spoilt"
        answer[0].append(9)
        completions.clear()
        return [0.0] * len(prompts)

    def looks(prompts, completions, answer, **_):
        rows = zip(prompts, completions, answer, strict=True)
        return [float(len(p[0]["content"]) + len(c[0]["content"]) + sum(a)) for p, c, a in rows]

    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "x"}], "answer": [1, 2]}])
    lines = []
    for listed in ([spoils, looks], [looks]):
        arguments = {"reward_funcs": listed, "train_dataset": data}
        trainer = make_trainer(tmp_path / str(len(listed)), trainer=arguments, max_steps=2)
        template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        monkeypatch.setattr(trainer.processing_class, "chat_template", template)
        trainer.train()
        lines.append([(line["rewards/looks/mean"], line["loss"], line["grad_norm"]) for line in log_lines(trainer)])
    assert lines[0] == lines[1]


# -- what it answers --------------------------------------------------------------------------------------------------
ANSWERS = {
    "ints": [1, 0, -2],
    "bools": [True, False, True],
    "tuple": (1.0, 2.0, 3.0),
    "deque": deque([1.0, 2.0, 3.0]),
    "range": range(3),
    "none": [1.0, None, 3.0],
    "fractions": [Fraction(1, 4), Fraction(1, 2), Fraction(1)],
    "decimals": [Decimal("0.25"), Decimal("NaN"), Decimal(1)],
    "numpy float16": np.array([0.5, 1, 2], dtype=np.float16),
    "numpy int8": np.array([1, -1, 0], dtype=np.int8),
    "numpy bool": np.array([True, False, True]),
    "numpy objects": np.array([1.0, None, 2], dtype=object),
    "numpy masked": np.ma.masked_array([1.0, 2.0, 3.0], mask=[False, True, False]),
    "numpy scalars": [np.float32(0.5), np.int64(2), np.bool_(True)],
    "tensor with gradient": torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
    "tensor bfloat16": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
    "tensors of no dimension": [torch.tensor(1.0), torch.tensor(2), torch.tensor(True)],
    "series": pandas.Series([1.0, None, 3.0], index=[5, 9, 2]),
    "largest": [1e16, -1e16, 5e-324],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_numbers_of_any_kind_are_taken(name):
    answer = ANSWERS[name].detach() if isinstance(ANSWERS[name], torch.Tensor) else ANSWERS[name]
    expected = [math.nan if x is None or x is np.ma.masked else float(x) for x in answer]
    found = scored(judge(ANSWERS[name]))
    assert torch.equal(found[:, 0].nan_to_num(-7), torch.tensor(expected).nan_to_num(-7))


class Hostile:
    """A number that fails when it is looked at."""

    def __float__(self):
        raise OSError("never")

    __repr__ = __float__


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (["0.5", 1, 1], "returned '0.5' for row 0"),
        ([1, b"1", 1], "returned b'1' for row 1"),
        ([1, 1j, 1], "returned 1j for row 1"),
        ([[1.0], [1.0], [1.0]], r"returned \[1.0\] for row 0"),
        ([1, {}, 1], "returned {} for row 1"),
        ([1, pandas.NA, 1], "returned <NA> for row 1"),
        ([1, Hostile(), 1], "returned a Hostile for row 1"),
        ([1, 10**400, 1], "returned 1000000.* for row 1"),
        ([1, 10**5000, 1], "returned a int for row 1"),
        ([1, 1e300, 1], r"returned 1e\+300 for row 1"),
        ([1, -1e17, 1], r"returned -1e\+17 for row 1"),
        ([1, 1, math.inf], "returned inf for row 2"),
        ([Decimal("Infinity"), 1, 1], "returned inf for row 0"),
        ([Decimal("sNaN"), 1, 1], r"returned Decimal\('sNaN'\) for row 0"),
        (np.array(["1", "2", "3"]), "returned '1' for row 0"),
        (np.array([1j, 1, 1]), "returned 1j for row 0"),
        (np.ones((3, 1)), r"returned \[1.0\] for row 0"),
        (torch.ones(3, 1), r"returned \[1.0\] for row 0"),
        (np.array(["2020-01-01"] * 3, dtype="datetime64[D]"), r"returned datetime.date\(2020, 1, 1\) for row 0"),
        (np.float64(1.0), "returned a float64 for 3 rows"),
        (torch.tensor(1.0), "returned a Tensor for 3 rows"),
        (1.0, "returned a float for 3 rows"),
        ("111", "returned a str for 3 rows"),
        (b"111", "returned a bytes for 3 rows"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "returned a dict for 3 rows"),
        ({1.0, 2.0, 3.0}, "returned a set for 3 rows"),
        ((x for x in (1.0, 2.0, 3.0)), "returned a generator for 3 rows"),
        (map(float, "111"), "returned a map for 3 rows"),
        (pandas.DataFrame({"a": [1, 2, 3]}), "returned a DataFrame for 3 rows"),
        ([], "returned 0 values for 3 rows"),
        (torch.ones(1, 3), "returned 1 values for 3 rows"),
        (judge, "returned a function for 3 rows"),
    ],
)
def test_what_is_no_number_for_each_row_is_told_with_function_row_and_value(answer, named):
    with pytest.raises(RewardError, match=f"'judge' {named}") as caught:
        scored(judge(answer))
    assert caught.value.mend


def test_weights_that_make_a_reward_huge_are_told(tmp_path):
    arguments = {"reward_funcs": table(1e10, 1.0), "rollouts": Recorder({"completion_ids": [[9, EOS]] * 4})}
    trainer = make_trainer(tmp_path, trainer=arguments, max_steps=1, reward_weights=[1e10])
    with pytest.raises(RewardError, match=r"weighted reward of row 0 is 1e\+20, from {'reward': 1.*reward_weights"):
        trainer.train()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), Hostile, RecursionError("deep")])
def test_whatever_a_function_raises_is_told(error):
    class Mute(Exception):
        def __str__(self):
            raise OSError

    def brittle(completions):
        raise Mute if error is Hostile else error

    with pytest.raises(RewardError, match=r"'brittle' raised (SystemExit: 3|KeyboardInterrupt|Mute: |RecursionError)"):
        scored(brittle)


def runs_a_loop(completions):
    async def later():
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    return asyncio.run(later())


async def waits(completions):
    await asyncio.sleep(0)
    return [2.0] * len(completions)


def test_plain_function_may_run_an_event_loop_beside_coroutine_functions():
    """Judges that are asked over the network are called so."""
    rewards = RewardFunctions([waits, runs_a_loop, waits, runs_a_loop])
    assert rewards(rollouts()).tolist() == [[2.0, 1.0, 2.0, 1.0]] * 3


def sets_an_alarm(completions):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return [1.0] * len(completions)


def test_function_that_needs_a_main_thread_is_told_where_there_is_one():
    with pytest.raises(RewardError, match="'sets_an_alarm' raised ValueError: signal only works in main") as caught:
        scored(sets_an_alarm)
    assert "reward_processes=1" in caught.value.mend


def test_very_long_timeout_is_as_good_as_none():
    assert RewardFunctions(judge([1.0] * 3), timeout=1e300)(rollouts()).tolist() == [[1.0]] * 3


# -- what it logs -----------------------------------------------------------------------------------------------------
def logs(*calls):
    def logging(completions, log_metric, log_extra):
        for call, *args in calls:
            {"metric": log_metric, "extra": log_extra}[call](*args)
        return [0.0] * len(completions)

    return logging


@pytest.mark.parametrize(
    ("calls", "named"),
    [
        ([("metric", "m", "0.5")], "'logging' logged the metric 'm' with the value '0.5'"),
        ([("metric", "m", None)], "'m' with the value None"),
        ([("metric", "m", [1.0])], r"'m' with the value \[1.0\]"),
        ([("metric", "m", torch.ones(2))], r"'m' with the value \[1.0, 1.0\]"),
        ([("metric", "m", math.inf)], "'m' with the value inf"),
        ([("metric", "m", 10**400)], "'m' with the value 1000000"),
        ([("metric", "m", 1.0, "heavy")], "the weight 'heavy'"),
        ([("metric", "m", 1.0, -1)], "the weight -1.0"),
        ([("metric", "m", 1.0, 1.0, "median")], "reduce='median'"),
        ([("metric", 3, 1.0)], "the metric 3"),
        ([("metric", "reward", 1.0)], "'logging' logged the metric 'reward', which the trainer logs itself"),
        ([("metric", "step", 1.0)], "'step', which the trainer logs itself"),
        ([("metric", "rewards/logging/mean", 1.0)], "which the trainer logs itself"),
        ([("metric", "m")], "'logging' raised TypeError"),
        ([("extra", "c", ["a"])], "'logging' logged 1 values in the column 'c' for 3 rows"),
        ([("extra", "c", ["a"] * 3), ("extra", "c", ["a"])], "logged 4 values in the column 'c' for 3 rows"),
        ([("extra", "c", "abc")], "logged a str in the column 'c'"),
        ([("extra", None, ["a"] * 3)], "in the column None"),
    ],
)
def test_what_cannot_be_logged_is_told_with_function_and_value(calls, named):
    with pytest.raises(RewardError, match=named):
        scored(logs(*calls), log_metric=lambda *_: None, log_extra=lambda *_: None)


def test_what_can_be_logged_arrives_as_plain_values():
    seen = []
    calls = [
        ("metric", "m", torch.tensor(0.5), np.int64(2), "min"),
        ("metric", "n", math.nan),
        ("metric", "rewards/format", 1),
        ("extra", "c", np.array([1, 2, 3])),
        ("extra", "d", ["a"]),
        ("extra", "d", ["b", "c"]),
    ]
    scored(logs(*calls), log_metric=lambda *line: seen.append(line), log_extra=lambda *line: seen.append(line))
    assert seen[0] == ("m", 0.5, 2.0, "min") and math.isnan(seen[1][1])
    assert seen[2] == ("rewards/format", 1.0, 1.0, "mean")
    assert seen[3:] == [("c", [1, 2, 3]), ("d", ["a"]), ("d", ["b", "c"])]


# -- in processes of their own ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def workers():
    """A function in a process of its own; the batch says what it does there."""
    rewards = RewardFunctions(functions.odd, processes=1, timeout=60)
    yield rewards
    rewards.close()


def odd(rewards, what, rows=2, **context):
    given = {"log_metric": lambda *_: None, "log_extra": lambda *_: None, **context}
    return rewards(rollouts(rows, what=[what] * rows), **given)[:, 0].tolist()


@pytest.mark.parametrize(
    "what", ["forks", "fork raises", "fork exits", "starts processes", "prints", "awaits", "answers late"]
)
def test_process_that_forks_or_prints_gives_the_values_of_this_batch(what, workers):
    assert odd(workers, what) == [1.0, 2.0]
    assert odd(workers, "plain") == [3.0, 4.0]
    assert odd(workers, "plain", rows=1) == [3.0]


def test_answers_of_a_process_keep_every_bit_and_none_apart_from_nan(workers):
    found = workers(rollouts(3, what=["exact"] * 3))[:, 0]
    assert found[0] == torch.tensor(0.1) and found[1:].isnan().all()
    assert workers._workers[0].call(functions.request("exact"))[0] == [0.1, None, pytest.approx(math.nan, nan_ok=True)]


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("text", r"'odd' returned '0.5' for row 1"),
        pytest.param(*("object", "'odd' returned a set for 2 rows"), marks=pytest.mark.slow),
        pytest.param(*("huge number", r"'odd' returned 1000000.* for row 1"), marks=pytest.mark.slow),
        ("metric", "'odd' logged the metric 'm' with the value 'word'"),
        ("extra object", "'odd' raised TypeError: log_extra and log_metric take numbers.*no object"),
        pytest.param(*("long answer", "'odd' raised ProcessEnded: its answer has .* bytes"), marks=pytest.mark.slow),
        ("garbage", "'odd' raised ProcessEnded: what its process sent is no answer"),
        pytest.param(
            *("pickle", "'odd' raised ProcessEnded: what its process sent is no answer"), marks=pytest.mark.slow
        ),
        pytest.param(
            *("other number", "'odd' raised ProcessEnded: what its process sent is no answer"), marks=pytest.mark.slow
        ),
        pytest.param(
            *("announces too much", "'odd' raised ProcessEnded: what its process sent is no answer"),
            marks=pytest.mark.slow,
        ),
        ("half an answer", "'odd' raised ProcessEnded: its process ended with exit code 0"),
        pytest.param(*("shuts the pipe", "'odd' raised ProcessEnded: "), marks=pytest.mark.slow),
        ("exits", "'odd' raised SystemExit: 3"),
    ],
)
def test_process_that_answers_nonsense_is_told_and_replaced(what, named, workers):
    with pytest.raises(RewardError, match=named):
        odd(workers, what)
    assert odd(workers, "plain") == [3.0, 4.0]


def test_answer_to_an_earlier_request_is_not_taken_for_this_one(workers):
    """As if the process had answered twice, or late."""
    assert odd(workers, "answers twice") == [1.0, 2.0]
    assert odd(workers, "plain") == [3.0, 4.0]


def test_late_answer_is_never_seen(tmp_path):
    rewards = RewardFunctions(functions.odd, processes=1, timeout=1.0)
    with pytest.raises(RewardError, match=r"did not return within reward_timeout=1\.0"):
        odd(rewards, "late")
    rewards.timeout = 60
    assert odd(rewards, "plain") == [3.0, 4.0]
    rewards.close()


def test_coroutine_that_is_late_does_not_answer_the_next_batch():
    calls = []

    async def slow(completions):
        calls.append(1)
        if len(calls) == 1:
            await asyncio.sleep(0.4)
            return [9.0] * 3
        return [1.0] * 3

    rewards = RewardFunctions(slow, timeout=0.1)
    with pytest.raises(RewardError, match="did not return"):
        rewards(rollouts())
    rewards.timeout = 5
    assert rewards(rollouts())[:, 0].tolist() == [1.0] * 3
