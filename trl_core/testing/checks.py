"""What every algorithm must keep: the checks of the conformance kit, each a function with a name and a docstring.

A check that fails raises an error that says how to mend it. One that can say nothing raises `NotApplicable`, or
`Blocked` where a check it builds on fails: one fault is reported once. `kit` makes tests of them.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from importlib_metadata import requires
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import Tensor, nn
from transformers import TrainingArguments

import trl_core

from ..composition import Hooks, compose, default_of
from ..discovery import CORE, load, source_files
from ..errors import ConformanceError
from ..training.state import checkpoints, join_tensors, split_tensors
from .outcomes import Blocked, NotApplicable
from .subject import Subject, Weights

Check = Callable[[Subject, Path], None]
SPLITS = ((16, 1), (8, 2), (4, 4), (2, 8))
"""Rows of a micro-batch and micro-batches of a step; the last cuts groups of 4."""
LAYOUTS: tuple[dict[str, Any], ...] = ({}, {"padding_free": True}, {"share_prompts": False}, {"pad_to_multiple_of": 16})
SPLIT_TOLERANCE = 1e-5
"""Relative to the change that training made, of which rounding moves about 1e-6; what float32 does not resolve of the
weights is allowed in any case, for there may be hardly any change."""


def require(condition: object, what: str, mend: str) -> None:
    """Raise `ConformanceError` unless the condition holds."""
    if not condition:
        raise ConformanceError(what, mend=mend)


def _first(earlier: Check, subject: Subject, folder: Path) -> None:
    """Make nothing of what follows if an earlier check fails, which is made once for a subject."""
    if earlier.__name__ not in subject.found:
        subject.found[earlier.__name__] = None
        try:
            earlier(subject, folder)
        except Exception as error:
            subject.found[earlier.__name__] = error
    if isinstance(failed := subject.found[earlier.__name__], Blocked):
        raise failed
    if failed is not None:
        raise Blocked(f"{earlier.__name__}: {failed}") from failed


# -- what the distribution says ---------------------------------------------------------------------------------------
_LIST = "import sys, trl_core; print(trl_core.list_algorithms()); print(*sys.modules)"


def check_is_listed_without_import(subject: Subject, folder: Path) -> None:
    """`list_algorithms` shows it, and imports neither it nor torch to do so."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", _LIST], capture_output=True, text=True, env=environment, check=True)
    listed, modules = done.stdout.splitlines()[-2:]
    for info in subject.infos:
        require(repr(info) in listed, f"{info} is not listed.", "Look at what `trl-core list` reports.")
        imported = {"torch", info.value.partition(":")[0]} & set(modules.split())
        require(not imported, f"Listing {info} imports {imported}.", "Find out what does, a .pth file perhaps.")


def check_declares_its_range(subject: Subject, folder: Path) -> None:
    """The distribution says which versions of trl-core it works with."""
    for name in {info.distribution for info in subject.infos} - {CORE}:
        needs = [Requirement(text) for text in requires(name) or []]
        ranges = [str(need.specifier) for need in needs if canonicalize_name(need.name) == CORE]
        require(any(ranges), f"{name} requires no particular version of {CORE}.", f"Require {CORE}>=0.1,<0.3, say.")


def check_imports_only_public_names(subject: Subject, folder: Path) -> None:
    """It imports of trl-core only what is public; all else may change in any release, for stable algorithms too."""
    for info in subject.infos:
        files = {} if info.distribution == CORE else source_files(info.value)
        for name, file in files.items():
            try:
                private = sorted(set(_private_imports(ast.parse(file.read_bytes()))))
            except SyntaxError as error:
                raise Blocked(f"{name} cannot be read: {error}") from error
            mend = f"Use {', '.join(trl_core.PUBLIC_MODULES)}, or ask for what you need to be made public."
            require(not private, f"{name} of {info} imports {', '.join(private)}.", mend)


