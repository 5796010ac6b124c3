"""Secrets are found in no file and in no text; what only sounds like one stays readable."""

import copy
import dataclasses
import json
import logging
import pickle
import traceback
import uuid

import pytest

from trl_core import get_config, option
from trl_core.cli.main import main
from trl_core.errors import CheckpointError, ConfigError
from trl_core.redaction import hide, hide_error, redacted, remember
from trl_core.testing import tiny_model
from trl_core.training.callbacks import JsonlMetricsCallback

from .helpers_cli import train
from .helpers_dist import write_plugin
from .helpers_online import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::trl_core.TRLExperimentalWarning")

PLUGIN = """
from dataclasses import dataclass
from typing import Any
from trl_core import Algorithm, hookimpl, option, require, require_choice

@dataclass
class Options:
    api_token: str | None = option(None, "Of the service.")
    door: str | int = option("front-9aF3door", "Where to get in.", secret=True)
    servers: dict[str, Any] | None = option(None, "Where the judges are.")
    command: list[str] | None = option(None, "What starts the judge.")
    judge_url: str | None = option(None, "Where the judge is.")
    gspo_token: str = option("plain", "A name that ends like one of a secret.")
    level: str = option("low", "low or high.")

    def __post_init__(self):
        require_choice(self, "level", ("low", "high"))
        require(self.api_token != "refused-" + "token-1", f"api_token={self.api_token!r} is not taken.", "Another.")
        require(self.door != 5, f"door={self.door!r} is too small.", "Give more.")

class Hooks:
    def __init__(self, context):
        self.context = context

algorithm = Algorithm(name="guarded", summary="x", extends="grpo", config=Options, hooks=Hooks,
                      arguments={"client_secret": "of the judge"})
"""


@pytest.fixture
def guarded(packages):
    """An algorithm whose options hold secrets."""
    write_plugin(packages, "guarded", source=PLUGIN)
    return "guarded"


def planted():
    """Options with a secret in each of many places, all different, and these secrets."""
    secrets = []

    def new(form="{}"):
        secrets.append(uuid.uuid4().hex[:20])
        return form.format(secrets[-1])

    options = {
        "hub_token": new(),
        "model_init_kwargs": {"token": new(), "proxies": {"https": new("https://me:{}@proxy:8080")}},
        "generation_kwargs": {"stop_strings": None},
        "chat_template_kwargs": {"judge": {"credentials": {"user": "me", "password": new()}}},
        "api_token": new(),
        "door": new(),
        "servers": {
            "headers": [{"X-Api-Key": new()}, {"Authorization": new("Bearer {}")}],
            "pair": ("access_key", new()),
            "env": new("OPENAI_API_KEY={} MODE=1"),
            "note": new("the key is hf_{}"),
        },
        "command": ["judge", "--api-key", new(), "--port", "80"],
        "judge_url": new("https://judge/score?rows=4&access_token={}"),
    }
    return options, secrets


def found_in(folder, secrets):
    return {
        str(path.relative_to(folder)): [i for i, secret in enumerate(secrets) if secret.encode() in path.read_bytes()]
        for path in folder.rglob("*")
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in secrets)
    }


def test_planted_secrets_are_in_no_file_and_no_text(guarded, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    options, secrets = planted()
    assert len(secrets) == 13
    tiny_model().save_pretrained(tmp_path / "base")
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "log_completions": True, **options}
    secrets.append(uuid.uuid4().hex)
    arguments = {
        "model": str(tmp_path / "base"),
        "client_secret": secrets[-1],
        "callbacks": [JsonlMetricsCallback()],
    }
    trainer = make_trainer(tmp_path / "run", guarded, arguments, **settings)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert (trainer.args.hub_token, trainer.args.api_token) == (options["hub_token"], options["api_token"])
    # What trackers are given, and what a reader of a log or a debugger sees.
    args = trainer.args
    texts = [str(args), repr(args), f"{args!r:.9999}", args.to_json_string(), str(args.to_dict())]
    texts += [str(args.to_sanitized_dict()), str(trainer.resume_options()), trainer.model_card()]
    # A resume that is refused, and one with other secrets that is not.
    other, further = planted()
    secrets += further
    with pytest.raises(CheckpointError, match="level"):
        make_trainer(tmp_path / "run", guarded, arguments, **{**settings, **other, "level": "high"}).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
        )
    resumed = make_trainer(tmp_path / "run", guarded, arguments, **{**settings, **other})
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for wrong in ({"level": options["api_token"]}, {"level": "x", "hub_token": other["hub_token"]}):
        with pytest.raises(ConfigError) as error:
            get_config(guarded)(output_dir=str(tmp_path), use_cpu=True, **{**options, **wrong})
        texts.append("".join(traceback.format_exception(error.value)))
    captured = capfd.readouterr()
    texts += [captured.out, captured.err, caplog.text]
    assert found_in(tmp_path, secrets) == {}
    assert [secret for secret in secrets if any(secret in text for text in texts)] == []
    # Each secret's name is still there, and all else is as it was given.
    saved = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert saved["hub_token"] == saved["api_token"] == saved["model_init_kwargs"]["token"] == "<hidden>"
    assert saved["command"] == ["judge", "--api-key", "<hidden>", "--port", "80"]
    assert saved["judge_url"] == "https://judge/score?rows=4&access_token=<hidden>"
    assert saved["gspo_token"] == "plain"


