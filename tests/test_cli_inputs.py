"""`trl-core train` with what nobody should write: each is refused by name, with a mend, before a model is loaded."""

import os
import re

import pytest

from trl_core import get_config
from trl_core.cli.main import main
from trl_core.cli.yaml_file import read_yaml
from trl_core.data.loading import load
from trl_core.errors import ConfigError, DatasetError, RewardError
from trl_core.models.loading import load_policy
from trl_core.names import SYNONYMS, did_you_mean
from trl_core.training.online import OnlineTrainer

from .helpers_cli import train
from .test_cli_train import NEEDED, folder, passed, refused, there  # noqa: F401 (fixtures)


def without(*names):
    """What a run needs, without some of it."""
    pairs = zip(NEEDED[::2], NEEDED[1::2], strict=True)
    return [word for pair in pairs if pair[0].strip("-") not in names for word in pair]


# -- the file ---------------------------------------------------------------------------------------------------------
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "bomb": (BOMB, "more than 100000 values, aliases put in full"),
    "merging bomb": (
        "a: &a {x: 1}\n" + "b: &b {" + "<<: *a, y: 2}\nc: {<<: *c}",
        "cannot be read: found undefined alias",
    ),
    "itself": ("peft: &a {r: *a}", "line 1: a part holds itself"),
    "itself in a list": ("peft: {r: &a [*a]}", "line 1: a part holds itself"),
    "deep": ("peft: " + "[" * 1200, "nested too deeply"),
    "deep and whole": ("peft: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
    "twice": ("seed: 1\nbeta: 0\nseed: 2", "line 3: the key 'seed' is also in line 1"),
    "twice, quoted": ("seed: 1\n'seed': 2", "line 2: the key 'seed' is also in line 1"),
    "merged twice": ("peft:\n  <<: {r: 1}\n  <<: {r: 2}", "line 3: the key '<<' is also in line 2"),
    "no time": ("chat_template_kwargs: {a: !!timestamp abc}", "cannot be read"),
    "further file": ("config: other.yaml", "a file names no further file"),
    "twice inside": ("peft:\n  r: 1\n  r: 2", "line 3: the key 'r' is also in line 2"),
    "tabs": ("peft:\n\tr: 1", "cannot be read: while scanning.*cannot start any token"),
    "key on": ("on: 1", "there is no option 'on'"),
    "key true": ("true: 1", "there is no option 'true'"),
    "key null": ("null: 1", "there is no option 'null'"),
    "key number": ("3: 1", "there is no option 3"),
    "key date": ("2024-01-01: 1", "there is no option '2024-01-01'"),
    "key list": ("? [a, b]\n: 1", "cannot be read: .*unhashable key"),
    "several": ("seed: 1\n---\nseed: 2", "cannot be read: expected a single document"),
    "list": ("- seed", "holds no mapping"),
    "text": ("seed", "holds no mapping"),
    "empty": ("", "holds no mapping"),
    "comment": ("# seed: 1", "holds no mapping"),
    "python": ("seed: !!python/object/apply:os.getpid []", "cannot be read: could not determine a constructor"),
    "binary": (bytes(range(256)), "cannot be read"),
    "control": (b"seed: \x00", "cannot be read: .*special characters"),
    "huge": (b"#" * (2**18 + 1), "has 262145 bytes"),
    "time": ("max_steps: 1:30", "max_steps='1:30' .str. is not a whole number"),
    "fraction": ("max_steps: 1.5", "max_steps='1.5' .str. is not a whole number"),
    "mapping for a number": ("max_steps: {a: 1}", r"max_steps={'a': 1} \(dict\) is not a whole number"),
    "infinite int": ("max_steps: .inf", "max_steps='.inf' .str. is not a whole number"),
    "lr": ("lr: 1", r"run.yaml: there is no option 'lr'. Did you mean 'learning_rate'"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_that_does_not_fit_is_refused(name, refused, tmp_path):  # noqa: F811
    content, named = FILES[name]
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused("--config", str(file))
    assert re.search(named, message, re.DOTALL), message


@pytest.mark.parametrize("kind", ["folder", "fifo", "missing", "null"])
def test_what_is_no_file_is_refused_without_waiting_for_it(kind, refused, tmp_path):  # noqa: F811
    place = tmp_path / "run.yaml"
    {"folder": place.mkdir, "fifo": lambda: os.mkfifo(place)}.get(kind, lambda: None)()
    message = refused("--config", "/dev/null" if kind == "null" else str(place))
    assert ("cannot be read" if kind == "missing" else "is no file") in message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_file_is_read_in_its_encoding(encoding, tmp_path):
    (tmp_path / "run.yaml").write_text("run_name: día\nseed: 1", encoding=encoding)
    assert read_yaml(str(tmp_path / "run.yaml")) == {"run_name": "día", "seed": "1"}


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("run_name: 2024-01-01", "2024-01-01"),
        ("run_name: 1:30", "1:30"),
        ("run_name: 010", "010"),
        ("run_name: 1.10", "1.10"),
        ("run_name: 1_000", "1_000"),
        ("run_name: 0x1F", "0x1F"),
        ("run_name: '17'", "17"),
        ("seed: 010", 10),
        ("seed: 08", 8),
        ("learning_rate: 1e-3", 1e-3),
        ("learning_rate: 1", 1.0),
        ("learning_rate: .5", 0.5),
        ("reward_weights: [1e-1]", [0.1]),
        ("chat_template_kwargs: {top_k: 3, penalty_alpha: 1e-1, bad: 010, use_cache: no}",) * 2,
        ("lr_scheduler_kwargs: '{}'", {}),
        ("base: &b {top_k: 3}", None),
    ],
)
def test_value_is_what_is_written(line, value, passed, tmp_path):  # noqa: F811
    if value == line:
        value = {"top_k": 3, "penalty_alpha": 0.1, "bad": "010", "use_cache": False}
    if value is None:
        line, value = "chat_template_kwargs: {<<: &b {top_k: 3, min_p: 1}, min_p: 2}", {"top_k": 3, "min_p": 2}
    (tmp_path / "run.yaml").write_text(line)
    found = getattr(passed("--config", str(tmp_path / "run.yaml")).args, line.partition(":")[0])
    assert found == value and type(found) is type(value)


