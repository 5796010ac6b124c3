"""`trl-core train`: a run from a YAML file and flags."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import install
from ..errors import ConfigError, RewardError
from ..options import option, require
from ..redaction import hide_error, marked_in, remember
from .flags import Field, fields_of, groups_of, help_of, is_list, kinds, read


@dataclasses.dataclass
class RunOptions:
    """What a run needs beside the options of its algorithm."""

    config: str | None = option(None, "YAML file with any of these keys; flags override it.")
    model: str | None = option(None, "Folder or Hub id of the model to train. Needed.")
    dataset: str | None = option(
        None, "File (.json, .jsonl, .csv, .parquet), folder, or Hub id; NAME:SPLIT names a split. Needed."
    )
    dataset_config: str | None = option(None, "Configuration of a Hub dataset.")
    datasets: list[dict[str, Any]] | None = option(
        None,
        "Several, in place of dataset: mappings with path, and optionally name (the configuration), data_dir, "
        "data_files, split, columns (those to keep) and weight (rows are drawn in these proportions).",
    )
    stopping_strategy: str | None = option(None, "With weights: first_exhausted (the default) or all_exhausted.")
    streaming: bool = option(False, "Read the rows while training, not before.")
    eval_dataset: str | None = option(
        None, "As dataset, for evaluation, after each epoch unless eval_strategy says otherwise."
    )
    test_split_size: int | float | None = option(None, "Rows, or the part of them, to set aside for evaluation.")
    reward_funcs: list[str] | None = option(
        None, "module:function or path/to/file.py:function, or folder or Hub id (owner/name) of a classifier."
    )
    ref_model: str | None = option(None, "Folder or Hub id of the reference model; default: the model as it starts.")
    formatting_func: str | None = option(
        None, "module:function or path/to/file.py:function that gives the text or the messages of a row."
    )
    peft: dict[str, Any] | None = option(None, "Options of peft.LoraConfig (JSON, or a mapping): train an adapter.")
    resume: bool | str | None = option(None, "Checkpoint folder, or true for the newest complete one in output_dir.")
    require: str | None = option(None, "Refuse algorithms less stable than this: stable or experimental.")


_TRAINER_ARGUMENTS = {"reward_funcs", "ref_model", "formatting_func"}
"""Those that only some trainers take."""
_MIXTURE = ("datasets", "streaming", "test_split_size", "stopping_strategy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the subcommand; those of the algorithm are known only once it is named."""
    parser.usage = "trl-core train NAME [--config FILE.yaml] [--OPTION VALUE ...]"
    parser.epilog = "`trl-core train NAME --help` lists all options of an algorithm or composition."
    parser.add_argument("name", metavar="NAME", help="algorithm, or several joined by +")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTION", help="see the help of an algorithm")


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked without a model, then train and save.

    Raises:
        TRLCoreError: something does not fit; see the message.
    """
    from ..composition import compose

    composition = compose(args.name)
    arguments = [(name, Any, option(None, text)) for name, text in composition.arguments.items()]
    groups = groups_of(composition)
    own = {f.name for fields in groups.values() for f in fields}
    run_options = fields_of(dataclasses.make_dataclass("Run", arguments, bases=(RunOptions,)))
    taken = {*inspect.signature(composition.trainer_class).parameters}
    groups = {"run": [f for f in run_options if f.name not in _TRAINER_ARGUMENTS - taken], **groups}
    values = _settings(args.name, groups, args.options)
    compose(args.name, require=values.get("require"))
    _train(composition, values, {name: value for name, value in values.items() if name in own})
    return 0


def _settings(name: str, groups: dict[str, list[Field]], words: list[str]) -> dict[str, Any]:
    """The YAML file's values, overridden by the flags', each in its type."""
    hints = {f.name: f.type for fields in groups.values() for f in fields}
    given, unknown = _parser(name, groups).parse_known_args([_spelt(word, hints) for word in words])
    flags = {key: _parsed(value) for key, value in vars(given).items()}
    sources = {"The command line": flags | {word.strip("-").split("=")[0]: None for word in unknown}}
    if "config" in flags:
        sources = {flags["config"]: _yaml(flags["config"])} | sources
    values, mend = {}, f"See trl-core train {name} --help."
    for source, found in sources.items():
        remember(found, marked=marked_in(f for fields in groups.values() for f in fields))
        for key, value in found.items():
            key = "resume" if key == "resume_from_checkpoint" else key
            if key not in hints:
                raise ConfigError(f"{source}: there is no option {key!r}.{_did_you_mean(key, hints)}", mend=mend)
            try:
                values[key] = read(value, hints[key])
            except TypeError as error:
                raise ConfigError(f"{source}: {key}: {error}.", mend=mend) from error
    return values


def _parser(name: str, groups: dict[str, list[Field]]) -> argparse.ArgumentParser:
    usage = f"trl-core train {name} [--config FILE.yaml] [--OPTION VALUE ...]"
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False)
    for title, fields in groups.items():
        group = parser.add_argument_group(f"options of {title}")
        for f in fields:
            shown = "" if f.default in (None, "", []) else f" (default: {f.default})"
            form: dict[str, Any] = {"metavar": "VALUE", "help": (help_of(f) + shown).replace("%", "%%")}
            if is_list(f.type):
                form["nargs"] = "+"
            elif bool in kinds(f.type):
                form |= {"nargs": "?", "const": True}
            group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **form)
    return parser


def _spelt(word: str, known: Iterable[str]) -> str:
    """A flag with underscores; `--no_x` as `--x=false`."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word[2:].partition("=")
    flag = flag.replace("-", "_")
    if flag.startswith("no_") and flag not in known:
        return f"--{flag[3:]}=false"
    return f"--{flag}{equals}{value}"


