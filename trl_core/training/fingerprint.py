"""What a run is given besides options, as JSON that is the same whenever the same thing is given again.

A description tells apart what computes something else: other rows, other code, other weights. It does not depend on
the process, on paths, line numbers or comments. What cannot be known is left out.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import json
import logging
import os
import sysconfig
from collections.abc import Iterable, Iterator
from enum import Enum
from itertools import islice
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..redaction import is_named_secret

logger = logging.getLogger(__name__)
UNKNOWN = "unknown"
MOST_ROWS, MOST_BYTES = 20_000, 2**26
"""As much of a dataset's contents is compared; of a longer one so many rows, evenly spread, but at least 100."""
STREAM_ROWS = 16
"""Rows at the start of a stream whose contents are compared."""
_LIBRARIES = (
    *{path for name, path in sysconfig.get_paths().items() if "lib" in name},
    str(Path(__file__).resolve().parent.parent) + os.sep,
)
_PLAIN = (bool, int, float, str, bytes, type(None))


def description(value: Any) -> Any:
    """`described`, or "unknown" for what cannot be described: a run never fails for it."""
    try:
        return described(value)
    except Exception as error:
        logger.debug("A %s cannot be described: %s", type(value).__name__, error)
        return UNKNOWN


def described(value: Any) -> Any:
    """The description of a value: an option, a function, a dataset, a model, a tokenizer, or nested ones."""
    if isinstance(value, Enum):
        return described(value.value)
    if isinstance(value, _PLAIN):
        return _short(value)
    if isinstance(value, dict):
        return {str(key): described(item) for key, item in value.items() if not is_named_secret(str(key))}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(described, value), key=json.dumps)
    for kind, describe in _KINDS.items():
        if isinstance(value, kind):
            return describe(value)
    return _object(value)


def _short(value: Any) -> Any:
    if isinstance(value, bytes) or (isinstance(value, str) and len(value) > 500):
        return _hash([value if isinstance(value, str) else value.hex()])
    return repr(value) if isinstance(value, float) and value != value else value


def _hash(parts: Iterable[Any]) -> str:
    """Sixteen digits that stand for JSON values or texts, one after the other."""
    found = hashlib.sha256()
    for part in parts:
        text = part if isinstance(part, str) else json.dumps(part, sort_keys=True, default=repr)
        found.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()[:16]


