"""A decoding loop for groups: a prompt runs through the model once, and ended rows leave the batch.

`transformers` prepares everything and calls the loop (`model.generate(custom_generate=...)`); its own processors and
stopping criteria choose and end tokens, so every sampling option means what it means there. Whatever the loop does not
know for certain to be exact it leaves to `model.generate`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

# Those that look at each row by itself and remember nothing of it from one step to the next, except how much padding it
# has. Others number the rows (a watermark's state, a second prompt for each), and rows that leave would shift them.
_PROCESSORS = frozenset(
    {
        hf.MinLengthLogitsProcessor,
        hf.MinNewTokensLengthLogitsProcessor,
        hf.MinPLogitsWarper,
        hf.NoBadWordsLogitsProcessor,
        hf.NoRepeatNGramLogitsProcessor,
        hf.RepetitionPenaltyLogitsProcessor,
        hf.SuppressTokensLogitsProcessor,
        hf.TemperatureLogitsWarper,
        hf.TopKLogitsWarper,
        hf.TopPLogitsWarper,
    }
)
_CRITERIA = frozenset({hf.MaxLengthCriteria, hf.MaxTimeCriteria, hf.StopStringCriteria, EosTokenCriteria})
_MODES = frozenset({GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE})
_BY_ROW = ("attention_mask", "position_ids")
_KNOWN = frozenset({*_BY_ROW, "past_key_values", "logits_to_keep", "use_cache"})
_LAYERS = frozenset({DynamicLayer, DynamicSlidingWindowLayer})


def decodes(model: Any) -> bool:
    """Whether the class samples as `transformers` does, so that its loop may be replaced.

    Of adapters only LoRA does: its `generate` hands over to the model below. Where weights are sharded every process
    has to take the same steps, which the loop does not.
    """
    if type(model).__module__ == "peft.peft_model" and model.active_peft_config.peft_type == "LORA":
        model = model.get_base_model()
    return (
        isinstance(model, hf.GenerationMixin)
        and all(_own(model, name) is getattr(hf.GenerationMixin, name) for name in ("generate", "_sample"))
        and not is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]
        and not is_fsdp_managed_module(cast(nn.Module, model))
    )


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    prompt_of: list[int],
    **model_kwargs: Any,
) -> Tensor | None:
    """Sample or take the likeliest tokens until every row has ended.

    Args:
        model: as `generate` passes it, like all arguments up to `generation_config`.
        input_ids: (N, L) prompts, left-padded.
        logits_processor: turns (N', V) logits into scores, for the N' rows still in the batch.
        stopping_criteria: says which of these rows have ended.
        generation_config: complete, with the model's own defaults.
        prompt_of: N numbers; rows with the same number have the same prompt. Numbered from 0 in order of appearance.
        **model_kwargs: arguments of the forward pass.

    Returns:
        (N, L + new tokens), padded after each end, as `generate` returns it; None where the loop is not known to be
        exact. Nothing has been drawn then.
    """
    cache = model_kwargs.get("past_key_values")
    if (
        len(prompt_of) != len(input_ids)
        or not _known(logits_processor, stopping_criteria, generation_config)
        or not _selectable(cache)
        or not model_kwargs.keys() <= _KNOWN
        or any(model_kwargs[name].dim() != 2 for name in _BY_ROW if model_kwargs.get(name) is not None)
    ):
        return None
    device, pad = input_ids.device, generation_config.pad_token_id
    firsts = torch.tensor([prompt_of.index(number) for number in range(max(prompt_of) + 1)], device=device)
    prompt_kwargs = _rows(model_kwargs, firsts)
    inputs = model.prepare_inputs_for_generation(input_ids[firsts], is_first_iteration=True, **prompt_kwargs)
    outputs = model(**inputs, return_dict=True)
    if outputs.get("past_key_values") is not cache or not _selectable(cache):
        return None
    # The row of the cache for each row of the batch, and whether they differ by now.
    slot, moved = torch.tensor(prompt_of, device=device), len(firsts) < len(input_ids)
    logits = outputs.logits[:, -1][slot]
    # Without a terminator, `generate` lets rows that a stop string has ended run on, and so must this.
    leave = any(isinstance(criterion, EosTokenCriteria) for criterion in stopping_criteria)
    running, ids = torch.arange(len(input_ids), device=device), input_ids
    ended, columns = torch.zeros_like(running, dtype=torch.bool), []
    # For experts `generate` decodes with other kernels than it reads the prompt with.
    with getattr(model, "_optimize_model_for_decode", nullcontext)():
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            del outputs  # the logits of a prompt may be large
            scores = logits_processor(ids, logits.to(copy=True, dtype=torch.float32))
            draw = generation_config.do_sample
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0] if draw else scores.argmax(-1)
            if leave:
                tokens = tokens.masked_fill(ended, pad)
            columns.append(tokens.new_full((len(input_ids),), pad).index_copy(0, running, tokens))
            ids = torch.cat([ids, tokens[:, None]], 1)
            ended = ended | stopping_criteria(ids, None)
            count = int(ended.sum())
            if count == len(ended):
                return torch.cat([input_ids, torch.stack(columns, 1)], 1)
            # Leaving copies the cache, about as much as the model does in a step: too much for one row of many.
            if leave and 4 * count >= len(ended):
                kept = (~ended).nonzero()[:, 0]
                running, ids, ended, slot, moved = running[kept], ids[kept], ended[kept], slot[kept], True
                model_kwargs = _rows(model_kwargs, kept)
                _keep(logits_processor, kept)
            if moved:
                cache.batch_select_indices(slot)
                slot, moved = torch.arange(len(slot), device=device), False
            inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
            outputs = model(**inputs, return_dict=True)
            logits = outputs.logits[:, -1]


def _own(model: Any, name: str) -> Any:
    """The method of this name: the object's, where one was set on it, or the class's."""
    return vars(model).get(name, getattr(type(model), name))


def _known(logits_processor: Any, stopping_criteria: Any, config: Any) -> bool:
    """Whether the options ask for nothing but sampling of single rows."""
    return (
        config.get_generation_mode() in _MODES
        and {type(processor) for processor in logits_processor} <= _PROCESSORS
        and {type(criterion) for criterion in stopping_criteria} <= _CRITERIA
        and config.pad_token_id is not None
        and not config.return_dict_in_generate
        and config.prefill_chunk_size is None
        and not config.token_healing
    )


def _selectable(cache: Any) -> bool:
    """Whether the cache is keys and values with a row for each row of the batch, and nothing else."""
    return type(cache) is DynamicCache and not cache.offloading and {type(layer) for layer in cache.layers} <= _LAYERS


def _rows(model_kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The arguments for some of the rows; the cache is left as it is."""
    return model_kwargs | {name: model_kwargs[name][rows] for name in _BY_ROW if model_kwargs.get(name) is not None}


def _keep(logits_processor: Any, rows: Tensor) -> None:
    """Only these rows stay in what processors know of each row."""
    for processor in logits_processor:
        padding = getattr(processor, "prompt_ignore_length", None)
        if isinstance(padding, Tensor):
            processor.prompt_ignore_length = padding[rows.to(padding.device)]
