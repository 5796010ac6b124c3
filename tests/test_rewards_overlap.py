"""Reward functions beside other work, and in processes of their own: the same results, in another order."""

import asyncio
import gc
import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from trl_core import get_config, hookimpl
from trl_core.errors import ConfigError, HookResultError, RewardError
from trl_core.processes import FunctionFailed
from trl_core.stages.rewards import RewardFunctions

from . import helpers_rewards as functions
from .helpers_online import table, weights
from .helpers_train import CLOCKS, differences, end_state, make_trainer, newest_checkpoint, prompt_dataset, run_in_two

LIMIT = 30.0
SMALL = {"max_steps": 2, "steps_per_generation": 1, "num_iterations": 1, "save_strategy": "no"}


def dataset(rows=5, **columns):
    listed = [{**row, "answer": "y" * i} for i, row in enumerate(prompt_dataset(rows))]
    return Dataset.from_list([{**row, **{k: v[i] for k, v in columns.items()}} for i, row in enumerate(listed)])


def trainer_of(folder, *rewards, evaluation=None, train=None, callbacks=(), rollouts=None, algorithm="grpo", **options):
    """A small trainer; evaluation takes one prompt a batch."""
    arguments = {"reward_funcs": list(rewards), "callbacks": list(callbacks), "rollouts": rollouts}
    arguments["train_dataset"] = lambda: train or dataset()
    if algorithm == "gfpo":
        arguments["group_filter_func"] = "shortest"
    if evaluation is not None:
        arguments["eval_dataset"] = evaluation
    options = {**SMALL, "per_device_eval_batch_size": 4, **options}
    return make_trainer(folder, algorithm, arguments, **options)


class Watch(TrainerCallback):
    """Notes when generations begin; sets an event, or makes a file, for each."""

    def __init__(self, folder=None):
        self.begun, self.events, self.folder, self.seen = 0, [threading.Event() for _ in range(20)], folder, []

    @hookimpl(wrapper=True)
    def generate(self):
        self.begun += 1
        self.seen.append(f"generate {self.begun}")
        self.events[self.begun - 1].set()
        if self.folder is not None:
            Path(self.folder, str(self.begun)).touch()
        return (yield)


def without_clocks(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith(CLOCKS)}


def random_state():
    return [random.getstate(), torch.get_rng_state()]


def children():
    """Processes of reward functions that this one has."""
    found = psutil.Process().children(recursive=True)
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(p.cmdline())]


# -- evaluation: a batch is scored while the next one is generated ----------------------------------------------------
def test_evaluation_generates_the_next_batch_while_one_is_scored(tmp_path):
    watch, calls = Watch(), []

    async def patient(completions, **_):
        calls.append(watch.begun)
        if len(calls) < 4:
            assert await asyncio.to_thread(watch.events[len(calls)].wait, LIMIT), "the next generation never came"
        return functions.reward(completions)

    trainer = trainer_of(tmp_path, patient, evaluation=dataset(4), callbacks=[watch], reward_timeout=LIMIT)
    trainer.evaluate()
    # Each call begins after its own generation, and none before the one before it has returned.
    assert calls == [1, 2, 3, 4] and watch.begun == 4


def test_evaluation_generates_the_next_batch_while_another_process_scores(tmp_path):
    wanted = [str(tmp_path / str(i)) for i in (2, 3, 4)] + [""]
    watch = Watch(tmp_path)
    data = dataset(4, wanted=wanted)
    options = {"callbacks": [watch], "train": data, "reward_processes": 1, "reward_timeout": LIMIT}
    trainer = trainer_of(tmp_path / "out", functions.after_file, evaluation=data, **options)
    assert trainer.evaluate()["eval_reward"] > 0
    trainer.reward_functions.close()


MIXES = {
    "coroutine": ([functions.chatty_awaited], {}),
    "process": ([functions.chatty], {"reward_processes": 1}),
    "all_kinds": ([table(1.0, None, 0.5), functions.awaited, functions.chatty_awaited], {}),
    "coroutine_and_processes": ([functions.awaited, functions.half, functions.chatty], {"reward_processes": 2}),
}