def test_adapter_may_be_written_as_json_in_the_file(passed, tmp_path):  # noqa: F811
    (tmp_path / "run.yaml").write_text("peft: '{\"r\": 2}'")
    assert passed("--config", str(tmp_path / "run.yaml")).peft_config.r == 2


def test_few_aliases_are_fine(tmp_path):
    (tmp_path / "run.yaml").write_text("peft: &p {r: 2}\ngeneration_kwargs: *p")
    assert read_yaml(str(tmp_path / "run.yaml")) == {"peft": {"r": 2}, "generation_kwargs": {"r": 2}}


# -- the words --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--use_peft"], "no option 'use_peft'. Did you mean 'peft'?"),
        (["--use-peft", "true"], "Did you mean 'peft'?"),
        (["--lora_r", "8"], "Did you mean 'peft'?"),
        (["--lr", "1"], "Did you mean 'learning_rate'?"),
        (["--LR=1"], "Did you mean 'learning_rate'?"),
        (["--epochs", "1"], "Did you mean 'num_train_epochs'?"),
        (["--batch_size", "1"], "Did you mean 'per_device_train_batch_size'?"),
        (["--model_name_or_path", "x"], "Did you mean 'model'?"),
        (["--dataset_name", "x"], "Did you mean 'dataset'?"),
        (["--vllm_mode", "server"], "the trainer's argument `rollouts`"),
        (["--max_prompt_length", "9"], "Prompts are never cut"),
        (["--deepsped", "x"], "Did you mean 'deepspeed'?"),
        (["--deep-speed", "x"], "Did you mean 'deepspeed'?"),
        (["--zzz"], "no option 'zzz'."),
        (["--seed", "1", "extra"], "no option 'extra'"),
        (["--", "extra"], "no option"),
        (["--seed", "1", "-x"], "no option 'x'"),
        (["--peft", "{r: 8"], "(as JSON: Expecting property name"),
        (["--peft", "[1]"], "peft=... (list) is not a mapping"),
        (["--peft", "8"], "peft=... (str) is not a mapping"),
        (["--peft", "[" * 20000], "peft: "),
        (["--peft", '{"r": -1}'], "peft: r=-1 makes no adapter"),
        (["--peft", '{"lora_dropout": "much"}'], "peft: lora_dropout='much' makes no adapter"),
        (["--model_init_kwargs", "{"], "(as JSON: "),
        (["--chat_template_kwargs", "3"], "chat_template_kwargs=... (str) is not a mapping"),
        (["--datasets", "[3]"], "datasets=[3] (list) is not a list of mappings"),
        (["--test_split_size", "0"], "test_split_size=0 is not a whole number above 0"),
        (["--test_split_size", "1.5"], "test_split_size=1.5 leaves no two parts"),
        (["--test_split_size", "nan"], "test_split_size=nan is not a whole number above 0"),
        (["--stopping_strategy", "first_exhausted"], "says nothing here"),
        (["--dataset_config", "main"], "prompts.jsonl' has no configurations"),
        (["--beta"], "expected one argument"),
        (["--beta="], "beta='' (str) is not a finite number"),
        (["--model="], "No model is given"),
        (["--output_dir", "prompts.jsonl"], "output_dir='prompts.jsonl' cannot be written"),
        (["--output_dir", "prompts.jsonl/x"], "output_dir='prompts.jsonl/x' cannot be written"),
        (["--output_dir", "x" * 300], "cannot be written: File name too long"),
        (["--config="], "is no file"),
        (["--config", "a", "--config", "b"], "--config is given twice"),
        (["--max_steps", "1e3"], "max_steps='1e3' (str) is not a whole number"),
        (["--max_steps", "9" * 5000], "max_steps: "),
        (["--report_to", "wandb"], "report_to: the tracker 'wandb' is not installed"),
        (["--report_to", "none", "mlflow"], "report_to: "),
        (["--report_to", "wandbb"], "there is no tracker 'wandbb'. Did you mean 'wandb'?"),
        (["--report_to", "all"], "report_to='all', but no tracker is installed"),
    ],
)
def test_words_that_do_not_fit_are_refused(words, named, refused, monkeypatch):  # noqa: F811
    monkeypatch.setattr("trl_core.training.config.get_available_reporting_integrations", list)
    message = refused(*words)
    assert all(part in message for part in named.split(" | ")), message
    assert "without quotes" not in message  # there need be none


