"""What a trainer is given besides its options, checked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils._validators import validate_repo_id
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils.import_utils import is_liger_kernel_available, is_peft_available

from ..data.prompts import check_kind
from ..errors import ConfigError, DatasetError, UnknownOptionError
from ..models.loading import check_model
from ..names import did_you_mean
from ..options import require
from .config import as_dict

if TYPE_CHECKING:
    from ..composition import Composition


def given_arguments(trainer: type, args: tuple[Any, ...], more: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a trainer by name, as far as its constructor names them."""
    for cls in trainer.__mro__:
        found = inspect.signature(vars(cls)["__init__"]).parameters if "__init__" in vars(cls) else {}
        if found and not any(p.kind is p.VAR_POSITIONAL for p in found.values()):
            return {**dict(zip([*found][1:], args, strict=False)), **more}
    return more


def check_names(composition: Composition, trainer: type, given: Iterable[str]) -> None:
    """Raise `UnknownOptionError` unless all are arguments that the composition adds to those of its trainer."""
    own = composition.arguments
    for name in given:
        if name not in own:
            allowed = f" Beyond the common ones it takes: {', '.join(own)}." if own else ""
            classes = trainer.__mro__[: trainer.__mro__.index(Trainer)]
            made = [vars(cls)["__init__"] for cls in classes if "__init__" in vars(cls)]
            common = [known for each in made for known in inspect.signature(each).parameters]
            close = did_you_mean(name, [*own, *common])
            what = f"The trainer of {composition.name!r} takes no argument {name!r}.{close}{allowed}"
            raise UnknownOptionError(what, mend="Options belong into args; check the spelling of the argument.")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse what cannot be what a trainer asks for.

    Raises:
        ConfigError, DatasetError: an argument of another kind, or an evaluation without a dataset.
    """
    loading = getattr(given.get("args"), "model_init_kwargs", None)
    for name in ("model", "ref_model"):
        if name in given and (name == "model" or given[name] is not None):
            check_model(given[name], dict(loading) if isinstance(loading, Mapping) else None, name)
    _check_tokenizer(given.get("processing_class"))
    _check_callbacks(given.get("callbacks"))
    _check_optimizers(given.get("optimizers"))
    _check_adapter(given.get("peft_config"))
    function = given.get("formatting_func")
    what = f"formatting_func is {_shown(function)}, which cannot be called."
    require(function is None or callable(function), what, "Pass a function of a row, or leave it out.")
    _check_datasets(given)
    if isinstance(given.get("args"), TrainingArguments):
        _check_surroundings(given["args"])


def _shown(value: Any) -> str:
    return f"{repr(value)[:80]} ({type(value).__name__})"


def _check_tokenizer(given: Any) -> None:
    text = getattr(given, "tokenizer", given)  # the text side of a processor
    fits = given is None or (callable(text) and hasattr(text, "eos_token_id") and not isinstance(given, type))
    what = f"processing_class is {_shown(given)}, which is no tokenizer."
    require(fits, what, "Pass transformers.AutoTokenizer.from_pretrained(...), or leave it out.")


def _check_callbacks(given: Any) -> None:
    listed = isinstance(given, list | tuple | None)
    what, mend = f"callbacks is {_shown(given)}; expected a list.", "Pass callbacks=[...]."
    require(listed, what, mend)
    for callback in given or ():
        fits = isinstance(callback, TrainerCallback)
        fits = fits or (isinstance(callback, type) and issubclass(callback, TrainerCallback))
        what = f"callbacks holds {_shown(callback)}, which is no callback."
        require(fits, what, "Pass objects or classes that derive from transformers.TrainerCallback.")


def _check_optimizers(given: Any) -> None:
    pair = given is None or (isinstance(given, list | tuple) and len(given) == 2)
    mend = "Pass (optimizer, scheduler), objects of torch.optim made for the model; None for the default."
    require(pair, f"optimizers is {_shown(given)}; expected two.", mend)
    optimizer, scheduler = given or (None, None)
    fits = optimizer is None or isinstance(optimizer, torch.optim.Optimizer)
    require(fits, f"optimizers[0] is {_shown(optimizer)}, which is no torch.optim.Optimizer.", mend)
    fits = scheduler is None or (hasattr(scheduler, "step") and not isinstance(scheduler, type))
    require(fits, f"optimizers[1] is {_shown(scheduler)}, which is no schedule of the learning rate.", mend)


def _check_adapter(given: Any) -> None:
    if given is None or not is_peft_available():
        return  # where peft is missing, adding the adapter says so
    from peft import PeftConfig

    mend = "Pass peft.LoraConfig(...), or another configuration of peft."
    require(isinstance(given, PeftConfig), f"peft_config is {_shown(given)}, which is no PeftConfig.", mend)


def _check_surroundings(args: TrainingArguments) -> None:
    """Refuse options that ask for what is not here, which transformers finds out with the model loaded."""
    liger = not args.use_liger_kernel or is_liger_kernel_available()
    mend = "Install it (pip install liger-kernel), or leave use_liger_kernel out."
    require(liger, "use_liger_kernel=True, but liger-kernel is not installed.", mend)
    alone = bool(args.fsdp) and not as_dict(args.fsdp_config).get("xla") and args.parallel_mode.value != "distributed"
    mend = "Start the run with `accelerate launch` or `torchrun`, or leave fsdp out."
    require(not alone, "fsdp is set, but it shards over several processes, and this is a single one.", mend)
    if args.torch_compile:
        try:
            torch.compile(lambda: None, backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode)
        except Exception as error:
            what = f"torch_compile_backend={args.torch_compile_backend!r} with torch_compile_mode="
            what += f"{args.torch_compile_mode!r} cannot be: {error}"
            raise ConfigError(what, mend="Change them, or leave them out.") from error
    if args.push_to_hub:
        name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
        try:
            validate_repo_id(name)
        except ValueError as error:
            what = f"push_to_hub: hub_model_id={name!r} is no name of a repository: {error}"
            raise ConfigError(what, mend="Give hub_model_id as owner/name, or leave push_to_hub out.") from error


def _check_datasets(given: Mapping[str, Any]) -> None:
    evaluation = given.get("eval_dataset")
    if isinstance(evaluation, dict) and not evaluation:
        raise DatasetError("eval_dataset is an empty mapping.", mend="Name at least one dataset, or pass None.")
    named = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    splits = {f"eval_dataset[{name!r}]" if name else "eval_dataset": dataset for name, dataset in named.items()}
    for split, dataset in {"train_dataset": given.get("train_dataset"), **splits}.items():
        if dataset is not None:
            check_kind(dataset, split)
    strategy = getattr(given.get("args"), "eval_strategy", "no")
    strategy = getattr(strategy, "value", strategy)
    if evaluation is None and strategy != "no":
        raise ConfigError(
            f"eval_strategy={strategy!r}, but no eval_dataset is given.",
            mend="Pass eval_dataset=..., or leave eval_strategy out.",
        )
