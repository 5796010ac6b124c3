"""Trainers whose runs can be stopped at any moment: state, checkpoints, resume, and who trained what."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy
import torch
from accelerate.utils import broadcast_object_list, set_seed
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..composition import Composition, Hooks
from ..discovery import core_version
from ..errors import CheckpointError
from ..models.loading import is_peft
from ..models.reference import ReferenceModel
from ..redaction import marked_in, redacted
from .callbacks import OUTSIDE, STEP_BEGUN, UPDATING, CarefulCallbacks
from .card import model_card
from .fingerprint import adapter, configuration, description, weights_of
from .folder import RunFolder, on_main, write_run
from .metrics import Metrics
from .origin import (
    PYTHON,
    REFUSED,
    check_composition,
    check_weights,
    compare,
    compared_options,
    converted_weights,
    policy_weights,
    without,
)
from .schedule import depends_on_length, load_with_new_values, optimizer_class
from .state import (
    PARTIAL,
    check_resumable,
    join_tensors,
    loading,
    newest_sound,
    none_complete,
    publish,
    read_manifest,
    read_named,
    read_state,
    rotate,
    split_tensors,
    step_of,
    verify,
    write_manifest,
    write_tensors,
)
from .stopping import Signals

logger = logging.getLogger(__name__)
CHECKPOINT_FILES = ("model", "adapter_model", "reference", "trl_core_state")
"""Names of the safetensors files that every checkpoint may have; models beside the policy need others."""


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
    sources: dict[str, str]
    """Where the model and its data are from; see `card.sources`."""

    inputs: Mapping[str, Any] = MappingProxyType({})
    """Descriptions of what the trainer was given; see `trl_core.training.fingerprint`."""
    _resume: tuple[str, dict[str, Any]] | None = None
    """Folder and record of the checkpoint that is being resumed."""
    _changed: frozenset[str] = frozenset()
    """Options and inputs that are other ones than those of that checkpoint."""
    _converts = False
    """Whether the policy is saved under other names than it has."""
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
        options = compared_options(self.args) | {"num_processes": self.accelerator.num_processes}
        # Another secret makes no other run.
        return dict(redacted(options, marked=marked_in(dataclasses.fields(self.args)), drop=True))

    def note_inputs(self, **given: Any) -> None:
        """Keep the descriptions of what the run is given, as it is before the run changes it."""
        self.inputs = {**self.inputs, **{name: description(value) for name, value in given.items()}}

    def note_adapter(self, policy: Any) -> None:
        """Keep the options of the policy's adapter; and, as the checkpoint holds the adapter alone, what it is on."""
        adapted = is_peft(policy)
        names = list(policy.peft_config) if adapted else []
        base = [(name, p) for name, p in policy.named_parameters() if not any(f".{n}." in name for n in names)]
        self.note_inputs(
            adapter=adapter(policy.peft_config[policy.active_adapters[0]]) if adapted else None,
            base_model=weights_of(base) if adapted else None,
        )

    def resume_inputs(self) -> dict[str, Any]:
        """Descriptions of all else that a resumed run must share: data, functions, models, hooks of callbacks."""
        policy = self.accelerator.unwrap_model(self.model)
        trained = [(name, p.new_empty(0)) for name, p in policy.named_parameters() if p.requires_grad]
        algorithms = [part["algorithm"] for part in self.composition.provenance()]
        others = {name: hooks for name, hooks in self.hooks.objects.items() if name not in algorithms}
        backend = others.pop("rollouts", None)
        inputs = {
            **self.inputs,
            "model": configuration(policy),
            "trained_parameters": {"tensors": len(trained), "names": weights_of(trained)["weights"]},
            "rollouts": None if backend is None else type(backend).__name__,
            # Weights that a hooks object trains are in the checkpoint.
            "hooks": {name: without(description(hooks), "weights") for name, hooks in others.items()},
        }
        return dict(redacted(inputs, drop=True))

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
        tensors: dict[str, torch.Tensor] = {}
        self._before = (split_tensors(self.state_of_run(), tensors, copy=False), tensors, rng)

    def _rescue(self) -> None:
        """Save a checkpoint as of the last step that was done, so that nothing trained is lost."""
        phase = self.callback_handler.phase
        if phase in (OUTSIDE, UPDATING) or self._signals.at_once:
            return  # nothing is trained, the weights are neither those before nor after the step, or there is no time
        if phase == STEP_BEGUN:
            state, tensors, (python, numpys, cpu, devices) = self._before
            random.setstate(python)
            numpy.random.set_state(numpys)
            torch.set_rng_state(cpu)
            torch.cuda.set_rng_state_all(devices)
            self.load_state_of_run(join_tensors(state, tensors))
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
        owed = {"evaluation": self.owes_evaluation, "after_step": self.owed_hooks}
        write_manifest(partial, {**self._origin(), "owed": owed, "state": plain})
        publish(partial, folder)

    def _is_foreign(self, folder: Path) -> bool:
        return folder.exists() and not self.run.owns(folder)

    def _origin(self) -> dict[str, Any]:
        """What a checkpoint says of the run that wrote it."""
        return {
            "trl_core": core_version(),
            "python": PYTHON,
            "composition": self.composition.provenance(),
            "options": self.resume_options(),
            "inputs": self.resume_inputs(),
            "optimizer": optimizer_class(self.optimizer),
            "step": self.state.global_step,
            "max_steps": self.state.max_steps,
            "save_only_model": self.args.save_only_model,
        }

    def _take_up(self, given: str | bool) -> str:
        """Check the checkpoint that is to be resumed, and note it for when the loop is prepared; returns its folder."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                found = [self._find_checkpoint(given)]
            except CheckpointError as error:
                found = [error]
        # One process reads all files, and all processes take the same checkpoint.
        (answer,) = broadcast_object_list(found)
        if isinstance(answer, CheckpointError):
            raise answer
        folder, record = answer
        check_composition(record, self.composition.provenance())
        self._compare(folder, record)
        self._check_models(folder, record)
        self._resume = (str(folder), record)
        step = step_of(folder, record)
        if folder.resolve() == Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}").resolve():
            self._saved_step = step
        return str(folder)

    def _find_checkpoint(self, given: Any) -> tuple[Path, dict[str, Any]]:
        """The folder that is meant and its record, after all of its files are read."""
        if given is not True:
            if not isinstance(given, str | os.PathLike):
                raise CheckpointError(
                    f"resume_from_checkpoint={given!r} is a {type(given).__name__}; expected a folder, or True.",
                    mend="Name a checkpoint folder, or give True for the newest sound one in output_dir.",
                )
            folder = Path(os.fsdecode(given))
            record = read_named(os.fsdecode(given), self.args.output_dir)
            check_resumable(folder, record)
            verify(folder, record)
            return folder, record
        newest, wrong = newest_sound(self.args.output_dir)
        if newest is None:
            raise none_complete(self.args.output_dir, wrong)
        if wrong:
            logger.warning("%s is resumed, because later ones cannot be: %s", newest.name, " ".join(wrong))
        return newest, read_manifest(newest)

    def _compare(self, folder: Path, record: dict[str, Any]) -> None:
        """Refuse other options and inputs than the checkpoint's, or, if told so, note them for what is loaded next."""
        found, unknown = compare(record, self.resume_options(), self.resume_inputs())
        self._changed = frozenset(difference.of for difference in found)
        others = self.hooks.state_difference(record["state"].get("hooks", {}))
        listed = "; ".join(map(str, [*found, *([others] if others else [])]))
        if unknown:
            what = ", ".join(unknown)
            logger.warning("%s says nothing about, so that it cannot be compared: %s.", folder.name, what)
        if held := REFUSED & self._changed:
            raise CheckpointError(
                f"{folder.name} holds the weights of another run ({listed}).",
                mend=f"Resume with the same {', '.join(sorted(held))}, or start a new run from the saved weights.",
            )
        if listed and self.args.resume_check == "strict":
            raise CheckpointError(
                f"{folder.name} was written with other options ({listed}).",
                mend="Use the same options, or set resume_check='warn' to go on with the new ones.",
            )
        if listed:
            logger.warning("Resuming %s with other options: %s.", folder.name, listed)
        if "train_dataset" in self._changed:
            logger.warning("The run goes on in the new train_dataset at the epoch and the step it had reached.")

    def _check_models(self, folder: Path, record: dict[str, Any]) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return  # their files are their own
        policy = self.accelerator.unwrap_model(self.model)
        self._converts = not check_weights(*policy_weights(folder, policy), folder) and not is_peft(policy)
        for name, module in self._further_models().items():
            check_weights([folder / f"{name}.safetensors"], module.state_dict(), folder)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(  # type: ignore[no-untyped-call]
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if self._resume is not None:
            folder, record = self._resume
            self.load_state_of_run(self.taken_up(read_state(folder, record)))
            for name, module in self._further_models().items():
                with loading(folder, f"{name}.safetensors"):
                    module.load_state_dict(load_file(Path(folder) / f"{name}.safetensors"))
        return prepared

    def taken_up(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of a checkpoint, without what the options that `_changed` make useless."""
        return state

    def _compare_length(self, max_steps: int, folder: str, record: dict[str, Any]) -> None:
        """A run may be made longer; where the learning rates depend on its length, they are those of the new one."""
        step, before = step_of(Path(folder), record), record.get("max_steps")
        if max_steps < step:
            raise CheckpointError(
                f"{Path(folder).name!r} is at step {step}; this run ends at step {max_steps}.",
                mend="Raise max_steps or num_train_epochs, or resume from an earlier checkpoint.",
            )
        if before not in (None, max_steps) and depends_on_length(self.args):
            self._changed |= {"max_steps"}
            logger.warning(
                "The run has %d steps now, %d when %s was written: from here on the learning rates of the schedule "
                "%r are those of the new length.",
                max_steps,
                before,
                Path(folder).name,
                getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type),
            )

    # What transformers loads, after the checks above.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with loading(resume_from_checkpoint, "The model"):
            if self._converts:
                policy = self.accelerator.unwrap_model(self.model)
                policy.load_state_dict(converted_weights(Path(resume_from_checkpoint), policy))
                return
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        try:
            on_main(lambda: verify(best, read_manifest(best)))
        except CheckpointError as error:
            raise CheckpointError(
                f"The best model cannot be loaded: {error.what}",
                mend="load_best_model_at_end=False takes the model of the last step.",
            ) from error
        super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._resume is None:
            return
        with loading(checkpoint, "The state of optimizer and schedule"):
            load = super()._load_optimizer_and_scheduler
            if self._changed and not self.is_deepspeed_enabled:
                load_with_new_values(self, Path(checkpoint), self._resume[1], self._changed, load)
            else:
                load(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and getattr(self.accelerator, "scaler", None) is not None:
            with loading(checkpoint, "The state of the gradient scaler"):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if "seed" in self._changed:
            set_seed(self.args.seed, device_specific=True)
        elif checkpoint is not None:
            with loading(checkpoint, "The random state"):
                super()._load_rng_state(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # The loop pickles its arguments; nothing reads them, and they are kept as JSON instead.
            (folder / "training_args.bin").unlink(missing_ok=True)
            (folder / "training_args.json").write_text(self.args.to_json_string())
            (folder / "README.md").write_text(self.model_card(), encoding="utf-8")

    # -- provenance -----------------------------------------------------------------------------------------------
    def model_card(self) -> str:
        """A model card that records what trained the model; see `trl_core.training.card`."""
        return model_card(self)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of `model_card` into `output_dir`."""
        if self.is_world_process_zero():
            Path(self.args.output_dir, "README.md").write_text(self.model_card(), encoding="utf-8")
