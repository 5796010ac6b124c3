"""However rows are laid out, the model computes the same for them; only the number of tokens differs."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from trl_core.batch import TokenRows
from trl_core.models.layout import PACKED, PADDED, SHARED, Layouts, cheapest_lines, lay_out
from trl_core.models.logprobs import row_scores, token_logps
from trl_core.testing import tiny_model

VOCABULARY = 120
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
KV = {**SMALL, "num_key_value_heads": 1}

MODELS = {
    "llama": lambda **k: tiny_model(vocab_size=VOCABULARY, **k),
    "qwen2": lambda **k: Qwen2ForCausalLM(Qwen2Config(**KV, **k)),
    "qwen3": lambda **k: Qwen3ForCausalLM(Qwen3Config(**KV, head_dim=8, **k)),
    "mistral": lambda **k: MistralForCausalLM(MistralConfig(**KV, sliding_window=32, **k)),
    "gemma3": lambda **k: Gemma3ForCausalLM(
        Gemma3TextConfig(**KV, head_dim=8, sliding_window=32, layer_types=["sliding_attention", "full_attention"], **k)
    ),
    "gpt2": lambda **k: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, **k)
    ),
    "mixtral": lambda **k: MixtralForCausalLM(MixtralConfig(**KV, num_local_experts=4, num_experts_per_tok=2, **k)),
    "opt": lambda **k: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
            init_std=0.3,
            **k,
        )
    ),
}
OTHERS = {
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3)
    ),
    "lfm2, convolutions and attention": lambda: Lfm2ForCausalLM(
        Lfm2Config(**KV, layer_types=["conv", "full_attention"], pad_token_id=0)
    ),
    "qwen3 next, linear and full attention": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **KV,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=2,
            linear_num_key_heads=1,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.3)
    ),
}


def make(build, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(**options).eval()


def rows_of(prompts=((5, 6, 7, 8, 9), (10, 11, 12)), sizes=((4, 7), (2, 3))):
    """Two groups of two completions; the tokens out of the loss and the pad token 2 come in the middle."""
    ids = iter(range(20, VOCABULARY))
    completions = [[next(ids) for _ in range(size)] for group in sizes for size in group]
    completions[0][1] = 2
    masks = [[1] * len(row) for row in completions]
    masks[1][2] = 0
    return TokenRows.from_lists(
        [list(prompt) for prompt in prompts for _ in range(2)], completions, loss_mask=masks, group=[0, 0, 1, 1]
    )


def forwarded(model):
    """Counts the tokens that go through the model; the count is in the returned list."""
    counts = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: counts.append(args[0].numel()))
    return counts


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# -- what each layout holds -------------------------------------------------------------------------------------------
def test_shared_layout_holds_a_prompt_once_and_restarts_positions():
    layout = lay_out(rows_of(), SHARED, pad_token_id=0, hidden_size=1)
    # 5 + 4 + 7 tokens, and 3 + 2 + 3 of the other group in a line of their own.
    ids, positions = layout.inputs["input_ids"], layout.inputs["position_ids"]
    assert ids.shape == (2, 16)
    assert ids[0, :5].tolist() == [5, 6, 7, 8, 9]
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 9, 10, 11]
    mask = layout.inputs["attention_mask"][:, 0]
    # A token of the second branch sees the prompt and its own branch, not the first branch.
    assert mask[0, 10].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 9, 10]
    assert mask[1, 6].nonzero().flatten().tolist() == [0, 1, 2, 5, 6]
    assert layout.last[1].tolist() == [8, 15, 4, 7]


def test_padding_sees_nothing_of_the_rows():
    mask = lay_out(rows_of(), SHARED, pad_token_id=0, hidden_size=1).inputs["attention_mask"][1, 0]
    assert not mask[8:, :8].any()
    assert not mask[:8, 8:].any()
    assert mask.diagonal().all()


def test_packed_layout_puts_short_rows_beside_each_other():
    layout = lay_out(rows_of(), PACKED, pad_token_id=0, hidden_size=4)
    assert layout.inputs["input_ids"].shape == (3, 12)  # 12, 9, and 6 + 5 in one line
    assert set(layout.inputs) == {"input_ids", "position_ids"}


def test_lines_weigh_padding_against_attention():
    sizes = [230, 100, 118, 137, 155, 174, 211, 192]
    for hidden in (16, 576, 4096):
        lines = cheapest_lines(sizes, hidden)
        assert sorted(i for line in lines for i in line) == list(range(8))
    widest = [max(sum(sizes[i] for i in line) for line in cheapest_lines(sizes, hidden)) for hidden in (16, 576, 4096)]
    assert widest == sorted(widest)
    assert widest[0] < widest[2]
    lines = cheapest_lines(sizes, 576)
    assert len(lines) * widest[1] < 0.8 * 8 * 230  # padding to the longest row
    assert cheapest_lines([], 576) == []


def test_one_line_has_no_padding():
    layout = lay_out(rows_of(), PACKED, pad_token_id=0, one_line=True)
    assert layout.inputs["input_ids"].shape == (1, 12 + 9 + 6 + 5)


def test_lines_are_rounded_up_to_a_multiple():
    for kind in (PADDED, PACKED, SHARED):
        assert lay_out(rows_of(), kind, pad_token_id=0, multiple=8, hidden_size=1).inputs["input_ids"].shape[1] == 16


def test_rows_of_a_group_with_other_prompts_share_nothing():
    rows = TokenRows.from_lists([[5, 6], [5, 7]], [[8], [9]], group=[0, 0])
    assert lay_out(rows, SHARED, pad_token_id=0).inputs["input_ids"].numel() == 6


# -- what the model computes ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_gives_the_same_logps_and_gradient(name, attention):
    model, rows = make(MODELS[name], attn_implementation=attention), rows_of()
    weights = torch.linspace(-1, 1, int(rows.loss_mask.sum()))
    expected = token_logps(model, rows, pad_token_id=2).logps
    plain = gradient(model, (expected * weights).sum())
    float_mask = torch.float32 if attention == "eager" else None
    for kind in (PACKED, SHARED):
        if (name, kind) == ("opt", PACKED):
            continue  # makes no mask from positions; see the next test
        for one_line in (False, True):

            def layouts(rows, pad, kind=kind, one_line=one_line):
                return lay_out(rows, kind, pad_token_id=pad, one_line=one_line, float_mask=float_mask)

            logps = token_logps(model, rows, pad_token_id=2, layouts=layouts).logps
            torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-5)
            ours = gradient(model, (logps * weights).sum())
            assert (ours - plain).norm() < 1e-5 * plain.norm(), (kind, one_line)


@pytest.mark.parametrize("name", MODELS)
def test_shared_layout_is_found_exact_and_used(name):
    model = make(MODELS[name])
    assert Layouts(model).choose(rows_of()) == SHARED
    assert Layouts(model, share_prompts=False).choose(rows_of()) == (PADDED if name == "opt" else PACKED)


def test_a_model_that_makes_no_mask_from_positions_packs_by_a_mask_that_is_given():
    model = make(MODELS["opt"])
    rows = rows_of().take([0, 2, 3])
    rows.group = torch.arange(3)
    layouts = Layouts(model)
    assert layouts.choose(rows) == SHARED
    logps = token_logps(model, rows, pad_token_id=2, layouts=layouts).logps
    torch.testing.assert_close(logps, token_logps(model, rows, pad_token_id=2).logps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_fall_back_and_are_still_right(name):
    model, rows = make(OTHERS[name]).eval(), rows_of()
    layouts = Layouts(model)
    assert layouts.choose(rows) != SHARED
    logps = token_logps(model, rows, pad_token_id=2, layouts=layouts).logps
    torch.testing.assert_close(logps, token_logps(model, rows, pad_token_id=2).logps, rtol=1e-4, atol=1e-5)


def test_small_leak_between_rows_is_found():
    # Of a new model the logits are small, and so is what rows get from each other; training makes it large.
    model = make(OTHERS["bloom"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    assert Layouts(model).choose(rows_of()) == PADDED


def test_rounding_of_half_precision_is_no_leak():
    model = make(MODELS["llama"]).to(torch.bfloat16)
    assert Layouts(model).choose(rows_of()) == SHARED
    assert Layouts(model, share_prompts=False).choose(rows_of()) == PACKED


def test_rows_beyond_the_sliding_window_are_not_shared():
    model = make(MODELS["mistral"])
    layouts, long = Layouts(model), rows_of(prompts=(range(5, 35), (10, 11, 12)))
    assert layouts.choose(rows_of()) == SHARED
    assert layouts.choose(long) == PACKED
    logps = token_logps(model, long, pad_token_id=2, layouts=layouts).logps
    torch.testing.assert_close(logps, token_logps(model, long, pad_token_id=2).logps, rtol=1e-4, atol=1e-5)


def test_rows_do_not_share_the_noise_of_dropout():
    model = make(MODELS["llama"], attention_dropout=0.1).train()
    assert Layouts(model).choose(rows_of()) == PACKED
    assert Layouts(model.eval()).choose(rows_of()) == SHARED


def test_trying_leaves_the_random_state_and_the_mode_alone():
    model = make(MODELS["llama"], attention_dropout=0.1).train()
    before = torch.get_rng_state()
    Layouts(model).choose(rows_of())
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def test_tokens_through_the_model_are_those_of_the_shared_layout():
    model, rows = make(MODELS["llama"]), rows_of(sizes=((4, 7), (6, 7)))
    layouts = Layouts(model)
    layouts.choose(rows)
    counts = forwarded(model)
    token_logps(model, rows, pad_token_id=2, layouts=layouts)
    token_logps(model, rows, pad_token_id=2)
    assert counts == [2 * 16, 4 * 12]  # 5 + 4 + 7 and 3 + 6 + 7 tokens; four rows padded to 12


# -- scores of a classifier -------------------------------------------------------------------------------------------
def classifier(**options):
    config = tiny_model(vocab_size=VOCABULARY).config
    config.num_labels, config.pad_token_id = 1, 2
    return LlamaForSequenceClassification(config)


def test_scores_are_read_at_the_last_token_also_where_it_is_the_pad_token():
    model = make(classifier).eval()
    rows = TokenRows.from_lists([[5, 6, 7]] * 2, [[8, 9, 2], [10]], group=[0, 0])
    model.config.pad_token_id = None
    alone = [model(torch.tensor([[5, 6, 7, *ids]])).logits.item() for ids in ([8, 9, 2], [10])]
    model.config.pad_token_id = 2
    for layouts in (None, Layouts(model)):
        scores, _ = row_scores(model, rows, pad_token_id=2, layouts=layouts)
        assert scores.tolist() == pytest.approx(alone, abs=1e-5)
    assert Layouts(model).choose(rows) == SHARED
