"""How the conformance checks run an algorithm: on a tiny model, and on data that suit its trainer.

Online: prompts, real sampling, and rewards made from the tokens. Offline: demonstrations, or preference pairs, for a
reward model too.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from .. import discovery
from ..composition import Composition, compose
from ..errors import ConfigError
from ..training.offline import OfflineTrainer
from ..training.online import OnlineTrainer
from ..training.pairs import PairTrainer, ScoreTrainer
from .models import tiny_classifier, tiny_model, tiny_tokenizer
from .outcomes import NotApplicable

Weights = dict[str, Tensor]
# Six steps of three micro-steps. Online out of generation batches of eight, sixteen to an epoch: checkpoints fall into
# the middle of a window, a generation into the middle of a step, and the last step ends early with the epoch. Offline
# ten micro-batches to an epoch: the fourth step ends early, two more follow.
_STEPS = {"max_steps": 6, "gradient_accumulation_steps": 3, "steps_per_generation": 4, "num_iterations": 2}
_SIZES = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "learning_rate": 1e-2}
_HOUSE = {"activation_checkpointing": False, "save_strategy": "no", "report_to": [], "use_cpu": True}
_OURS: dict[str, Any] = {**_STEPS, **_SIZES, **_HOUSE}


def _reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """Differs inside groups; about one row in nine has no score."""
    return [None if sum(ids) % 9 == 0 else sum(ids) % 7 / 2 for ids in completion_ids]


def _sampler() -> Any:
    model = tiny_model()
    # Among so many terminators completions get all lengths.
    model.generation_config.eos_token_id = list(range(40, 90))
    return model


@torch.no_grad()
def _change(policy: torch.nn.Module) -> None:
    """Move each trained weight by about a twentieth of its size, the same way each time."""
    generator = torch.Generator().manual_seed(0)
    for weight in (each for each in policy.parameters() if each.requires_grad):
        size = weight.square().mean().sqrt() + 0.1  # those that begin as zeros move too
        weight.add_(0.05 * size * torch.randn(weight.shape, generator=generator).to(weight))


@dataclass(frozen=True)
class _Kind:
    """A model and data for one kind of trainer."""

    model: Callable[[], Any]
    rows: Dataset
    arguments: Mapping[str, Any] = field(default_factory=dict)


def _prompt(row: int) -> dict[str, Any]:
    return {"prompt": "12+34="[: 2 + row % 5], "row": row}


_TEXTS = Dataset.from_list([{**_prompt(row), "completion": str(3 ** (row % 13))} for row in range(40)])
_PAIRS = _TEXTS.rename_column("completion", "chosen").add_column("rejected", [str(2 ** (row + 1)) for row in range(40)])
_KINDS: dict[type, _Kind] = {
    OnlineTrainer: _Kind(_sampler, Dataset.from_list([_prompt(row) for row in range(8)]), {"reward_funcs": _reward}),
    ScoreTrainer: _Kind(tiny_classifier, _PAIRS),
    PairTrainer: _Kind(tiny_model, _PAIRS),
    OfflineTrainer: _Kind(tiny_model, _TEXTS),
}


@dataclass(eq=False)
class Subject:
    """An algorithm under test, and how to run it.

    Args:
        name: as for `get_trainer`; the qualified form, "trl-gfpo:gfpo", stays right whatever else is installed.
        options: under which the algorithm acts. They go over the checks' own: 16 completions at a time in groups of 4
            of at most 6 tokens, or micro-batches of 4 demonstrations or pairs.
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
        self.found: dict[str, Exception | None] = {}
        """Checks that others build on, with the error of those that fail."""
        self._compositions: dict[bool, Composition] = {}

    @property
    def own_configs(self) -> list[type]:
        """The dataclasses of options that it brings."""
        return [config for info in self.infos if (config := discovery.load(info).config) is not None]

    @cached_property
    def kind(self) -> _Kind:
        """What its trainer needs.

        Raises:
            ConfigError: the trainer is of no kind that there are data for.
        """
        trainer = self.composition().trainer_class
        for base, kind in _KINDS.items():
            if issubclass(trainer, base):
                return kind
        names = ", ".join(base.__name__ for base in _KINDS)
        raise ConfigError(
            f"There are no data to check {trainer.__name__} with.", mend=f"Derive it from one of {names}."
        )

    @property
    def online(self) -> bool:
        """Whether it learns from what it generates."""
        return self.kind is _KINDS[OnlineTrainer]

    def composition(self, base: bool = False) -> Composition:
        """What the name stands for; or its base: of several algorithms the root, of a single one what it extends.

        Raises:
            NotApplicable: it has no base.
        """
        if base not in self._compositions:
            name = self.name
            if base:
                parts = self.composition().parts
                if len(parts) == 1:
                    raise NotApplicable(f"{self.name} builds on nothing.")
                name = parts[0 if "+" in self.name else -2].info.qualified
            self._compositions[base] = compose(name)
        return self._compositions[base]

    def trainer(self, folder: Path, *, base: bool = False, **options: Any) -> Any:
        """A trainer of the algorithm; or of its base, with those of the options and arguments that it has.

        Its policy has changed a little since the trainer was made: a reference, or a teacher of the same weights, is
        then another model. With equal ones the loss of some algorithms is 0, and all that is seen of it rounding.
        """
        composition = self.composition(base)
        known = {f.name for f in dataclasses.fields(composition.config_class)} | composition.arguments.keys()
        chosen = {**_OURS, **self.options, **options}
        kept = {name: value for name, value in chosen.items() if name in known or not (base or name in _OURS)}
        arguments = {name: value for name, value in self.arguments.items() if not base or name in known}
        trainer: Any = composition.trainer_class(
            model=self.kind.model(),
            args=composition.config_class(output_dir=str(folder), disable_tqdm=True, **kept),
            train_dataset=self.kind.rows,
            eval_dataset=self.kind.rows.select(range(3)),
            processing_class=tiny_tokenizer(),
            **self.kind.arguments,
            **arguments,
        )
        _change(trainer.model)
        return trainer

    def train(self, folder: Path, *, resume: Path | None = None, base: bool = False, **options: Any) -> Weights:
        """The weights after training; see `trainer` and `weights`."""
        trainer = self.trainer(folder, base=base, **options)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return self.weights(trainer)

    @staticmethod
    def weights(trainer: Any) -> Weights:
        """Copies of the weights of the policy, of extra models and, where it has its own, of the reference."""
        modules = {"policy": trainer.model, "reference": trainer.reference and trainer.reference.module}
        modules |= trainer.extra_models
        states = {name: module.state_dict() for name, module in modules.items() if module is not None}
        return {f"{of}.{name}": value.detach().clone() for of, state in states.items() for name, value in state.items()}

    @cached_property
    def run(self) -> Weights:
        """The weights after one run, with which others are compared."""
        with tempfile.TemporaryDirectory() as folder:
            return self.train(Path(folder))

    @cached_property
    def again(self) -> Weights:
        """The weights after another run like the first."""
        return Subject(self.name, self.options, self.arguments).run
