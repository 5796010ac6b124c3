"""A decoding loop for groups: a prompt runs through the model once, and ended rows leave the batch to waiting ones.

`transformers` prepares everything and calls the loop (`model.generate(custom_generate=...)`); its own processors and
stopping criteria choose and end tokens, so every sampling option means what it means there. Whatever the loop does not
know for certain to be exact it leaves to `model.generate`.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from .room import LAYERS, Room, with_room

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


def decodes(model: Any) -> bool:
    """Whether the class samples as `transformers` does, so that its loop may be replaced.

    Of adapters only LoRA does: its `generate` hands over to the model below.
    """
    if type(model).__module__ == "peft.peft_model" and model.active_peft_config.peft_type == "LORA":
        model = model.get_base_model()
    return (
        isinstance(model, hf.GenerationMixin)
        and all(_own(model, name) is getattr(hf.GenerationMixin, name) for name in ("generate", "_sample"))
        and not sharded(model)
    )


def sharded(model: Any) -> bool:
    """Whether weights are spread over processes, which then have to take the same number of steps."""
    return bool(is_deepspeed_zero3_enabled()) or bool(is_fsdp_managed_module(cast(nn.Module, model)))  # type: ignore[no-untyped-call]


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    prompt_of: list[int],
    places: int | None = None,
    **model_kwargs: Any,
) -> Tensor | None:
    """Sample or take the likeliest tokens until every row has ended.

    Args:
        model: as `generate` passes it, like all arguments up to `generation_config`.
        input_ids: (N, L) prompts, left-padded.
        logits_processor: turns (n, V) logits into scores, for n rows with equally many tokens.
        stopping_criteria: says which of these rows have ended.
        generation_config: complete, with the model's own defaults.
        prompt_of: N numbers; rows with the same number have the same prompt. Numbered from 0 in order of appearance.
        places: most rows in the batch at a time; the others wait until some have ended. None for all N, as it is
            where nothing terminates a row.
        **model_kwargs: arguments of the forward pass.

    Returns:
        (N, L + new tokens), padded after each end, as `generate` returns it; None where the loop is not known to be
        exact. Nothing has been drawn then.
    """
    if (
        len(prompt_of) != len(input_ids)
        or not _known(logits_processor, stopping_criteria, generation_config)
        or not _selectable(model_kwargs.get("past_key_values"))
        or not model_kwargs.keys() <= _KNOWN
        or any(model_kwargs[name].dim() != 2 for name in _BY_ROW if model_kwargs.get(name) is not None)
    ):
        return None
    # Without a terminator, `generate` lets rows that a stop string has ended run on, and so must this.
    terminates = any(isinstance(criterion, EosTokenCriteria) for criterion in stopping_criteria)
    places = min(places or len(input_ids), len(input_ids)) if terminates else len(input_ids)
    if places < len(input_ids):
        # A row that comes later stands in other columns: the model has to go by positions and mask.
        if "attention_mask" not in model_kwargs or model_kwargs.get("position_ids") is None:
            return None
        if model_kwargs["attention_mask"] is None:  # no prompt is padded, but shorter rows will be
            model_kwargs["attention_mask"] = torch.ones_like(input_ids)
    loop = _Loop(model, logits_processor, stopping_criteria, generation_config, terminates, places)
    return loop.run(input_ids, prompt_of, model_kwargs)


@dataclass(eq=False)
class _Cohort:
    """Rows that came into the batch together: `generate` would show them to processors and criteria together."""

    rows: list[int]
    """n numbers, out of N."""
    ids: Tensor
    """(n, L + tokens so far)."""
    processors: Any
    ended: Tensor
    """(n,) bool."""

    def leave(self) -> None:
        """Let go of the rows that have ended."""
        stays = (~self.ended).nonzero()[:, 0]
        self.rows, self.processors = [self.rows[i] for i in stays.tolist()], _of_rows(self.processors, stays)
        self.ids, self.ended = self.ids[stays], self.ended[stays]


class _Loop:
    """The batch of `decode`: rows come, get their tokens, and leave."""

    def __init__(self, model: Any, processors: Any, criteria: Any, config: Any, terminates: bool, places: int) -> None:
        self.model, self.processors, self.criteria, self.config = model, processors, criteria, config
        self.terminates, self.places = terminates, places
        self.cohorts: list[_Cohort] = []
        # Where each row of the cohorts is: arguments of a forward pass, and its row in these and in their cache, which
        # lacks its last token. They are joined before the next pass if they have moved.
        self.where: list[tuple[dict[str, Any], int]] = []
        self.moved = False
        # Prompts of which rows come: where they are, and their logits (V,).
        self.prompts: dict[int, tuple[dict[str, Any], int, Tensor]] = {}
        self.finished: dict[int, Tensor] = {}

    def run(self, input_ids: Tensor, prompt_of: list[int], prompt_kwargs: dict[str, Any]) -> Tensor | None:
        """See `decode`."""
        self.input_ids, self.prompt_of, self.prompt_kwargs = input_ids, prompt_of, prompt_kwargs
        self.waiting = sorted(range(len(prompt_of)), key=prompt_of.__getitem__)
        if not self._admit():
            return None
        # For experts `generate` decodes with other kernels than it reads the prompt with.
        decoding = getattr(self.model, "_optimize_model_for_decode", nullcontext)
        while self.where:
            with decoding():
                while not self._leave():
                    self._step()
            if self.waiting:
                self._admit()
        rows = [self.finished[row] for row in range(len(input_ids))]
        return pad_sequence(rows, batch_first=True, padding_value=self.config.pad_token_id)

    def _admit(self) -> bool:
        """Waiting rows take the free places and get their first token; False if their prompts cannot be read."""
        free = self.places - len(self.where)
        rows, self.waiting = self.waiting[:free], self.waiting[free:]
        numbers = [self.prompt_of[row] for row in rows]
        fresh = [number for number in dict.fromkeys(numbers) if number not in self.prompts]
        if fresh and not self._read(fresh):
            return False
        self.where += [self.prompts[number][:2] for number in numbers]
        self.moved, logits = True, torch.stack([self.prompts[number][2] for number in numbers])
        # Some rows of the last group may have to wait.
        self.prompts = {
            number: self.prompts[number] for row in self.waiting[:1] if (number := self.prompt_of[row]) in numbers
        }
        ids, processors = self.input_ids[rows], _of_rows(self.processors, torch.tensor(rows))
        self.cohorts.append(_Cohort(rows, ids, processors, torch.zeros_like(ids[:, 0], dtype=torch.bool)))
        self._choose(self.cohorts[-1], logits)
        return True

    def _read(self, numbers: list[int]) -> bool:
        """Send these prompts through the model; False if it does not keep its state in the cache."""
        firsts = [self.prompt_of.index(number) for number in numbers]
        width = _used(self.prompt_kwargs, firsts, self.input_ids.shape[1])
        kwargs = _joined([(self.prompt_kwargs, firsts)], width)
        kwargs["past_key_values"] = cache = copy.deepcopy(kwargs["past_key_values"])
        ids = self.input_ids[firsts, -width:]
        inputs = self.model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
        outputs = self.model(**inputs, return_dict=True)
        kwargs = self.model._update_model_kwargs_for_generation(outputs, kwargs)
        logits = outputs.logits[:, -1].clone()  # those of all tokens may be large
        self.prompts |= {number: (kwargs, i, logits[i]) for i, number in enumerate(numbers)}
        return outputs.get("past_key_values") is cache and _selectable(cache)

    def _step(self) -> None:
        """One more token for each row."""
        if self.moved:
            self._join()
        kwargs = self.where[0][0]
        ids = torch.cat([_fit(cohort.ids, _width(kwargs), self.config.pad_token_id) for cohort in self.cohorts])
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=1, **kwargs)
        outputs = self.model(**inputs, return_dict=True)
        kwargs = self.model._update_model_kwargs_for_generation(outputs, kwargs)
        self.where = [(kwargs, row) for _, row in self.where]
        logits = outputs.logits[:, -1].split([len(cohort.rows) for cohort in self.cohorts])
        for cohort, own in zip(self.cohorts, logits, strict=True):
            self._choose(cohort, own)

    def _choose(self, cohort: _Cohort, logits: Tensor) -> None:
        scores = cohort.processors(cohort.ids, logits.to(copy=True, dtype=torch.float32))
        tokens = draw(scores.softmax(-1)) if self.config.do_sample else scores.argmax(-1)
        if self.terminates:
            tokens = tokens.masked_fill(cohort.ended, self.config.pad_token_id)
        cohort.ids = torch.cat([cohort.ids, tokens[:, None]], 1)
        cohort.ended = cohort.ended | self.criteria(cohort.ids, None)

    def _join(self) -> None:
        """Bring all rows into one cache, in no more columns than they use, with room for more."""
        parts: list[tuple[dict[str, Any], list[int]]] = []
        for kwargs, row in self.where:
            if not parts or parts[-1][0] is not kwargs:
                parts.append((kwargs, []))
            parts[-1][1].append(row)
        caches = [kwargs["past_key_values"].layers for kwargs, _ in parts]
        width = max(_used(kwargs, rows, _width(kwargs)) for kwargs, rows in parts)
        more = self.config.max_length - min(cohort.ids.shape[1] for cohort in self.cohorts)
        index = [torch.tensor(rows, device=self.input_ids.device) for _, rows in parts]
        kwargs = _joined(parts, width)
        kwargs["past_key_values"] = cache = copy.copy(kwargs["past_key_values"])
        cache.layers = []
        for layers in zip(*caches, strict=True):
            cache.layers.append(with_room(list(zip(layers, index, strict=True)), width - 1, more))
            for layer, (source, _) in zip(layers, parts, strict=True):
                if not isinstance(layer, Room) and not any(source is other for other, *_ in self.prompts.values()):
                    layer.reset()  # no row will come for it any more
        self.where, self.moved = [(kwargs, row) for row in range(len(self.where))], False

    def _leave(self) -> bool:
        """Let ended rows go, if they are many; whether to go on with `_admit` and not `_step`."""
        flags = [cohort.ended.tolist() for cohort in self.cohorts]
        ended = [flag for own in flags for flag in own]
        # Leaving copies the cache, about as much as the model does in a step: too much for one row of many. A cohort
        # that has ended as a whole must not get longer.
        if not (self.terminates and 4 * sum(ended) >= len(ended)) and not any(map(all, flags)):
            return False
        for cohort in self.cohorts:
            self.finished.update(zip(cohort.rows, cohort.ids, strict=True))  # of rows that stay, replaced later
            cohort.leave()
        self.cohorts = [cohort for cohort in self.cohorts if cohort.rows]
        self.where, self.moved = [place for place, over in zip(self.where, ended, strict=True) if not over], True
        return not self.where or (bool(self.waiting) and 4 * (self.places - len(self.where)) >= self.places)


def draw(probabilities: Tensor) -> Tensor:
    """(n,) one column of each row of (n, V), drawn with these probabilities.

    `torch.multinomial` draws an exponential variate for every column, on a CPU a noticeable part of a small model's
    step. There one uniform variate is drawn for each row, and looked up in the sums of the probabilities.
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64) if probabilities.device.type == "cpu" else None
    if sums is None or not bool(sums[:, -1].isfinite().all()):  # it refuses what is no number
        return torch.multinomial(probabilities, num_samples=1)[:, 0]
    points = torch.rand(len(sums), 1, dtype=torch.float64) * sums[:, -1:]
    # The first column whose sum is above the point, so that none without probability is drawn.
    return torch.searchsorted(sums, points, right=True)[:, 0].clamp(max=sums.shape[1] - 1)


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
    return type(cache) is DynamicCache and not cache.offloading and layers <= LAYERS.keys()