def test_what_is_needed_is_told_with_its_help_alone(refused):  # noqa: F811
    assert refused(needed=without("model")).endswith("Folder or Hub id of the model to train. Needed.\n")


@pytest.mark.parametrize("value", ["-1", "-1e-5", "-.5"])
def test_negative_number_is_a_value(value, passed):  # noqa: F811
    assert passed("--reward_weights", value).args.reward_weights == [float(value)]
    assert passed(f"--reward_weights={value}").args.reward_weights == [float(value)]


def test_of_an_option_given_twice_the_last_counts_and_that_is_said(passed, capsys):  # noqa: F811
    assert passed("--seed", "1", "--seed=2").args.seed == 2
    assert "--seed is given 2 times; the last one counts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["trian", "grpo"], "no command 'trian'. Did you mean 'train'?"),
        (["zzz"], "no command 'zzz'."),
        (["train", "grop"], "AlgorithmNotFoundError"),
        (["train", ""], "Error"),
    ],
)
def test_unknown_command_or_algorithm_is_refused(words, named, capsys):
    assert main(words) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "The command line: no NAME of an algorithm"),
        (["--config", "x.yaml", "grpo"], "The command line: NAME, the algorithm, comes before '--config'."),
        (["--hub_token=hidden", "grpo"], "The command line: NAME, the algorithm, comes before '--hub_token'."),
        (["--config=x.yaml"], "The command line: NAME, the algorithm, comes before '--config'."),
        (["-x", "grpo"], "The command line: NAME, the algorithm, comes before '-x'."),
    ],
)
def test_name_that_is_missing_or_not_first_is_refused_with_the_order(words, named, capsys):
    assert main(["train", *words]) == 2
    told = capsys.readouterr().err
    assert "ConfigError" in told and named in told and "hidden" not in told
    assert "To mend: Write it so: trl-core train NAME [--config FILE.yaml]" in told


