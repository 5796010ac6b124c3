"""Policies, tokenizers and adapters from what users pass."""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_peft_available

from ..errors import ConfigError
from ..options import require

logger = logging.getLogger(__name__)


def check_model(name: str, model: Any) -> None:
    """Raise `ConfigError` unless it is the name of a model, a folder or a module."""
    if isinstance(model, nn.Module) or (isinstance(model, str | os.PathLike) and str(model).strip()):
        return
    raise ConfigError(
        f"{name} is {repr(model)[:80]} ({type(model).__name__}); expected a Hub id, a folder, or a module.",
        mend="Pass for example 'Qwen/Qwen3-0.6B', or AutoModelForCausalLM.from_pretrained(...).",
    )


def load_policy(
    model: str | os.PathLike[str] | PreTrainedModel,
    init_kwargs: dict[str, Any] | None,
    trust_remote_code: bool,
    auto_class: Any = AutoModelForCausalLM,
) -> nn.Module:
    """A model from a Hub id, a folder or a module; a causal language model unless `auto_class` says otherwise.

    Weights are loaded in float32 unless `init_kwargs["dtype"]` says otherwise.

    Raises:
        ConfigError: `init_kwargs` are given with a module, or the name cannot be loaded.
    """
    check_model("The model", model)
    if not isinstance(model, str | os.PathLike):
        if init_kwargs:
            raise ConfigError(
                "`model_init_kwargs` are set but `model` is already a module.",
                mend="Pass the model's id or path, or remove model_init_kwargs.",
            )
        return model
    kwargs = {"dtype": torch.float32, "trust_remote_code": trust_remote_code, **(init_kwargs or {})}
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto":
        found = getattr(torch, kwargs["dtype"], None)
        what = f"model_init_kwargs: dtype={kwargs['dtype']!r} is no type of torch."
        require(isinstance(found, torch.dtype), what, "Use for example 'float32', 'bfloat16' or 'auto'.")
        kwargs["dtype"] = found
    if kwargs["dtype"] is torch.bfloat16 and not torch.cuda.is_available():
        logger.warning("bfloat16 weights on a CPU without AMX or AVX-512 are extremely slow; float32 is the default.")
    try:
        loaded: nn.Module = auto_class.from_pretrained(os.fspath(model), **kwargs)
        return loaded
    except (OSError, ValueError, TypeError) as error:  # TypeError: an argument that the model does not take
        raise ConfigError(
            f"The model {model!r} cannot be loaded: {error}",
            mend="Pass a Hub id you can reach, a folder with config.json and weights, or a model object.",
        ) from error


def load_tokenizer(
    processing_class: Any,
    model: nn.Module,
    trust_remote_code: bool,
    customize: Callable[[Any], None] = lambda tokenizer: None,
) -> PreTrainedTokenizerBase:
    """The given tokenizer, or the one saved beside the model; its pad token falls back to the terminator.

    So does a pad token that was added to the tokenizer alone and has no embedding. `customize` may give it other
    special tokens before that.

    Raises:
        ConfigError: there is none, or it has neither pad nor end-of-sequence token.
    """
    tokenizer: Any = processing_class
    if tokenizer is None:
        source = getattr(getattr(model, "config", None), "_name_or_path", "")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"No tokenizer was passed and none can be loaded from {source!r}.", mend="Pass processing_class=...."
            ) from error
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # the text side of a processor
    customize(tokenizer)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "The tokenizer has neither a pad token nor an end-of-sequence token.",
                mend="Set processing_class.eos_token (and preferably pad_token).",
            )
        tokenizer.pad_token = tokenizer.eos_token
    known = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if tokenizer.pad_token_id >= known and tokenizer.eos_token_id is not None:
        logger.warning(
            "The model has no embedding for the pad token %r (%d of %d); the end-of-sequence token is used instead.",
            tokenizer.pad_token,
            tokenizer.pad_token_id,
            known,
        )
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_classifier(
    model: str | os.PathLike[str] | PreTrainedModel, init_kwargs: dict[str, Any] | None, trust_remote_code: bool
) -> nn.Module:
    """A sequence classifier with one output; made from a language model, it gets a new head.

    Raises:
        ConfigError: it has another number of outputs, or see `load_policy`.
    """
    check_model("The model", model)
    config, one = getattr(model, "config", None), {}
    if isinstance(model, str | os.PathLike):
        one = {"num_labels": 1}
        with contextlib.suppress(OSError, ValueError):  # loading the model says why
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        config = config if "Classification" in str(getattr(config, "architectures", None)) else None
    outputs = getattr(config, "num_labels", 1 if one else None)
    if outputs != 1:
        raise ConfigError(
            f"The reward or value model has {outputs} outputs; a score is one number.",
            mend="Train one with one output: from_pretrained(..., num_labels=1), or start from a language model.",
        )
    return load_policy(
        model, {**(init_kwargs or {}), **one} or None, trust_remote_code, AutoModelForSequenceClassification
    )


