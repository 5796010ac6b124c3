"""What a resumed run must share with the one that wrote the checkpoint, and how the two are compared."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor
from transformers import TrainingArguments

from ..errors import CheckpointError
from ..models.loading import is_peft
from .fingerprint import UNKNOWN, described
from .state import loading

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
"""Instructions of functions are compared only between runs of the same Python."""

# How long the run is: `CheckpointedTrainer` says what follows for the learning rates.
_LENGTH = "max_steps num_train_epochs"
_OUTPUT = """
output_dir logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
trackio_bucket_id trackio_static_space_id push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
hub_always_push hub_revision skip_memory_metrics debug save_only_model save_strategy save_steps save_on_each_node
save_total_limit enable_jit_checkpoint
"""
_RESUMING = "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint"
# Some schedules are steered by it: see `_OF_EVALUATION`.
_EVALUATION = """
eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
bf16_full_eval fp16_full_eval load_best_model_at_end metric_for_best_model greater_is_better do_train do_eval do_predict
"""
# The same numbers up to rounding: memory, kernels, devices, processes that load rows or talk to each other.
_MACHINE = """
use_cpu use_cache activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode use_liger_kernel
liger_kernel_config torch_empty_cache_steps auto_find_batch_size full_determinism dataloader_num_workers
dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
ddp_timeout local_rank
"""
NOT_SHAPING = frozenset(" ".join((_LENGTH, _OUTPUT, _RESUMING, _EVALUATION, _MACHINE)).split())
"""Options of transformers that do not shape the mathematics. A new one of a later release does until it stands here."""
_OF_EVALUATION = frozenset({"eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better"})
_STEERED_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
REFUSED = frozenset({"adapter", "ref_model", "trained_parameters"})
"""What a checkpoint holds weights of, so that another one cannot take its place."""


class Difference(NamedTuple):
    """Something that was another when the checkpoint was written."""

    name: str
    then: Any
    now: Any

    @property
    def of(self) -> str:
        """The option or input that it belongs to."""
        return self.name.split(".")[0].split("[")[0]

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.then)} then, {_shown(self.now)} now"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def compared_options(args: Any) -> dict[str, Any]:
    """The options that shape the mathematics, whoever defined them."""
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    free = NOT_SHAPING - _OF_EVALUATION if schedule in _STEERED_BY_EVALUATION else NOT_SHAPING
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    named = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(args)
        if (field.name not in free if field.name in theirs else field.metadata.get("resume", True))
    }
    found = {name: described(_plain(value)) for name, value in named.items()}
    # A dictionary that holds nothing but secrets is as good as none.
    return {name: None if value == {} else value for name, value in found.items()}


def _plain(value: Any) -> Any:
    """An option that is an object as the dictionary it stands for."""
    for convert in ("to_dict", "to_json"):
        if callable(getattr(value, convert, None)):
            value = getattr(value, convert)()
    return value


def differences(then: Any, now: Any, name: str = "") -> list[Difference]:
    """Where two descriptions differ; what one of them does not know is no difference."""
    if UNKNOWN in (then, now):
        return []
    if isinstance(then, dict) and isinstance(now, dict):
        # A configuration of a model has other names in other versions of transformers.
        shared = [key for key in then if key in now]
        keys = shared if name == "model" else [*shared, *(then.keys() ^ now.keys())]
        return [
            found
            for key in sorted(keys)
            for found in differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        pairs = zip(then, now, strict=True)
        return [found for i, pair in enumerate(pairs) for found in differences(*pair, f"{name}[{i}]")]
    return [] if (then == now and type(then) is type(now)) or _same_number(then, now) else [Difference(name, then, now)]


def _same_number(then: Any, now: Any) -> bool:
    kinds = (type(then), type(now))
    return bool not in kinds and all(kind in (int, float) for kind in kinds) and then == now


def check_composition(record: dict[str, Any], composition: list[dict[str, str]]) -> None:
    """Raise `CheckpointError` if a checkpoint is from another algorithm, or the same ones in another order."""
    theirs = [part["algorithm"] for part in record["composition"]]
    ours = [part["algorithm"] for part in composition]
    if theirs != ours:
        raise CheckpointError(
            f"The checkpoint was written by {'+'.join(theirs)!r}, this run is {'+'.join(ours)!r}.",
            mend="Resume with get_trainer of the same composition, or start a new run from the saved weights.",
        )


def compare(
    record: dict[str, Any], options: dict[str, Any], inputs: dict[str, Any]
) -> tuple[list[Difference], list[str]]:
    """What differs between the run that wrote a checkpoint and this one, and what cannot be compared."""
    # Compared as JSON, in which they were stored.
    now = json.loads(json.dumps({**options, **inputs}))
    then = {**record["options"], **record.get("inputs", {})}
    unknown = sorted(now.keys() ^ then.keys())
    if record.get("python", PYTHON) != PYTHON:
        then, now = without(then, "code"), without(now, "code")
        unknown.append(f"the code of functions (Python {record['python']} then, {PYTHON} now)")
    shared = [name for name in now if name in then]
    return differences({n: then[n] for n in shared}, {n: now[n] for n in shared}), unknown


def without(value: Any, key: str) -> Any:
    """A description without one of its parts, wherever it occurs."""
    if isinstance(value, dict):
        return {name: without(item, key) for name, item in value.items() if name != key}
    return [without(item, key) for item in value] if isinstance(value, list) else value


# -- do the weights fit? ----------------------------------------------------------------------------------------------
def policy_weights(folder: Path, policy: Any) -> tuple[list[Path], dict[str, Tensor]]:
    """The files that hold the weights of the policy in a checkpoint, and what they have to hold."""
    if not is_peft(policy):
        whole = folder / "model.safetensors"
        return sorted(folder.glob("model-*-of-*.safetensors")) or [whole], policy.state_dict()
    active = policy.active_adapters[0]
    of_adapter = importlib.import_module("peft").get_peft_model_state_dict
    expected = of_adapter(policy, adapter_name=active, save_embedding_layers=False)
    return [folder / ("" if active == "default" else active) / "adapter_model.safetensors"], expected


def check_weights(files: list[Path], expected: dict[str, Tensor], folder: Path) -> bool:
    """Compare names and shapes of saved weights with those a model has, before anything is loaded.

    Returns:
        Whether names are those of the model; else `converted_weights` has to read them, and shapes are not compared.

    Raises:
        CheckpointError: there are no such weights, or they are of another architecture.
    """
    shapes: dict[str, list[int]] = {}
    for file in files:
        name = file.relative_to(folder)
        if not file.is_file():
            raise CheckpointError(
                f"{folder.name!r} holds no {name}, which this run needs.",
                mend="Resume with the same model, adapter, reference and algorithms, or start a new run from the "
                "saved weights.",
            )
        with loading(folder, str(name)), safe_open(file, framework="pt") as saved:
            shapes |= {key: list(saved.get_slice(key).get_shape()) for key in saved.keys()}  # noqa: SIM118
    if files[0].stem == "adapter_model":  # has embeddings too, if those were resized
        shapes = {name: shape for name, shape in shapes.items() if name in expected}
    if not shapes.keys() <= expected.keys():
        return False
    # Of weights that are tied one is saved.
    places = {expected[name].data_ptr() for name in shapes}
    _check_shapes(folder, shapes, {n: t for n, t in expected.items() if n in shapes or t.data_ptr() not in places})
    return True


def _check_shapes(folder: Path, shapes: dict[str, list[int]], expected: dict[str, Tensor]) -> None:
    now = {name: list(tensor.shape) for name, tensor in expected.items()}
    if wrong := [
        Difference(name, shapes.get(name), now.get(name))
        for name in sorted(shapes.keys() | now.keys())
        if shapes.get(name) != now.get(name)
    ]:
        raise CheckpointError(
            f"The weights of {folder.name!r} are of another model: {len(wrong)} tensors have another shape, among "
            f"them {wrong[0]}.",
            mend="Resume with a model of the architecture the run was started with.",
        )


def converted_weights(folder: Path, policy: Any) -> dict[str, Tensor]:
    """The weights of a model that is saved under other names than it has, such as a mixture of experts.

    The loop of transformers would leave such weights as they are, with a line in the log.
    """
    dtype = next(policy.parameters()).dtype
    weights: dict[str, Tensor] = type(policy).from_pretrained(folder, dtype=dtype).state_dict()
    _check_shapes(folder, {name: list(tensor.shape) for name, tensor in weights.items()}, policy.state_dict())
    return weights
