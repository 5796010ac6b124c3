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


class _Room(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values with room behind them: a new column is written in place, where the base class copies them all."""

    start, more = 0, 0

    def fill(self, sources: list[tuple[DynamicLayer, Tensor]], columns: int, more: int) -> None:
        """Take these rows of each source, with their ends in the last of `columns` columns; up to `more` will follow.

        There is room for only some of these at first. What does not fit into the columns is left out.
        """
        room = min(more, columns // 4 + 32)
        self.buffers = [
            _right_aligned([(getattr(layer, name), rows) for layer, rows in sources], columns, room)
            for name in ("keys", "values")
        ]
        self.dtype, self.device, self.is_initialized = self.buffers[0].dtype, self.buffers[0].device, True
        self.start, self.end, self.more = 0, columns, more - room
        self.keys, self.values = (buffer[:, :, :columns] for buffer in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values that the new columns may attend to, these included."""
        end = self.end + key_states.shape[2]
        if end > self.buffers[0].shape[2]:
            kept = self.end - self.start
            self.fill([(self, torch.arange(len(key_states)))], kept, max(self.more, end - self.end))
            end = kept + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.end : end] = states
        self.keys, self.values = (buffer[:, :, self.start : end] for buffer in self.buffers)
        self.end = end
        return self.keys, self.values


class _SlidingRoom(_Room, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """Likewise, of the last columns only."""

    def fill(self, sources: list[tuple[DynamicLayer, Tensor]], columns: int, more: int) -> None:
        """As above; `columns` counts those that have left the window too."""
        super().fill(sources, min(columns, self.sliding_window - 1), more)
        self.cumulative_length = columns

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As above."""
        seen = self.cumulative_length
        keys, values = super().update(key_states, value_states)
        self.cumulative_length = seen + key_states.shape[2]
        left = max(0, self.end - self.start - self.sliding_window + 1)
        self.keys, self.values, self.start = keys[:, :, left:], values[:, :, left:], self.start + left
        return keys, values


_LAYERS: dict[type, type[_Room]] = {DynamicLayer: _Room, DynamicSlidingWindowLayer: _SlidingRoom}


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
    slot, moved = torch.tensor(prompt_of, device=device), True
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
                cache.layers = [
                    _with_room([(layer, slot)], ids.shape[1] - 1, generation_config.max_length - ids.shape[1])
                    for layer in cache.layers
                ]
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
    layers = {type(layer) for layer in getattr(cache, "layers", ())}
    return type(cache) is DynamicCache and not cache.offloading and layers <= _LAYERS.keys()


def _with_room(sources: list[tuple[DynamicLayer, Tensor]], columns: int, more: int) -> DynamicLayer:
    """The first layer, with these rows of all of them and room for more columns; see `_Room.fill`."""
    layer = sources[0][0]
    if layer.keys is None:  # the model does not use it
        return layer
    if not isinstance(layer, _Room):
        layer = _LAYERS[type(layer)](sliding_window=getattr(layer, "sliding_window", None))
    layer.fill(sources, columns, more)
    return layer


def _right_aligned(parts: list[tuple[Tensor, Tensor]], columns: int, room: int) -> Tensor:
    """(N, H, columns + room, D): these rows of each part, with their ends in the last column before the room."""
    first = parts[0][0]
    joined = first.new_empty(sum(len(rows) for _, rows in parts), first.shape[1], columns + room, first.shape[3])
    start = 0
    for states, rows in parts:
        width, target = min(columns, states.shape[2]), joined[start : start + len(rows), :, :columns]
        target[:, :, : columns - width] = 0  # masked, but what is there by chance may be no number
        source = states[:, :, states.shape[2] - width :]
        torch.index_select(source, 0, rows.to(states.device), out=target[:, :, columns - width :])
        start += len(rows)
    return joined


def _rows(model_kwargs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The arguments for some of the rows; the cache is left as it is."""
    return model_kwargs | {name: model_kwargs[name][rows] for name in _BY_ROW if model_kwargs.get(name) is not None}


def _keep(logits_processor: Any, rows: Tensor) -> None:
    """Only these rows stay in what processors know of each row."""
    for processor in logits_processor:
        padding = getattr(processor, "prompt_ignore_length", None)
        if isinstance(padding, Tensor):
            processor.prompt_ignore_length = padding[rows.to(padding.device)]
