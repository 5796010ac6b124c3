"""`trl-core train` with the algorithms that learn from a dataset."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from datasets import IterableDataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl_core import get_config, get_trainer
from trl_core.cli.main import main
from trl_core.options import fields_of
from trl_core.testing import tiny_model, tiny_tokenizer

from .helpers_cli import flags, metrics, train, work_in

ALGORITHMS = ("sft", "reward", "dpo", "bema")
DATA = {"sft": "texts.jsonl", "reward": "pairs.jsonl", "dpo": "pairs.jsonl", "bema": "pairs.jsonl"}
SHOWN = {
    "sft": "loss token accuracy grad",
    "reward": "loss accuracy margin grad",
    "dpo": "loss accuracy margin token accuracy grad",
    "bema": "loss accuracy margin token accuracy grad",
}
FUNCTIONS = """
def text(row):
    return "so: " + row["text"]

nothing = None
"""
SMALL = {
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 0.01,
    "activation_checkpointing": False,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, texts, pairs and functions."""
    folder = tmp_path_factory.mktemp("offline")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    texts = [{"text": "abc" * n} for n in range(1, 9)]
    pairs = [{"prompt": "ask" * n, "chosen": " yes" * n, "rejected": " no" * n} for n in range(1, 9)]
    for name, rows in (("texts", texts), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "functions.py").write_text(FUNCTIONS)
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    work_in(folder, monkeypatch)


def needed(algorithm):
    return flags(model="model", dataset=DATA[algorithm])


class Reached(Exception):
    """Everything was checked and the trainer is being made."""


@pytest.fixture
def passed(monkeypatch):
    """Run up to the making of the trainer, and return the arguments it would get."""

    def run(algorithm, *words, given=None):
        trainer = get_trainer(algorithm)

        @functools.wraps(trainer.__init__)
        def stop(self, **arguments):
            raise Reached(arguments)

        monkeypatch.setattr(trainer, "__init__", stop)
        with pytest.raises(Reached) as reached:
            main(["train", algorithm, *(needed(algorithm) if given is None else given), "--use_cpu", *words])
        return SimpleNamespace(**reached.value.args[0])

    return run


@pytest.fixture
def refused(monkeypatch):
    """Run where a refusal is expected, before any model is loaded, and return the message."""
    for loader in ("base.load_policy", "pairs.load_classifier"):
        monkeypatch.setattr(f"trl_core.training.{loader}", lambda *_: pytest.fail("a model was loaded"))

    def run(algorithm, *words, given=None):
        done = train(*(needed(algorithm) if given is None else given), *words, algorithm=algorithm)
        assert done.code == 2
        assert "To mend:" in done.err and "Traceback" not in done.err
        return done.err

    return run


@pytest.fixture
def mixture(tmp_path):
    """A YAML file of these lines beside the model's; the words that name it."""

    def write(*lines):
        file = tmp_path / "run.yaml"
        file.write_text("\n".join(["model: model", *lines]))
        return ["--config", str(file)]

    return write


