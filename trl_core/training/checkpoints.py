"""Trainers whose runs can be stopped at any moment: state, checkpoints, resume, and who trained what."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy, TrainOutput, has_length

from ..composition import Composition, Hooks
from ..discovery import core_version
from ..errors import CheckpointError, OutputDirError
from ..models.reference import ReferenceModel
from ..redaction import marked_in, redacted
from .card import model_card
from .folder import RunFolder, on_main, write_run
from .metrics import Metrics
from .state import (
    PARTIAL,
    STATE_FILE,
    all_checkpoints,
    check_origin,
    checkpoints,
    discard,
    join_tensors,
    newest_complete,
    publish,
    read_manifest,
    read_run,
    read_state,
    rotate,
    step_of,
    write_manifest,
    write_tensors,
)
from .stopping import (
    OUTSIDE,
    STEP_BEGUN,
    STEP_ENDED,
    UPDATING,
    CarefulCallbacks,
    Signals,
    StopRun,
    say,
    signals,
)

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
    sources: dict[str, str]
    """Where the model and its data are from; see `card.sources`."""

    _resume: tuple[str, dict[str, Any]] | None = None
    """Folder and record of the checkpoint that is being resumed."""
    _saved_step: int | None = None
    """Of the newest checkpoint of this run that is known to be in its folder."""
    _before: Any = None
    failed_everywhere = False
    """Whether all processes are known to have failed, so that all can take part in saving."""

    callback_handler: CarefulCallbacks
    run: RunFolder
    _run_began_in: Path | None = None
    _signals: Signals
    _stale: list[Path]
    """Checkpoints of this run beyond the step it was taken up at; they go when there is a new one."""
    _aside: Path | None = None
    """Where a checkpoint is written before it gets its name."""
    _last_norm: Any = None
    nothing_left = False
    """Whether the last call of `train` found that all steps were done already."""
    owes_evaluation = False
    """Whether the evaluation of this step was due and is not done."""
    owed_hooks: list[str]
    """The plugins whose `after_step` failed in this step."""

    def resume_call(self, checkpoint: bool | str) -> str:
        """What to call to go on from a checkpoint; the command line says it in its own words."""
        return f"trainer.train(resume_from_checkpoint={checkpoint!r})"

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
        options = {name: getattr(self.args, name) for name in own} | {"num_processes": self.accelerator.num_processes}
        # Another secret makes no other run.
        return dict(redacted(options, marked=marked_in(dataclasses.fields(self.args)), drop=True))

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
            "options": self.resume_options(),
            "state": plain,
            "owed": {"evaluation": self.owes_evaluation, "after_step": self.owed_hooks},
            "save_only_model": self.args.save_only_model,
        }
        write_manifest(partial, record)
        publish(partial, folder)

    def _is_foreign(self, folder: Path) -> bool:
        return folder.exists() and not self.run.owns(folder)

    # -- the run --------------------------------------------------------------------------------------------------
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; see `transformers.Trainer.train`.

        SIGINT (Ctrl-C) and SIGTERM stop the run after the optimizer step that is under way, with a checkpoint; then
        KeyboardInterrupt or SystemExit(143) is raised. A second one stops it at once. Handlers of the program for these
        signals stay.

        Args:
            resume_from_checkpoint: a checkpoint folder, True for the newest complete one in `output_dir`, or "auto"
                for that one if there is any, and else a new run.
            trial: as in `transformers.Trainer.train`.
            ignore_keys_for_eval: likewise.

        Raises:
            CheckpointError: there is no complete checkpoint, or it is from another algorithm or other options.
            OutputDirError: `output_dir` holds another run, or one is training in it.
        """
        self._resume = self._saved_step = self._last_norm = None
        self.owes_evaluation, self.owed_hooks, self.metrics = False, [], Metrics()
        callbacks, self.run = self.callback_handler, RunFolder(self.args.output_dir)
        callbacks.phase, callbacks.failure = OUTSIDE, None
        with signals() as self._signals, self.run.held():
            try:
                folder = self._begin(resume_from_checkpoint)
                callbacks.careful = True
                output = super().train(folder, trial, ignore_keys_for_eval)
                if self._signals.received and not self._signals.nested:
                    raise StopRun  # in the last moments of a run
            except BaseException as error:
                self._end(error)
                raise
            finally:
                callbacks.careful = callbacks.silent = self._signals.held = False
            if self.is_world_process_zero():
                self.run.note(steps=self.state.global_step)
        return output

    def _begin(self, given: str | bool | None) -> str | None:
        """Take possession of the folder, and take up what is to be resumed; returns the checkpoint."""
        run = self.run
        on_main(run.recover)
        if given == "auto":
            given = on_main(lambda: any(read_run(p) or (p / STATE_FILE).exists() for p in checkpoints(run.path)))
            if not given:
                self._say(f"There is no checkpoint in {run.path}: the run starts afresh.")
        folder = Path(self._take_up(given)) if given else None
        again, self._run_began_in = self._run_began_in == run.path.resolve(), run.path.resolve()
        replace = bool(self.args.overwrite_output_dir)
        run.record = on_main(
            lambda: run.begin(self.composition.name, checkpoint=folder, overwrite=replace, again=again)
        )
        start = self._saved_step or 0
        self._stale = [p for p in checkpoints(run.path) if run.owns(p) and step_of(p) > start]
        return str(folder) if folder else None

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        begun = super()._init_training_state(max_steps, *args)
        done, owed = self.state.global_step, (self._resume or ("", {}))[1].get("owed", {})
        of = f"step {done} of {max_steps}"
        if self._resume:
            self._say(f"Resuming from {self._resume[0]}: {of} is done, {max(max_steps - done, 0)} steps are left.")
        self.nothing_left = done >= max_steps and not any(owed.values())
        if done >= max_steps:
            self._say(f"The run is finished ({of}): nothing is left to train.")
            self.callback_handler.silent = self.nothing_left
            return args[1], 0
        on_main(lambda: self._refuse_taken_names(done, max_steps))
        return begun

    def _refuse_taken_names(self, done: int, max_steps: int) -> None:
        """Refuse to begin if a checkpoint would need the name of a folder that is not of this run."""
        period = self.state.save_steps if self.args.save_strategy == SaveStrategy.STEPS else 0
        for path in all_checkpoints(self.args.output_dir):
            step = step_of(path)
            saved = period and done < step <= max_steps and (step % period == 0 or step == max_steps)
            if saved and self._is_foreign(path):
                raise OutputDirError(
                    f"{path} is not of this run, which would save a checkpoint of that name.",
                    mend="Move it away, or take another output_dir.",
                )

    def catch_up(self) -> None:
        """Do what the run still had to do at the step of the checkpoint when it was stopped."""
        self._signals.held = self.accelerator.num_processes > 1
        folder, record = self._resume or ("", {})
        owed = record.get("owed", {})
        if any(owed.values()):
            self._load_rng_state(folder)
        if owed.get("after_step"):
            self.after_step(set(owed["after_step"]))
            if self.callback_handler.failure is not None:
                raise self.callback_handler.failure
        if owed.get("evaluation") and self.args.eval_strategy != IntervalStrategy.NO:
            self._determine_best_metric(self._evaluate(None, None), None)

    def after_step(self, only: set[str] | None = None) -> None:
        """Call the hooks `after_step`."""
        raise NotImplementedError

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, epoch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """At the end of a step, and of an epoch: also stop here if that is asked for in any process."""
        control, again = self.control, (model, trial, epoch, *args)
        self._signals.held = True
        if grad_norm is not None:
            self._last_norm = grad_norm
        why = self._asked_to_stop()
        if (why or control.should_training_stop) and self.args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True
        if why:
            self.owes_evaluation |= control.should_evaluate
            control.should_evaluate = False
            # At the end of an epoch its own logging and evaluation are still to come.
            why = why and not (self.callback_handler.phase == STEP_ENDED and self.state.epoch == epoch + 1)
            control.should_save |= why
        due = control.should_log or control.should_evaluate or control.should_save
        super()._maybe_log_save_evaluate(tr_loss, self._last_norm, *again, **kwargs)
        if self._stale and self._saved_step == self.state.global_step and not why and self.args.should_save:
            for path in self._stale:
                if path.exists() and step_of(path) != self._saved_step:
                    discard(path)
            self._stale = []
        if why:
            raise StopRun
        if due and self._asked_to_stop():  # while it was logged, evaluated or saved
            self._maybe_log_save_evaluate(tr_loss, grad_norm, *again, **kwargs)

    def _asked_to_stop(self) -> bool:
        """Whether a signal has reached any process, or a callback has failed in any: the same answer in all."""
        asked, failed = self._signals.received, self.callback_handler.failure is not None
        if self.accelerator.num_processes > 1:
            flags = torch.tensor([[asked, failed]], device=self.accelerator.device)
            asked, failed = self.accelerator.gather(flags).amax(0).tolist()
        self._signals.received = asked
        if asked and not failed and self.state.global_step < self.state.max_steps:
            folder = Path(self._get_output_dir(None)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            return not on_main(lambda: self._is_foreign(folder))  # else at the next step
        self.failed_everywhere |= bool(failed)
        return bool(asked or failed)

    def stop_if_asked(self) -> None:
        """In the middle of an evaluation: stop now, if no other process has to be waited for."""
        callbacks = self.callback_handler
        asked = callbacks.careful and (self._signals.received or callbacks.failure)
        if asked and self.accelerator.num_processes == 1:
            raise StopRun

    def _end(self, error: BaseException) -> None:
        """After the loop has ended early: save what was done, say how to go on, raise what stands for a stop."""
        stop, failure, callbacks = self._signals, self.callback_handler.failure, self.callback_handler
        begun = callbacks.phase != OUTSIDE or self._resume is not None
        self._rescue()
        if not stop.received:
            if begun and self._saved_step:
                logger.error("The run stops after step %d. %s", self.state.global_step, self._how_to_go_on())
            if isinstance(error, StopRun):
                raise failure or SystemExit(1)  # it is another process that failed
            return
        at = f"after step {self.state.global_step} of {self.state.max_steps}" if begun else "before the first step"
        self._say(f"Stopped by {stop.name} {at}. {self._how_to_go_on()}", error=True)
        if isinstance(error, StopRun) or not stop.at_once:
            raise failure or stop.exception() from (None if isinstance(error, StopRun) else error)

    def _how_to_go_on(self) -> str:
        if not self._saved_step:
            return "Nothing is saved."
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self._saved_step}"
        if self.args.save_only_model:
            return (
                f"{folder} holds the model alone (save_only_model=True): this run cannot go on from it, a new one can "
                "begin with it as `model`."
            )
        newest = checkpoints(self.args.output_dir)[-1:] == [folder]
        return f"Checkpoint: {folder}. Go on: {self.resume_call(True if newest else str(folder))}"

    def _say(self, text: str, *, error: bool = False) -> None:
        if self.is_world_process_zero():
            say(text, error=error)

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """As in `transformers.Trainer`, also for max_steps=0 with a stream."""
        if args.max_steps == 0 and not has_length(dataloader):  # of which the loop makes nothing
            return 0, 1, 0, 0, self.get_total_train_batch_size(args), 0, 0
        return super().set_initial_training_values(args, dataloader)

    def _finalize_training(self, *args: Any) -> Any:
        # The loop would delete all checkpoints but the best, whoever wrote them.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.callback_handler.careful = False
        try:
            output = super()._finalize_training(*args)  # type: ignore[no-untyped-call]
        finally:
            self.args.save_total_limit = limit
        if not self.nothing_left:
            return output
        logged = [line for line in self.state.log_history if "loss" in line]
        steps = [line["step"] for line in logged]
        spans = [step - before for before, step in zip([0, *steps], steps, strict=False)]
        loss = sum(line["loss"] * span for line, span in zip(logged, spans, strict=True)) / max(sum(spans), 1)
        return TrainOutput(output.global_step, loss, {**output.metrics, "train_loss": loss})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and its step in the record of the run; see `transformers.Trainer.save_model`."""
        super().save_model(output_dir, _internal_call)
        run = getattr(self, "run", None)
        ours = run is not None and run.record and run.path == Path(output_dir or self.args.output_dir)
        if ours and not _internal_call and self.is_world_process_zero():
            self.run.note(model=self.state.global_step)

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
            (folder / "README.md").write_text(self.model_card(), encoding="utf-8")

    # -- provenance -----------------------------------------------------------------------------------------------
    def model_card(self) -> str:
        """A model card that records what trained the model; see `trl_core.training.card`."""
        return model_card(self)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of `model_card` into `output_dir`."""
        if self.is_world_process_zero():
            Path(self.args.output_dir, "README.md").write_text(self.model_card(), encoding="utf-8")
