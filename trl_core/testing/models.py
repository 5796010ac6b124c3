"""A tiny model and tokenizer, made from nothing: for tests that must run offline in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<bos>", "<eos>", "<pad>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 261 tokens with a ChatML-like template; pad and end-of-sequence differ."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A Llama of two layers and about 40,000 weights, without dropout, in float32.

    Args:
        seed: of the weights; the global random state is left as it was.
        **overrides: of its `LlamaConfig`.
    """
    model: LlamaForCausalLM = _made(LlamaForCausalLM, seed, overrides)
    return model


def tiny_classifier(seed: int = 0, **overrides: Any) -> LlamaForSequenceClassification:
    """A reward model of the same size: one score per row; see `tiny_model`."""
    model: LlamaForSequenceClassification = _made(LlamaForSequenceClassification, seed, {"num_labels": 1, **overrides})
    return model


def _made(model_class: Any, seed: int, overrides: dict[str, Any]) -> Any:
    options = {
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.2,
        **overrides,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(LlamaConfig(**options))