def _private_imports(node: ast.AST) -> Iterator[str]:
    """What a module imports of trl-core that is not public; types alone, under TYPE_CHECKING, do not count."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if _is_private(alias.name))
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == trl_core.__name__:
        names = (alias.name for alias in node.names if alias.name not in trl_core.__all__)
        yield from (name for name in (f"{node.module}.{name}" for name in names) if _is_private(name))
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and _is_private(str(node.module)):
        yield str(node.module)
    for child in ast.iter_child_nodes(node):
        yield from _private_imports(child)


def _is_private(module: str) -> bool:
    return module.partition(".")[0] == trl_core.__name__ and module not in trl_core.PUBLIC_MODULES


# -- what it registers ------------------------------------------------------------------------------------------------
def check_loads(subject: Subject, folder: Path) -> None:
    """The entry point leads to an `Algorithm` of its name."""
    for info in subject.infos:
        load(info)


def check_hooks_fit_the_contract(subject: Subject, folder: Path) -> None:
    """Every hook exists, takes arguments it may take, gives none a default, and no other provides the same step."""
    _first(check_loads, subject, folder)
    compose(subject.name)


def check_options_have_default_and_help(subject: Subject, folder: Path) -> None:
    """Every option has a default value and a help text, so that it can be left out and looked up."""
    _first(check_hooks_fit_the_contract, subject, folder)
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    for f in (f for config in subject.own_configs for f in dataclasses.fields(config) if f.name not in inherited):
        what, mend = f"The option {f.name!r} has no", f'Write {f.name}: ... = option(default, "What it does.").'
        require({f.default, f.default_factory} != {dataclasses.MISSING}, f"{what} default value.", mend)
        require(f.metadata.get("help"), f"{what} help text.", mend)


def check_options_are_new(subject: Subject, folder: Path) -> None:
    """No option is one that the base has."""
    _first(check_options_have_default_and_help, subject, folder)
    assert subject.composition().config_class  # made on first use, which compares the options


def check_options_can_be_written_down(subject: Subject, folder: Path) -> None:
    """Every option's value survives JSON, so that it can stand in a file and a checkpoint remembers it."""
    _first(check_options_are_new, subject, folder)
    own = {f.name for config in subject.own_configs for f in dataclasses.fields(config)}
    for f in (f for f in dataclasses.fields(subject.composition().config_class) if f.name in own):
        value = subject.options.get(f.name, default_of(f))
        try:
            same = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            same = False
        mend = "Use numbers, text, lists or mappings; a function is an argument: Algorithm(arguments=...)."
        require(same, f"The option {f.name!r} has the value {value!r}, which JSON cannot hold.", mend)


