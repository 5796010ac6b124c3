"""Trainers whose runs can be stopped at any moment: state, checkpoints, resume, and who trained what."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..composition import Composition, Hooks
from ..discovery import core_version
from ..errors import CheckpointError
from ..models.reference import ReferenceModel
from .callbacks import OUTSIDE, STEP_BEGUN, UPDATING, CarefulCallbacks
from .folder import RunFolder, on_main, write_run
from .metrics import Metrics
from .state import (
    PARTIAL,
    check_origin,
    join_tensors,
    newest_complete,
    publish,
    read_manifest,
    read_state,
    rotate,
    write_manifest,
    write_tensors,
)
from .stopping import Signals

logger = logging.getLogger(__name__)
CHECKPOINT_FILES = ("model", "adapter_model", "reference", "trl_core_state")
"""Names of the safetensors files that every checkpoint may have; models beside the policy need others."""
_COMPARED_ON_RESUME = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed")


class CheckpointedTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints also hold the state of hooks, reference and data, and their origin."""

    composition: ClassVar[Composition]
    args: Any
    model: Any
    processing_class: Any
    hooks: Hooks
    metrics: Metrics
    reference: ReferenceModel | None
    extra_models: dict[str, nn.Module]
    """Models that are trained beside the policy, by name."""

    _resume: tuple[str, dict[str, Any]] | None = None
    """Folder and record of the checkpoint that is being resumed."""
    _saved_step: int | None = None
    """Of the newest checkpoint of this run that is known to be in its folder."""
    _before: Any = None
    failed_everywhere = False
    """Whether all processes are known to have failed, so that all can take part in saving."""
    callback_handler: CarefulCallbacks
    run: RunFolder
    _signals: Signals
    _aside: Path | None = None
    """Where a checkpoint is written before it gets its name."""
    owes_evaluation = False
    """Whether the evaluation of this step was due and is not done."""
    owed_hooks: list[str]
    """The plugins whose `after_step` failed in this step."""

    # -- checkpoints ----------------------------------------------------------------------------------------------
    def state_of_run(self) -> dict[str, Any]:
        """State beyond model, optimizer, scheduler and random numbers: nested dicts of tensors and JSON values."""
        return {"hooks": self.hooks.state_dict()}

    def load_state_of_run(self, state: dict[str, Any]) -> None:
        """The inverse of `state_of_run`."""
        self.hooks.load_state_dict(state["hooks"])

    def resume_options(self) -> dict[str, Any]:
        """The options a resumed run must share with the one that wrote the checkpoint."""
        common = {f.name for f in dataclasses.fields(TrainingArguments)}
        own = [
            f.name
            for f in dataclasses.fields(self.args)
            if f.metadata.get("resume", True) and (f.name not in common or f.name in _COMPARED_ON_RESUME)
        ]
        return {name: getattr(self.args, name) for name in own} | {"num_processes": self.accelerator.num_processes}

    def _further_models(self) -> dict[str, nn.Module]:
        """Models beside the policy that have weights of their own, by the names of their files."""
        models = dict(self.extra_models)
        if self.reference is not None and self.reference.module is not None:
            models["reference"] = self.accelerator.unwrap_model(self.reference.module)
        return models

    def before_step(self) -> None:
        """Note the state at the start of an optimizer step, to which a failure in it goes back.

        Containers are copied; tensors are not, so hooks must not change those of their state within a step.
        """
        self.failed_everywhere = self.accelerator.num_processes == 1
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        rng = (random.getstate(), numpy.random.get_state(), torch.get_rng_state(), devices)
        self._before = (join_tensors(self.state_of_run(), {}), rng)

    def _rescue(self) -> None:
        """Save a checkpoint as of the last step that was done, so that nothing trained is lost."""
        phase = self.callback_handler.phase
        if phase in (OUTSIDE, UPDATING) or self._signals.at_once:
            return  # nothing is trained, the weights are neither those before nor after the step, or there is no time
        if phase == STEP_BEGUN:
            state, (python, numpys, cpu, devices) = self._before
            random.setstate(python)
            numpy.random.set_state(numpys)
            torch.set_rng_state(cpu)
            torch.cuda.set_rng_state_all(devices)
            self.load_state_of_run(state)
        if self.state.global_step == 0 or not self.failed_everywhere:
            return  # nothing is trained yet, or the other processes are not here to take part
        for module in (self.model, *self.extra_models.values()):
            module.zero_grad()
        try:
            self._save_checkpoint(self.model_wrapped, None)
        except Exception:
            logger.exception("No checkpoint could be saved.")

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step == self._saved_step:
            return  # writing it again would leave the run without it for a while
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if on_main(lambda: self._is_foreign(folder)):
            logger.error("%s is not of this run and stays as it is: no checkpoint is saved at this step.", folder)
            return
        partial = folder.parent / PARTIAL / folder.name
        if self.args.should_save and partial.exists():
            shutil.rmtree(partial)
        self.accelerator.wait_for_everyone()
        # Until the checkpoint is known to be complete, it has not its name, none is deleted, and none is published.
        held_back = {"save_total_limit": None, "push_to_hub": False}
        options = {name: getattr(self.args, name) for name in held_back}
        self._aside = partial.parent
        try:
            vars(self.args).update(held_back)
            super()._save_checkpoint(model, trial)
        finally:
            self._aside = None
            vars(self.args).update(options)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._complete(partial, folder)
            rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint, self.run.owns)
        self._saved_step = self.state.global_step
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and partial.exists():  # of a node with a disk of its own
            publish(partial, folder)
        with contextlib.suppress(OSError):
            partial.parent.rmdir()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _complete(self, partial: Path, folder: Path) -> None:
        """Add what the core keeps to a checkpoint, and give it its name."""
        if self.state.best_model_checkpoint == str(partial):
            self.state.best_model_checkpoint = str(folder)
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        for name, module in self._further_models().items():
            weights = module.state_dict()
            save_file({k: v.contiguous().clone() for k, v in weights.items()}, partial / f"{name}.safetensors")
        plain = write_tensors(partial, self.state_of_run())
        write_run(partial, self.run.record)
        record = {
            "trl_core": core_version(),
            "composition": self.composition.provenance(),
            "options": json.loads(json.dumps(self.resume_options(), default=str)),
            "state": plain,
            "owed": {"evaluation": self.owes_evaluation, "after_step": self.owed_hooks},
            "save_only_model": self.args.save_only_model,
        }
        write_manifest(partial, record)
        publish(partial, folder)

    def _is_foreign(self, folder: Path) -> bool:
        return folder.exists() and not self.run.owns(folder)

    def _take_up(self, given: str | bool) -> str:
        """Check the checkpoint that is to be resumed, and note it for when the loop is prepared; returns its folder."""
        folder = self._find_checkpoint(given)
        record = read_manifest(folder)
        if record.get("save_only_model"):
            raise CheckpointError(
                f"{folder.name} holds no optimizer state: it was written with save_only_model=True.",
                mend="Start a new run from its weights: pass the folder as `model`.",
            )
        difference = check_origin(record, self.composition.provenance(), self.resume_options())
        if difference and self.args.resume_check == "strict":
            raise CheckpointError(
                f"{folder.name} was written with other options ({difference}).",
                mend="Use the same options, or set resume_check='warn' to go on with the new ones.",
            )
        if difference:
            logger.warning("Resuming %s with other options: %s.", folder.name, difference)
        self._resume = (str(folder), record)
        if folder.resolve().parent == Path(self.args.output_dir).resolve():
            self._saved_step = int(folder.name.rpartition("-")[2])
        return str(folder)

    def _find_checkpoint(self, given: str | bool) -> Path:
        if given is not True:
            return Path(str(given))
        newest = newest_complete(self.args.output_dir)
        if newest is None:
            raise CheckpointError(
                f"There is no complete checkpoint in {self.args.output_dir!r}.",
                mend="Start without resume_from_checkpoint, or point it to a checkpoint folder.",
            )
        return newest

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(  # type: ignore[no-untyped-call]
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if self._resume is not None:
            folder, record = self._resume
            self.load_state_of_run(read_state(folder, record))
            for name, module in self._further_models().items():
                module.load_state_dict(load_file(Path(folder) / f"{name}.safetensors"))
        return prepared

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # The loop pickles its arguments; nothing reads them, and they are kept as JSON instead.
            (folder / "training_args.bin").unlink(missing_ok=True)
            (folder / "training_args.json").write_text(self.args.to_json_string())
            (folder / "README.md").write_text(self.model_card())

    # -- provenance -----------------------------------------------------------------------------------------------
    def model_card(self) -> str:
        """A model card that records what trained the model."""
        base = getattr(getattr(self.model, "config", None), "_name_or_path", "") or ""
        lines = ["---", "library_name: transformers", "tags: [trl-core, " + ", ".join(self._names()) + "]", "---", ""]
        lines += [f"# Trained with trl-core: {self.composition.name}", ""]
        # A local folder is nobody else's business.
        lines += [f"Base model: `{base}`" if base and not os.path.exists(base) else "Base model: a local one", ""]
        lines += [
            "| order | algorithm | distribution | version | stability |",
            "|---|---|---|---|---|",
        ]
        for order, part in enumerate(self.composition.provenance()):
            row = (str(order), part["algorithm"], part["distribution"], part["version"], part["stability"])
            lines.append("| " + " | ".join(row) + " |")
        options = json.dumps(self.resume_options(), indent=1, default=str)
        lines += ["", f"trl-core {core_version()}. Options:", "", "```json", options, "```", ""]
        return "\n".join(lines)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of `model_card` into `output_dir`."""
        if self.is_world_process_zero():
            Path(self.args.output_dir, "README.md").write_text(self.model_card())

    def _names(self) -> list[str]:
        return [part["algorithm"] for part in self.composition.provenance()]