def test_synonyms_lead_to_options_that_exist():
    known = {"model", "dataset", "dataset_config", "eval_dataset", "peft", "ref_model", "resume", "reward_funcs"}
    known |= {"streaming", *get_config("grpo").__dataclass_fields__, *get_config("sft").__dataclass_fields__}
    assert set(SYNONYMS.values()) <= known and not set(SYNONYMS) & known - {"mixed_precision"}
    assert did_you_mean("epochs", ["num_train_epochs"]) == " Did you mean 'num_train_epochs'?"
    assert did_you_mean("epochs", ["beta"]) == ""


# -- models -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders and files that hold no model."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


WRONG = [
    ("./nothere", "'./nothere' cannot be loaded: there is no such folder"),
    ("../nothere", "there is no such folder"),
    ("nothere/", "there is no such folder"),
    ("a/b/c", "'a/b/c' cannot be loaded: there is no such folder"),
    ("~/nothere", "'~/nothere' cannot be loaded: there is no such folder"),
    ("~/file", "it is a file"),
    ("~/empty", "the folder has no config.json"),
    ("{}/nothere", "there is no such folder"),
]


@pytest.mark.parametrize(("given", "named"), WRONG)
@pytest.mark.parametrize("option", ["model", "ref_model", "reward_funcs"])
def test_folder_that_holds_no_model_is_refused_by_option(option, given, named, places, refused, monkeypatch):  # noqa: F811
    monkeypatch.setattr("trl_core.cli.train._load_data", lambda *_: pytest.fail("data were loaded"))
    message = refused(f"--{option}", given.format(places), "--beta", "0.1", needed=without(option))
    assert f"{option}" in message and named in message


def test_home_is_put_in_full(places, passed, folder):  # noqa: F811
    (places / "model").symlink_to(folder / "model")
    (places / "rows.jsonl").write_text('{"prompt": "x"}\n')
    got = passed("--model", "~/model", "--dataset", "~/rows.jsonl", needed=without("model", "dataset"))
    assert got.model == str(places / "model") and len(got.train_dataset) == 1


@pytest.mark.parametrize("given", [3, None, {"a": 1}])
def test_model_of_another_kind_is_refused(given):
    with pytest.raises(ConfigError, match=f"The model is .*{type(given).__name__}.*; expected a Hub id"):
        load_policy(given, None, False)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [({"dtype": "float33"}, "no dtype 'float33'"), ({"nonsense": 1}, "TypeError: .*nonsense")],
)
def test_arguments_of_from_pretrained_that_do_not_fit_are_told(kwargs, named, folder):  # noqa: F811
    with pytest.raises(ConfigError, match=named):
        load_policy(str(folder / "model"), kwargs, False)


def test_hub_id_that_cannot_be_reached_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'nobody/nothing' \(no folder here, so taken for a Hub id\)") as caught:
        load_policy("nobody/nothing", None, False)
    assert "Offline" in caught.value.mend


