"""What people see of a run while it runs."""

import json

from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_core.training.callbacks import JsonlMetricsCallback, StepLineCallback


def log(callback, folder, logs):
    state = TrainerState(global_step=3, max_steps=9, is_world_process_zero=True)
    callback.on_log(TrainingArguments(output_dir=str(folder), report_to="none"), state, TrainerControl(), logs)


def test_line_shows_the_metrics_in_order(tmp_path, capsys):
    log(StepLineCallback(), tmp_path, {"kl": 0.01, "reward": 0.5, "unknown": 1.0})
    assert capsys.readouterr().out == "step    3/9  reward 0.500  kl 0.0100\n"


def test_extra_metrics_follow_the_reward(tmp_path, capsys):
    log(StepLineCallback([("mine/x", "x", "{:.1f}")]), tmp_path, {"kl": 0.01, "reward": 0.5, "mine/x": 2.0})
    assert capsys.readouterr().out == "step    3/9  reward 0.500  x 2.0  kl 0.0100\n"


def test_line_of_an_offline_run_shows_loss_and_accuracy(tmp_path, capsys):
    log(StepLineCallback(), tmp_path, {"rewards/margins": 0.25, "rewards/accuracies": 0.75, "loss": 0.5})
    log(StepLineCallback(), tmp_path, {"mean_token_accuracy": 0.5, "loss": 1.5, "entropy": 2.0})
    lines = ["step    3/9  loss 0.5000  accuracy 0.750  margin 0.250", "step    3/9  loss 1.5000  token accuracy 0.500"]
    assert capsys.readouterr().out.splitlines() == lines


def test_line_of_an_evaluation_says_so(tmp_path, capsys):
    log(
        StepLineCallback(), tmp_path, {"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_reward": 1.0, "eval_runtime": 1.0}
    )
    assert capsys.readouterr().out == "step    3/9  eval reward 1.000  eval loss 0.5000  eval accuracy 0.750\n"


def test_log_without_known_metrics_prints_nothing(tmp_path, capsys):
    log(StepLineCallback(), tmp_path, {"train_runtime": 3.0})
    assert capsys.readouterr().out == ""


def test_every_log_is_a_json_line(tmp_path):
    callback = JsonlMetricsCallback()
    log(callback, tmp_path, {"reward": 0.5})
    log(callback, tmp_path, {"reward": 0.75})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 3, "reward": 0.5}, {"step": 3, "reward": 0.75}]
