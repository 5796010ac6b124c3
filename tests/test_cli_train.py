import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_core import get_config
from trl_core.cli.main import main
from trl_core.options import fields_of
from trl_core.testing import tiny_model, tiny_tokenizer
from trl_core.training.online import OnlineTrainer

from . import helpers_cli
from .helpers_cli import flags, metrics

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = """
from pathlib import Path

calls = []

def length(completions, **_):
    return [float(len(text)) for text in completions]

def letters(completions, **_):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]  # different for different texts of a length

def second(completions, **_):
    calls.append(1)
    return [0.0] * len(completions)

def number_of_calls(completions, **_):
    return [float(len(calls))] * len(completions)

def broken(completions, **_):
    return [len(text) / nothing for text in completions]

def longest(group_completions, group_rewards):
    Path("filtered").touch()
    return group_rewards
"""
SMALL = {
    "max_completion_length": 4,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "activation_checkpointing": False,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, prompts and functions."""
    folder = tmp_path_factory.mktemp("train")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in range(1, 5)))
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "cli_train_module.py").write_text(FUNCTIONS)
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    helpers_cli.work_in(folder, monkeypatch)


NEEDED = flags(model="model", dataset="prompts.jsonl", reward_funcs="functions.py:length")


train = functools.partial(helpers_cli.train, algorithm="grpo")


class Reached(Exception):
    """Everything was checked and the trainer is being made."""


@pytest.fixture
def passed(monkeypatch):
    """Run up to the making of the trainer, and return the arguments it would get."""

    @functools.wraps(OnlineTrainer.__init__)
    def stop(self, **arguments):
        raise Reached(arguments)

    monkeypatch.setattr(OnlineTrainer, "__init__", stop)

    def run(*words, algorithm="grpo", needed=NEEDED):
        with pytest.raises(Reached) as reached:
            main(["train", algorithm, *needed, "--use_cpu", *words])
        return SimpleNamespace(**reached.value.args[0])

    return run


@pytest.fixture
def refused(monkeypatch):
    """Run where a refusal is expected, before any model is loaded, and return the message."""
    monkeypatch.setattr("trl_core.training.base.load_policy", lambda *_: pytest.fail("a model was loaded"))

    def run(*words, algorithm="grpo", needed=NEEDED):
        done = train(*needed, *words, algorithm=algorithm)
        assert done.code == 2
        assert "To mend:" in done.err
        assert "Traceback" not in done.err
        return done.err

    return run


# -- a whole run -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(folder):
    """Two steps, with a checkpoint after each."""
    with contextlib.chdir(folder):
        needed = flags(model="model", dataset="prompts.jsonl", reward_funcs="functions.py:letters")
        words = [*needed, *flags(**SMALL | {"save_strategy": "steps", "save_steps": 1}, learning_rate=0.1)]
        return train(*words, "--output_dir", "finished")


def test_run_succeeds(finished):
    assert finished.code == 0, finished.err


def test_run_saves_the_trained_model(finished, folder):
    saved = AutoModelForCausalLM.from_pretrained("finished").state_dict()
    start = tiny_model().state_dict()
    assert saved.keys() == start.keys()
    assert any(not torch.equal(saved[name], start[name]) for name in start)


def test_run_saves_the_tokenizer(finished):
    assert AutoTokenizer.from_pretrained("finished").get_vocab() == tiny_tokenizer().get_vocab()


def test_run_writes_metrics_of_every_step(finished):
    assert [line["step"] for line in metrics("finished") if "reward" in line] == [1, 2]


def test_run_prints_a_line_for_every_step(finished):
    assert [line.split()[1] for line in finished.out.splitlines() if line.startswith("step ")] == ["1/2", "2/2"]


def test_run_prints_each_log_once(finished):
    assert "'loss'" not in finished.out


def test_run_says_what_trains_and_where_things_are(finished):
    lines = finished.out.splitlines()
    assert lines[0].startswith("grpo ") and lines[0].endswith("(stable) of trl-core")
    assert any(line.endswith(": finished") for line in lines)
    assert any(line.endswith(os.path.join("finished", "metrics.jsonl")) for line in lines)


def test_filter_from_a_file_is_used(folder):
    words = flags(**SMALL | {"max_steps": 1, "num_generations": 4}, num_remains_in_group=2, output_dir="filter-output")
    done = train(*NEEDED, *words, "--group_filter_func", "functions.py:longest", algorithm="gfpo")
    assert done.code == 0, done.err
    assert (folder / "filtered").exists()


def test_example_runs_with_a_local_model(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = flags(model=folder / "model", output_dir=tmp_path / "out", max_steps=1)
    done = train("--config", "examples/cli/gfpo_tiny.yaml", *words, "--use_cpu", algorithm="gfpo")
    assert done.code == 0, done.err
    assert {"rewards/digits/mean", "rewards/brief/mean"} <= metrics(tmp_path / "out")[0].keys()


def test_two_processes_train_together(folder):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines=1",
        "--num_processes=2",
    ]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    words = [*NEEDED, *flags(**SMALL | {"max_steps": 1}, output_dir="two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launch, "-m", "trl_core.cli.main", "train", "grpo", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((folder / "two" / "training_args.json").read_text())["generation_batch_size"] == 8
    assert done.stdout.count("step    1/1") == 1


# -- resuming ----------------------------------------------------------------------------------------------------------
LETTERS = flags(model="model", dataset="prompts.jsonl", reward_funcs="functions.py:letters")
RESUMED = [*LETTERS, *flags(**SMALL | {"max_steps": 3}, learning_rate=0.1)]


def test_resume_goes_on_from_the_newest_checkpoint(finished, folder, tmp_path):
    (tmp_path / "out").mkdir()
    for number in (1, 2):
        os.rename(folder / "finished" / f"checkpoint-{number}", tmp_path / "out" / f"checkpoint-{number}")
    try:
        done = train(*RESUMED, "--output_dir", str(tmp_path / "out"), "--resume")
    finally:
        for number in (1, 2):
            os.rename(tmp_path / "out" / f"checkpoint-{number}", folder / "finished" / f"checkpoint-{number}")
    assert done.code == 0, done.err
    assert [line["step"] for line in metrics(tmp_path / "out") if "reward" in line] == [3]


def test_resume_from_a_named_checkpoint_goes_on_there(finished, tmp_path):
    words = ["--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "finished/checkpoint-1"]
    done = train(*RESUMED, *words)
    assert done.code == 0, done.err
    assert [line["step"] for line in metrics(tmp_path / "out") if "reward" in line] == [2, 3]


def test_missing_checkpoint_is_refused(tmp_path):
    done = train(*RESUMED, "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "nowhere")
    assert done.code == 2
    assert "nowhere" in done.err and "Traceback" not in done.err


# -- values ------------------------------------------------------------------------------------------------------------
def test_every_option_takes_its_default_as_a_flag(passed):
    options = {f.name: f.default for f in fields_of(get_config("gfpo")) if f.default not in (None, "", [])}
    options |= {"use_cpu": True, "logging_steps": 5, "report_to": "none"}
    plain = {name: getattr(value, "value", value) for name, value in options.items()}
    needed = [*NEEDED, "--output_dir", "x"]
    config = passed(*flags(**plain), algorithm="gfpo", needed=needed).args
    expected = get_config("gfpo")(output_dir="x", **options)
    assert {name: getattr(config, name) for name in options} == {name: getattr(expected, name) for name in options}


def test_every_option_that_may_be_none_takes_null(passed):
    names = [f.name for f in fields_of(get_config("gfpo")) if "None" in str(f.type) and f.name != "report_to"]
    config = passed(*flags(**dict.fromkeys(names, "null")), algorithm="gfpo").args
    expected = get_config("gfpo")(
        output_dir=None, vllm_importance_sampling_clip_max=None, num_completions_to_print=None, use_cpu=True
    )
    assert len(names) > 40
    assert {name: getattr(config, name) for name in names} == {name: getattr(expected, name) for name in names}


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--learning_rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning-rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning-rate=1e-5"], "learning_rate", 1e-5),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--epsilon_high", "0.28"], "epsilon_high", 0.28),
        (["--epsilon_high", "none"], "epsilon_high", None),
        (["--seed", "7"], "seed", 7),
        (["--log_completions"], "log_completions", True),
        (["--log_completions", "false"], "log_completions", False),
        (["--no_shuffle_dataset"], "shuffle_dataset", False),
        (["--no-shuffle-dataset"], "shuffle_dataset", False),
        (["--bf16", "false"], "bf16", False),
        (["--scale_rewards", "batch"], "scale_rewards", "batch"),
        (["--scale_rewards", "none"], "scale_rewards", "none"),
        (["--scale_rewards", "false"], "scale_rewards", "none"),
        (["--reward_weights", "0.5"], "reward_weights", [0.5]),
        (["--reward_weights", "0.5", "2"], "reward_weights", [0.5, 2.0]),
        (["--reward_weights", "[0.5, 2]"], "reward_weights", [0.5, 2.0]),
        (["--report_to", "none"], "report_to", []),
        (["--generation_kwargs", '{"top_k": 3}'], "generation_kwargs", {"top_k": 3}),
        (["--model_init_kwargs", '{"dtype": "float32"}'], "model_init_kwargs", {"dtype": "float32"}),
        (["--lr_scheduler_type", "cosine"], "lr_scheduler_type", "cosine"),
        (["--save_strategy", "no"], "save_strategy", "no"),
        (["--run_name", "17"], "run_name", "17"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
    ],
)
def test_flag_is_read_by_its_type(passed, words, name, value):
    found = getattr(passed(*words).args, name)
    assert (found, type(found) is bool) == (value, type(value) is bool)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("num_generations: 4", "num_generations", 4),
        ("save_strategy: no", "save_strategy", "no"),
        ("scale_rewards: false", "scale_rewards", "none"),
        ("log_completions: yes", "log_completions", True),
        ("epsilon_high: null", "epsilon_high", None),
        ("reward_weights: 0.5", "reward_weights", [0.5]),
        ("generation_kwargs: {top_k: 3}", "generation_kwargs", {"top_k": 3}),
        ("run_name: 17", "run_name", "17"),
    ],
)
def test_yaml_value_is_read_by_its_type(passed, tmp_path, line, name, value):
    (tmp_path / "run.yaml").write_text(line)
    assert getattr(passed("--config", str(tmp_path / "run.yaml")).args, name) == value


def test_command_line_overrides_yaml(passed, tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1\nmax_steps: 5\n")
    config = passed("--config", str(tmp_path / "run.yaml"), "--seed", "2").args
    assert (config.seed, config.max_steps) == (2, 5)


def test_everything_may_stand_in_yaml(passed, tmp_path):
    lines = ["model: model", "dataset: prompts.jsonl", "reward_funcs: functions.py:length", "peft: {r: 2}"]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    got = passed(needed=["--config", str(tmp_path / "run.yaml")])
    assert (got.model, len(got.train_dataset), got.peft_config.r) == ("model", 4, 2)


def test_nothing_is_reported_unless_asked(passed):
    assert passed().args.report_to == []


def test_output_dir_defaults_to_the_name_of_the_algorithm(passed):
    assert passed(algorithm="gfpo").args.output_dir == "gfpo-output"


# -- what the trainer gets ---------------------------------------------------------------------------------------------
def test_function_of_a_module_where_one_works_is_found(passed):
    (function,) = passed("--reward_funcs", "cli_train_module:length").reward_funcs
    assert function(completions=["ab"]) == [2.0]


def test_functions_of_one_file_share_its_state(passed):
    words = ["--reward_funcs", "functions.py:second", "functions.py:number_of_calls"]
    second, number_of_calls = passed(*words).reward_funcs
    before = number_of_calls(completions=["a"])[0]
    second(completions=["a"])
    assert number_of_calls(completions=["a"]) == [before + 1]


def test_folder_of_a_classifier_is_passed_by_name(passed):
    assert passed("--reward_funcs", "model").reward_funcs == ["model"]


def test_hub_id_of_a_classifier_is_passed_by_name(passed):
    assert passed("--reward_funcs", "owner/name").reward_funcs == ["owner/name"]


def test_plain_text_is_passed_to_an_argument_of_the_algorithm(passed):
    assert passed("--group_filter_func", "shortest", algorithm="gfpo").group_filter_func == "shortest"


def test_eval_dataset_is_loaded(passed):
    assert passed("--eval_dataset", "prompts.jsonl:train[:3]").eval_dataset.num_rows == 3


def test_peft_options_become_a_lora_config(passed):
    config = passed("--peft", '{"r": 3}').peft_config
    assert (config.r, config.task_type) == (3, "CAUSAL_LM")


# -- refusals ----------------------------------------------------------------------------------------------------------
def test_unknown_flag_is_refused_with_a_suggestion(refused):
    assert "command line: there is no option 'learning_rte'. Did you mean 'learning_rate'?" in refused(
        "--learning_rte", "1e-5"
    )


def test_unknown_key_of_yaml_is_refused_with_a_suggestion(refused, tmp_path):
    (tmp_path / "run.yaml").write_text("num_generation: 4")
    message = refused("--config", str(tmp_path / "run.yaml"))
    assert "run.yaml: there is no option 'num_generation'. Did you mean 'num_generations'?" in message


def test_option_of_an_algorithm_that_is_not_named_is_refused(refused):
    assert "no option 'num_remains_in_group'" in refused("--num_remains_in_group", "2")


def test_beginning_of_an_option_is_not_the_option(refused):
    assert "no option 'learning'" in refused("--learning", "1e-5")


def test_stray_word_is_refused(refused):
    assert "no option 'stray'" in refused("--seed", "1", "stray")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num_generations", "2.5"], "num_generations='2.5' (str) is not a whole number"),
        (["--learning_rate", "fast"], "learning_rate='fast' (str) is not a finite number"),
        (["--log_completions", "maybe"], "log_completions='maybe' (str) is not True or False"),
        (["--reward_weights", "1", "x"], "reward_weights=['1', 'x'] (list) is not a list of finite numbers, or None"),
        (["--peft", "{r: 2"], "peft=... (str) is not a mapping, or None"),
    ],
)
def test_value_of_another_type_is_refused(refused, words, expected):
    assert expected in refused(*words)


def test_yaml_value_of_another_type_is_refused_by_file(refused, tmp_path):
    (tmp_path / "run.yaml").write_text("num_generations: true")
    assert "run.yaml: num_generations=True is not a whole number" in refused("--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(("content", "expected"), [("a: [", "cannot be read"), ("- a", "holds no mapping")])
def test_config_that_is_no_mapping_is_refused(refused, tmp_path, content, expected):
    (tmp_path / "run.yaml").write_text(content)
    assert expected in refused("--config", str(tmp_path / "run.yaml"))


def test_missing_config_is_refused(refused):
    assert "'nowhere.yaml' cannot be read" in refused("--config", "nowhere.yaml")


@pytest.mark.parametrize("missing", ["model", "dataset", "reward_funcs"])
def test_missing_key_is_refused_by_name(refused, missing):
    place = NEEDED.index(f"--{missing}")
    message = refused(needed=NEEDED[:place] + NEEDED[place + 2 :])
    assert f"No {missing} is given" in message and f"--{missing}" in message


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("nowhere_module:length", "No module named 'nowhere_module'"),
        ("nowhere.py:length", "nowhere.py"),
        ("functions.py:lenght", "functions.py has no 'lenght'. Did you mean 'length'?"),
        ("cli_train_module:lenght", "cli_train_module has no 'lenght'. Did you mean 'length'?"),
        ("functions.py", "'functions.py' is neither a function nor a model"),
        ("length", "'length' is neither a function nor a model"),
        ("functions.py:calls", "'functions.py:calls' is neither a function nor a model"),
    ],
)
def test_reward_that_is_no_function_is_refused(refused, spec, expected):
    message = refused("--reward_funcs", spec)
    assert "reward_funcs: " in message and expected in message


def test_file_that_cannot_be_imported_is_refused_with_the_line(refused, tmp_path):
    (tmp_path / "bad.py").write_text("x = 1\ny = nothing\n")
    message = refused("--reward_funcs", f"{tmp_path / 'bad.py'}:f")
    assert "name 'nothing' is not defined" in message and "bad.py, line 2" in message


def test_missing_function_of_an_algorithm_argument_is_refused_by_its_name(refused):
    message = refused("--group_filter_func", "functions.py:lngest", algorithm="gfpo")
    assert "group_filter_func: functions.py has no 'lngest'. Did you mean 'longest'?" in message


def test_reward_model_that_cannot_be_loaded_is_refused(refused, tmp_path):
    assert "The reward model" in refused("--reward_funcs", str(tmp_path), "--use_cpu")


def test_missing_dataset_is_refused(refused):
    assert "'nowhere.jsonl' is no dataset" in refused("--dataset", "nowhere.jsonl")


def test_unknown_option_of_peft_is_refused(refused):
    assert "unexpected keyword argument 'rank'" in refused("--peft", '{"rank": 2}')


def test_options_that_transformers_refuses_are_refused(refused):
    told = refused("--eval_strategy", "sometimes")
    assert "eval_strategy='sometimes' (str) is not one of 'no', 'steps', 'epoch'" in told


def test_require_refuses_what_is_less_stable(refused):
    assert "StabilityError" in refused("--require", "stable", algorithm="gfpo")


def test_failing_reward_shows_where_it_failed(tmp_path):
    done = train(*NEEDED, *flags(**SMALL, output_dir=tmp_path / "out", reward_funcs="functions.py:broken"))
    assert done.code == 2
    assert "in broken" in done.err
    assert "trl-core: RewardError: The reward function 'broken' raised NameError" in done.err


# -- help --------------------------------------------------------------------------------------------------------------
def test_help_groups_the_options_by_who_defines_them(capsys):
    with pytest.raises(SystemExit) as left:
        main(["train", "gfpo", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    titles = ["run", "gfpo", "grpo", "trainer", "transformers.TrainingArguments"]
    places = [text.index(f"options of {title}:") for title in titles]
    assert places == sorted(places)
    owned = ["--group_filter_func", "--num_remains_in_group", "--beta", "--temperature", "--weight_decay"]
    sections = [text[start:end] for start, end in zip(places, [*places[1:], None], strict=True)]
    assert [next(i for i, section in enumerate(sections) if f"{flag} " in section) for flag in owned] == [0, 1, 2, 3, 4]


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "grpo", "--help"])
    assert "(default: 0.2)" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["info", "--help"]])
def test_help_without_an_algorithm_imports_nothing_heavy(words):
    code = (
        "import sys\nfrom trl_core.cli.main import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        "print('heavy:', *{'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "heavy:", done.stderr
    assert "usage: trl-core" in done.stdout