@pytest.mark.parametrize(
    ("given", "now"),
    [
        ({"api_token": "one-22"}, {"api_token": "two-33"}),
        ({"api_token": "one-22"}, {}),
        ({"model_init_kwargs": {"token": "one-22"}}, {}),
        ({"model_init_kwargs": '{"token": "one-22", "revision": "a"}'}, {"model_init_kwargs": {"revision": "a"}}),
        ({"judge_url": "https://me:one-22@judge/a"}, {"judge_url": "https://judge/a"}),
        ({"door": "one-22"}, {"door": 7}),
    ],
)
def test_another_secret_makes_no_other_run(given, now, guarded, tmp_path):
    configs = [get_config(guarded)(output_dir=str(tmp_path), use_cpu=True, **options) for options in (given, now)]
    trainer = make_trainer(tmp_path, guarded)
    found = []
    for trainer.args in configs:
        found.append(trainer.resume_options())
    assert found[0] == found[1]
    assert "one-22" not in json.dumps(found)


def test_copies_of_a_config_keep_the_real_value(guarded, tmp_path):
    options, _ = planted()
    config = get_config(guarded)(output_dir=str(tmp_path), use_cpu=True, **options)
    for same in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert {name: getattr(same, name) for name in options} == options


def test_a_dataclass_of_options_does_not_show_what_is_marked():
    made = dataclasses.make_dataclass(
        "Own", [("door", str, option("front", "x", secret=True)), ("a", int, option(1, "y"))]
    )
    assert repr(made()) == "Own(a=1)"


# -- on the command line ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token={}", "--no_such_option", "1"],
        ["--model_init_kwargs", '{{"token": "{}"'],
        ["--model_init_kwargs", '["token", "{}"]', "--learning_rate", "fast"],
        ["--door", '{{"x": "{}"}}'],
        ["--servers", "password={}"],
        ["--api_token", "refused-token-1"],
        ["--door", "5"],
        ["--level", "{}", "--api_token", "{}"],
        ["--dataset", "https://me:{}@host/rows.jsonl"],
        ["--config", "CONFIG"],
        ["--config", "BROKEN"],
    ],
)
def test_no_error_of_the_command_line_repeats_a_secret(words, guarded, tmp_path, capfd):
    secret = uuid.uuid4().hex
    (tmp_path / "CONFIG").write_text(f"model_init_kwargs: {{token: '{secret}'}}\nlearning_rate: [1]\n")
    (tmp_path / "BROKEN").write_text(f"api_key: '{secret}\nlearning_rate: [1\n")
    filled = [str(tmp_path / word) if word in ("CONFIG", "BROKEN") else word.format(secret) for word in words]
    common = ["--model", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--reward_funcs", "os:getcwd"]
    done = train(*common, *filled, "--use_cpu", algorithm=guarded)
    said = done.out + done.err + "".join(capfd.readouterr())
    assert done.code == 2
    assert "To mend" in said
    assert secret not in said and "refused-token" not in said and "door=5" not in said


def test_a_secret_default_is_not_shown(guarded, capsys):
    main(["info", guarded])
    main(["info", guarded, "--json"])
    with pytest.raises(SystemExit):
        main(["train", guarded, "--help"])
    shown = capsys.readouterr().out
    assert "front-9aF3door" not in shown
    assert shown.count("<hidden>") == 3


# -- what is a secret -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        "token",
        "api_token",
        "apiToken",
        "X-Api-Key",
        "OPENAI_API_KEY",
        "aws_secret_access_key",
        "aws_access_key_id",
        "password",
        "db_password2",
        "client_secret",
        "credentials",
        "auth",
        "Authorization",
        "private_key",
        "sshKey",
        "HF_TOKEN",
        "use_auth_token",
        "judge_token",
        "webhook_url",
        "access_tokens",
        "password_value",
        "db_pass",
        "PGPASSWORD",
        "otp",
        "passwort",
        "sessionid",
    ],
)
def test_named_like_a_secret(name):
    assert redacted({"deep": [{name: "abcd1234"}]}) == {"deep": [{name: "<hidden>"}]}
    assert redacted({name: {"a": ["abcd1234"]}, "b": 1}) in (
        {name: "<hidden>", "b": 1},
        {name: {"a": ["abcd1234"]}, "b": 1} if name == "judge_token" else None,
    )
    assert redacted({name: None, "b": 1}) == {name: None, "b": 1}
    for text in (f"{name}=abcd1234", f"{name}='abcd1234'", f"{{'{name}': 'abcd1234'}}", f"x --{name} abcd1234 y"):
        assert "abcd1234" not in hide(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "solution") for name in ("eos_token", "pad_token", "stop_token", "gspo_token", "token_normalizer")),
        *((name, "solution") for name in ("tokenizer_name", "mask_truncated", "answer_key", "author", "keyword")),
        *((name, 512) for name in ("max_tokens_per_forward", "num_virtual_tokens", "max_new_tokens", "eos_token_id")),
        *((name, "word") for name in ("password_file", "pass_rate", "secretary", "auth_type", "tokens", "monkey")),
        ("user_token", "<|user|>"),
        ("score_at_last_token", True),
        ("token", True),
    ],
)
def test_not_a_secret(name, value):
    assert redacted({name: value}) == {name: value}
    assert hide(f"{name}={value!r} is unknown.") == f"{name}={value!r} is unknown."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgres://me:p@ss@host/db", "postgres://<hidden>@host/db"),
        ("https://ghtoken@github.com/a/b", "https://<hidden>@github.com/a/b"),
        ("https://host/@user?a=1", "https://host/@user?a=1"),
        ("git@github.com:a/b", "git@github.com:a/b"),
        ("https://a.net/c?sv=1&sig=ab%2Fcdefgh&x=1", "https://a.net/c?sv=1&sig=<hidden>&x=1"),
        ("https://a/x?X-Amz-Signature=0123456789&y=1", "https://a/x?X-Amz-Signature=<hidden>&y=1"),
        ("https://hooks.slack.com/services/T0000/B0000/abcd", "https://hooks.slack.com/services/<hidden>"),
        ("//registry.npmjs.org/:_authToken=abcdefgh12", "//registry.npmjs.org/:_authToken=<hidden>"),
        ("Bearer abcdefgh1234", "Bearer <hidden>"),
        ("the one hf_abcdefghijklmnop1 is", "the one <hidden> is"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----\nx", "<hidden>\nx"),
        ("password: must be longer", "password: <hidden> be longer"),
        ("The password: none was given", "The password: none was given"),
        ("api_token=None", "api_token=None"),
        ("a 'token' is a part of a word", "a 'token' is a part of a word"),
    ],
)
def test_texts_without_secrets(text, expected):
    assert hide(text) == hide(hide(text)) == expected


