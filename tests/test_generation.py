"""Sampling with transformers: rows end at their first terminator, and padding changes nothing."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
)

from trl_core import Prompts, Sampling
from trl_core.stages.generation import cut, generate
from trl_core.testing import tiny_model

IDS = {"vocab_size": 261, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SMALL = IDS | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **IDS),
    "mamba": MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **IDS),
    "mistral with a sliding window": MistralConfig(sliding_window=4, **SMALL),
    "mixture of experts with router logits": MixtralConfig(num_local_experts=2, output_router_logits=True, **SMALL),
    "qwen3": Qwen3Config(head_dim=8, **SMALL),
}


def prompts(*rows):
    return Prompts(ids=list(rows), raw=["?"] * len(rows), group=torch.arange(len(rows)))


def greedy(**options):
    return Sampling(max_new_tokens=6, eos_token_ids=(1,), pad_token_id=2, extra={"do_sample": False}, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_rows_equal_single_rows(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    rows = [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
    single = [generate(model, prompts(row), greedy()).completion_ids[0] for row in rows]
    assert generate(model, prompts(*rows), greedy()).completion_ids == single


def test_router_logits_are_switched_on_again_after_generation():
    model = AutoModelForCausalLM.from_config(FAMILIES["mixture of experts with router logits"])
    generate(model, prompts([5, 6]), greedy())
    assert model.config.output_router_logits is True


def test_mode_of_the_model_is_kept():
    model = tiny_model().train()
    generate(model, prompts([5, 6]), greedy())
    assert model.training


def test_no_rows_give_no_completions():
    assert generate(tiny_model(), prompts(), greedy()).completion_ids == []


def test_row_ends_with_its_first_terminator():
    rows = torch.tensor([[7, 1, 8, 1], [7, 8, 9, 4]])
    assert cut(rows, (1, 4), 2) == [[7, 1], [7, 8, 9, 4]]


def test_pad_that_is_the_terminator_counts_once():
    assert cut(torch.tensor([[7, 1, 1, 1]]), (1,), 1) == [[7, 1]]


def test_row_without_terminator_loses_only_padding():
    assert cut(torch.tensor([[7, 2, 8, 2, 2]]), (1,), 2) == [[7, 2, 8]]


def test_nothing_ends_a_row_where_no_terminator_is_given():
    torch.manual_seed(0)
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(200))  # nearly every token would end it
    endless = Sampling(max_new_tokens=5, pad_token_id=2)
    rows = generate(model, prompts([5, 6], [7]), endless).completion_ids
    assert [len(row) for row in rows] == [5, 5]
    assert model.generation_config.eos_token_id == list(range(200))
    assert cut(torch.tensor([[5, 1, 2, 2]]), (), 2) == [[5, 1, 2, 2]]  # the pad token too was sampled


def test_sampling_follows_the_distribution():
    # Chi-square over the four likeliest tokens of a known distribution, 2,000 draws.
    model = tiny_model(initializer_range=0.5)
    with torch.no_grad():
        probabilities = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    sampling = Sampling(max_new_tokens=1, eos_token_ids=(), pad_token_id=2)
    drawn = torch.tensor(generate(model, prompts(*[[5, 6]] * 2000), sampling).completion_ids).flatten()
    top = probabilities.topk(4).indices
    expected = torch.cat([probabilities[top], 1 - probabilities[top].sum().reshape(1)]) * 2000
    counts = torch.tensor([(drawn == token).sum() for token in top] + [(~torch.isin(drawn, top)).sum()])
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # p = 0.001 with four degrees of freedom