def _parsed(value: Any) -> Any:
    """A value given as a flag: JSON where it is that, and a list of one as its only entry."""
    if isinstance(value, list):
        return _parsed(value[0]) if len(value) == 1 else value
    with contextlib.suppress(ValueError):
        return json.loads(value) if str(value)[:1] in "[{" else value
    return value


def _yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The config {path!r} cannot be read: {error}", mend="Give a YAML file.") from error
    require(isinstance(found, dict), f"{path} holds no mapping.", "Write lines of the form `option: value`.")
    return dict(found)


def _did_you_mean(word: Any, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), choices, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


_run_file = functools.cache(runpy.run_path)


def load_object(spec: Any, key: str) -> Any:
    """What "module:name" or "path/to/file.py:name" names; anything else as it is.

    Raises:
        ConfigError: there is no such module, file or name, or importing it fails.
    """
    match = re.fullmatch(r"(?:(.+\.py)|([A-Za-z_][\w.]*)):(\w+)", str(spec))
    if match is None:
        return spec
    file, module, name = match.groups()
    # A console script, unlike `python -m`, does not look for modules where it is run.
    sys.path.append(os.path.dirname(os.path.abspath(file)) if file else os.getcwd())
    try:
        found = _run_file(os.path.abspath(file)) if file else vars(importlib.import_module(module))
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({at.filename}, line {at.lineno})" if os.path.exists(at.filename) else ""
        what = f"{key}: {spec!r} cannot be imported: {type(error).__name__}: {error}{place}."
        raise ConfigError(what, mend="Check the spelling, and that it can be imported from here.") from error
    missing = f"{key}: {file or module} has no {name!r}.{_did_you_mean(name, found)}"
    require(name in found, missing, "Name something that it defines.")
    return found[name]


def _reward(spec: str) -> Any:
    found = load_object(spec, "reward_funcs")
    model = os.path.isdir(str(found)) or re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.py)", str(found))
    what = f"reward_funcs: {spec!r} is neither a function nor a model."
    require(callable(found) or bool(model), what, help_of(_field("reward_funcs")))
    return found


def _field(name: str) -> Field:
    return RunOptions.__dataclass_fields__[name]


def _adapter(settings: dict[str, Any], task: str) -> Any:
    try:
        return importlib.import_module("peft").LoraConfig(**{"task_type": task, **settings})
    except (ImportError, TypeError, ValueError) as error:
        missing = isinstance(error, ImportError)
        mend = install.how("trl-core[peft]") if missing else "Give options of peft.LoraConfig that fit together."
        raise ConfigError(f"peft: {error}", mend=mend) from error