# -- whole runs --------------------------------------------------------------------------------------------------------
@functools.cache
def finished(algorithm):
    """Two steps, with a checkpoint after each."""
    done = train(*needed(algorithm), *flags(**SMALL, output_dir=algorithm), algorithm=algorithm)
    assert done.code == 0, done.err
    return done


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_run_saves_the_trained_model_and_its_tokenizer(algorithm):
    finished(algorithm)
    kind = AutoModelForSequenceClassification if algorithm == "reward" else AutoModelForCausalLM
    start = tiny_model().state_dict()
    saved = kind.from_pretrained(algorithm).state_dict()
    assert any(not torch.equal(saved[name], start[name]) for name in start.keys() & saved.keys())
    assert ("score.weight" in saved) == (algorithm == "reward")
    assert AutoTokenizer.from_pretrained(algorithm).get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_run_writes_and_prints_the_metrics_of_every_step(algorithm):
    done = finished(algorithm)
    assert [line["step"] for line in metrics(algorithm) if "loss" in line] == [1, 2]
    lines = [line for line in done.out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    labels = " ".join(word for word in lines[0].split("  grad")[0].split() if word.isalpha())
    assert f"{labels} grad" == f"step {SHOWN[algorithm]}"
    assert done.out.splitlines()[-1].endswith("metrics.jsonl")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_run_resumes_from_a_checkpoint(algorithm, tmp_path):
    finished(algorithm)
    words = flags(**SMALL | {"max_steps": 3}, output_dir=tmp_path / "out", resume=f"{algorithm}/checkpoint-1")
    done = train(*needed(algorithm), *words, algorithm=algorithm)
    assert done.code == 0, done.err
    again = [line for line in metrics(tmp_path / "out") if "loss" in line]
    assert [line["step"] for line in again] == [2, 3]
    (second,) = [line for line in metrics(algorithm) if line["step"] == 2 and "loss" in line]
    assert again[0]["loss"] == second["loss"]


def test_bema_saves_the_average_too(folder):
    finished("bema")
    assert AutoModelForCausalLM.from_pretrained("bema/bema")


def test_run_of_a_mixture_trains_and_evaluates(folder, mixture, tmp_path):
    lines = [f"{key}: {json.dumps(value)}" for key, value in SMALL.items()]
    lines += ["loss_type: [sigmoid, sft]", "loss_weights: [1, 5e-1]", "eval_strategy: steps", "eval_steps: 1"]
    lines += ["datasets:", "  - path: pairs.jsonl", "  - {path: pairs.jsonl, split: 'train[:4]'}", "test_split_size: 3"]
    done = train(*mixture(*lines), "--output_dir", str(tmp_path / "out"), algorithm="dpo")
    assert done.code == 0, done.err
    found = [line for line in metrics(tmp_path / "out") if "eval_loss" in line]
    assert [line["step"] for line in found] == [1, 2]
    assert "eval loss" in done.out and "eval accuracy" in done.out


def test_run_with_a_reference_of_its_own(folder, tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path / "reference")
    words = flags(**SMALL | {"max_steps": 1}, output_dir=tmp_path / "out", ref_model=tmp_path / "reference")
    done = train(*needed("dpo"), *words, algorithm="dpo")
    assert done.code == 0, done.err
    # A copy of the policy would give the ratio 1 and this loss.
    assert metrics(tmp_path / "out")[0]["loss"] != pytest.approx(0.6931, abs=1e-3)


def test_run_streams(folder, tmp_path):
    words = flags(**SMALL | {"max_steps": 1}, output_dir=tmp_path / "out")
    done = train(*needed("sft"), *words, "--streaming", "--formatting_func", "functions.py:text", algorithm="sft")
    assert done.code == 0, done.err
    assert [line["step"] for line in metrics(tmp_path / "out") if "loss" in line] == [1]


# -- options -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_option_takes_its_default_as_a_flag(algorithm, passed):
    options = {f.name: f.default for f in fields_of(get_config(algorithm)) if f.default not in (None, "", [])}
    options |= {"use_cpu": True, "logging_steps": 5, "report_to": "none"}
    words = []
    for name, value in options.items():
        value = getattr(value, "value", value)
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    config = passed(algorithm, *words, "--output_dir", "x").args
    expected = get_config(algorithm)(output_dir="x", **options)
    assert {name: getattr(config, name) for name in options} == {name: getattr(expected, name) for name in options}


@pytest.mark.parametrize(
    ("words", "losses", "weights"),
    [
        ([], ["sigmoid"], None),
        (["--loss_type", "ipo"], ["ipo"], None),
        (["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.5"], ["sigmoid", "sft"], [1.0, 0.5]),
        (["--loss_type", '["sigmoid", "sft"]', "--loss_weights", "[1, 0.5]"], ["sigmoid", "sft"], [1.0, 0.5]),
        (["--loss-type=hinge", "--loss-weights=2"], ["hinge"], [2.0]),
    ],
)
def test_options_that_are_lists_are_read(words, losses, weights, passed):
    config = passed("dpo", *words).args
    assert (config.loss_type, config.loss_weights) == (losses, weights)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_help_lists_the_options_that_the_trainer_takes(algorithm, capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", algorithm, "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert all(f"--{option} " in text for option in ("model", "dataset", "datasets", "peft", "max_length", "seed"))
    assert ("--loss_weights " in text) == (algorithm in ("dpo", "bema"))
    assert "--ref_model " in text and "--reward_funcs " not in text


def test_help_of_an_online_algorithm_has_no_argument_of_the_offline_trainers(capsys):
    with pytest.raises(SystemExit):
        main(["train", "grpo", "--help"])
    text = capsys.readouterr().out
    assert "--reward_funcs " in text and "--ref_model " in text
    assert "--formatting_func " not in text


# -- what the trainer gets ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("algorithm", "task"), [("sft", "CAUSAL_LM"), ("dpo", "CAUSAL_LM"), ("bema", "CAUSAL_LM"), ("reward", "SEQ_CLS")]
)
def test_adapter_is_made_for_the_task_of_the_trainer(algorithm, task, passed):
    assert passed(algorithm, "--peft", '{"r": 2}').peft_config.task_type == task
    assert passed(algorithm, "--peft", '{"r": 2, "task_type": "TOKEN_CLS"}').peft_config.task_type == "TOKEN_CLS"


def test_formatting_function_is_imported(passed):
    function = passed("sft", "--formatting_func", "functions.py:text").formatting_func
    assert function({"text": "x"}) == "so: x"


def test_reference_is_passed_by_name(passed):
    assert passed("dpo", "--ref_model", "owner/name").ref_model == "owner/name"
    assert not hasattr(passed("dpo"), "ref_model")


@pytest.mark.parametrize(
    ("lines", "rows", "evaluated"),
    [
        (["dataset: pairs.jsonl"], 8, None),
        (["dataset: pairs.jsonl", "test_split_size: 2"], 6, 2),
        (["dataset: pairs.jsonl", "test_split_size: 0.25"], 6, 2),
        (["datasets:", "  - path: pairs.jsonl"], 8, None),
        (["datasets:", "  path: pairs.jsonl"], 8, None),
        (["datasets: [{path: pairs.jsonl}, {path: 'pairs.jsonl:train[:3]'}]"], 11, None),
        (["datasets: [{path: pairs.jsonl}]", "test_split_size: 3"], 5, 3),
        (["datasets: [{path: pairs.jsonl}]", "eval_dataset: 'pairs.jsonl:train[:3]'"], 8, 3),
        (
            [
                "datasets: [{path: pairs.jsonl, weight: 1}, {path: 'pairs.jsonl:train[:2]', weight: 1}]",
                "stopping_strategy: all_exhausted",
            ],
            None,
            None,
        ),
    ],
)
def test_datasets_of_a_yaml_file_are_loaded(lines, rows, evaluated, passed, mixture):
    got = passed("dpo", given=mixture(*lines))
    assert len(got.train_dataset) == rows or (rows is None and len(got.train_dataset) >= 8)
    assert (None if got.eval_dataset is None else len(got.eval_dataset)) == evaluated
    assert got.train_dataset.column_names == ["prompt", "chosen", "rejected"]
    # Rows that are named for evaluation are evaluated.
    assert got.args.eval_strategy == ("no" if evaluated is None else "epoch")


@pytest.mark.parametrize(
    "line", ["dataset: pairs.jsonl", "datasets: [{path: pairs.jsonl, columns: [chosen, rejected]}]"]
)
def test_streams_are_not_read_before(line, passed, mixture):
    got = passed("reward", given=mixture(line, "streaming: true", "max_steps: 1", "eval_dataset: pairs.jsonl"))
    assert isinstance(got.train_dataset, IterableDataset) and isinstance(got.eval_dataset, IterableDataset)


def test_mixture_may_stand_on_the_command_line(passed):
    given = ["--model", "model", "--datasets", '[{"path": "pairs.jsonl"}, {"path": "pairs.jsonl"}]']
    assert len(passed("dpo", given=given).train_dataset) == 16


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["dataset: pairs.jsonl", "datasets: [{path: pairs.jsonl}]"], "datasets and dataset are both given"),
        (["dataset_config: x", "datasets: [{path: pairs.jsonl}]"], "datasets and dataset_config are both given"),
        (
            ["dataset: pairs.jsonl", "eval_dataset: pairs.jsonl", "test_split_size: 2"],
            "test_split_size and eval_dataset are both given",
        ),
        (["datasets: [{pth: pairs.jsonl}]"], "datasets[0] is {'pth': 'pairs.jsonl'}"),
        (["datasets: [pairs.jsonl]"], "run.yaml: datasets=['pairs.jsonl'] (list) is not a list of mappings, or None"),
        (["datasets: [{path: nowhere.jsonl}]"], "datasets[0]: 'nowhere.jsonl' is no dataset"),
        (
            ["datasets: [{path: pairs.jsonl}]", "test_split_size: many"],
            "test_split_size='many' (str) is not a whole number above 0",
        ),
        (["datasets: [{path: pairs.jsonl}]", "test_split_size: 99"], "The datasets cannot be mixed"),
        (["datasets: [{path: pairs.jsonl, columns: [text]}]"], "lacks some of the columns ['text']"),
        (
            ["datasets: [{path: pairs.jsonl}]", "streaming: true", "max_steps: 1", "test_split_size: 2"],
            "test_split_size=2 needs",
        ),
        (["dataset: pairs.jsonl", "streaming: true"], "streaming without max_steps"),
        (["datasets: []"], "No dataset is given"),
        (["mixture: [{path: pairs.jsonl}]"], "run.yaml: there is no option 'mixture'"),
        (["dataset: texts.jsonl"], "train_dataset has the columns ['text']"),
    ],
)
def test_data_that_do_not_fit_are_refused(lines, expected, refused, mixture):
    assert expected in refused("dpo", given=mixture(*lines))


