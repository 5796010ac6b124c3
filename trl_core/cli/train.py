"""`trl-core train`: a run from a YAML file and flags."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import sys
import traceback
import typing
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from .. import install
from ..errors import CompositionError, ConfigError, RewardError
from ..names import did_you_mean, require_source
from ..options import Field, fields_of, help_of, kinds, option, require
from ..redaction import hide, hide_error, marked_in, remember
from ..training.stopping import signals
from .flags import groups_of, is_list, read


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
    stopping_strategy: str | None = option(
        None,
        "With weights: first_exhausted (the default) or all_exhausted.",
        choices=("first_exhausted", "all_exhausted"),
    )
    streaming: bool = option(False, "Read the rows while training, not before.")
    eval_dataset: str | None = option(
        None, "As dataset, for evaluation, after each epoch unless eval_strategy says otherwise."
    )
    test_split_size: int | float | None = option(None, "Rows, or the part of them, to set aside for evaluation.", gt=0)
    reward_funcs: list[str] | None = option(
        None, "module:function or path/to/file.py:function, or folder or Hub id (owner/name) of a classifier."
    )
    ref_model: str | None = option(None, "Folder or Hub id of the reference model; default: the model as it starts.")
    formatting_func: str | None = option(
        None, "module:function or path/to/file.py:function that gives the text or the messages of a row."
    )
    peft: dict[str, Any] | None = option(None, "Options of peft.LoraConfig (JSON, or a mapping): train an adapter.")
    resume: bool | str | None = option(
        None,
        "Checkpoint folder, true for the newest complete one in output_dir, or auto for that one if there is any.",
    )
    require: str | None = option(
        None, "Refuse algorithms less stable than this: stable or experimental.", choices=("stable", "experimental")
    )


_TRAINER_ARGUMENTS = {"reward_funcs", "ref_model", "formatting_func"}
"""Those that only some trainers take."""
_ALIASES = {"resume_from_checkpoint": "resume", "overwrite": "overwrite_output_dir"}
_MIXTURE = ("datasets", "streaming", "test_split_size", "stopping_strategy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of the subcommand; those of the algorithm are known only once it is named."""
    parser.usage = "trl-core train NAME [--config FILE.yaml] [--OPTION VALUE ...]"
    parser.epilog = "`trl-core train NAME --help` lists all options of an algorithm or composition."
    parser.add_argument("name", metavar="NAME", nargs="?", help="algorithm, or several joined by +")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="OPTION", help="see the help of an algorithm")


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked without a model, then train and save.

    The exit code is 130, 143 or 129 if SIGINT (Ctrl-C), SIGTERM or SIGHUP stopped it.

    Raises:
        TRLCoreError: something does not fit; see the message.
    """
    with signals() as stop:
        try:
            _run(args)
        except BaseException as error:
            # A signal that acts at once may come as another error: who imports a plugin makes that of everything.
            if not stop.at_once and not (stop.received and isinstance(error, KeyboardInterrupt | SystemExit)):
                raise
        if stop.received and not stop.told:
            print(f"trl-core: stopped by {stop.name} before the training began; nothing is saved.", file=sys.stderr)
        return 128 + stop.received if stop.received else 0


def _run(args: argparse.Namespace) -> None:
    from ..composition import compose

    usage = "Write it so: trl-core train NAME [--config FILE.yaml] [--OPTION VALUE ...]; `trl-core list` shows names."
    require(args.name is not None, "The command line: no NAME of an algorithm is given.", usage)
    composition = compose(args.name)
    arguments = [(name, Any, option(None, text)) for name, text in composition.arguments.items()]
    groups = groups_of(composition)
    own = {f.name for fields in groups.values() for f in fields}
    run_options = fields_of(dataclasses.make_dataclass("Run", arguments, bases=(RunOptions,)))
    taken = {*inspect.signature(composition.trainer_class).parameters}
    groups = {"run": [f for f in run_options if f.name not in _TRAINER_ARGUMENTS - taken], **groups}
    values = _settings(args.name, groups, args.options)
    compose(args.name, require=values.get("require"))
    _train(composition, values, {name: value for name, value in values.items() if name in own}, args)


def _settings(name: str, groups: dict[str, list[Field]], words: list[str]) -> dict[str, Any]:
    """The YAML file's values, overridden by the flags', each in its type."""
    hints = {f.name: f for fields in groups.values() for f in fields}
    spelt = [_spelt(word, hints) for word in words]
    counts = Counter(word.partition("=")[0] for word in spelt if word.startswith("--"))
    for flag in [flag for flag, times in counts.items() if times > 1]:
        require(flag != "--config", "--config is given twice.", "Put all keys in one file; flags override it.")
        print(f"trl-core: {flag} is given {counts[flag]} times; the last one counts.", file=sys.stderr)
    given, unknown = _parser(name, groups).parse_known_args(spelt)
    flags = {key: _parsed(value) for key, value in vars(given).items()}
    sources = {"The command line": flags | {word.strip("-").split("=")[0]: None for word in unknown}}
    if "config" in flags:
        from .yaml_file import read_yaml

        found = read_yaml(flags["config"])
        what = f"{flags['config']}: a file names no further file, but it has the key config."
        require("config" not in found, what, "Put all keys in one file; flags override it.")
        sources = {flags["config"]: found} | sources
    values, mend = {}, f"See trl-core train {name} --help."
    for source, found in sources.items():
        remember(found, marked=marked_in(f for fields in groups.values() for f in fields))
        for key, value in found.items():
            key = _ALIASES.get(key, key)
            if key not in hints:
                raise ConfigError(f"{source}: there is no option {key!r}.{did_you_mean(key, hints)}", mend=mend)
            try:
                values[key] = read(value, hints[key])
            except ConfigError as error:
                what = f"{source}: {error.what.removesuffix('.')}{_json_error(value)}."
                raise ConfigError(what, mend=error.mend) from None
            # What is no JSON is text, which options that take a file's name too would accept.
            mapping = any(dict in (kind, typing.get_origin(kind)) for kind in kinds(hints[key].type))
            broken = _json_error(value) if mapping and values[key] is value else ""
            require(not broken, f"{source}: {key}: {value!r} is no mapping{broken}.", mend)
    return values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise an error of ours."""
        raise ConfigError(f"The command line: {message}.", mend=f"{(self.usage or '')} See --help.")


