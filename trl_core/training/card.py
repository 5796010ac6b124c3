"""The model card: what trained a model, on what, how far it came, and how to load it."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..discovery import core_version
from ..markdown import table
from ..models.loading import is_peft
from ..redaction import hide

LOCAL = "a local one"
_LONGEST = 300
_CLOCKS = re.compile(r"(eval_|train_)?(time/|step_time|runtime|samples_per|steps_per|total_flos)|step$|epoch$")

_LOAD = {
    "model": """from transformers import {auto}, AutoTokenizer

folder = {place}  # this folder, or where it is
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder{options})
""",
    "adapter": """from peft import PeftModel
from transformers import {auto}, AutoTokenizer

folder = {place}  # this folder, or where it is
tokenizer = AutoTokenizer.from_pretrained(folder)
base = {auto}.from_pretrained({base}{options})
model = PeftModel.from_pretrained(base, folder)
""",
}
_USE = {
    "text": """inputs = tokenizer("Hello", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))""",
    "chat": """messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))""",
    "score": """inputs = tokenizer("Hello", return_tensors="pt")
print(model(**inputs).logits[0, 0].item())""",
}


def sources(model: Any, train: Any, evaluation: Any) -> dict[str, str]:
    """Where a model and its data are from, as long as that is known: before the data are prepared.

    Args:
        model: as loaded, before it gets an adapter.
        train: dataset, or None.
        evaluation: likewise, or several by name.
    """
    config = getattr(model, "config", None)
    base, commit = str(getattr(config, "_name_or_path", "") or ""), getattr(config, "_commit_hash", None)
    if is_peft(model):
        base = str(model.active_peft_config.base_model_name_or_path or base)
    # A local folder is nobody else's business.
    known = {"base": base if _is_hub_id(base) else "", "commit": str(commit or "") if _is_hub_id(base) else ""}
    parts = {"evaluation": evaluation} if not isinstance(evaluation, Mapping) else evaluation
    named = {"training data": train, **{f"evaluation data {_plain(name)}": part for name, part in parts.items()}}
    return known | {name.removesuffix(" evaluation"): _data(part) for name, part in named.items() if part is not None}


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return bool(name) and not Path(name).exists()


def _data(dataset: Any) -> str:
    info, rows = getattr(dataset, "info", None), getattr(dataset, "num_rows", None)
    urls = " ".join(map(str, getattr(info, "download_checksums", None) or ()))
    found = re.search(r"hf://datasets/([\w.-]+/[\w.-]+)@", urls)
    name = found[1] if found else getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    config, split = getattr(info, "config_name", None), getattr(dataset, "split", None)
    told = [_code(name) if name else "rows made in Python"]
    told += [f"{what} {_code(value)}" for what, value in (("configuration", config), ("split", split)) if value]
    told += [f"{rows} rows" if rows is not None else "a stream"]
    fingerprint = getattr(dataset, "_fingerprint", None)
    return ", ".join([*told, *([f"fingerprint {_code(fingerprint)}"] if fingerprint else [])])


def model_card(trainer: Any) -> str:
    """The card of what a trainer has trained so far, as Markdown with the metadata that the Hub reads."""
    parts = trainer.composition.parts
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapted, known = is_peft(model), trainer.sources
    papers = {number: title for part in parts for number, title in part.algorithm.papers.items()}
    scores = trainer.new_head == "score"
    data = re.search(r"`([\w.-]+/[\w.-]+)`", known.get("training data", ""))
    metadata = ModelCardData(
        base_model=known["base"] or None,
        library_name="peft" if adapted else "transformers",
        pipeline_tag="text-classification" if scores else "text-generation",
        datasets=[data[1]] if data else None,
        tags=["trl-core", *(part.algorithm.name for part in parts), *(f"arxiv:{number}" for number in papers)],
    )
    summary = " ".join(_plain(part.algorithm.summary) for part in parts[-1:])
    lines = ["---", metadata.to_yaml().strip(), "---", "", f"# Trained with trl-core: {trainer.composition.name}", ""]
    lines += [summary, "", "Base model: " + (f"`{known['base']}`" if known["base"] else LOCAL), ""]
    lines += ["## How to load it", "", "```python", _snippet(trainer, adapted, scores), "```", ""]
    lines += ["## Training", "", table(("what", "value"), _training(trainer, model, adapted).items()), ""]
    for title, found in _metrics(trainer.state.log_history).items():
        lines += [f"## {title}", "", table(("metric", "value"), found), ""]
    provenance = [[str(i), *part.values()] for i, part in enumerate(trainer.composition.provenance())]
    lines += ["## Who trained it", "", table(("order", *trainer.composition.provenance()[0]), provenance), ""]
    libraries = ("torch", "transformers", "datasets", "accelerate", *(["peft"] if adapted else []))
    versions = {"trl-core": core_version(), **{name: version(name) for name in libraries}}
    versions["Python"] = platform.python_version()
    lines += [", ".join(f"{name} {found}" for name, found in versions.items()) + ". Options:", ""]
    # No line of a fence can end it: each begins with a bracket, a quote or a space.
    options = json.dumps(trainer.resume_options(), indent=1, default=str)
    lines += ["```json", options, "```", ""]
    if papers:
        cited = [f"- {title}, [arXiv:{number}](https://arxiv.org/abs/{number})" for number, title in papers.items()]
        lines += ["## Papers", "", *cited, ""]
    return "\n".join(lines)


def _snippet(trainer: Any, adapted: bool, scores: bool) -> str:
    auto = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    base = trainer.sources["base"] or "path/to/the/base-model"
    options = ", num_labels=1" if scores else ""
    place = trainer.args.hub_model_id if trainer.args.push_to_hub and trainer.args.hub_model_id else "."
    load = _LOAD["adapter" if adapted else "model"].format(
        auto=auto, base=json.dumps(base), options=options, place=json.dumps(place)
    )
    chat = bool(getattr(trainer.processing_class, "chat_template", None))
    return load + _USE["score" if scores else "chat" if chat else "text"]


def _training(trainer: Any, model: Any, adapted: bool) -> dict[str, str]:
    args, state, known = trainer.args, trainer.state, trainer.sources
    base = _code(known["base"]) + (f" at {_code(known['commit'])}" if known["commit"] else "")
    told = {"base model": base if known["base"] else LOCAL}
    if adapted:
        adapter = model.active_peft_config
        modules = adapter.target_modules if isinstance(adapter.target_modules, str) else adapter.target_modules or ()
        names = [modules] if isinstance(modules, str) else sorted(modules)
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        of = {"rank": getattr(adapter, "r", None), "alpha": getattr(adapter, "lora_alpha", None)}
        told["adapter"] = ", ".join(
            [str(kind), *(f"{name} {value}" for name, value in of.items() if value is not None)]
        )
        told["adapted modules"] = ", ".join(map(_code, names)) or "as peft chooses"
    told |= {name: value for name, value in known.items() if name not in ("base", "commit")}
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    told |= {
        "steps": f"{state.global_step} of {state.max_steps}, {state.epoch or 0:.4g} epochs",
        "rows of an optimizer step": f"{batch} = {args.per_device_train_batch_size} in each micro-batch x "
        f"{args.gradient_accumulation_steps} x {trainer.accelerator.num_processes} processes",
        "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}"
        f" schedule, {args.get_warmup_steps(max(state.max_steps, 1))} warm-up steps",
        "optimizer": _code(_of(trainer.optimizer)) if trainer.optimizer is not None else "none yet",
        "seed": str(args.seed),
    }
    return told


def _of(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _metrics(history: list[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """The last line of training and of evaluation, without clocks."""
    kinds = {"Last training metrics": lambda line: "loss" in line}
    kinds["Last evaluation"] = lambda line: any(name.startswith("eval_") for name in line)
    found: dict[str, list[tuple[str, str]]] = {}
    for title, fits in kinds.items():
        line = next(filter(fits, reversed(history)), None)
        if line is not None:
            numbers = {name: value for name, value in line.items() if not _CLOCKS.match(name)}
            shown = [(_code(name), f"{v:.5g}" if isinstance(v, float) else _plain(v)) for name, v in numbers.items()]
            found[f"{title}, step {line.get('step', '?')}"] = shown
    return found


def _line(text: Any) -> str:
    """One line of printable text without secrets."""
    line = " ".join(hide(str(text)).encode("utf-8", "replace").decode().split())
    return "".join(c if c.isprintable() else " " for c in line[:_LONGEST]) + "..." * (len(line) > _LONGEST)


def _plain(text: Any) -> str:
    """The same as text of a paragraph, which no Markdown takes for more than that."""
    return re.sub(r"([\\`*_\[\]<>&#])", r"\\\1", _line(text))


def _code(text: Any) -> str:
    """The same in a code span."""
    return "`" + _line(text).replace("`", "'") + "`"