@pytest.mark.parametrize(
    ("algorithm", "words", "expected"),
    [
        ("sft", ["--reward_funcs", "functions.py:text"], "there is no option 'reward_funcs'"),
        ("sft", ["--loss_weights", "1"], "there is no option 'loss_weights'"),
        ("grpo", ["--formatting_func", "functions.py:text"], "there is no option 'formatting_func'"),
        ("dpo", ["--formatting_func", "functions.py:text"], "there is no option 'formatting_func'"),
        ("sft", ["--formatting_func", "functions.py:txt"], "functions.py has no 'txt'. Did you mean 'text'?"),
        ("sft", ["--formatting_func", "text"], "formatting_func: 'text' is no function"),
        (
            "sft",
            ["--formatting_func", "functions.py:nothing"],
            "formatting_func: 'functions.py:nothing' is no function",
        ),
        (
            "dpo",
            ["--loss_type", "sigmoid", "sft", "--loss_weights", "1"],
            "loss_weights has 1 entries and loss_type has 2",
        ),
        ("dpo", ["--loss_type", "sigmod"], "Did you mean 'sigmoid'?"),
        (
            "dpo",
            ["--loss_weights", "1", "x"],
            "loss_weights=['1', 'x'] (list) is not a list of finite numbers",
        ),
        ("bema", ["--update_ref_model", "--sync_ref_model"], "update_ref_model=True contradicts"),
        ("bema", ["--require", "stable"], "StabilityError"),
    ],
)
def test_words_that_do_not_fit_are_refused(algorithm, words, expected, refused):
    given = flags(model="model", dataset="x", reward_funcs="y") if algorithm == "grpo" else None
    assert expected in refused(algorithm, *words, given=given)


def test_missing_dataset_is_refused_by_name(refused):
    assert "No dataset is given" in refused("sft", given=flags(model="model"))
