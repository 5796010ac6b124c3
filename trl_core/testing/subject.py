"""How the conformance checks run an algorithm: on a tiny model, real sampling, and rewards made from the tokens."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import SkipTest

from datasets import Dataset
from torch import Tensor

from .. import discovery
from ..composition import Composition, compose
from .models import tiny_model, tiny_tokenizer

Weights = dict[str, Tensor]
_PROMPTS = Dataset.from_list([{"prompt": "12+34="[: 2 + row % 5], "row": row} for row in range(8)])
# Six steps of three micro-steps, out of generation batches of eight, sixteen to an epoch: checkpoints fall into the
# middle of a window, a generation into the middle of a step, and the last step ends early with the epoch.
_STEPS = {"max_steps": 6, "gradient_accumulation_steps": 3, "steps_per_generation": 4, "num_iterations": 2}
_SIZES = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "learning_rate": 1e-2}
_HOUSE = {"activation_checkpointing": False, "save_strategy": "no", "report_to": [], "use_cpu": True}


def _reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Differs inside groups; about one row in nine has no score."""
    return [None if sum(ids) % 9 == 0 else sum(ids) % 7 / 2 for ids in completion_ids]


@dataclass(eq=False)
class Subject:
    """An algorithm under test, and how to run it.

    Args:
        name: as for `get_trainer`; the qualified form, "trl-gfpo:gfpo", stays right whatever else is installed.
        options: under which the algorithm acts. They go over the checks' own: 16 completions at a time in groups of 4
            of at most 6 tokens.
        arguments: of the trainer, such as a filter.
        neutral: options that, put over `options`, make the algorithm equal its base bit for bit; None if none do.

    Raises:
        AlgorithmNotFoundError, AmbiguousAlgorithmError: it is not installed.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.infos = [discovery.find(name) for name in self.name.split("+")]

    def composition(self, base: bool = False) -> Composition:
        """What the name stands for; or its base: of several algorithms the root, of a single one what it extends.

        Raises:
            SkipTest: it has no base.
        """
        own = compose(self.name)
        if base and len(own.parts) == 1:
            raise SkipTest(f"{self.name} builds on nothing.")
        return compose(own.parts[0 if "+" in self.name else -2].info.qualified) if base else own

    def trainer(self, folder: Path, *, base: bool = False, **options: Any) -> Any:
        """A trainer of the algorithm; or of its base, with those of the options and arguments that it has."""
        composition = self.composition(base)
        known = {f.name for f in dataclasses.fields(composition.config_class)} | composition.arguments.keys()
        chosen = {**_STEPS, **_SIZES, **_HOUSE, **self.options, **options}
        kept = {name: value for name, value in chosen.items() if not base or name in known}
        arguments = {name: value for name, value in self.arguments.items() if not base or name in known}
        model = tiny_model()
        # Among so many terminators completions get all lengths.
        model.generation_config.eos_token_id = list(range(40, 90))
        return composition.trainer_class(
            model,
            reward_funcs=_reward,
            args=composition.config_class(output_dir=str(folder), disable_tqdm=True, **kept),
            train_dataset=_PROMPTS,
            eval_dataset=_PROMPTS.select(range(3)),
            processing_class=tiny_tokenizer(),
            **arguments,
        )

    def train(self, folder: Path, *, resume: Path | None = None, base: bool = False, **options: Any) -> Weights:
        """The weights after training; see `trainer`."""
        trainer = self.trainer(folder, base=base, **options)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}

    @cached_property
    def two_runs(self) -> tuple[Weights, Weights]:
        """The weights of two runs with the same seed."""
        with tempfile.TemporaryDirectory() as folder:
            return self.train(Path(folder, "first")), self.train(Path(folder, "second"))