def _check_data(values: dict[str, Any]) -> None:
    """Refuse keys that say twice what the data are."""
    for one, other in (("datasets", "dataset"), ("datasets", "dataset_config"), ("test_split_size", "eval_dataset")):
        mend = "Leave one out; each of the datasets has its own path, name (configuration) and split."
        require(not (values.get(one) and values.get(other)), f"{one} and {other} are both given.", mend)


def _load_data(values: dict[str, Any]) -> tuple[Any, Any]:
    """What to train on and what to evaluate on, which may be None."""
    from ..data.loading import load, load_mixture

    config = values.get("dataset_config")
    stream: dict[str, Any] = {"streaming": True} if values.get("streaming") else {}
    evaluation = None
    if values.get("eval_dataset"):
        evaluation = load(values["eval_dataset"], config, default="test", **stream)
    mixture = {name: values[name] for name in _MIXTURE if values.get(name)}
    if not mixture.keys() - stream:
        return load(values["dataset"], config, **stream), evaluation
    found = load_mixture({"datasets": [{"path": values.get("dataset"), "name": config}], **mixture})
    return found["train"], found.get("test", evaluation)


def _train(composition: Any, values: dict[str, Any], options: dict[str, Any]) -> None:
    trainer_class = composition.trainer_class
    rewarded = "reward_funcs" in inspect.signature(trainer_class).parameters
    _check_data(values)
    # An algorithm may take its rewards in an argument of its own, as PPO does.
    scored = any(values.get(name) for name in composition.arguments if name.startswith("reward_"))
    needed = {"model": True, "dataset": not values.get("datasets"), "reward_funcs": rewarded and not scored}
    for name in (name for name, asked in needed.items() if asked):
        mend = f"Give --{name}, or `{name}:` in the file of --config. {help_of(_field(name))}"
        require(bool(values.get(name)), f"No {name} is given.", mend)
    given = [*composition.arguments, *(name for name in ("ref_model", "formatting_func") if values.get(name))]
    extra = {name: load_object(values[name], name) for name in given if name in values}
    if "formatting_func" in extra:
        what = f"formatting_func: {values['formatting_func']!r} is no function."
        require(callable(extra["formatting_func"]), what, help_of(_field("formatting_func")))
    if rewarded:
        extra["reward_funcs"] = [_reward(spec) for spec in values.get("reward_funcs") or []]
    if values.get("peft") is not None:
        extra["peft_config"] = _adapter(values["peft"], "SEQ_CLS" if trainer_class.new_head == "score" else "CAUSAL_LM")
    # Who names rows for evaluation wants one; transformers would never make it.
    evaluates = {"eval_strategy": "epoch"} if values.get("eval_dataset") or values.get("test_split_size") else {}
    options = {"output_dir": f"{composition.name.replace('+', '-')}-output", **evaluates, **options}
    try:
        config = composition.config_class(**options | {"report_to": options.get("report_to") or "none"})
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"The options do not fit: {error}", mend="Change the option that is named.") from error

    endless = values.get("streaming") and config.max_steps < 1
    require(not endless, "streaming without max_steps: a stream has no end that is known.", "Set max_steps.")

    from transformers import PrinterCallback, ProgressCallback

    from ..training.callbacks import JsonlMetricsCallback, StepLineCallback

    train_dataset, eval_dataset = _load_data(values)
    trainer = trainer_class(
        model=values["model"],
        args=config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=[JsonlMetricsCallback(), StepLineCallback()],
        **extra,
    )
    for printer in (PrinterCallback, ProgressCallback):  # the step line says it better
        trainer.remove_callback(printer)
    say = print if trainer.is_world_process_zero() else lambda _: None
    for part in composition.provenance():
        say("{algorithm} {version} ({stability}) of {distribution}".format(**part))
    try:
        trainer.train(resume_from_checkpoint=values.get("resume"))
    except RewardError as error:
        traceback.print_exception(error.__cause__ and hide_error(error.__cause__))  # where in the user's code
        raise
    trainer.save_model()
    say(f"model, tokenizer and card: {config.output_dir}\nmetrics: {os.path.join(config.output_dir, 'metrics.jsonl')}")
    trainer.accelerator.end_training()