def customize_tokenizer(
    tokenizer: Any, *, eos_token: str | None, pad_token: str | None, chat_template: str | None, trust_remote_code: bool
) -> None:
    """Give the tokenizer other special tokens, which must be in its vocabulary, or another chat template.

    Args:
        tokenizer: changed in place.
        eos_token: a token, or None to leave it.
        pad_token: likewise.
        chat_template: a .jinja file, or a folder or Hub id of a tokenizer whose template is taken.
        trust_remote_code: for that tokenizer.

    Raises:
        ConfigError: a token is not in the vocabulary, or there is no chat template.
    """
    for name, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ConfigError(
                f"{name}={token!r} is not in the tokenizer's vocabulary.", mend="Name one of its tokens, or add it."
            )
        setattr(tokenizer, name, token)
    if chat_template is None:
        return
    try:
        if chat_template.endswith(".jinja"):
            found = Path(chat_template).read_text(encoding="utf-8")
        else:
            found = AutoTokenizer.from_pretrained(chat_template, trust_remote_code=trust_remote_code).chat_template
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template_path={chat_template!r} cannot be read: {error}",
            mend="Give a .jinja file, or a folder or Hub id of a tokenizer.",
        ) from error
    if not found:
        raise ConfigError(
            f"The tokenizer of chat_template_path={chat_template!r} has no chat template.", mend="Choose another."
        )
    tokenizer.chat_template = found


def terminators(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's, and those of the model's generation config."""
    generation_config = getattr(model, "generation_config", None)
    configured = getattr(generation_config, "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if isinstance(tokenizer.eos_token_id, int):
        ids.insert(0, tokenizer.eos_token_id)
    return tuple(dict.fromkeys(ids))


def max_positions(model: nn.Module) -> int | None:
    """How many tokens the model can hold, or None if it says nothing."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Every dropout probability as (owner, attribute, value): of dropout modules, and those kept as a number."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or isinstance(module, nn.Dropout)):
                yield module, name, value


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0."""
    for module, name, _ in dropouts(model):
        setattr(module, name, 0.0)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """While active, the models are in evaluation mode and nothing gets a gradient; afterwards as they were."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def is_peft(model: nn.Module) -> bool:
    """Whether the model is a `peft.PeftModel`; peft need not be installed."""
    if not is_peft_available():
        return False
    return isinstance(model, importlib.import_module("peft").PeftModel)


def add_adapter(model: Any, peft_config: Any, gradient_checkpointing: bool, new_head: str | None = None) -> Any:
    """Wrap the model in a new adapter, or return it unchanged when `peft_config` is None.

    `new_head` names a module that is trained and saved whole beside the adapter, because it starts untrained.

    Raises:
        ConfigError: peft is not installed, or the model already carries an adapter.
    """
    if peft_config is None:
        return model
    if not is_peft_available():
        raise ConfigError("`peft_config` is set but peft is not installed.", mend="pip install 'trl-core[peft]'")
    if is_peft(model):
        raise ConfigError(
            "`peft_config` is set but the model already carries an adapter.",
            mend="Pass the base model, or leave peft_config out to continue the existing adapter.",
        )
    if gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # a frozen embedding would cut the graph at the first checkpoint
    if new_head is not None and hasattr(model, new_head):
        peft_config = copy.deepcopy(peft_config)
        peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), new_head})
    adapted: nn.Module = importlib.import_module("peft").get_peft_model(model, peft_config)
    return adapted