# -- rewards ----------------------------------------------------------------------------------------------------------
SOURCES = {
    "raises": ("raise KeyError('x')", "KeyError: 'x' .*made.py, line 1"),
    "syntax": ("def f(:", r"SyntaxError: invalid syntax \(made.py, line 1\)"),
    "exits": ("import sys\nsys.exit(0)", "SystemExit: 0 .*made.py, line 2"),
    "no name": ("def g(): pass", "has no 'f'"),
    "number": ("f = 3", "neither a function nor a model"),
    "class": ("class f: pass", "'f' is a class"),
    "misspelt": ("def f(completions, promt): pass", "wants the arguments .*'promt'.* Did you mean 'prompts'"),
    "yields": ("def f(completions): yield 1", "yields its values"),
    "imports": ("import nothing_of_that_name", "ModuleNotFoundError"),
    "null": ("\0", "cannot be imported"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_reward_file_that_gives_no_function_is_refused(name, refused, tmp_path):  # noqa: F811
    source, named = SOURCES[name]
    (tmp_path / "made.py").write_text(source)
    message = refused("--reward_funcs", f"{tmp_path / 'made.py'}:f", "--use_cpu", needed=without("reward_funcs"))
    assert re.search(named, message), message


def test_reward_file_that_prints_is_fine(passed, tmp_path, capsys):  # noqa: F811
    (tmp_path / "made.py").write_text("print('loaded')\ndef f(completions): return [0.0] * len(completions)")
    got = passed("--reward_funcs", f"{tmp_path / 'made.py'}:f", needed=without("reward_funcs"))
    assert got.reward_funcs[0].__name__ == "f" and "loaded" in capsys.readouterr().out


def test_reward_error_without_a_cause_is_told_alone(monkeypatch, tmp_path):
    def late(*_, **__):
        raise RewardError("Did not return.", mend="Wait.")

    monkeypatch.setattr(OnlineTrainer, "train", late)
    words = [*NEEDED, "--use_cpu", "--max_completion_length", "4", "--output_dir", str(tmp_path / "out")]
    done = train(*words, algorithm="grpo")
    assert done.code == 2 and "Did not return." in done.err and "NoneType" not in done.err


# -- data -------------------------------------------------------------------------------------------------------------
DATA = {
    "empty.jsonl": ("", "it is empty"),
    "empty.csv": ("", "it is empty"),
    "broken.jsonl": ('{"prompt": "a"}\n{"prompt": "b"\n', "line 2 is no JSON"),
    "cut.jsonl": ('{"prompt": "a"}\n\n{"prom', "line 3 is no JSON"),
    "numbers.jsonl": ("1\n2\n", "line 1 is 1, no row"),
    "broken.json": ('[{"prompt": "a"}', "cannot be read"),
    "other.csv": ("question\na\n", "no column 'prompt'"),
    "rows.txt": ("a\n", "no dataset file or folder"),
    "rows": ("a\n", "no dataset file or folder"),
    "broken.parquet": ("a\n", "cannot be read"),
    "text.jsonl": (b"\xff\xfe\x00", "cannot be read"),
    "null.jsonl": ('{"prompt": null}\n', "Row 0 of train_dataset has None"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_read_are_refused(name, refused, tmp_path):  # noqa: F811
    content, named = DATA[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused("--dataset", str(tmp_path / name), "--use_cpu", needed=without("dataset"))
    assert "DatasetError" in message and named in message


@pytest.mark.parametrize(
    ("name", "named"), [("./x.jsonl", "no dataset"), ("./x", "no dataset"), ("a/b/c", "no dataset")]
)
def test_data_that_are_not_there_are_refused(name, named):
    with pytest.raises(DatasetError, match=named):
        load(name)


def test_pipe_and_folder_without_rows_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DatasetError, match="no dataset file"):
        load(str(tmp_path / "rows.jsonl"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DatasetError, match="cannot be read"):
        load(str(tmp_path / "folder"))


# -- in Python --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "named"), [("wandb", "not installed"), (["zzz"], "no tracker"), ([3], "not a list of texts")]
)
def test_tracker_that_is_not_there_is_refused_when_the_config_is_made(given, named, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_core.training.config.get_available_reporting_integrations", list)
    with pytest.raises(ConfigError, match=named):
        get_config("sft")(output_dir=str(tmp_path), report_to=given)