# -- data -------------------------------------------------------------------------------------------------------------
def _dataset(dataset: Dataset) -> dict[str, Any]:
    count = len(dataset)
    bytes_per_row = dataset.data.nbytes / max(dataset.data.num_rows, 1)
    most = max(100, min(MOST_ROWS, int(MOST_BYTES / max(bytes_per_row, 1))))
    rows = range(count) if count <= most else [i * (count - 1) // (most - 1) for i in range(most)]
    stored = dataset.with_format("arrow")
    chunks = (stored[list(rows[start : start + 1000])].to_pylist() for start in range(0, len(rows), 1000))
    return {"rows": count, "columns": sorted(dataset.column_names), "content": _hash(map(_row, _joined(chunks)))}


def _stream(dataset: IterableDataset) -> dict[str, Any]:
    """What is known without reading it all; the rows of one that is shuffled or sampled may differ each time."""
    steps, step = [], getattr(dataset, "_ex_iterable", None)
    while step is not None:
        steps.append(type(step).__name__)
        step = getattr(step, "ex_iterable", None)
    known: dict[str, Any] = {"stream": True, "columns": sorted(dataset.column_names or []), "content": UNKNOWN}
    if steps and not any("Shuffle" in name or "Random" in name for name in steps):
        known["content"] = _hash(map(_row, islice(dataset.with_format(None), STREAM_ROWS)))
    return known


def _joined(chunks: Iterator[list[Any]]) -> Iterator[Any]:
    for chunk in chunks:
        yield from chunk


def _row(value: Any) -> Any:
    """A row without the places its files lie at: of an image or a sound the bytes count."""
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            content = value["bytes"]
            return hashlib.sha256(content).hexdigest() if content else os.path.basename(value["path"] or "")
        return {name: _row(item) for name, item in sorted(value.items())}
    return [_row(item) for item in value] if isinstance(value, list) else value


# -- models -----------------------------------------------------------------------------------------------------------
def weights_of(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """How many numbers there are, and a hash of names, shapes and some values of each tensor."""
    count, parts = 0, []
    for name, tensor in named:
        if not isinstance(tensor, torch.Tensor):
            continue
        flat = tensor.detach().flatten()
        some = flat[:: max(flat.numel() // 16, 1)][:16]
        values = [] if tensor.is_meta else some.float().cpu().tolist()
        parts.append([name, list(tensor.shape), values])
        count += flat.numel()
    return {"parameters": count, "weights": _hash(parts)}


def _model(model: nn.Module) -> dict[str, Any]:
    return {"class": type(model).__name__, **weights_of(model.state_dict().items())}


def configuration(model: Any) -> dict[str, Any]:
    """The architecture of a model: class, type of its numbers, and configuration without what is incidental."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = getattr(model, "config", None)
    found = config.to_dict() if hasattr(config, "to_dict") else {}
    dtype = next((str(p.dtype) for p in model.parameters()), None)
    return {"class": type(model).__name__, "dtype": dtype, **_without_incidentals(found)}


_INCIDENTAL = {"transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "id2label", "label2id"}


def _without_incidentals(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_incidentals(value) if isinstance(value, dict) else described(value)
        for name, value in {str(key): value for key, value in config.items()}.items()
        if name not in _INCIDENTAL and not name.startswith("_") and not name.endswith("_token_id")
    }


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    template = tokenizer.chat_template
    return {
        "vocabulary": _hash(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))),
        **{f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")},
        "chat_template": None if template is None else _hash([json.dumps(template, sort_keys=True).strip()]),
    }


def adapter(config: Any) -> dict[str, Any] | None:
    """The options of an adapter; those of a running one and of the one it was made from are the same."""
    if config is None:
        return None
    incidental = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
    return {name: value for name, value in described(config.to_dict()).items() if name not in incidental}


# -- code -------------------------------------------------------------------------------------------------------------
def _function(function: FunctionType) -> dict[str, Any]:
    return {"name": function.__name__, "code": _hash([_code_of(function, set())])}


def _code_of(function: FunctionType, seen: set[int]) -> Any:
    """What a function does: its instructions, its defaults, what it captures, and the user's own code it calls."""
    code = function.__code__
    if id(code) in seen:
        return "again"
    seen.add(id(code))
    changes = {str(i.argval) for part in _codes(code) for i in dis.get_instructions(part) if i.opname in _STORES}
    captured = zip(code.co_freevars, function.__closure__ or (), strict=True)
    around = {name: cell.cell_contents for name, cell in captured if _is_filled(cell)}
    around |= {
        str(i.argval): function.__globals__[i.argval]
        for part in _codes(code)
        for i in dis.get_instructions(part)
        if i.opname == "LOAD_GLOBAL" and i.argval in function.__globals__
    }
    modules = [value for value in around.values() if isinstance(value, ModuleType)]
    for module in [value for value in modules if _is_own(getattr(value, "__file__", None) or "<frozen")]:
        around |= {name: vars(module)[name] for part in _codes(code) for name in part.co_names if name in vars(module)}
    defaults = function.__defaults__ or ()
    last = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    around |= dict(zip(last, defaults, strict=True)) | (function.__kwdefaults__ or {})
    used = {name: _used(name, value, seen) for name, value in sorted(around.items()) if name not in changes}
    return [_instructions(code, function.__doc__), used]


_STORES = ("STORE_GLOBAL", "STORE_DEREF", "DELETE_GLOBAL")


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _instructions(code: CodeType, doc: str | None = None) -> Any:
    constants: list[Any] = []
    for number, constant in enumerate(code.co_consts):
        if isinstance(constant, CodeType):
            constants.append(_instructions(constant))
        elif isinstance(constant, frozenset):
            constants.append(sorted(map(repr, constant)))
        else:
            constants.append(None if number == 0 and constant == doc else repr(constant))
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return [code.co_code.hex(), constants, code.co_names, arguments, code.co_freevars, code.co_flags]


def _used(name: str, value: Any, seen: set[int]) -> Any:
    """What a function captures, reads or calls, as far as it is its author's; what changes in a run does not count.

    Lists and dictionaries count where the name says that they are constant.
    """
    if isinstance(value, MethodType):
        return _used(name, value.__func__, seen)
    if isinstance(value, functools.partial):
        return [_used(name, part, seen) for part in (value.func, *value.args, *value.keywords.values())]
    if not isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
        return _used(name, value.__wrapped__, seen)
    if is_named_secret(name) or (isinstance(value, str) and _is_place(value)):
        return None
    if isinstance(value, _PLAIN):
        return _short(value)
    if isinstance(value, FunctionType):
        return _code_of(value, seen) if _is_own(value.__code__.co_filename) else value.__qualname__
    if isinstance(value, type):
        return [value.__name__, *(_code_of(method, seen) for method in _methods(value))]
    if isinstance(value, frozenset | tuple) or (name.isupper() and isinstance(value, list | dict | set)):
        return repr(described(value))
    return _used(name, type(value), seen)


def _is_place(text: str) -> bool:
    return os.path.isabs(text) or "://" in text


def _is_own(file: str) -> bool:
    """Whether code is the user's, and not of an installed library."""
    packaged = any(part in ("site-packages", "dist-packages") for part in Path(file).parts)
    return not packaged and not file.startswith(_LIBRARIES) and not file.startswith("<frozen")


def _methods(kind: type) -> Iterator[FunctionType]:
    """The functions of a class and its bases, as far as they are the user's."""
    for base in kind.__mro__:
        for value in vars(base).values():
            found = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(found, FunctionType) and _is_own(found.__code__.co_filename):
                yield found


def _partial(value: functools.partial[Any]) -> dict[str, Any]:
    arguments = {"arguments": _hash([described(value.args)])} if value.args else {}  # whose names are not known
    return {"function": described(value.func), **arguments, **described(value.keywords)}


def _method(value: MethodType) -> dict[str, Any]:
    return {**described(value.__func__), "self": described(value.__self__)}


def _class(value: type) -> dict[str, Any]:
    return {"name": value.__name__, "code": _hash([_used("", value, set())])}


def _object(value: Any) -> dict[str, Any]:
    """Of another object its class, and what it keeps of what it was made with: its other attributes may change."""
    if hasattr(value, "__wrapped__"):
        return {"name": type(value).__name__, "of": described(value.__wrapped__)}
    named = getattr(value, "__name__", None)
    if inspect.isbuiltin(value):
        return {"name": named}
    try:
        parameters = list(inspect.signature(type(value)).parameters)
    except (TypeError, ValueError):
        parameters = []
    kept = {
        name: getattr(value, name, getattr(value, f"_{name}", None)) for name in parameters if not is_named_secret(name)
    }
    plain = {name: item for name, item in kept.items() if not isinstance(item, str) or not _is_place(item)}
    shown = {"name": named} if isinstance(named, str) else {}
    return {**_class(type(value)), **shown, **{name: described(item) for name, item in plain.items()}}


def _optimizer(value: Any) -> dict[str, Any]:
    """Its class and values; of a schedule too, without how far it has come."""
    if isinstance(value, torch.optim.Optimizer):
        groups = [{k: v for k, v in group.items() if k != "params"} for group in value.param_groups]
        return {"class": type(value).__name__, "groups": [described(_at_start(group)) for group in groups]}
    state = {k: v for k, v in value.state_dict().items() if k != "last_epoch" and not k.startswith("_")}
    return {"class": type(value).__name__, **described({**state, "rates": getattr(value, "lr_lambdas", None)})}


def _at_start(group: dict[str, Any]) -> dict[str, Any]:
    return {**group, "lr": group.get("initial_lr", group["lr"])} if "lr" in group else group


_KINDS: dict[type, Any] = {
    torch.optim.Optimizer: _optimizer,
    torch.optim.lr_scheduler.LRScheduler: _optimizer,
    Dataset: _dataset,
    IterableDataset: _stream,
    nn.Module: _model,
    PreTrainedTokenizerBase: _tokenizer,
    functools.partial: _partial,
    MethodType: _method,
    FunctionType: _function,
    type: _class,
    torch.dtype: str,
    torch.Tensor: lambda value: weights_of([("", value)]),
}
