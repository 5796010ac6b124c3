"""Whole runs of the classic trainer: stopped and resumed, over a dataset, logged, in two processes, and the example."""

import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.tracking import GeneralTracker
from datasets import Dataset

from trl_core import errors
from trl_core.testing import tiny_model, tiny_tokenizer
from trl_ppo.classic import AutoModelForCausalLMWithValueHead, LengthSampler, PPOConfig, PPOTrainer
from trl_ppo.classic.controllers import RunningMoments

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "algorithms" / "ppo-classic.md"
EXAMPLE = ROOT / "plugins" / "trl-ppo" / "examples" / "classic_ten_lines.py"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- stopped and resumed -----------------------------------------------------------------------------------------------
def collate(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def queries(count=6):
    made = Dataset.from_dict({"input_ids": [[5 + i, 30, 40 + i] for i in range(count)], "review": ["x"] * count})
    return made.with_format("torch")


def make_run(seed=0, dataset=None, **options):
    """A trainer that samples, adapts and schedules all it can."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model(seed, tie_word_embeddings=True))
    settings = {"batch_size": 2, "mini_batch_size": 1, "ppo_epochs": 2, "use_score_scaling": True, "horizon": 50}
    config = PPOConfig(**{**settings, **options})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    # The reference is not part of the state: it is made from the model one starts with.
    reference = tiny_model(tie_word_embeddings=True).eval()
    dataset = queries() if dataset is None else dataset
    return PPOTrainer(config, model, reference, tiny_tokenizer(), dataset, optimizer, collate, lr_scheduler=schedule)


def train(trainer, steps, folder=None):
    """Go on to `steps` steps, each with sampled responses, saving before each."""
    lengths, loader, seen = LengthSampler(2, 6), trainer.dataloader, []
    while trainer.current_step < steps:
        epoch, done = divmod(trainer.current_step, len(loader))
        loader.set_epoch(epoch)
        for batch in skip_first_batches(loader, done):
            if folder is not None:
                trainer.save_state(folder / str(trainer.current_step))
            asked = batch["input_ids"]
            answers = trainer.generate(asked, lengths, return_prompt=False, do_sample=True, top_k=0)
            stats = trainer.step(asked, answers, [answer.float().mean() / 100 for answer in answers])
            seen.append({name: value for name, value in stats.items() if isinstance(value, float)})
            if trainer.current_step == steps:
                break
    return seen


def end_of(trainer):
    model = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    moments = {
        (i, name): value for i, slot in trainer.optimizer.state_dict()["state"].items() for name, value in slot.items()
    }
    return model, moments, trainer.kl_ctl.value, vars(trainer.running), trainer.lr_scheduler.get_last_lr()


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[name]) for name, value in one.items())
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


STEPS = 5  # of three in an epoch: the last two are in the second


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    trainer = make_run()
    return folder, train(trainer, STEPS, folder), end_of(trainer)


@pytest.mark.parametrize("at", range(STEPS))
def test_a_run_stopped_at_any_step_ends_the_same(at, whole):
    folder, seen, end = whole
    trainer = make_run(seed=1)
    assert not equal(end_of(trainer)[0], end[0])
    trainer.load_state(folder / str(at))
    assert trainer.current_step == at
    rest = train(trainer, STEPS)
    assert equal(end_of(trainer), end)
    clocks = [name for name in seen[0] if name.startswith("time/")]
    for name in set(seen[0]) - set(clocks):
        assert [stats[name] for stats in rest] == [stats[name] for stats in seen[at:]], name


def test_steps_differ_so_that_resuming_can_fail(whole):
    _, seen, end = whole
    assert len({stats["ppo/mean_scores"] for stats in seen}) == STEPS
    assert len({stats["objective/kl_coef"] for stats in seen}) == STEPS
    torch.manual_seed(0)
    start = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model(tie_word_embeddings=True)).state_dict()
    assert not any(torch.equal(value, end[0][name]) for name, value in start.items())


def test_the_random_state_is_kept_twice(whole, tmp_path):
    """accelerate says nothing where it cannot restore its own."""
    folder, _, end = whole
    shutil.copytree(folder / "2", tmp_path / "2")
    (tmp_path / "2" / "random_states_0.pkl").unlink()
    trainer = make_run(seed=1)
    trainer.load_state(tmp_path / "2")
    train(trainer, STEPS)
    assert equal(end_of(trainer), end)


def test_a_state_that_was_not_finished_is_refused(tmp_path, monkeypatch):
    trainer = make_run()
    train(trainer, 1)
    trainer.save_state(tmp_path / "state")

    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.accelerator, "save_state", die)
    with pytest.raises(KeyboardInterrupt):
        trainer.save_state(tmp_path / "state")  # over a complete one
    for folder in ("state", "nothing"):
        with pytest.raises(errors.CheckpointError, match="To mend"):
            make_run().load_state(tmp_path / folder)


def test_running_moments_do_not_depend_on_the_batches():
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 3 + 100
    for size in (1, 5, 12):
        moments = RunningMoments()
        for part in scores.split(size):
            moments.update(part)
        assert moments.mean == pytest.approx(float(scores.double().mean()), rel=1e-9)
        assert moments.std == pytest.approx(float(scores.double().std()), rel=1e-9)


# -- over a dataset ----------------------------------------------------------------------------------------------------
def test_the_dataloader_shuffles_into_whole_batches():
    trainer = make_run(dataset=queries(5))
    found = [[row.tolist() for row in batch["input_ids"]] for batch in trainer.dataloader]
    assert [len(batch) for batch in found] == [2, 2]
    again = [[row.tolist() for row in batch["input_ids"]] for batch in trainer.dataloader]
    assert again != found
    other = make_run(dataset=queries(5), seed=5)
    assert [[row.tolist() for row in batch["input_ids"]] for batch in other.dataloader] == found


def test_unused_columns_are_removed_unless_wanted():
    rows = queries().add_column("query", ["q"] * 6).with_format("torch")
    assert set(next(iter(make_run(dataset=rows).dataloader))) == {"input_ids", "query"}
    kept = make_run(dataset=rows, remove_unused_columns=False)
    assert set(next(iter(kept.dataloader))) == {"input_ids", "query", "review"}


def test_a_dataset_smaller_than_a_batch_is_refused():
    with pytest.raises(errors.DatasetError, match="1 rows"):
        make_run(dataset=queries(1))


# -- logged ------------------------------------------------------------------------------------------------------------
class Notebook(GeneralTracker):
    name = "notebook"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.settings, self.lines, self.tables = None, [], []

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **_):
        self.lines.append((step, values))

    def log_table(self, name, columns, data, step=None):
        self.tables.append((step, name, columns, data))


def test_statistics_reach_the_trackers():
    notebook = Notebook()
    trainer = make_run(log_with=notebook)
    assert notebook.settings["batch_size"] == 2
    batch = {"query": ["a", "b"], "response": ["c", "d"], "other": ["e", "f"]}
    asked, answers = [torch.tensor([5, 6])] * 2, [torch.tensor([7]), torch.tensor([8, 9])]
    rewards = [torch.tensor(1.0), torch.tensor(3.0)]
    stats = trainer.step(asked, answers, rewards)
    trainer.log_stats(stats, batch, rewards)
    trainer.log_stats(stats, batch, [1, 3], columns_to_log=["other"])
    (step, logged), (_, again) = notebook.lines
    assert step == 1 and stats.items() <= logged.items()
    assert (logged["env/reward_mean"], logged["env/reward_std"]) == pytest.approx((2, 2**0.5))
    assert logged["env/reward_dist"].tolist() == again["env/reward_dist"].tolist() == [1, 3]
    assert notebook.tables == [
        (1, "game_log", ["query", "response", "reward"], [("a", "c", 1.0), ("b", "d", 3.0)]),
        (1, "game_log", ["other", "reward"], [("e", 1.0), ("f", 3.0)]),
    ]
    with pytest.raises(ValueError, match="response"):
        trainer.log_stats(stats, {"query": ["a", "b"]}, rewards)


# -- in two processes --------------------------------------------------------------------------------------------------
def rows_of(rank):
    """Two rows for each process, all of one length: with equal token counts the mean of means is the mean."""
    generator = torch.Generator().manual_seed(rank)
    drawn = torch.randint(5, 261, (2, 7), generator=generator)
    return list(drawn[:, :3]), list(drawn[:, 3:]), list(torch.rand(2, generator=generator))


def run_in_process(folder):
    """What one of two processes does; it is started by the test below."""
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model(tie_word_embeddings=True).eval())
    options = {"batch_size": 2, "mini_batch_size": 1, "gradient_accumulation_steps": 2, "ppo_epochs": 2}
    config = PPOConfig(**options, target=1e-9, horizon=10, use_score_scaling=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    reference = tiny_model(1, tie_word_embeddings=True)
    trainer = PPOTrainer(config, model, reference, optimizer=optimizer, lr_scheduler=schedule)
    drawn = float(torch.rand(()))
    rank = trainer.accelerator.process_index
    stats = trainer.step(*rows_of(rank))
    trainer.save_state(folder / "state")
    again = trainer.step(*rows_of(rank))
    end = {name: value.clone() for name, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()}
    trainer.load_state(folder / "state")
    repeated = trainer.step(*rows_of(rank))
    after = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    said = {
        "kl": stats["objective/kl"],
        "kl_dist": stats["objective/kl_dist"].tolist(),
        "kl_coef": [stats["objective/kl_coef"], again["objective/kl_coef"]],
        "rates": [stats["ppo/learning_rate"], again["ppo/learning_rate"]],
        "drawn": drawn,
        "count": trainer.running.count,
        "mean_scores": stats["ppo/mean_scores"],
        "sum": float(sum(value.double().abs().sum() for value in end.values())),
        "resumed": all(torch.equal(value, after[name]) for name, value in end.items())
        and repeated["ppo/loss/total"] == again["ppo/loss/total"],
    }
    (folder / f"{rank}.json").write_text(json.dumps(said))


def test_two_processes_share_gradients_and_statistics(tmp_path):
    code = "import sys, runpy, pathlib; runpy.run_path(sys.argv[1])['run_in_process'](pathlib.Path(sys.argv[2]))"
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one.pop("drawn") != two.pop("drawn")  # so they sample apart
    assert one == two  # means, gathered rows, and the weights
    assert one["resumed"]
    assert one["rates"] == [0.01, 0.005]
    assert len(one["kl_dist"]) == 4
    assert one["kl"] == pytest.approx(sum(one["kl_dist"]) / 4, rel=1e-5)
    sign = 1 if one["kl"] > 0 else -1
    assert one["kl_coef"] == pytest.approx([0.2, 0.2 * (1 + sign * 0.2 * 4 / 10)])  # n is the rows of both
    assert one["count"] == 8  # two steps: the one after loading took the place of the other
    scores = torch.tensor([float(score) for rank in (0, 1) for score in rows_of(rank)[2]])
    assert one["mean_scores"] == pytest.approx(float(scores.mean() / scores.std()), rel=1e-5)


# -- the example and the page ------------------------------------------------------------------------------------------
def run_example(model, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--model", str(model)])
    return runpy.run_path(str(EXAMPLE), run_name="__main__")["train_stats"]


def check_example(stats):
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-3)
    assert stats["tokens/responses_len_mean"] == 20
    assert stats["ppo/mean_scores"] == 1
    assert stats["ppo/loss/value"] > 0
    assert abs(stats["ppo/policy/ratio"][:20] - 1).max() < 1e-3  # the first of four passes


def test_the_ten_lines_run(tmp_path, monkeypatch, capsys):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    check_example(run_example(tmp_path, monkeypatch))
    assert "objective/kl: 0.0000" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_ten_lines_run_on_a_real_model(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "demo"))
    from model import prepare_model

    check_example(run_example(prepare_model(), monkeypatch))
    print(capsys.readouterr().out)


def test_the_page_shows_the_ten_lines(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    first = page.split("```python\n")[1].split("```")[0]
    assert '"gpt2"' in first
    names = {}
    exec(compile(first.replace('"gpt2"', repr(str(tmp_path))), str(PAGE), "exec"), names)
    check_example(names["train_stats"])
    section = page.split("## Metrics\n")[1].split("\n## ")[0]
    listed = set(re.findall(r"`((?:objective|ppo|tokens|time)/[\w/]+)`", section))
    assert listed == set(names["train_stats"])


def test_the_page_lists_every_option_with_its_default():
    page = PAGE.read_text(encoding="utf-8")
    for option in dataclasses.fields(PPOConfig):
        default = "none" if option.default is None else f"`{option.default!r}`"
        kind = option.type.__name__ if type(option.type) is type else str(option.type).replace("typing.", "")
        kind = kind.replace("|", r"\|")
        assert f"| `{option.name}` | `{kind}` | {default} | {option.metadata['help']} |" in page