@pytest.mark.parametrize("piece", ["x", "x-", "--", "a:", "eyJ-", "://", "'", "x=", "token", "\n", "http://a:"])
def test_long_texts_take_no_longer_than_short_ones_do(piece):
    text = piece * (60_000 // len(piece))  # a pattern that looks back at all it has seen would take minutes
    assert hide(f"{text} api_token='abcd1234'").endswith("<hidden>")


def test_entries_of_a_list_of_variables():
    given = [{"name": "API_KEY", "value": "abcd1234"}, {"name": "MODE", "value": "fast"}]
    assert redacted(given) == [{"name": "API_KEY", "value": "<hidden>"}, given[1]]
    assert redacted(given, drop=True) == [{"name": "API_KEY"}, given[1]]


def test_copies_are_json_whatever_an_option_holds(tmp_path):
    loop: dict = {"x": 1}
    loop["self"] = loop
    odd = {
        1: {2, 3},
        "loop": loop,
        "function": hide,
        "class": dict,
        "path": tmp_path,
        "bytes": b"ab",
        "object": object(),
        "nan": float("nan"),
        "error": ValueError("x"),
    }
    found = json.loads(json.dumps(redacted(odd)))
    assert found["1"] == [2, 3]
    assert found["function"] == "trl_core.redaction.hide"
    assert found["class"] == "builtins.dict"
    assert redacted(odd)["object"] == redacted({"object": object()})["object"]  # no address, which no run repeats


def test_an_error_is_cleaned_with_all_that_it_came_from():
    remember({"password": "zebra-crossing"})

    class Odd(Exception):
        def __init__(self, value):
            self.value = {"of": value}

        def __str__(self):
            return str(self.value)

    def failing():
        try:
            try:
                raise Odd("zebra-crossing")
            except Odd:
                raise OSError(2, "no zebra-crossing", "/a/zebra-crossing") from None
        except OSError as error:
            raise ValueError("got zebra-crossing") from error

    with pytest.raises(ValueError) as caught:
        failing()
    text = "".join(traceback.format_exception(hide_error(caught.value)))
    assert "ValueError: got <hidden>" in text and "/a/<hidden>" in text
    assert "zebra-crossing" not in str(caught.value.__cause__.__context__ or "")
    assert str(ConfigError("got zebra-crossing", mend="no zebra-crossing")) == "got <hidden>\n  To mend: no <hidden>"


def test_a_model_that_cannot_be_loaded_repeats_no_secret(tmp_path):
    secret = uuid.uuid4().hex
    trainer = {"model": str(tmp_path / f"nowhere-{secret}")}
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        make_trainer(tmp_path / "run", trainer=trainer, model_init_kwargs={"token": secret})
    assert secret not in "".join(traceback.format_exception(caught.value))