# -- what it computes -------------------------------------------------------------------------------------------------
def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names that only one of the two has, or under which they differ."""
    both = one.keys() & other.keys()
    unequal = {name for name in both if not torch.equal(one[name].nan_to_num(), other[name].nan_to_num())}
    return sorted((one.keys() ^ other.keys()) | unequal)


def _shared(*runs: Weights) -> list[Weights]:
    """Only the weights that every run ends with: options may bring or remove a reference."""
    names = set.intersection(*({*run} for run in runs))
    return [{name: value for name, value in run.items() if name in names} for run in runs]


def _require_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str, mend: str) -> None:
    differing = _differing(one, other)
    require(not differing, f"{what}: {len(differing)} of {len(one)} tensors differ, {differing[:1]} first.", mend)


def check_trains(subject: Subject, folder: Path) -> None:
    """Training goes through to its end with finite losses and moves the weights, which stay finite."""
    _first(check_options_can_be_written_down, subject, folder)
    what = f"{subject.name!r}, trained under {dict(subject.options)},"
    moved = _differing(*_shared(subject.run, subject.weights(subject.trainer(folder))))
    require(moved, f"{what} moves no weight.", "Give Subject(options=...) under which it learns.")
    finite = all(bool(tensor.isfinite().all()) for tensor in subject.run.values())
    require(finite, f"{what} ends with weights that are not finite.", "Look for a division by 0, or a root of it.")


def check_same_seed_gives_same_weights(subject: Subject, folder: Path) -> None:
    """Two runs with one seed end with the same weights, bit for bit."""
    _first(check_trains, subject, folder)
    mend = "Draw random numbers from torch's global generator, or from one seeded with args.seed; sort sets."
    _require_equal(subject.run, subject.again, "Two runs with the same seed end with other weights", mend)


def check_acts(subject: Subject, folder: Path) -> None:
    """Under the options given it trains otherwise than its base; if not, the other checks would show nothing."""
    _first(check_same_seed_gives_same_weights, subject, folder)
    differs = _differing(*_shared(subject.run, subject.train(folder, base=True)))
    require(differs, f"{subject.name!r} trains exactly as its base.", "Give Subject(options=...) under which it acts.")


def check_neutral_setting_equals_base(subject: Subject, folder: Path) -> None:
    """Under its neutral options it trains exactly as its base does."""
    _first(check_same_seed_gives_same_weights, subject, folder)
    if subject.neutral is None:
        raise NotApplicable(f"{subject.name} has no neutral setting.")
    base, own = _shared(*(subject.train(folder / str(base), base=base, **subject.neutral) for base in (True, False)))
    mend = "Let every hook return what it was given when there is nothing to do."
    _require_equal(base, own, f"{subject.name!r} does not equal its base under {subject.neutral}", mend)


def check_micro_batches_do_not_matter(subject: Subject, folder: Path) -> None:
    """However the rows of an optimizer step are cut into micro-batches, the step is the same."""
    _first(check_same_seed_gives_same_weights, subject, folder)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")
    splits = [dict(zip(names, (rows, cuts, cuts, 1), strict=True)) for rows, cuts in SPLITS]
    mend = "Return terms per token or per pair; leave every mean over rows or tokens to the core."
    _require_same_steps(subject, folder, splits, mend)


def check_layout_does_not_matter(subject: Subject, folder: Path) -> None:
    """However the rows of a micro-batch are laid out for the model, the step is the same."""
    _first(check_same_seed_gives_same_weights, subject, folder)
    mend = "Take log-probabilities and scores from the core, which knows where a row's tokens are."
    _require_same_steps(subject, folder, LAYOUTS, mend)


def _require_same_steps(subject: Subject, folder: Path, ways: Sequence[dict[str, Any]], mend: str) -> None:
    # Plain gradient descent, for Adam and clipping would hide a wrong factor.
    options: Any = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 2}
    runs = [subject.weights(subject.trainer(folder / "start"))]
    runs += [subject.train(folder / str(number), **options, **way) for number, way in enumerate(ways)]
    start, usual, *others = [torch.cat([w.double().flatten() for w in run.values()]) for run in _shared(*runs)]
    # A weight is rounded to one of float32, off by a quarter of its relative precision in the mean.
    step, resolved = float((usual - start).norm()), torch.finfo(torch.float32).eps / 4 * float(start.norm())
    allowed = max(SPLIT_TOLERANCE * step, resolved)
    for way, other in zip(ways[1:], others, strict=True):
        gap = float((other - usual).norm())
        what = (
            f"{subject.name!r} trains otherwise under {way} than under {ways[0]}: two steps of plain gradient descent "
            f"move the weights by {step:.3g} and end {gap:.3g} apart. Rounding explains {allowed:.2g}, the "
            f"larger of {SPLIT_TOLERANCE:g} of the way and {resolved:.2g}, which float32 does not resolve."
        )
        require(gap <= allowed, what, mend)


def check_resumes_exactly_at_every_step(subject: Subject, folder: Path) -> None:
    """A run resumed from any of its checkpoints ends with the weights of the run that was not stopped."""
    _first(check_same_seed_gives_same_weights, subject, folder)
    subject.train(folder / "saved", save_strategy="steps", save_steps=1)
    mend = "Give the hooks class state_dict and load_state_dict with all that changes during training."
    for checkpoint in checkpoints(folder / "saved")[:-1]:
        weights = subject.train(folder / checkpoint.name, resume=checkpoint)
        _require_equal(subject.run, weights, f"Resumed from {checkpoint.name}, training ends elsewhere", mend)


def check_evaluation_changes_nothing(subject: Subject, folder: Path) -> None:
    """A run that evaluates after every step ends with the weights of one that never does."""
    _first(check_same_seed_gives_same_weights, subject, folder)
    weights = subject.train(folder, eval_strategy="steps", eval_steps=1)
    mend = "Change nothing in a hook while context.training is False."
    _require_equal(subject.run, weights, "With evaluation, training ends with other weights", mend)


def check_state_survives_storage(subject: Subject, folder: Path) -> None:
    """The state of the hooks is the same after a way through JSON and safetensors into a fresh trainer."""
    _first(check_trains, subject, folder)
    trained, fresh = (subject.trainer(folder / name) for name in ("trained", "fresh"))
    trained.train()
    plain, tensors = _stored(trained.hooks)
    fresh.hooks.load_state_dict(join_tensors(json.loads(plain), tensors))
    plain_again, tensors_again = _stored(fresh.hooks)
    what, mend = f"The state of {subject.name!r} changes when it is saved and loaded", "Load all that state_dict holds."
    require(plain == plain_again, f"{what}: {plain} becomes {plain_again}.", mend)
    _require_equal(tensors, tensors_again, what, mend)


def _stored(hooks: Hooks) -> tuple[str, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    return json.dumps(split_tensors({"hooks": hooks.state_dict()}, tensors)["hooks"]), tensors


def check_writes_only_into_output_dir(subject: Subject, folder: Path) -> None:
    """A run with checkpoints and evaluations leaves no file in the folder it is started in, nor around its own."""
    _first(check_trains, subject, folder)
    (folder / "start").mkdir(parents=True)
    with contextlib.chdir(folder / "start"):
        subject.train(folder / "output", max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="epoch")
    found = [path.name for path in folder.rglob("*") if not path.is_relative_to(folder / "output")]
    require(
        found == ["start"], f"{subject.name!r} writes outside of output_dir: {found}.", "Write under args.output_dir."
    )


def check_hooks_leave_their_arguments_alone(subject: Subject, folder: Path) -> None:
    """No hook changes the policy, rows or tensors it is given: what other plugins see would depend on their order."""
    _first(check_trains, subject, folder)
    trainer, changed = subject.trainer(folder), set[str]()
    given: list[dict[str, Any]] = []

    def before(hook: str, _: Any, arguments: dict[str, Any]) -> None:
        copies = {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in _seen(hook, arguments).items()}
        given.append(copies)

    def after(_: Any, hook: str, __: Any, arguments: dict[str, Any]) -> None:
        earlier, now = given.pop(), _seen(hook, arguments)
        noted = {name for name in now.keys() - earlier.keys() if hook == "advantages" and ".notes." in name}
        others = {name for name in now.keys() & earlier.keys() if not _is_same(now[name], earlier[name])}
        changed.update(f"{hook}: {name}" for name in (now.keys() ^ earlier.keys() | others) - noted)

    trainer.hooks.manager.add_hookcall_monitoring(before, after)
    trainer.train()
    require(not changed, f"Hooks of {subject.name!r} change their arguments: {sorted(changed)}.", "Return a copy.")


def _seen(hook: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a hook may not change, by name: tensors as they are, and the text of all else.

    The reference may follow the policy after a step.
    """
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, nn.Module):
            inner = {} if (hook, name) == ("after_step", "reference") else value.state_dict()
        elif dataclasses.is_dataclass(value):
            inner = {key: item for key, item in vars(value).items() if key != "notes"}
            inner |= {f"notes.{key}": item for key, item in getattr(value, "notes", {}).items()}
        else:
            inner = {"": value}
        found |= {f"{name}.{key}".rstrip("."): item for key, item in inner.items()}
    return {name: item if isinstance(item, Tensor) else repr(item) for name, item in found.items()}


def _is_same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and bool(one == other)
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.equal(one.isnan(), other.isnan())
        and (torch.equal(one.nan_to_num(), other.nan_to_num()))
    )


# -- running them -----------------------------------------------------------------------------------------------------
CHECKS: tuple[Check, ...] = tuple(value for name, value in list(globals().items()) if name.startswith("check_"))
"""All checks, in the order in which they build on each other."""
