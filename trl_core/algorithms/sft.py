"""SFT: maximum likelihood on demonstrations, and dynamic fine-tuning (DFT, arXiv 2508.05629)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..algorithm import Algorithm
from ..batch import Texts
from ..data.packing import STRATEGIES
from ..hookspecs import HookContext, hookimpl
from ..options import option, require
from ..stages.supervised_loss import dft, token_nll
from ..training.config import OfflineConfig

LOSS_TYPES = ("nll", "dft")
ALIASES = {"chunked_nll": "nll"}
"""Names of the same loss; here logits exist only at loss positions anyway."""


@dataclass
class SFTConfig(OfflineConfig):
    """Options of SFT; names and defaults are TRL's."""

    learning_rate: float = option(2e-5, "Initial learning rate.")
    loss_type: str = option(
        "nll", "'nll', or 'dft': each token weighted by its own probability.", choices=(*LOSS_TYPES, *ALIASES)
    )
    completion_only_loss: bool | None = option(
        None, "Learn only the completion; default: where rows have a prompt and a completion."
    )
    assistant_only_loss: bool = option(
        False, "Learn only what the assistant says; needs a chat template with generation markers."
    )
    token_normalizer: str = option(
        "predicted",
        "Denominator of the loss: 'predicted' counts the tokens that are learned; 'labels' also counts the first token "
        "of each row, which nothing predicts, as transformers up to 5.3 did.",
        choices=("predicted", "labels"),
    )
    dataset_text_field: str = option("text", "Column of plain texts.")
    packing: bool = option(False, "Put several rows into one of max_length tokens; needs max_length.")
    packing_strategy: str = option(
        "bfd",
        "'bfd': whole rows, cut to max_length. 'bfd_split': long rows in several pieces. 'wrapped': everything end to "
        "end, cut every max_length tokens, where rows see those before them in the piece.",
        choices=STRATEGIES,
    )
    eval_packing: bool | None = option(None, "The same for evaluation; default: as packing.")
    shuffle_dataset: bool = option(False, "Shuffle the rows once, before they are packed.")

    @property
    def token_statistics(self) -> tuple[str, ...]:
        """Label smoothing looks at the whole vocabulary."""
        return ("mean_logp",) if self.label_smoothing_factor else ()

    smooths_labels = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss_type = ALIASES.get(self.loss_type, self.loss_type)
        require(
            not ((self.packing or self.eval_packing) and self.max_length is None),
            "packing=True with max_length=None: the length of the packed rows is not known.",
            "Set max_length.",
        )
        require(
            not (self.label_smoothing_factor and self.loss_type == "dft"),
            f"label_smoothing_factor={self.label_smoothing_factor} with loss_type='dft'.",
            "Use one of them.",
        )


class SFT:
    """The hooks of SFT."""

    def __init__(self, context: HookContext) -> None:
        self.args: SFTConfig = context.args

    @hookimpl
    def loss_terms(self, samples: Texts, logps: Tensor) -> dict[str, Any]:
        """Negative log-likelihood, or its DFT form."""
        if self.args.loss_type == "dft":
            return {"dft": dft(logps)}
        return {"nll": token_nll(logps, samples.mean_logps, self.args.label_smoothing_factor)}


algorithm = Algorithm(
    name="sft",
    summary="Supervised fine-tuning: the likelihood of demonstrations, with packing and completion-only loss.",
    extends=None,
    config=SFTConfig,
    hooks=SFT,
    config_name="SFTConfig",
    trainer_name="SFTTrainer",
    trainer="trl_core.training.offline:OfflineTrainer",
)