@pytest.mark.parametrize("mix", MIXES)
def test_evaluation_is_the_same_to_the_last_bit(mix, tmp_path):
    rewards, options = MIXES[mix]
    ends = []
    for overlap in (False, True):
        trainer = trainer_of(
            tmp_path / str(overlap),
            *rewards,
            evaluation=dataset(3),
            beta=0.1,
            overlap_rewards=overlap,
            per_device_eval_batch_size=4,
            **options,
        )
        assert trainer.overlaps is overlap
        ends.append([without_clocks(trainer.evaluate()), *random_state(), trainer.metrics.tick, trainer.num_tokens])
        trainer.reward_functions.close()
    assert differences(*ends) == []
    assert {"eval_reward", "eval_kl", "eval_loss"} <= ends[0][0].keys()
    assert "eval_chatty/length" in ends[0][0] and ends[0][3] == 3


def test_evaluation_time_for_scores_is_the_time_waited(tmp_path):
    watch = Watch()

    async def patient(completions, **_):
        # The first call waits for the second generation, which takes a while.
        if watch.begun == 1:
            await asyncio.to_thread(watch.events[1].wait, LIMIT)
        return functions.reward(completions)

    class Slow(TrainerCallback):
        @hookimpl(wrapper=True)
        def generate(self):
            time.sleep(0.5)
            return (yield)

    trainer = trainer_of(tmp_path, patient, evaluation=dataset(2), callbacks=[Slow(), watch])
    metrics = trainer.evaluate()
    assert metrics["eval_time/generate"] > 0.5
    assert metrics["eval_time/score"] < 0.4


# -- what is never overlapped -----------------------------------------------------------------------------------------
def test_plain_functions_are_called_before_anything_else_goes_on(tmp_path):
    watch = Watch()

    def plain(completions, **_):
        watch.seen.append("plain")
        time.sleep(0.05)
        watch.seen.append("end of plain")
        return functions.reward(completions)

    trainer = trainer_of(tmp_path, functions.awaited, plain, evaluation=dataset(3), callbacks=[watch])
    trainer.evaluate()
    pieces = [[f"generate {i}", "plain", "end of plain"] for i in (1, 2, 3)]
    assert watch.seen == [item for piece in pieces for item in piece]


class OwnScore(TrainerCallback):
    @hookimpl(wrapper=True)
    def score(self):
        return (yield) * 1.0


class Remembers(Watch):
    """Its loss term belongs to the batch it saw last."""

    @hookimpl
    def loss_terms(self, logps):
        self.seen.append(f"loss {self.begun}")
        return {}


@pytest.mark.parametrize("how", ["hook", "option", "plain", "memory"])
def test_without_overlap_a_batch_is_scored_before_the_next_generation(how, tmp_path):
    watch, calls = Remembers() if how == "memory" else Watch(), []

    async def noted(completions, **_):
        await asyncio.sleep(0.05)
        calls.append(watch.begun)
        return functions.reward(completions)

    def plain(completions, **_):
        calls.append(watch.begun)
        return functions.reward(completions)

    callbacks = [watch, OwnScore()] if how == "hook" else [watch]
    function = plain if how == "plain" else noted
    options = {"overlap_rewards": how != "option"}
    trainer = trainer_of(tmp_path, function, evaluation=dataset(3), callbacks=callbacks, **options)
    assert trainer.overlaps is (how == "memory")
    trainer.evaluate()
    assert calls == [1, 2, 3]
    if how == "memory":
        assert watch.seen == [f"{what} {i}" for i in (1, 2, 3) for what in ("generate", "loss")]


# -- training: rows are measured while they are scored ----------------------------------------------------------------
MEASURED = {"reference": {"beta": 0.1}, "old_logps": {"num_iterations": 2, "gradient_accumulation_steps": 1}}


