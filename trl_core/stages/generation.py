"""Sampling completions with `transformers`."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

from ..batch import Generated, Prompts, Sampling
from ..errors import NonFiniteLossError
from .decoding import decode, decodes, sharded


@torch.no_grad()
def generate(model: Any, prompts: Prompts, sampling: Sampling, tokenizer: Any = None) -> Generated:
    """One completion per row with `model.generate`, in evaluation mode.

    Equal prompts run through the model once, and rows that have ended leave the batch to others that wait, where that
    is exact; see `decoding`. The result is that of `model.generate` alone.

    Args:
        model: the bare policy (a custom `generate` of its class is used).
        prompts: N rows.
        sampling: how to sample; `sampling.extra` may hold any option of `transformers.GenerationConfig`.
        tokenizer: needed for `stop_strings` only.
    """
    if not len(prompts):
        return Generated(completion_ids=[])
    device = next(model.parameters()).device
    ids = [torch.tensor(row, device=device) for row in prompts.ids]
    padded = pad_sequence(ids, batch_first=True, padding_value=sampling.pad_token_id, padding_side="left")
    lengths = torch.tensor([len(row) for row in prompts.ids], device=device)
    mask = (torch.arange(padded.shape[1], device=device)[None] >= padded.shape[1] - lengths[:, None]).long()
    options: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "eos_token_id": list(sampling.eos_token_ids) or None,
        "pad_token_id": sampling.pad_token_id,
        **sampling.extra,
    }
    training, model_config, own = model.training, model.config, getattr(model, "generation_config", None)
    router, ends = getattr(model_config, "output_router_logits", None), getattr(own, "eos_token_id", None)
    model.eval()
    try:
        if router:  # transformers forms a load-balancing loss then, also of single tokens, and fails
            model_config.output_router_logits = False
        if own is not None and not sampling.eos_token_ids:  # it would fill in what is None
            own.eos_token_id = None
        inputs = {"input_ids": padded, "attention_mask": mask}
        places = sampling.rows if sampling.eos_token_ids else None
        output = _generate(model, prompts.ids, inputs, options, tokenizer, places)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NonFiniteLossError(
            f"The policy gives no probabilities to sample from at temperature {sampling.temperature}: {error}.",
            mend="Lower the learning rate, if training made weights NaN or infinite; or raise the temperature.",
        ) from error
    finally:
        model.train(training)
        if router:
            model_config.output_router_logits = router
        if own is not None:
            own.eos_token_id = ends
    rows = output[:, padded.shape[1] :]
    return Generated(completion_ids=cut(rows, sampling.eos_token_ids, sampling.pad_token_id))


def _generate(
    model: Any,
    prompts: list[list[int]],
    inputs: dict[str, Tensor],
    options: dict[str, Any],
    tokenizer: Any,
    places: int | None,
) -> Tensor:
    """(N, L + new tokens) from `model.generate`, with the loop of `decoding` where it applies.

    Where it does not, batches of at most `places` rows follow one another.
    """
    stops = options.get("stop_strings")
    # `generate` loses the tokenizer where it is given a loop, so stop strings go in as a criterion. Those of the
    # model's own configuration would come on top.
    own = getattr(model, "generation_config", None)
    if decodes(model) and not getattr(own, "stop_strings", None) and (tokenizer is not None or not stops):
        numbers: dict[tuple[int, ...], int] = {}
        prompt_of = [numbers.setdefault(tuple(row), len(numbers)) for row in prompts]
        loop = partial(decode, prompt_of=prompt_of, places=places)
        config = GenerationConfig(**(options | {"stop_strings": None}))  # type: ignore[no-untyped-call]
        criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, stops)] if stops else [])
        output = model.generate(**inputs, generation_config=config, stopping_criteria=criteria, custom_generate=loop)
        if output is not None:
            return cast(Tensor, output)
    if places and places < len(prompts) and not sharded(model):
        rows: list[Tensor] = []
        for first in range(0, len(prompts), places):
            part = slice(first, first + places)
            some = {name: value[part] for name, value in inputs.items()}
            rows += _generate(model, prompts[part], some, options, tokenizer, None)
        return pad_sequence(rows, batch_first=True, padding_value=options["pad_token_id"])
    config = GenerationConfig(**options)  # type: ignore[no-untyped-call]
    kwargs = {"tokenizer": tokenizer} if stops else {}
    return cast(Tensor, model.generate(**inputs, generation_config=config, **kwargs))


def cut(rows: Tensor, eos_token_ids: tuple[int, ...], pad_token_id: int) -> list[list[int]]:
    """Each row up to and including its first terminator; without one, without trailing padding.

    Where nothing terminates, rows are what was sampled, whole.
    """
    if not eos_token_ids:
        return [list(row) for row in rows.tolist()]
    ends = torch.isin(rows, torch.tensor(eos_token_ids, device=rows.device, dtype=rows.dtype))
    completions = []
    for row, end in zip(rows.tolist(), ends.tolist(), strict=True):
        if True in end:
            row = row[: end.index(True) + 1]
        else:
            while row and row[-1] == pad_token_id:
                row.pop()
        completions.append(row)
    return completions