def _parser(name: str, groups: dict[str, list[Field]]) -> argparse.ArgumentParser:
    usage = f"trl-core train {name} [--config FILE.yaml] [--OPTION VALUE ...]"
    parser = _Parser(usage=usage, allow_abbrev=False)
    parser._negative_number_matcher = re.compile("-[^-]")  # -1e-5 is a value too; there are no short options
    for title, fields in groups.items():
        group = parser.add_argument_group(f"options of {title}")
        for f in fields:
            shown = "" if f.default in (None, "", []) else f" (default: {f.default})"
            form: dict[str, Any] = {"metavar": "VALUE", "help": (help_of(f) + shown).replace("%", "%%")}
            if is_list(f.type):
                form["nargs"] = "+"
            elif bool in kinds(f.type):
                form |= {"nargs": "?", "const": True}
            try:
                group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **form)
            except argparse.ArgumentError:
                what = f"{f.name!r} of {title!r} is also the name of another key of `trl-core train`."
                mend = "For its authors: rename it. From Python it can be used as it is."
                raise CompositionError(what, mend=mend) from None
    return parser


def _spelt(word: str, known: Iterable[str]) -> str:
    """A flag with underscores; `--no_x` as `--x=false`."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word[2:].partition("=")
    flag = flag.replace("-", "_")
    flag = _ALIASES.get(flag, f"no_{_ALIASES[flag[3:]]}" if flag[3:] in _ALIASES else flag)
    if flag.startswith("no_") and flag not in known:
        return f"--{flag[3:]}=false"
    return f"--{flag}{equals}{value}"


def _parsed(value: Any) -> Any:
    """A value given as a flag: JSON where it is that, and a list of one as its only entry."""
    if isinstance(value, list):
        return _parsed(value[0]) if len(value) == 1 else value
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(value) if str(value)[:1] in ("[", "{") else value
    return value


def _json_error(value: Any) -> str:
    try:
        json.loads(value if isinstance(value, str) and value[:1] in ("[", "{") else "0")
    except (ValueError, RecursionError) as error:
        return f" (as JSON: {error})"
    return ""


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
    file = file and os.path.expanduser(file)
    # A console script, unlike `python -m`, does not look for modules where it is run.
    sys.path.append(os.path.dirname(os.path.abspath(file)) if file else os.getcwd())
    try:
        found = _run_file(os.path.abspath(file)) if file else vars(importlib.import_module(module))
    except (Exception, SystemExit) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({at.filename}, line {at.lineno})" if os.path.exists(at.filename) else ""
        what = f"{key}: {spec!r} cannot be imported: {type(error).__name__}: {error}{place}."
        raise ConfigError(what, mend="Check the spelling, and that it can be imported from here.") from error
    missing = f"{key}: {file or module} has no {name!r}.{did_you_mean(name, found)}"
    require(name in found, missing, "Name something that it defines.")
    return found[name]


def _reward(spec: str) -> Any:
    found = load_object(spec, "reward_funcs")
    if isinstance(found, str) and (os.path.isdir(found) or ("/" in found and not found.endswith(".py"))):
        return require_source(found, "reward_funcs: The reward model")
    what = f"reward_funcs: {spec!r} is neither a function nor a model."
    require(callable(found), what, help_of(_field("reward_funcs")))
    return found


def _field(name: str) -> Field:
    return RunOptions.__dataclass_fields__[name]


def _adapter(settings: dict[str, Any], task: str) -> Any:
    mend = "Give options of peft.LoraConfig that fit together."
    for name, fits in (("r", lambda r: type(r) is int and r >= 1), ("lora_dropout", lambda p: 0 <= p < 1)):
        with contextlib.suppress(TypeError):
            if name in settings and fits(settings[name]):
                continue
        require(name not in settings, f"peft: {name}={settings.get(name)!r} makes no adapter.", mend)
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
    size, stop = values.get("test_split_size"), values.get("stopping_strategy")
    fits = size is None or (size >= 1 if isinstance(size, int) else 0 < size < 1)
    require(fits, f"test_split_size={size} leaves no two parts.", "Give a number of rows, or a part between 0 and 1.")
    fits = stop is None or (bool(values.get("datasets")) and stop in ("first_exhausted", "all_exhausted"))
    mend = "Give datasets with weights, and first_exhausted or all_exhausted."
    require(fits, f"stopping_strategy={stop!r} says nothing here.", mend)


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


def _resume_call(args: argparse.Namespace, checkpoint: bool | str) -> str:
    """The command that goes on with a run from a checkpoint; what is secret in it is hidden."""
    words = iter(args.options)
    kept: list[str] = []
    for word in words:
        flag = _spelt(word, ()).removeprefix("--")
        while flag and word.startswith("--") and flag.partition("=")[0] in ("resume", "overwrite_output_dir"):
            word = next((word for word in words if word.startswith("--")), "")
            flag = _spelt(word, ()).removeprefix("--")
        kept += [word] if word else []
    given = "true" if checkpoint is True else str(checkpoint)
    words = hide(shlex.join(["trl-core", "train", args.name, *kept, "--resume", given]))
    return ("accelerate launch ... " if "TORCHELASTIC_RUN_ID" in os.environ else "") + words


def _train(composition: Any, values: dict[str, Any], options: dict[str, Any], args: argparse.Namespace) -> None:
    from ..models.loading import check_model

    trainer_class = composition.trainer_class
    rewarded = "reward_funcs" in inspect.signature(trainer_class).parameters
    _check_data(values)
    # An algorithm may take its rewards in an argument of its own, as PPO does.
    scored = any(values.get(name) for name in composition.arguments if name.startswith("reward_"))
    needed = {"model": True, "dataset": not values.get("datasets"), "reward_funcs": rewarded and not scored}
    for name in (name for name, asked in needed.items() if asked):
        mend = f"Give --{name}, or `{name}:` in the file of --config. {help_of(_field(name))}"
        require(bool(values.get(name)), f"No {name} is given.", mend)
    for name in ("model", "ref_model"):
        if values.get(name):
            kwargs = options.get("model_init_kwargs")
            values[name] = check_model(values[name], kwargs if isinstance(kwargs, dict) else {}, name)
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
    config = composition.config_class(**options | {"report_to": options.get("report_to") or "none"})

    endless = values.get("streaming") and config.max_steps < 1
    require(not endless, "streaming without max_steps: a stream has no end that is known.", "Set max_steps.")

    from ..training.folder import RunFolder

    run = RunFolder(config.output_dir)
    with run.held():
        run.check(values.get("resume"), overwrite=config.overwrite_output_dir)
        _train_in_folder(composition, values, config, extra, lambda given: _resume_call(args, given))


def _train_in_folder(
    composition: Any, values: dict[str, Any], config: Any, extra: dict[str, Any], resume_call: Callable[..., str]
) -> None:
    from transformers import PrinterCallback, ProgressCallback

    from ..training.callbacks import JsonlMetricsCallback, StepLineCallback

    train_dataset, eval_dataset = _load_data(values)
    trainer = composition.trainer_class(
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
    trainer.resume_call = resume_call
    try:
        trainer.train(resume_from_checkpoint=values.get("resume"))
    except RewardError as error:
        if error.__cause__:
            traceback.print_exception(hide_error(error.__cause__))  # where in the user's code
        raise
    stop = signals()
    stop.held = True  # the model is saved in any case
    if not (trainer.nothing_left and trainer.run.record.get("model") == trainer.state.global_step):
        trainer.save_model()
    say(f"model, tokenizer and card: {config.output_dir}\nmetrics: {os.path.join(config.output_dir, 'metrics.jsonl')}")
    trainer.accelerator.end_training()
    stop.told = True