@pytest.mark.parametrize("what", MEASURED)
def test_models_measure_the_rows_while_they_are_scored(what, tmp_path):
    measured = threading.Event()

    async def patient(completions, **_):
        assert await asyncio.to_thread(measured.wait, LIMIT), "nothing was measured meanwhile"
        return functions.reward(completions)

    options = {**MEASURED[what], "max_steps": 1}
    trainer = trainer_of(tmp_path, patient, **options)
    measure = trainer._measure

    def noted(samples):
        measure(samples)
        assert (samples.ref_logps if what == "reference" else samples.old_logps) is not None
        measured.set()

    trainer._measure = noted
    trainer.train()
    assert trainer.state.global_step == 1


class Keeps(TrainerCallback):
    @hookimpl
    def keep(self, rollouts):
        return rollouts.reward > 1.0


class Notes(TrainerCallback):
    @hookimpl
    def annotate(self, samples):
        assert not samples.reward.isnan().any()
        return {"own": samples.expand(samples.reward)}


class References(TrainerCallback):
    @hookimpl
    def reference_logps(self, samples):
        assert not samples.reward.isnan().any()
        return torch.zeros_like(samples.advantages)


@pytest.mark.parametrize("hook", [Keeps, Notes, References, "dynamic_sampling"])
def test_what_may_depend_on_rewards_waits_for_them(hook, tmp_path):
    seen = []

    async def noted(completions, **_):
        await asyncio.sleep(0.05)
        seen.append("scored")
        return functions.reward(completions)

    callbacks, options = ([], {hook: True}) if isinstance(hook, str) else ([hook()], {})
    trainer = trainer_of(tmp_path, noted, callbacks=callbacks, beta=0.1, max_steps=1, **options)
    measure = trainer._measure
    trainer._measure = lambda samples: (seen.append("measured"), measure(samples))
    trainer.train()
    assert seen[-2:] == ["scored", "measured"] and seen.count("measured") == 1


TRAINED = {
    "coroutine": ([functions.chatty_awaited], {"beta": 0.1}),
    "process": ([functions.chatty], {"beta": 0.1, "reward_processes": 1}),
    "all_kinds": (
        [table(1.0, None, 0.5), functions.awaited],
        {"num_iterations": 2, "gradient_accumulation_steps": 3},
    ),
    # Several generation batches in an optimizer step, and a filter.
    "filter": ([functions.awaited], {"algorithm": "gfpo", "num_remains_in_group": 2, "gradient_accumulation_steps": 4}),
    "refilled": ([functions.awaited], {"dynamic_sampling": True}),
}


def trained(folder, name, overlap, resume=None, **options):
    rewards, own = TRAINED[name]
    settings = {
        "steps_per_generation": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "eval_steps": 2,
        **own,
        **options,
    }
    trainer = trainer_of(folder, *rewards, evaluation=dataset(3), overlap_rewards=overlap, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_the_same_to_the_last_bit(name, tmp_path):
    ends = []
    for overlap in (False, True):
        trainer = trained(tmp_path / str(overlap), name, overlap)
        ends.append([end_state(trainer), *random_state()])
    assert differences(*ends) == []
    assert trainer.state.global_step == 4 and len(ends[0][0]["log"]) == 6


@pytest.mark.parametrize("name", ["coroutine", "process"])
def test_run_resumed_in_the_middle_of_a_generation_batch_is_the_same(name, tmp_path):
    # With two micro-steps of a generation batch, step 3 begins a second one and checkpoint-3 is inside it.
    whole = trained(tmp_path, name, True)
    state, numbers = end_state(whole), random_state()
    resumed = trained(tmp_path, name, True, resume=str(tmp_path / "checkpoint-3"), save_strategy="no")
    assert differences(end_state(resumed), state) == [] and differences(random_state(), numbers) == []


def test_completion_log_has_the_columns_of_functions(tmp_path):
    import pyarrow.parquet

    for name, rewards, options in (("here", functions.chatty_awaited, {}), ("there", functions.chatty, {})):
        options = {"log_completions": True, "num_completions_to_print": 0, "max_steps": 2}
        trainer = trainer_of(tmp_path / name, rewards, beta=0.1, reward_processes=int(name == "there"), **options)
        trainer.train()
        tables = [pyarrow.parquet.read_table(p) for p in sorted((tmp_path / name).glob("completions/*.parquet"))]
        assert [table["extra/seen"].to_pylist() for table in tables] == [[0] * 4 + [1] * 4]


# -- failures beside other work ---------------------------------------------------------------------------------------
def test_failure_in_an_evaluation_stops_the_run_after_saving(tmp_path):
    calls = []

    async def flaky(completions, **_):
        calls.append(1)
        if len(calls) == 4:  # two steps, then the second batch of the evaluation
            raise KeyError("no such answer")
        return functions.reward(completions)

    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "callbacks": [Watch()]}
    trainer = trainer_of(tmp_path, flaky, evaluation=dataset(3), **options)
    with pytest.raises(RewardError, match="'flaky' raised KeyError: 'no such answer'"):
        trainer.train()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


