"""A causal language model with a value head, and the frozen copy it is compared with."""

import copy
import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.hub import PushToHubMixin, cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from trl_core import require

HEAD_FILE = "v_head.safetensors"
_NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_HEAD_OPTIONS = ("summary_dropout_prob", "v_head_init_strategy", "v_head_initializer_range")
_INNER, _HEAD = "pretrained_model.", "v_head."


class ValueHead(nn.Module):
    """Dropout and a linear map of the last hidden state, (B, L, H), to one float32 value per position, (B, L).

    Args:
        config: of the language model; its `summary_dropout_prob`, if it has one, comes before the next argument.
        summary_dropout_prob: dropout.
        v_head_init_strategy: None: as torch initialises a linear layer; "normal": with bias 0.
        v_head_initializer_range: standard deviation for "normal".

    Raises:
        ConfigError: an unknown `v_head_init_strategy`.
    """

    def __init__(self, config, summary_dropout_prob=0.1, v_head_init_strategy=None, v_head_initializer_range=0.2):
        super().__init__()
        text = config.get_text_config()
        # OPT projects its hidden states to another width before its head.
        width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
        self.dropout = nn.Dropout(getattr(config, "summary_dropout_prob", summary_dropout_prob))
        self.summary = nn.Linear(width, 1, dtype=torch.float32)
        if v_head_init_strategy is not None:
            what = f"v_head_init_strategy={v_head_init_strategy!r} is unknown."
            require(v_head_init_strategy == "normal", what, "Use 'normal' or None.")
            nn.init.normal_(self.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.summary(self.dropout(hidden.to(self.summary.weight))).squeeze(-1).float()


class AutoModelForCausalLMWithValueHead(nn.Module, PushToHubMixin):
    """A causal language model and a value for each position.

    What it does not have itself, `pretrained_model` has: `config`, `generate`, `gradient_checkpointing_enable`.
    The names in its state dict are those of the language model, `v_head.summary.weight` and `v_head.summary.bias`.

    Args:
        pretrained_model: the language model, also a `peft.PeftModel`.
        **head_options: of `ValueHead`.
    """

    def __init__(self, pretrained_model: nn.Module, **head_options: Any) -> None:
        super().__init__()
        self.pretrained_model: Any = pretrained_model
        self.v_head = ValueHead(pretrained_model.config, **head_options)
        self.is_peft_model = hasattr(pretrained_model, "disable_adapter")
        self.train(pretrained_model.training)
        self.register_state_dict_post_hook(_outer_names)
        self.register_load_state_dict_pre_hook(_inner_names)
        self.register_load_state_dict_post_hook(_report_outer_names)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("pretrained_model"), name)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, peft_config=None, is_trainable=False, **kwargs):
        """A model with the head that is saved beside its weights, or with a new one if there is none.

        Args:
            pretrained_model_name_or_path: Hub id or folder of a model or an adapter, or a model.
            peft_config: of a new adapter.
            is_trainable: whether a saved adapter is trained on.
            **kwargs: options of `ValueHead`, and of the language model's `from_pretrained`; its weights are float32
                unless `dtype` is set.
        """
        source = model = pretrained_model_name_or_path
        head_options = {name: kwargs.pop(name) for name in _HEAD_OPTIONS if name in kwargs}
        head = None
        if isinstance(source, str | os.PathLike):
            hub = {name: kwargs[name] for name in _HUB if name in kwargs}
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))
            if find_adapter_config_file(str(source), **hub):
                loader = importlib.import_module("peft").AutoPeftModelForCausalLM
                model = loader.from_pretrained(source, is_trainable=is_trainable, **kwargs)
            else:
                model = AutoModelForCausalLM.from_pretrained(source, **kwargs)
            head = read_head(str(source), **hub)
        if peft_config is not None:
            model = importlib.import_module("peft").get_peft_model(model, peft_config)
        made = cls(model, **head_options)
        if head:
            made.v_head.load_state_dict(head)
        return made

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any):
        """(B, L, V) float32 logits; the loss if `labels` are given, else None; (B, L) float32 values."""
        kwargs = {"input_ids": input_ids, "attention_mask": attention_mask, "output_hidden_states": True, **kwargs}
        output = self.pretrained_model(**kwargs)
        return output.logits.float(), output.loss, self.v_head(output.hidden_states[-1])

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write a model folder that holds the head too, or a folder of adapter and head.

        A plain `AutoModelForCausalLM` loads a model folder as well, and ignores the head.
        """
        if self.is_peft_model:
            self.pretrained_model.save_pretrained(save_directory, **kwargs)
            head = {_HEAD + name: value for name, value in self.v_head.state_dict().items()}
            save_file(head, Path(save_directory) / HEAD_FILE)
        else:
            self.pretrained_model.save_pretrained(save_directory, **{"state_dict": self.state_dict(), **kwargs})


def _rename(state: dict[str, Tensor], old: str, new: str) -> None:
    for name in [name for name in state if name.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)


def _outer_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    _rename(state, prefix + _INNER, prefix)


def _inner_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    _rename(state, prefix, prefix + _INNER)
    _rename(state, prefix + _INNER + _HEAD, prefix + _HEAD)


def _report_outer_names(module: nn.Module, incompatible: Any) -> None:
    for names in incompatible:
        names[:] = [name.replace(_INNER, "", 1) for name in names]


def read_head(source: str, **hub: Any) -> dict[str, Tensor]:
    """The weights of the value head, without prefix, in a folder or Hub repository; empty if there are none."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found: Any = next(filter(None, (cached_file(source, name, **quiet, **hub) for name in (HEAD_FILE, *_NAMES))), None)
    files = {found} if found else set()
    if found and found.endswith(".json"):
        places = json.loads(Path(found).read_text(encoding="utf-8"))["weight_map"]
        files = {cached_file(source, place, **hub) for name, place in places.items() if name.startswith(_HEAD)}
    head: dict[str, Tensor] = {}
    for file in files:
        if file.endswith(".bin"):
            head |= torch.load(file, map_location="cpu", weights_only=True)
        else:
            with safe_open(file, "pt") as weights:
                head |= {name: weights.get_tensor(name) for name in weights.keys() if name.startswith(_HEAD)}  # noqa: SIM118
    return {name.removeprefix(_HEAD): value for name, value in head.items() if name.startswith(_HEAD)}


def create_reference_model(
    model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None
) -> nn.Module:
    """A frozen copy of a model, in evaluation mode.

    Args:
        model: with a value head or without.
        num_shared_layers: n; the parameters before block n are frozen in `model` too, and exist only once.
        pattern: what the names of a block's parameters contain, with `{layer}` for its number; default: the block is
            number n of `h`, `layer`, `layers`, `block` or `blocks`.

    Raises:
        ConfigError: no parameter belongs to block n.
    """
    named, shared = list(model.named_parameters()), {}
    if num_shared_layers is not None:
        block = rf"\b(h|layers?|blocks?)\.{num_shared_layers}\."
        block = block if pattern is None else re.escape(pattern.format(layer=num_shared_layers))
        firsts = [i for i, (name, _) in enumerate(named) if re.search(block, name)]
        what = f"No parameter of {type(model).__name__} belongs to a block {num_shared_layers}."
        require(bool(firsts), what, "Choose a block that exists, or pass a pattern such as 'model.layers.{layer}.'.")
        shared = {id(parameter): parameter.requires_grad_(False) for _, parameter in named[: firsts[0]]}
    # What is in the memo is taken over as it is.
    return copy.deepcopy(model, shared).requires_grad_(False).eval()
