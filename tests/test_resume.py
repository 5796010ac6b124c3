"""A run that is stopped at any moment and resumed ends as the run that was not stopped, bit for bit."""

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from trl_core import hookimpl
from trl_core.errors import CheckpointError, NonFiniteLossError, RewardError
from trl_core.testing import FixedRollouts, tiny_model
from trl_core.training import metrics as metrics_module
from trl_core.training.metrics import Metrics
from trl_core.training.state import PARTIAL, read_manifest

from .helpers_train import (
    KILLED,
    adapted_model,
    coarse_reward,
    differences,
    end_state,
    lora_config,
    make_trainer,
    newest_checkpoint,
    prompt_dataset,
    prompt_stream,
    reward,
)

ADAPTIVE = {
    "num_generations": 8,
    "adaptive_difficulty": True,
    "k_very_hard": 4,
    "k_hard": 4,
    "k_medium": 3,
    "k_easy": 2,
    "difficulty_warmup": 2,
}


def varied(name):
    """Whether a logged value took more than one value: what a scenario is about must happen in it."""
    return lambda trainer: len({line[name] for line in trainer.state.log_history if name in line}) > 1


def reference_moved(trainer):
    start = dict(make_trainer(trainer.args.output_dir + "-fresh").model.state_dict())
    return not torch.equal(trainer.reference.module.state_dict()["lm_head.weight"], start["lm_head.weight"])