class FailsAt(Watch):
    @hookimpl(wrapper=True)
    def generate(self):
        answer = yield
        self.begun += 1
        if self.begun == 2:
            raise HookResultError("The backend is gone.", mend="Start it again.")
        return answer


@pytest.mark.parametrize("reward_fails", [True, False])
def test_of_two_failures_the_one_of_the_earlier_batch_is_raised(reward_fails, tmp_path):
    async def brittle(completions, **_):
        if reward_fails:
            raise KeyError("first")
        return functions.reward(completions)

    for overlap in (True, False):
        trainer = trainer_of(tmp_path, brittle, evaluation=dataset(3), callbacks=[FailsAt()], overlap_rewards=overlap)
        error, message = (RewardError, "first") if reward_fails else (HookResultError, "backend is gone")
        with pytest.raises(error, match=message):
            trainer.evaluate()


def test_timeout_beside_other_work_names_what_hangs(tmp_path):
    release = threading.Event()

    async def quick(completions, **_):
        return functions.reward(completions)

    async def patient(completions, **_):
        await asyncio.to_thread(release.wait, LIMIT)
        return functions.reward(completions)

    trainer = trainer_of(tmp_path, quick, patient, beta=0.1, reward_timeout=0.3)
    try:
        with pytest.raises(RewardError, match=r"\['patient'\] did not return within reward_timeout=0.3"):
            trainer.train()
    finally:
        release.set()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    code, errors = run_in_two(Path(__file__).with_name("script_two_rewards.py"), folder)
    assert code == 0, errors[-6000:]
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_train_and_evaluate_as_without_overlap(two, rank):
    ends = torch.load(two / f"ends-{rank}.pt", weights_only=False)
    assert differences(ends[True], ends[False]) == []
    assert any("eval_reward" in line for line in ends[True]["log"])


def test_failure_of_one_of_two_processes_stops_both_after_saving(two):
    other, own = (json.loads((two / f"flaky-{rank}.json").read_text()) for rank in (0, 1))
    assert own["error"][0] == "RewardError" and "'flaky' raised KeyError: 'no such answer'" in own["error"][1]
    assert "Process 1 failed: The reward function 'flaky' raised KeyError" in other["error"][1]
    assert own["step"] == other["step"] == 2
    assert newest_checkpoint(two / "flaky") == two / "flaky" / "checkpoint-2"


# -- processes of reward functions ------------------------------------------------------------------------------------
def rollouts_of(folder, *names, **options):
    """A trainer whose rollouts are fixed and rewards are in a process of their own."""
    listed = [getattr(functions, name) for name in names]
    options = {"max_steps": 1, "reward_processes": 1, "reward_timeout": LIMIT, **options}
    data = dataset(5, folder=[str(folder)] * 5)
    return trainer_of(folder / "out", *listed, train=data, **options)


def test_functions_in_processes_are_called_beside_each_other(tmp_path):
    trainer = rollouts_of(tmp_path, "left", "right", reward_processes=2)
    trainer.train()
    assert trainer.state.global_step == 1


def test_process_imports_no_torch_unless_the_function_does(tmp_path):
    trainer = rollouts_of(tmp_path, "alone")
    trainer.train()
    assert trainer.state.log_history[0]["rewards/alone/mean"] == 0.0