def _width(kwargs: dict[str, Any]) -> int:
    """Columns of the cache, and the one of the token that is not in it yet."""
    return 1 + max(int(layer.get_seq_length()) for layer in kwargs["past_key_values"].layers)


def _used(kwargs: dict[str, Any], rows: list[int], width: int) -> int:
    """How many of the last columns have anything that these rows attend to."""
    mask = kwargs.get("attention_mask")
    if mask is None or kwargs.get("position_ids") is None:  # the columns may be the positions
        return width
    return width - int(mask[rows].any(0).int().argmax())


def _joined(parts: list[tuple[dict[str, Any], list[int]]], width: int) -> dict[str, Any]:
    """Arguments for these rows of all parts, in `width` columns; the cache is still the first one's."""
    joined = dict(parts[0][0])
    for name in _BY_ROW:
        if joined.get(name) is not None:
            joined[name] = torch.cat([_fit(kwargs[name][rows], width) for kwargs, rows in parts])
    return joined


def _fit(columns: Tensor, width: int, pad: int = 0) -> Tensor:
    """The last `width` columns, padded on the left if there are not so many."""
    return nn.functional.pad(columns, (width - columns.shape[1], 0), value=pad)


def _of_rows(processors: Any, rows: Tensor) -> Any:
    """The processors, with what they know of each row for these rows only."""
    chosen = hf.LogitsProcessorList()
    for processor in processors:
        padding = getattr(processor, "prompt_ignore_length", None)
        if isinstance(padding, Tensor):
            processor = copy.copy(processor)
            processor.prompt_ignore_length = padding[rows.to(padding.device)]
        chosen.append(processor)
    return chosen
