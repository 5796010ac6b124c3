"""A run from its beginning to its end: whose folder it is, what is left to do, and stopping in order."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy, TrainOutput

from ..errors import ConfigError, OutputDirError, RewardError
from .callbacks import OUTSIDE, STEP_ENDED
from .checkpoints import CheckpointedTrainer
from .folder import RunFolder, on_main
from .metrics import Metrics
from .state import all_checkpoints, checkpoints, discard, number_of
from .stopping import StopRun, say, signals

logger = logging.getLogger(__name__)


class RunTrainer(CheckpointedTrainer):
    """`CheckpointedTrainer` whose runs own their folder, stop in order, and know when they are finished."""

    _run_began_in: Path | None = None
    _stale: list[Path]
    """Checkpoints of this run beyond the step it was taken up at; they go when there is a new one."""
    _last_norm: Any = None
    nothing_left = False
    """Whether the last call of `train` found that all steps were done already."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; see `transformers.Trainer.train`.

        SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is gone) stop the run after the optimizer step that is under
        way, with a checkpoint; then KeyboardInterrupt, or SystemExit(143 or 129), is raised. A second one stops it at
        once. Handlers of the program for these signals stay.

        Args:
            resume_from_checkpoint: a checkpoint folder, True for the newest complete one in `output_dir`, or "auto"
                for that one if there is any, and else a new run. None: as the option of this name says.
            trial: as in `transformers.Trainer.train`.
            ignore_keys_for_eval: likewise.

        Raises:
            CheckpointError: there is no complete checkpoint, or it is from another algorithm or other options.
            OutputDirError: `output_dir` holds another run, or one is training in it.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        self._resume = self._saved_step = self._last_norm = None
        self._changed = frozenset()
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

    # -- beginning ------------------------------------------------------------------------------------------------
    def _begin(self, given: str | bool | None) -> str | None:
        """Take possession of the folder, and take up what is to be resumed; returns the checkpoint."""
        run = self.run
        on_main(run.recover)
        if given == "auto":
            given = on_main(run.has_checkpoint)
            if not given:
                self._say(f"There is no checkpoint in {run.path}: the run starts afresh.")
        folder = Path(self._take_up(given)) if given else None
        again, self._run_began_in = self._run_began_in == run.path.resolve(), run.path.resolve()
        replace = bool(self.args.overwrite_output_dir)
        run.record = on_main(
            lambda: run.begin(self.composition.name, checkpoint=folder, overwrite=replace, again=again)
        )
        start = self._saved_step or 0
        self._stale = [p for p in checkpoints(run.path) if run.owns(p) and number_of(p) > start]
        return str(folder) if folder else None

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        begun = super()._init_training_state(max_steps, *args)
        # Else those of the checkpoint would be kept.
        self.state.compute_steps(self.args, max_steps)  # type: ignore[no-untyped-call]
        # The folder may have been moved, or be named in another way now.
        best = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self._resume and self.args.should_save and best.is_dir() and self.run.owns(best):
            self.state.best_model_checkpoint = str(best)
        done, owed = self.state.global_step, (self._resume or ("", {}))[1].get("owed", {})
        of = f"step {done} of {max_steps}"
        if self._resume:
            self._compare_length(max_steps, *self._resume)
            self._say(f"Resuming from {self._resume[0]} at {of}; steps left: {max(max_steps - done, 0)}.")
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
            step = number_of(path)
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
        # Not asked of eval_strategy: a callback may have wanted it.
        if owed.get("evaluation") and self.eval_dataset is not None:
            self._determine_best_metric(self._evaluate(None, None), None)

    def after_step(self, only: set[str] | None = None) -> None:
        """Call the hooks `after_step`."""
        raise NotImplementedError

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return bool(super()._determine_best_metric(metrics, trial))
        except KeyError as error:
            what = f"metric_for_best_model={self.args.metric_for_best_model!r} is none of the evaluation's metrics."
            raise ConfigError(what, mend=f"Use one of: {', '.join(metrics)}.") from error

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in `transformers.Trainer`; what the Hub refuses is told.

        Raises:
            ConfigError: the repository cannot be made or reached.
        """
        try:
            super().init_hf_repo(token, private)
        except Exception as error:
            what = f"push_to_hub: the repository cannot be made: {type(error).__name__}: {error}"
            mend = "Log in (`hf auth login`), see that the Hub can be reached, check hub_model_id, or leave it out."
            raise ConfigError(what, mend=mend) from error

    # -- stopping -------------------------------------------------------------------------------------------------
    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, epoch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """At the end of a step, and of an epoch: also stop here if that is asked for in any process."""
        control, again = self.control, (model, trial, epoch, *args)
        self._signals.held = True
        if grad_norm is not None:
            self._last_norm = grad_norm
        asked = self._asked_to_stop()
        # At the end of an epoch its own logging and evaluation are still to come.
        ends = self.callback_handler.phase == STEP_ENDED and self.state.epoch == epoch + 1
        stop = asked and not ends
        if (stop or control.should_training_stop) and self.args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True
        if asked:
            self.owes_evaluation |= control.should_evaluate
            control.should_evaluate = False
            control.should_save |= stop
        due = control.should_log or control.should_evaluate or control.should_save
        super()._maybe_log_save_evaluate(tr_loss, self._last_norm, *again, **kwargs)
        if self._stale and self._saved_step == self.state.global_step and not stop and self.args.should_save:
            for path in self._stale:
                if path.exists() and number_of(path) != self._saved_step:
                    discard(path)
            self._stale = []
        if stop:
            raise StopRun
        if due and not asked and self._asked_to_stop():  # while it was logged, evaluated or saved
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
        stop, callbacks = self._signals, self.callback_handler
        asked, failure = isinstance(error, StopRun), callbacks.failure
        begun = self.state.global_step > 0 and (callbacks.phase != OUTSIDE or self._resume is not None)
        self._rescue()
        if stop.received:
            at = f"after step {self.state.global_step} of {self.state.max_steps}" if begun else "before the first step"
            self._say(f"Stopped by {stop.name} {at}. {self._how_to_go_on()}", error=True)
            stop.told = True
        elif callbacks.phase != OUTSIDE and self._saved_step:
            logger.error("The run stops after step %d. %s", self.state.global_step, self._how_to_go_on())
        if asked and failure is not None:
            raise failure
        if asked and not stop.received:
            raise SystemExit(1)  # it is another process that failed
        if stop.received and not stop.at_once:
            raise stop.exception() from (None if asked else error)
        if isinstance(error, RewardError) and isinstance(error.__cause__, KeyboardInterrupt | SystemExit):
            raise error.__cause__

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

    def resume_call(self, checkpoint: bool | str) -> str:
        """What to call to go on from a checkpoint; the command line says it in its own words."""
        return f"trainer.train(resume_from_checkpoint={checkpoint!r})"

    def _say(self, text: str, *, error: bool = False) -> None:
        if self.is_world_process_zero():
            say(text, error=error)

    # -- the end --------------------------------------------------------------------------------------------------
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
