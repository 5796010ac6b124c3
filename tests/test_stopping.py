"""A run that is told to stop, or whose callbacks fail, keeps what it has done, and goes on as if nothing had been."""

import contextlib
import os
import signal
import threading

import pytest
from transformers import TrainerCallback

from trl_core import hookimpl
from trl_core.errors import PluginError
from trl_core.training.state import read_manifest

from . import helpers_train
from .helpers_offline import make_trainer, texts
from .helpers_train import differences, end_state, newest_checkpoint, reward

SLOW = pytest.mark.slow
# Two steps an epoch; the order, Adam and the schedule have a state of their own.
RUN = {"max_steps": 6, "train_sampling_strategy": "random", "optim": "adamw_torch", "lr_scheduler_type": "linear"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


class At(TrainerCallback):
    """Does something when an event comes at a step."""

    def __init__(self, event, step, action):
        self.step, self.action = step, action
        setattr(self, event, self.event)

    def event(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action()


class Count(TrainerCallback):
    """A callback with a state that the end of each step moves on."""

    steps = evaluations = 0

    def on_step_end(self, args, state, control, **_):
        self.steps += 1

    @hookimpl
    def after_step(self, step, policy, reference):
        self.steps += 10

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def run(folder, *callbacks, **options):
    """An SFT trainer; the callbacks come before the one with a state."""
    arguments = {"callbacks": [*callbacks, Count()], "eval_dataset": texts(4, 5)}
    return make_trainer(folder, "SFT", arguments, **{**RUN, **options})


def send(number):
    return lambda: os.kill(os.getpid(), number)


def fail():
    raise LookupError("mine")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The end of a run that nothing happened to, by its options."""
    ends = {}

    def end(**options):
        key = repr(sorted(options.items()))
        if key not in ends:
            trainer = run(tmp_path_factory.mktemp("whole"), **options)
            trainer.train()
            ends[key] = end_state(trainer)
        return ends[key]

    return end


def resumed(folder, **options):
    trainer = run(folder, **options)
    trainer.train(resume_from_checkpoint=True)
    return end_state(trainer)


# -- signals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "event", "at", "saved"),
    [
        (signal.SIGINT, "on_step_begin", 2, 3),
        (signal.SIGTERM, "on_save", 3, 3),
        *(
            pytest.param(*case, marks=SLOW)
            for case in (
                (signal.SIGTERM, "on_pre_optimizer_step", 3, 4),
                (signal.SIGTERM, "on_optimizer_step", 1, 2),
                (signal.SIGINT, "on_log", 3, 3),
                (signal.SIGINT, "on_evaluate", 2, 2),
                (signal.SIGINT, "on_epoch_begin", 4, 5),
                (signal.SIGTERM, "on_step_end", 6, 6),
                (signal.SIGHUP, "on_step_begin", 1, 2),
            )
        ),
    ],
)
def test_signal_stops_at_the_end_of_the_step_and_the_run_goes_on_from_there(
    number, event, at, saved, whole, tmp_path, capsys
):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    trainer = run(tmp_path, At(event, at, send(number)), save_strategy="steps", save_steps=3, **EVALUATED)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stopped:
        trainer.train()
    assert number == signal.SIGINT or stopped.value.code == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Stopped by")]
    assert line == (
        f"Stopped by {signal.Signals(number).name} after step {saved} of 6. Checkpoint: {tmp_path}/checkpoint-{saved}. "
        "Go on: trainer.train(resume_from_checkpoint=True)"
    )
    assert newest_checkpoint(tmp_path).name == f"checkpoint-{saved}"
    assert differences(resumed(tmp_path, **EVALUATED), whole(**EVALUATED)) == []


def test_signal_in_a_reward_function_leaves_a_run_that_ends_as_the_one_without(tmp_path):
    options = {"steps_per_generation": 2, "num_iterations": 1, "max_steps": 4, "save_strategy": "no"}
    calls = []

    def interrupting(completions, **_):
        calls.append(len(completions))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return reward(completions)

    interrupting.__name__ = "reward"
    made = helpers_train.make_trainer(tmp_path, trainer={"reward_funcs": interrupting}, **options)
    with pytest.raises(SystemExit):
        made.train()
    # The second call is for the third step.
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    ends = []
    for folder, resume in ((tmp_path, True), (tmp_path / "whole", None)):
        made = helpers_train.make_trainer(folder, trainer={"reward_funcs": interrupting}, **options)
        made.train(resume_from_checkpoint=resume)
        ends.append(end_state(made))
    assert differences(*ends) == []


def test_second_signal_stops_at_once(tmp_path, capsys):
    def twice():
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    trainer = run(tmp_path, At("on_step_begin", 3, twice), save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    assert "checkpoint-2. Go on" in capsys.readouterr().err


def test_signal_before_the_first_step_is_done_stops_at_once_and_saves_nothing(tmp_path, capsys):
    reached = []
    callbacks = At("on_step_begin", 0, send(signal.SIGTERM)), At("on_step_end", 1, lambda: reached.append(1))
    trainer = run(tmp_path, *callbacks)
    with pytest.raises(SystemExit):
        trainer.train()
    assert not reached and not [*tmp_path.glob("checkpoint-*")]
    assert "before the first step. Nothing is saved." in capsys.readouterr().err
    run(tmp_path).train()  # nothing of it is in the way


def test_signal_in_an_evaluation_does_not_wait_for_its_end(whole, tmp_path):
    batches = []
    trainer = run(tmp_path, per_device_eval_batch_size=1, **EVALUATED)
    evaluate = trainer._evaluate_batch

    def interrupting(batch):
        batches.append(1)
        send(signal.SIGINT)()
        return evaluate(batch)

    trainer._evaluate_batch = interrupting
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(batches) == 1 and newest_checkpoint(tmp_path).name == "checkpoint-2"
    # What was cut short is done when the run goes on, so that its log is that of a run without a stop.
    options = {"per_device_eval_batch_size": 1, **EVALUATED}
    assert differences(resumed(tmp_path, **options), whole(**options)) == []


@pytest.mark.parametrize("at", [1, pytest.param(3, marks=SLOW)])
def test_stop_at_the_end_of_an_epoch_loses_nothing_that_was_due_there(at, whole, tmp_path):
    options = {"eval_strategy": "epoch", "logging_strategy": "epoch"}
    trainer = run(tmp_path, At("on_step_begin", at, send(signal.SIGTERM)), **options)
    with pytest.raises(SystemExit):
        trainer.train()
    assert newest_checkpoint(tmp_path).name == f"checkpoint-{at + 1}"
    assert differences(resumed(tmp_path, **options), whole(**options)) == []


def test_handler_of_the_program_stays_and_is_called(tmp_path):
    called = []
    before = signal.signal(signal.SIGTERM, lambda *_: called.append(1))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        trainer = run(tmp_path, At("on_step_begin", 1, send(signal.SIGTERM)), max_steps=2)
        assert trainer.train().global_step == 2
        assert called == [1] and signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


@SLOW
def test_training_in_another_thread_leaves_the_signals_alone(tmp_path):
    before, found = signal.getsignal(signal.SIGINT), []
    trainer = run(tmp_path, At("on_step_begin", 1, lambda: found.append(signal.getsignal(signal.SIGINT))), max_steps=2)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert found == [before] and trainer.state.global_step == 2


def test_forked_child_ends_as_if_it_had_no_handler_of_ours(tmp_path):
    ended = []

    def child():
        if (pid := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
        ended.append(os.WTERMSIG(os.waitpid(pid, 0)[1]))

    assert run(tmp_path, At("on_step_begin", 1, child), max_steps=2).train().global_step == 2
    assert ended == [signal.SIGTERM]


@SLOW
def test_stop_of_a_run_that_keeps_only_models_says_that_it_cannot_go_on(tmp_path, capsys):
    trainer = run(tmp_path, At("on_step_begin", 1, send(signal.SIGTERM)), save_only_model=True)
    with pytest.raises(SystemExit):
        trainer.train()
    assert "checkpoint-2 holds the model alone (save_only_model=True)" in capsys.readouterr().err


# -- callbacks that fail ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("event", "at", "saved"),
    [
        ("on_step_end", 3, 3),
        ("on_log", 3, 3),
        *(
            pytest.param(*case, marks=SLOW)
            for case in (
                ("on_step_begin", 3, 3),
                ("on_pre_optimizer_step", 3, 3),
                ("on_optimizer_step", 3, 4),
                ("on_evaluate", 4, 4),
                ("on_save", 3, 3),
                ("on_epoch_end", 4, 4),
                ("on_epoch_begin", 4, 4),
            )
        ),
    ],
)
def test_callback_that_fails_costs_no_step(event, at, saved, whole, tmp_path):
    options = {"logging_steps": 1, **EVALUATED}
    trainer = run(tmp_path, At(event, at, fail), save_strategy="steps", save_steps=3, **options)
    with pytest.raises(LookupError, match="mine"):
        trainer.train()
    assert newest_checkpoint(tmp_path).name == f"checkpoint-{saved}"
    assert differences(resumed(tmp_path, **options), whole(**options)) == []


@SLOW
def test_keyboard_interrupt_from_a_callback_is_raised_after_the_checkpoint(tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, At("on_step_end", 3, interrupt)).train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"


@SLOW
def test_keyboard_interrupt_from_a_reward_function_is_that_of_the_run(tmp_path):
    calls = []

    def interrupting(completions, **_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return reward(completions)

    options = {"steps_per_generation": 1, "num_iterations": 1, "max_steps": 3, "save_strategy": "no"}
    with pytest.raises(KeyboardInterrupt):
        helpers_train.make_trainer(tmp_path, trainer={"reward_funcs": interrupting}, **options).train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-1"


class Broken:
    """Hooks whose `after_step` fails once, before it does what it is for."""

    def __init__(self, at=None):
        self.at, self.seen = at, []

    @hookimpl
    def after_step(self, step, policy, reference):
        if step == self.at:
            raise LookupError("mine")
        self.seen.append(step)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


def test_hook_after_the_step_that_failed_is_called_once_more_when_it_is_mended(tmp_path):
    def made(folder, hooks, **options):
        trainer = make_trainer(folder, "SFT", {"callbacks": [Count()]}, **RUN, **options)
        trainer.composition.add_provider(trainer.hooks, "broken", hooks)
        return trainer

    untouched = made(tmp_path / "whole", Broken())
    untouched.train()
    with pytest.raises(PluginError, match=r"The hook 'after_step' of broken .* raised LookupError: mine") as failed:
        made(tmp_path / "run", Broken(at=3)).train()
    assert isinstance(failed.value.__cause__, LookupError)
    assert read_manifest(tmp_path / "run" / "checkpoint-3")["owed"]["after_step"] == ["broken"]
    mended = made(tmp_path / "run", Broken(), resume_check="warn")  # mended hooks are other ones
    mended.train(resume_from_checkpoint=True)
    assert differences(end_state(mended), end_state(untouched)) == []
    assert mended.state_of_run()["hooks"]["broken"]["seen"] == [1, 2, 3, 4, 5, 6]


@SLOW
def test_callback_that_removes_itself_at_the_end_of_a_step_is_removed(tmp_path):
    trainer = run(tmp_path, max_steps=2)
    once = At("on_step_end", 1, lambda: trainer.remove_callback(once))
    trainer.add_callback(once)
    trainer.train()
    assert once not in trainer.callback_handler.callbacks


# -- the last line ----------------------------------------------------------------------------------------------------
def lines(folder, *callbacks, **options):
    trainer = run(folder, *callbacks, **options)
    with contextlib.suppress(SystemExit):
        trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def test_last_line_has_the_steps_that_were_not_logged_before(tmp_path):
    each = [line["loss"] for line in lines(tmp_path / "each")]
    found = lines(tmp_path / "some", logging_steps=4)
    assert [line["step"] for line in found] == [4, 6]
    assert found[1]["loss"] == pytest.approx((each[4] + each[5]) / 2)
    assert found[1]["grad_norm"] > 0 and found[1]["mean_token_accuracy"] >= 0
    stopped = lines(tmp_path / "stopped", At("on_step_begin", 4, send(signal.SIGTERM)), logging_steps=3)
    assert [line["step"] for line in stopped] == [3, 5]
    assert stopped[1]["loss"] == pytest.approx((each[3] + each[4]) / 2)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        pytest.param({"logging_steps": 3}, [3, 6], marks=SLOW),
        pytest.param({"logging_strategy": "no"}, [], marks=SLOW),
        ({"logging_strategy": "epoch", "max_steps": 5}, [2, 4, 5]),
        pytest.param({"logging_steps": 4, "logging_first_step": True}, [1, 4, 6], marks=SLOW),
    ],
)
def test_steps_are_logged_once(options, steps, tmp_path):
    assert [line["step"] for line in lines(tmp_path, **options)] == steps


def test_evaluation_that_a_callback_wants_is_made_up_for(tmp_path):
    class Wants(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_evaluate |= state.global_step == 2

    def trainer(folder, *callbacks):
        return run(folder, Wants(), *callbacks, eval_strategy="no", max_steps=3)

    def evaluated(trained):
        lines = [{k: v for k, v in line.items() if "time" not in k and "second" not in k} for line in trained]
        return [line for line in lines if any(name.startswith("eval_") for name in line)]

    whole = trainer(tmp_path / "whole")
    whole.train()
    stop = At("on_step_begin", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer(tmp_path / "run", stop).train()
    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert len(evaluated(whole.state.log_history)) == 1
    assert evaluated(resumed.state.log_history) == evaluated(whole.state.log_history)