SCENARIOS = {
    # A window of 8 micro-steps and an epoch of one window: most checkpoints lie inside a window.
    "moving_reference": (reference_moved, {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2}),
    "accumulation": (varied("kl"), {"gradient_accumulation_steps": 2, "max_steps": 6, "beta": 0.1}),
    # Generation in the middle of an optimizer step, and several windows in one step.
    "accumulation_across_windows": (
        varied("num_tokens"),
        {"gradient_accumulation_steps": 3, "num_iterations": 1, "max_steps": 6},
    ),
    "windows_inside_a_step": (
        varied("num_tokens"),
        {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 1, "max_steps": 4},
    ),
    "adaptive_gfpo": (
        varied("gfpo/k_mean"),
        {"algorithm": "gfpo", "trainer": {"group_filter_func": "shortest"}, "num_iterations": 1, **ADAPTIVE},
    ),
    "dynamic_sampling": (
        varied("dynamic_sampling/refilled_groups"),
        {
            "trainer": {"reward_funcs": coarse_reward},
            "dynamic_sampling": True,
            "num_generations": 2,
            "steps_per_generation": 1,
            "max_steps": 6,
        },
    ),
    # Until one of them is seen to have a gradient, rows without advantage go without.
    "rows_without_advantage": (
        varied("frac_reward_zero_std"),
        {
            "trainer": {"model": tiny_model, "reward_funcs": coarse_reward},
            "num_generations": 2,
            "steps_per_generation": 1,
            "beta": 0.1,
            "max_tokens_per_forward": 16,
            "max_steps": 6,
        },
    ),
    "adaptive_entropy": (
        varied("entropy_coef"),
        {
            "use_adaptive_entropy": True,
            "entropy_target": 5.0,
            "entropy_coef": 0.02,
            "top_entropy_quantile": 0.5,
            "steps_per_generation": 2,
            "max_steps": 6,
        },
    ),
    # Nine prompts make two windows of four and a rest; the third window belongs to the second epoch.
    "stream": (
        varied("num_tokens"),
        {"trainer": {"train_dataset": prompt_stream}, "num_iterations": 1, "max_steps": 11},
    ),
    "stream_with_refills": (
        varied("dynamic_sampling/refilled_groups"),
        {
            "trainer": {"train_dataset": prompt_stream, "reward_funcs": coarse_reward},
            "dynamic_sampling": True,
            "num_generations": 2,
            "steps_per_generation": 1,
            "num_iterations": 1,
            "max_steps": 7,
        },
    ),
    "new_adapter": (
        varied("kl"),
        {"trainer": {"peft_config": lora_config()}, "beta": 0.1, "steps_per_generation": 2, "max_steps": 6},
    ),
    "continued_adapter": (
        varied("kl"),
        {"trainer": {"model": adapted_model}, "beta": 0.1, "steps_per_generation": 2, "max_steps": 6},
    ),
    "evaluation": (
        varied("eval_reward"),
        {
            "trainer": {"eval_dataset": prompt_dataset(2)},
            "eval_strategy": "steps",
            "eval_steps": 2,
            "steps_per_generation": 2,
            "max_steps": 6,
        },
    ),
    "checkpointed_activations": (
        varied("loss"),
        {"activation_checkpointing": True, "steps_per_generation": 2, "max_steps": 3},
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_resume_from_every_step_equals_the_uninterrupted_run(name, tmp_path):
    happened, scenario = SCENARIOS[name]
    whole = make_trainer(tmp_path / "whole", **scenario)
    whole.train()
    assert happened(whole)
    expected = end_state(whole)
    steps = range(1, whole.state.max_steps)
    found = {}
    for step in steps:
        trainer = make_trainer(tmp_path / "resumed", **scenario, save_strategy="no")
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        found[step] = differences(end_state(trainer), expected)
    assert found == {step: [] for step in steps}


def test_resumed_adapter_reference_is_the_initial_adapter(tmp_path):
    options = {"beta": 0.1, "steps_per_generation": 2}
    make_trainer(tmp_path, trainer={"model": adapted_model}, max_steps=2, **options).train()
    # Weights of another adapter on the same model, as if the user had loaded something else: the checkpoint's count.
    other = adapted_model()
    with torch.no_grad():
        [parameter.fill_(0.3) for name, parameter in other.named_parameters() if "lora_" in name]
    trainer = make_trainer(tmp_path, trainer={"model": lambda: other}, max_steps=3, **options)
    trainer.train(resume_from_checkpoint=True)
    weights = trainer.model.state_dict()
    initial = {name: value for name, value in adapted_model().state_dict().items() if "lora" in name}
    assert initial
    assert all(torch.equal(weights[name.replace(".default.", ".ref.")], value) for name, value in initial.items())
    assert not any(parameter.requires_grad for name, parameter in trainer.model.named_parameters() if ".ref." in name)


# -- a killed process -------------------------------------------------------------------------------------------------
RUN = {"beta": 0.1, "num_iterations": 1, "steps_per_generation": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of runs whose process was killed at each of `KILLED`, and the end of the run that was not."""
    folder = tmp_path_factory.mktemp("killed")
    script = Path(__file__).with_name("script_kill.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(RUN)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    signals = json.loads(done.stdout.splitlines()[-1])
    assert signals == dict.fromkeys(KILLED, signal.SIGKILL)
    whole = make_trainer(folder / "whole", **RUN, save_strategy="no")
    whole.train()
    return folder, end_state(whole)


@pytest.mark.parametrize("where", KILLED)
def test_killed_run_resumes_to_the_same_end(where, killed):
    folder, expected = killed
    trainer = make_trainer(folder / where, **RUN, save_total_limit=1)
    trainer.train(resume_from_checkpoint=True)
    assert differences(end_state(trainer), expected) == []
    # What the killed run left is gone.
    assert [path.name for path in (folder / where).glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize("where", [where for where in KILLED if where.startswith("in_save")])
def test_kill_during_a_save_leaves_the_earlier_checkpoint(where, killed, tmp_path):
    folder = shutil.copytree(killed[0] / f"{where}-as-left", tmp_path / "copy")
    # The run kept one checkpoint; the fourth was being written.
    assert newest_checkpoint(folder) == folder / "checkpoint-3"
    # What was written of it has not its name.
    assert not (folder / "checkpoint-4").exists() and (folder / PARTIAL / "checkpoint-4").is_dir()


def test_save_limit_keeps_the_best_and_the_newest(tmp_path):
    scores = iter([1.0, 3.0, 2.0, 0.0])
    trainer = make_trainer(
        tmp_path,
        trainer={"eval_dataset": prompt_dataset(2)},
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="score",
        greater_is_better=True,
        save_total_limit=2,
    )
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *a, **k: {**evaluate(*a, **k), "eval_score": next(scores)}
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    make_trainer(folder, max_steps=1, beta=0.1, trainer={"group_filter_func": "shortest"}, algorithm="gfpo").train()
    return folder / "checkpoint-1"


def resume(folder, target, algorithm="gfpo", **options):
    trainer = {"group_filter_func": "shortest"} if algorithm == "gfpo" else {}
    made = make_trainer(target, algorithm, trainer, **{"max_steps": 2, "beta": 0.1, **options})
    return made.train(resume_from_checkpoint=folder)


def test_checkpoint_of_another_algorithm_is_refused(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"'grpo\+gfpo'.*'grpo'"):
        resume(str(checkpoint), tmp_path, "grpo")


def test_checkpoint_with_other_options_is_refused(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"beta: 0\.1 then, 0\.2 now; num_iterations: 2 then, 1 now"):
        resume(str(checkpoint), tmp_path, beta=0.2, num_iterations=1)


def test_resume_check_warn_goes_on_with_other_options(checkpoint, tmp_path, caplog):
    result = resume(str(checkpoint), tmp_path, beta=0.2, resume_check="warn")
    assert result.global_step == 2
    assert "beta: 0.1 then, 0.2 now" in caplog.text


def test_options_that_shape_no_mathematics_may_change(checkpoint, tmp_path):
    assert resume(str(checkpoint), tmp_path, reward_timeout=50.0, logging_steps=2).global_step == 2


def test_every_truncated_or_missing_file_is_refused(checkpoint, tmp_path):
    files = [path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file() and path.suffix != ".md"]
    assert {"model.safetensors", "optimizer.pt", "trl_core_state.json"} <= {str(name) for name in files}
    for name in files:
        for damage in ("cut", "gone"):
            folder = shutil.copytree(checkpoint, tmp_path / f"checkpoint-{name.name}-{damage}")
            content = (folder / name).read_bytes()
            (folder / name).unlink()
            if damage == "cut":
                (folder / name).write_bytes(content[: len(content) // 2])
            with pytest.raises(CheckpointError, match=name.name):
                read_manifest(folder)


def test_truncated_checkpoint_stops_before_training(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt of 'checkpoint-1' has 0 bytes; expected \d+"):
        resume(str(folder), tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": 3}'])
def test_manifest_of_another_form_is_refused(checkpoint, tmp_path, content):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    (folder / "trl_core_state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"trl_core_state\.json is missing or damaged"):
        read_manifest(folder)


def test_no_complete_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resume(True, tmp_path)


def test_missing_checkpoint_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint folder .*checkpoint-3"):
        resume(str(tmp_path / "checkpoint-3"), tmp_path)


def test_checkpoint_without_optimizer_is_refused(tmp_path):
    make_trainer(tmp_path, max_steps=1, save_only_model=True).train()
    with pytest.raises(CheckpointError, match="save_only_model"):
        make_trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


# -- failures in the middle of a run ----------------------------------------------------------------------------------
class Failing:
    """A reward that fails in its n-th call, in one of several ways."""

    __name__ = "flaky"

    def __init__(self, how=None, call=3):
        self.how, self.call, self.calls, self.release = how, call, 0, threading.Event()

    def __call__(self, completions, **_):
        self.calls += 1
        # A reward that draws random numbers: they belong to the state of the run as well.
        values = [value + random.random() for value in reward(completions)]
        if self.calls != self.call or self.how is None:
            return values
        if self.how == "raises":
            raise KeyError("no such answer")
        if self.how == "hangs":
            self.release.wait(60)
        return values[:-1]


FAILURES = {
    "raises": ("'flaky' raised KeyError", {}),
    "counts": ("'flaky' returned 7 values for 8 rows", {}),
    "hangs": (r"\['flaky'\] did not return within reward_timeout=5.0", {"reward_timeout": 5.0}),
}
SHAPES = {
    # options, the failing call, and the optimizer steps done by then
    "between_steps": ({}, 2, 4),
    "between_epochs": ({"trainer": {"train_dataset": lambda: prompt_dataset(2)}}, 2, 4),
    "several_micro_steps": ({"gradient_accumulation_steps": 2}, 2, 2),
    # Generation in the middle of the second optimizer step, whose first micro-batch is from the window before.
    "inside_a_step": (
        {
            "gradient_accumulation_steps": 3,
            "num_iterations": 1,
            "trainer": {"train_dataset": lambda: prompt_dataset(12)},
        },
        3,
        1,
    ),
}


def failing_run(folder, how, call, *, trainer=None, **options):
    function = Failing(how, call)
    settings = {"steps_per_generation": 2, "max_steps": 6, "save_strategy": "no", **options}
    return make_trainer(folder, trainer={**(trainer or {}), "reward_funcs": function}, **settings), function


@pytest.mark.parametrize(
    ("how", "shape"), [*((how, "between_steps") for how in FAILURES), *(("raises", s) for s in list(SHAPES)[1:])]
)
def test_run_with_mended_reward_equals_the_one_that_never_failed(how, shape, tmp_path, caplog):
    message, timeout = FAILURES[how]
    options, call, step = SHAPES[shape]
    whole, _ = failing_run(tmp_path / "whole", None, call, **options)
    whole.train()
    broken, function = failing_run(tmp_path / "run", how, call, **options, **timeout)
    with pytest.raises(RewardError, match=message):
        broken.train()
    function.release.set()
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / f"checkpoint-{step}"
    mended, _ = failing_run(tmp_path / "run", None, call, **options)
    with pytest.raises(CheckpointError, match=rf"reward_funcs\[0\]\.how: '{how}' then, None now"):
        mended.train(resume_from_checkpoint=True)
    mended.args.resume_check = "warn"
    mended.train(resume_from_checkpoint=True)
    assert ("generation batch from before the change: 1." in caplog.text) == (shape == "inside_a_step")
    assert differences(end_state(mended), end_state(whole)) == []


def test_same_trainer_goes_on_after_a_failure(tmp_path):
    whole, _ = failing_run(tmp_path / "whole", None, 2)
    whole.train()
    trainer, _ = failing_run(tmp_path / "run", "raises", 2)
    with pytest.raises(RewardError):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert differences(end_state(trainer), end_state(whole)) == []


def test_failure_leaves_a_checkpoint_of_its_step_alone(tmp_path):
    trainer, _ = failing_run(tmp_path, "raises", 2, save_strategy="steps", save_steps=2)
    written = {}
    save = trainer._save_checkpoint

    def noted(model, trial):
        save(model, trial)
        written.setdefault(trainer.state.global_step, newest_checkpoint(tmp_path).stat().st_mtime_ns)

    trainer._save_checkpoint = noted
    with pytest.raises(RewardError):
        trainer.train()
    newest = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-4" and newest.stat().st_mtime_ns == written[4]


def test_failure_is_reported_although_nothing_can_be_saved(tmp_path, caplog):
    trainer, _ = failing_run(tmp_path, "raises", 2)

    def full(*_):
        raise OSError("No space left on device")

    trainer._save_optimizer_and_scheduler = full
    with pytest.raises(RewardError, match="flaky"):
        trainer.train()
    assert "No space left on device" in caplog.text


def test_failure_in_evaluation_leaves_a_checkpoint(tmp_path):
    # Two calls in training, the third in the evaluation after step 6.
    options = {"eval_strategy": "steps", "eval_steps": 6, "max_steps": 8}
    evaluated = {"eval_dataset": prompt_dataset(2)}
    whole, _ = failing_run(tmp_path / "whole", None, 0, trainer=evaluated, max_steps=8)
    whole.train()
    broken, _ = failing_run(tmp_path / "run", "raises", 3, trainer=evaluated, **options)
    with pytest.raises(RewardError):
        broken.train()
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-6"
    mended, _ = failing_run(tmp_path / "run", None, 0, trainer=evaluated, max_steps=8, resume_check="warn")
    mended.train(resume_from_checkpoint=True)
    assert differences(end_state(mended)["weights"], end_state(whole)["weights"]) == []


def break_loss(trainer, step):
    """Make the loss NaN at one optimizer step."""
    aggregate = trainer._add_router_loss

    def broken(loss, output, accumulation):
        loss = aggregate(loss, output, accumulation)
        return loss * float("nan") if trainer.state.global_step == step else loss

    trainer._add_router_loss = broken


def test_nonfinite_loss_stops_with_rows_and_checkpoint_of_the_step(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="no")
    break_loss(trainer, 2)
    with pytest.raises(NonFiniteLossError, match="loss at step 3 is nan; the 4 rows"):
        trainer.train()
    (rows,) = (tmp_path / "nonfinite").iterdir()
    assert len(json.loads(rows.read_text())["rows"]) == 4
    # The bad micro-batch counts as not done: a run with a mended loss takes it again.
    whole = make_trainer(tmp_path / "whole", max_steps=4, save_strategy="no")
    whole.train()
    resumed = make_trainer(tmp_path, max_steps=4, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert differences(end_state(resumed), end_state(whole)) == []


def test_nonfinite_loss_skip_keeps_the_weights_finite(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="no", on_nonfinite_loss="skip")
    break_loss(trainer, 2)
    trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert [line["step"] for line in trainer.state.log_history if "skipped_nonfinite" in line] == [3]


# -- what else a run keeps --------------------------------------------------------------------------------------------
def test_second_train_starts_with_a_new_generation_batch(tmp_path):
    calls = []

    def counted(completions, **_):
        calls.append(len(completions))
        return reward(completions)

    trainer = make_trainer(tmp_path, trainer={"reward_funcs": counted}, max_steps=3, save_strategy="no")
    trainer.train()
    trainer.train()
    assert len(calls) == 2


def test_slice_without_kept_rows_adds_nothing_to_metrics(tmp_path):
    # Two rows per micro-batch, two kept of four: some micro-batches are empty. Policy and reference are equal.
    entropies = []
    trainer = make_trainer(
        tmp_path,
        "gfpo",
        {"group_filter_func": lambda completions, rewards: [[1.0, 1.0, 0.0, 0.0] for _ in rewards]},
        num_remains_in_group=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        beta=0.1,
        entropy_coef=0.1,
        shuffle_dataset=False,
        disable_dropout=True,
        max_steps=1,
        save_strategy="no",
    )
    hooks = trainer.hooks.objects["grpo"]
    bonus = hooks._entropy_bonus
    hooks._entropy_bonus = lambda entropy, mask: entropies.append(entropy.numel()) or bonus(entropy, mask)
    trainer.train()
    line = trainer.state.log_history[0]
    assert entropies.count(0) == 2 and abs(line["kl"]) < 1e-6


def test_disable_dropout_reaches_every_probability(tmp_path):
    trainer = make_trainer(tmp_path, trainer={"peft_config": lora_config()}, disable_dropout=True)
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        trained, evaluated = (trainer.model.train(mode)(input_ids=ids).logits for mode in (True, False))
        assert torch.equal(trained, evaluated)
        usual = make_trainer(tmp_path).model.train()
        assert not torch.equal(usual(input_ids=ids).logits, usual(input_ids=ids).logits)


def test_metric_of_one_process_is_joined_with_the_same_micro_step(monkeypatch):
    # Process 1 has no rows in the first of two micro-steps and records nothing there.
    first, second = Metrics(), Metrics()
    for tick, (here, there) in enumerate([((1.0, 10), None), ((2.0, 30), (4.0, 10))]):
        first.tick = second.tick = tick
        first.record("train", "m", *here)
        if there is not None:
            second.record("train", "m", *there)
    parts = []
    monkeypatch.setattr(metrics_module, "gather_object", lambda value: parts.extend(value) or value)
    second.drain("train")
    monkeypatch.setattr(metrics_module, "gather_object", lambda value: [*value, *parts])
    assert first.drain("train") == {"m": pytest.approx((1.0 + (2.0 * 30 + 4.0 * 10) / 40) / 2)}


def test_generation_without_loss_tokens_leaves_the_weights(tmp_path):
    # Every completion is cut off and masked; the sampler's log-probabilities are there as well.
    entry = {"completion_ids": [[10, 11, 12]] * 16, "logps": [[-1.0, -2.0, -3.0]] * 16}
    trainer = make_trainer(
        tmp_path,
        trainer={"rollouts": FixedRollouts([entry])},
        mask_truncated_completions=True,
        top_entropy_quantile=0.5,
        beta=0.1,
        max_steps=3,
    )
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert differences(dict(trainer.model.state_dict()), start) == []


def test_window_without_rows_is_saved_and_resumed(tmp_path):
    class KeepNone:
        @hookimpl
        def keep(self, rollouts):
            return torch.zeros(rollouts.num_rows, dtype=torch.bool)

    def trainer(steps):
        made = make_trainer(tmp_path, max_steps=steps, beta=0.1)
        made.hooks.manager.register(KeepNone())
        return made

    trainer(2).train()
    resumed = trainer(3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.window.used == 3 and resumed.window.samples.num_rows == 0


@pytest.mark.slow
def test_generation_batch_of_another_shape_is_dropped_and_said(tmp_path, caplog):
    make_trainer(tmp_path, max_steps=2, beta=0.1).train()
    trainer = make_trainer(tmp_path, max_steps=6, beta=0.1, steps_per_generation=2, resume_check="warn")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 6 and "generation batch of the checkpoint is dropped" in caplog.text
    # A reference that the checkpoint does not hold cannot be made up.
    make_trainer(tmp_path / "without", max_steps=1).train()
    trainer = make_trainer(tmp_path, max_steps=2, beta=0.1, resume_check="warn")
    with pytest.raises(CheckpointError, match=r"holds no reference\.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-1"))
