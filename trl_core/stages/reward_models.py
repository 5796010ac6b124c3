"""Sequence classifiers as reward functions."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..errors import ConfigError
from ..names import require_source

_FORM = "Pass a function, or a sequence classifier: a Hub id you can reach, a folder, or a module."


class ClassifierReward:
    """A sequence classifier with one output as a reward function.

    Args:
        model: a module, or its folder or Hub id, which is loaded by `load`.
        tokenizer: of the model, or None for the one beside it.
        device: where it runs.
        trust_remote_code: for a model loaded by name.

    Raises:
        ConfigError: no such folder, or the module is no classifier with one output.
    """

    def __init__(self, model: Any, tokenizer: Any, device: Any, trust_remote_code: bool) -> None:
        config = getattr(model, "config", None)
        if isinstance(model, nn.Module):
            name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
            if getattr(config, "num_labels", None) != 1:
                raise ConfigError(
                    f"The reward model {name!r} is no sequence classifier with one output.",
                    mend="Load it with AutoModelForSequenceClassification.from_pretrained(..., num_labels=1).",
                )
        else:
            name = model = require_source(os.fspath(model), "The reward model")
        self.__name__ = name.rstrip("/").split("/")[-1]
        self.model: Any = model
        self.tokenizer, self._source = tokenizer, name
        self._device, self._trusted = device, trust_remote_code

    def load(self) -> None:
        """Load what was given by name."""
        try:
            if isinstance(self.model, str):
                self.model = AutoModelForSequenceClassification.from_pretrained(
                    self.model, num_labels=1, dtype=torch.float32, trust_remote_code=self._trusted
                )
            if self.tokenizer is None:
                self.tokenizer = AutoTokenizer.from_pretrained(self._source, trust_remote_code=self._trusted)
        except Exception as error:  # every format raises its own
            what = f"The reward model {self._source!r} cannot be loaded, or its tokenizer: {error}"
            raise ConfigError(what, mend=f"{_FORM} Tokenizers go into reward_processing_classes.") from error
        self.model = self.model.to(self._device).eval()

    @torch.no_grad()
    def __call__(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        """One score per row."""
        texts, special = [], True
        for prompt, completion in zip(prompts, completions, strict=True):
            if isinstance(prompt, str):
                texts.append(prompt + completion)
            else:
                special = False  # a chat template writes them itself
                texts.append(self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
        sequences = [self.tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
        device = next(self.model.parameters()).device
        scores = []
        # Row by row: the score is read at the last token, which padding may hide (a pad token that equals the
        # terminator, or none at all).
        pad_token_id, self.model.config.pad_token_id = self.model.config.pad_token_id, None
        try:
            for ids in sequences:
                scores.append(self.model(input_ids=torch.tensor([ids], device=device)).logits[0, 0].item())
        finally:
            self.model.config.pad_token_id = pad_token_id
        return scores