def test_rows_are_dealt_out_for_a_function_that_scores_row_by_row(tmp_path):
    ends = []
    for processes, name in ((2, "parts_meet"), (0, "reward")):
        trainer = rollouts_of(tmp_path, name, reward_processes=processes, max_steps=2)
        trainer.train()
        ends.append(weights(trainer))
    assert len(list(tmp_path.glob("part-*"))) == 2
    assert torch.equal(*ends)


def test_row_of_a_part_is_named_by_its_place_in_the_batch(tmp_path):
    with pytest.raises(RewardError, match=r"'no_numbers' returned 'word' for row 1;"):
        rollouts_of(tmp_path, "no_numbers", reward_processes=2).train()


def test_more_processes_than_functions_are_not_started(tmp_path):
    trainer = rollouts_of(tmp_path, "reward", "half", reward_processes=8)
    assert len(trainer.reward_functions._workers) == 2
    trainer.reward_functions.close()


def test_models_and_coroutines_stay_in_this_process(tmp_path):
    class Scorer:
        def __init__(self):
            self.model = torch.nn.Linear(2, 1)

        def __call__(self, completions, **_):
            return functions.reward(completions)

    rewards = RewardFunctions([Scorer(), functions.awaited], processes=2)
    assert rewards._workers == [] and rewards.overlaps
    assert not RewardFunctions([Scorer()], processes=2).overlaps


@pytest.mark.parametrize("number", [-1])
def test_negative_number_of_processes_is_refused(number, tmp_path):
    with pytest.raises(ConfigError, match="reward_processes=-1 is not a whole number of at least 0"):
        get_config("grpo")(output_dir=str(tmp_path), reward_processes=number)


def inner():
    def reward(completions, **_):
        return [0.0] * len(completions)

    return reward


def locked():
    made = functions.Counting()
    made.lock = threading.Lock()
    return made


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda completions: [0.0], "<lambda>"),
        (inner(), "'reward_2'.*inner"),
        (locked(), "'counting'.*lock"),
    ],
)
def test_function_that_cannot_be_sent_is_refused_when_the_trainer_is_made(function, named, tmp_path):
    with pytest.raises(ConfigError, match=named) as caught:
        trainer_of(tmp_path, functions.reward, function, reward_processes=1)
    assert "top level of a module" in caught.value.mend and children() == []


def test_function_that_cannot_be_imported_there_is_refused_when_the_trainer_is_made(tmp_path, monkeypatch):
    import types

    module = types.ModuleType("made_up")
    exec("def ghost(completions): return [0.0] * len(completions)", vars(module))
    monkeypatch.setitem(sys.modules, "made_up", module)
    with pytest.raises(ConfigError, match=r"\['ghost'\].*No module named 'made_up'"):
        trainer_of(tmp_path, module.ghost, reward_processes=1)
    gc.collect()


def test_argument_that_cannot_be_sent_is_told(tmp_path):
    trainer = rollouts_of(tmp_path, "reward")
    trainer.state.stateful_callbacks["own"] = {"open": lambda: None}
    with pytest.raises(RewardError, match=r"'reward' is called in another process.*trainer_state") as caught:
        trainer.reward_functions.start(
            trainer.begin_roll_out(list(dataset(1, folder=[""])), 2)[1], trainer_state=trainer.state
        )
    assert "reward_processes=0" in caught.value.mend
    trainer.reward_functions.close()


@pytest.mark.parametrize(
    ("name", "message", "traced"),
    [
        ("raises", "'raises' raised KeyError: 'no such answer'", 'raise KeyError("no such answer")'),
        ("raises_odd", "'raises_odd' raised Odd: odd indeed", 'raise Odd("odd", "indeed")'),
    ],
)
def test_error_of_a_process_arrives_as_text_with_its_traceback(name, message, traced, tmp_path):
    with pytest.raises(RewardError, match=message) as caught:
        rollouts_of(tmp_path, "reward", name).train()
    assert type(caught.value.__cause__) is FunctionFailed
    assert traced in caught.value.__cause__.__notes__[0]
    assert children() == []


def test_wrong_number_of_values_from_a_process_is_refused(tmp_path):
    with pytest.raises(RewardError, match="'short' returned 3 values for 4 rows"):
        rollouts_of(tmp_path, "short").train()


def test_process_that_dies_is_told_with_its_function(tmp_path):
    trainer = rollouts_of(tmp_path, "dies", "reward")
    with pytest.raises(RewardError, match="'dies' raised ProcessEnded: its process ended with exit code 3"):
        trainer.train()
    assert children() == []


def test_process_that_hangs_is_ended_with_what_it_has_started(tmp_path):
    trainer = rollouts_of(tmp_path, "hangs", reward_timeout=2.0)
    with pytest.raises(RewardError, match=r"\['hangs'\] did not return within reward_timeout=2.0"):
        trainer.train()
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2 and all(gone(pid) for pid in pids) and children() == []
    (tmp_path / "mended").touch()
    trainer.train()
    assert trainer.state.global_step == 1 and children() == []


def gone(pid, seconds=10.0):
    end = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_batch_that_was_given_up_does_not_disturb_the_next(tmp_path):
    trainer = rollouts_of(tmp_path, "hangs", "reward")
    rewards = trainer.reward_functions
    rows = trainer.begin_roll_out(list(dataset(1, folder=[str(tmp_path)])), 2)[1]
    rewards.start(rows)
    functions.wait_for(tmp_path / "pids")
    (tmp_path / "mended").touch()
    expected = [[x, x] for x in functions.reward(rows.completions)]
    assert torch.allclose(rewards(rows), torch.tensor(expected))
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    rewards.close()


@pytest.mark.parametrize("fails", [False, True])
def test_no_process_is_left_after_training(fails, tmp_path):
    trainer = rollouts_of(tmp_path, "reward", "raises" if fails else "half", reward_processes=2)
    assert len(children()) == 2
    if fails:
        with pytest.raises(RewardError):
            trainer.train()
    else:
        trainer.train()
    assert children() == []


# -- scripts ----------------------------------------------------------------------------------------------------------
SCRIPT = """
import sys, time

sys.path.insert(0, {root!r})
from tests.helpers_rewards import hangs, reward, wait_for


def own(completions):
    return reward(completions)


{guard}
    import torch
    from trl_core import Rollouts
    from trl_core.stages.rewards import RewardFunctions

    mode, folder = sys.argv[1:]
    rewards = RewardFunctions([own, hangs] if mode != "one" else own, processes=2)
    print(*[worker._process.pid for worker in rewards._workers], flush=True)
    if mode in ("busy", "killed"):
        texts = {{"prompts": ["a"], "completions": ["b"], "columns": {{"folder": [folder]}}}}
        rewards.start(Rollouts.from_lists([[5]], [[6]], truncated=torch.zeros(1), **texts))
        wait_for(folder + "/pids")
    if mode == "killed":
        time.sleep(600)
"""


def script(folder, mode, guard="if __name__ == '__main__':"):
    file = folder / "own_script.py"
    file.write_text(SCRIPT.format(root=str(Path(__file__).resolve().parent.parent), guard=guard))
    command = [sys.executable, str(file), mode, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("mode", "processes"), [("idle", 2), ("busy", 4), ("killed", 4)])
def test_no_process_is_left_when_the_program_ends(mode, processes, tmp_path):
    program = script(tmp_path, mode)
    pids = program.stdout.readline().split()
    if mode == "killed":
        functions.wait_for(tmp_path / "pids")
        program.kill()
    _, errors = program.communicate(timeout=60)
    assert program.returncode == (-signal.SIGKILL if mode == "killed" else 0), errors
    if mode != "idle":
        pids += (tmp_path / "pids").read_text().split()
    assert len(pids) == processes and all(gone(int(pid)) for pid in pids)


def test_script_without_the_main_guard_is_told_of_it(tmp_path):
    program = script(tmp_path, "one", guard="if True:")
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 1
    assert "ended with exit code 1" in errors and "under `if __name__ == '__main__':`" in errors
