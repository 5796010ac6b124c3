"""Sampling with transformers: rows end at their first terminator, and padding changes nothing."""

import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
)

from trl_core import Prompts, Sampling
from trl_core.errors import ConfigError
from trl_core.stages import decoding, generation, room
from trl_core.stages.generation import cut, generate
from trl_core.testing import tiny_model, tiny_tokenizer

from .helpers_online import make_trainer

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
    "bloom": BloomConfig(n_embed=16, hidden_size=16, n_layer=2, n_head=2, tie_word_embeddings=False, **IDS),
    "gemma 3": Gemma3TextConfig(
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,
        **SMALL,
    ),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, tie_word_embeddings=False, **IDS),
    "llama": LlamaConfig(**SMALL),
    "mamba": MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **IDS),
    "mistral with a sliding window": MistralConfig(sliding_window=4, **SMALL),
    "mixture of experts with router logits": MixtralConfig(num_local_experts=2, output_router_logits=True, **SMALL),
    "qwen3": Qwen3Config(head_dim=8, **SMALL),
}

GROUPS = [[5, 6, 7, 8, 9, 10]] * 4 + [[11, 12]] * 3 + [[13, 14, 15]] * 2 + [[16]]


def prompts(*rows):
    return Prompts(ids=list(rows), raw=["?"] * len(rows), group=torch.arange(len(rows)))


def family(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name])
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)  # no near ties, and not the same token for ever
    return model


@pytest.fixture
def loop(monkeypatch):
    """What the project's own loop returned, call by call."""
    returned, decode = [], generation.decode

    def spy(*args, **kwargs):
        returned.append(decode(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(generation, "decode", spy)
    return returned


def plain(model, rows, sampling, tokenizer=None):
    """Completions of `model.generate` alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "decodes", lambda model: False)
        return generate(model, prompts(*rows), sampling, tokenizer).completion_ids


def greedy(**options):
    return Sampling(max_new_tokens=6, eos_token_ids=(1,), pad_token_id=2, extra={"do_sample": False}, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_batched_rows_equal_single_rows(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name])
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


# -- the own loop against `model.generate` -----------------------------------------------------------------------------
OPTIONS = {
    "nothing": {},
    "repetition penalty": {"repetition_penalty": 1.3},
    "bad words": {"bad_words_ids": [[token] for token in range(20, 120)] + [[150, 151]]},
    "least length": {"min_new_tokens": 5},
    "least length with the prompt": {"min_length": 10},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "suppressed tokens": {"suppress_tokens": list(range(60, 120))},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_completions_are_those_of_generate(name, options, loop):
    model = family(name)
    extra = {"do_sample": False, **OPTIONS[options]}
    for first in range(0, 260, 20):  # until a group ends in the middle, and another elsewhere
        ends = tuple(range(first, first + 20))
        sampling = Sampling(max_new_tokens=12, eos_token_ids=ends, pad_token_id=2, extra=extra)
        expected = plain(model, GROUPS, sampling)
        lengths = {len(row) for row in expected}
        if len(lengths) > 1 and lengths - {1, 12}:
            break
    else:
        raise AssertionError("the groups do not differ")
    # All rows together, or three at a time: one, seven and others below.
    for rows in (None, 3):
        sampling = dataclasses.replace(sampling, rows=rows)
        assert generate(model, prompts(*GROUPS), sampling).completion_ids == expected
    # Only where positions are given to the model can rows come later.
    assert [output is None for output in loop[:2]] == [name == "mamba", name in ("bloom", "mamba")]


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("name", ["gemma 3", "gpt2", "llama"])
def test_rows_that_waited_are_those_of_generate(name, rows, loop):
    model = family(name)
    extra = {"do_sample": False, "repetition_penalty": 1.3, "min_new_tokens": 4}
    batch = [row for row in GROUPS for _ in range(2)] + GROUPS[:1]  # and a group that is not in one place
    for first in range(0, 260, 10):
        sampling = Sampling(
            max_new_tokens=40, eos_token_ids=tuple(range(first, first + 10)), pad_token_id=2, extra=extra, rows=rows
        )
        expected = plain(model, batch, dataclasses.replace(sampling, rows=None))
        lengths = {len(row) for row in expected}
        if len(lengths) > 2 and max(lengths) > 20:
            break
    else:
        raise AssertionError("the groups do not differ")
    assert generate(model, prompts(*batch), sampling).completion_ids == expected
    assert loop[0] is not None


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("row", [0, 9])  # of four that end together and leave; one of ten, which stays and is padded
@pytest.mark.parametrize("ends", [(), (1,)])
def test_stop_strings_end_rows_as_they_do_in_generate(ends, row, rows, loop):
    model, tokenizer = family("llama"), tiny_tokenizer()
    free = plain(model, GROUPS, Sampling(max_new_tokens=12, pad_token_id=2, extra={"do_sample": False}))
    others = {token for other in free if other != free[row] for token in other}
    token = next(token for token in free[row][1:8] if token not in others and tokenizer.decode([token]).isalnum())
    extra = {"do_sample": False, "stop_strings": [tokenizer.decode([token])]}
    sampling = Sampling(max_new_tokens=12, eos_token_ids=ends, pad_token_id=2, extra=extra)
    expected = plain(model, GROUPS, sampling, tokenizer)
    sampling = dataclasses.replace(sampling, rows=rows)
    assert ends == () or len(expected[row]) < len(expected[4]) == 12
    assert generate(model, prompts(*GROUPS), sampling, tokenizer).completion_ids == expected
    assert loop[0] is not None


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mamba"])
def test_sampled_rows_see_the_distribution_of_their_own_history(name, rows, loop, monkeypatch):
    # Rows of a group end at different steps; whatever is moved about, each token has to come from the probabilities
    # that the model gives after this row's prompt and completion so far.
    model, draws, draw = family(name).eval(), [], decoding.draw

    def spy(probabilities):
        draws.append((probabilities, draw(probabilities)))
        return draws[-1][1]

    monkeypatch.setattr(decoding, "draw", spy)
    ends = tuple(range(60))
    sampling = Sampling(max_new_tokens=8, eos_token_ids=ends, pad_token_id=2, temperature=4.0, rows=rows)
    completions = generate(model, prompts(*GROUPS), sampling).completion_ids
    assert loop[-1] is not None
    assert len({len(row) for row in completions[:4]}) > 1
    assert len(draws[-1][0]) < (rows or len(GROUPS))  # some have left
    if rows:  # a row's first token is not drawn at the first draw
        draws = [tuple(torch.cat(column) for column in zip(*draws, strict=True))] * 8
    for prompt, completion in zip(GROUPS, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 4.0).softmax(-1)
        for (seen, drawn), own, token in zip(draws, expected, completion, strict=False):
            assert (((seen - own).abs().amax(1) < 1e-5) & (drawn == token)).any()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mamba"])
def test_room_for_keys_and_values_grows_with_the_completions(name, loop, monkeypatch):
    model, fills, fill = family(name), [], room.Room.fill
    monkeypatch.setattr(room.Room, "fill", lambda *args: fills.append(args[2]) or fill(*args))
    sampling = Sampling(max_new_tokens=50, pad_token_id=2, extra={"do_sample": False})
    assert generate(model, prompts(*GROUPS), sampling).completion_ids == plain(model, GROUPS, sampling)
    assert loop[0] is not None
    # Twice in 50 steps: the prompt's, and once more after some 30 columns.
    assert len(fills) == 2 * 2


@pytest.mark.parametrize("rows", [None, 100])
def test_pairs_of_tokens_follow_their_distribution(rows):
    # Chi-square over all completions of up to two tokens of a vocabulary of six, where two tokens end a completion.
    model = tiny_model(vocab_size=6, initializer_range=0.4).eval()
    with torch.no_grad():
        first = model(torch.tensor([[3, 4, 5]])).logits[0, -1].softmax(-1).double()
        second = model(torch.tensor([[3, 4, 5, token] for token in range(6)])).logits[:, -1].softmax(-1).double()
    expected = {(a,): float(first[a]) for a in (0, 1)}
    expected |= {(a, b): float(first[a] * second[a, b]) for a in range(2, 6) for b in range(6)}
    torch.manual_seed(0)
    sampling = Sampling(max_new_tokens=2, eos_token_ids=(0, 1), pad_token_id=0, rows=rows)
    drawn = [tuple(row) for row in generate(model, prompts(*[[3, 4, 5]] * 4000), sampling).completion_ids]
    often = [row for row, probability in expected.items() if 4000 * probability >= 5]
    assert len(often) >= 10
    pairs = [(drawn.count(row), 4000 * expected[row]) for row in often]
    pairs.append((4000 - sum(count for count, _ in pairs), 4000 - sum(mean for _, mean in pairs)))
    assert sum(count for count, _ in pairs) == len(drawn)
    freedom = len(often) - (pairs[-1][1] < 1e-6)
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3  # p = 0.001, Wilson-Hilferty
    assert sum((count - mean) ** 2 / mean for count, mean in pairs if mean > 1e-6) < bound


def positions(model, rows, sampling):
    """Completions, and the shapes of what went through the model."""
    shapes = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, ids, output: shapes.append(ids[0].shape))
    completions = generate(model, prompts(*rows), sampling).completion_ids
    hook.remove()
    return completions, shapes


def test_prompt_counts_once_for_its_group_and_ended_rows_not_at_all():
    torch.manual_seed(0)
    sampling = Sampling(max_new_tokens=20, eos_token_ids=tuple(range(40)), pad_token_id=2)
    completions, shapes = positions(tiny_model(), [list(range(5, 105))] * 4, sampling)
    assert len({len(row) for row in completions}) > 2
    # Of each row all tokens but its last went back into the model.
    assert sum(shape.numel() for shape in shapes) == 100 + sum(len(row) - 1 for row in completions)


@pytest.mark.parametrize("size", [3, 4])  # groups that fill the places, and groups of which some rows have to wait
def test_waiting_rows_take_the_places_of_ended_ones(size):
    torch.manual_seed(0)
    sampling = Sampling(max_new_tokens=150, eos_token_ids=tuple(range(6)), pad_token_id=2, rows=8)
    rows = [[7] * (20 + number) for number in range(12) for _ in range(size)]
    completions, shapes = positions(tiny_model(), rows, sampling)
    lengths = [len(row) for row in completions]
    assert max(lengths) > 100 > 10 > min(lengths)
    assert max(shape[0] for shape in shapes) == 8
    reads = [shape for shape in shapes if shape[1] > 1]
    assert sum(shape[0] for shape in reads) == 12  # each prompt once
    assert sum(shape.numel() for shape in reads) <= 1.1 * sum(len(rows[i]) for i in range(0, len(rows), size))
    steps = [shape[0] for shape in shapes if shape[1] == 1]
    needed = sum(length - 1 for length in lengths)
    assert needed <= sum(steps) < 1.2 * needed  # ended rows stay for a while
    one_after_the_other = sum(max(lengths[i : i + 8]) for i in range(0, len(rows), 8))
    assert len(steps) < 0.7 * one_after_the_other


def test_trainer_samples_no_more_rows_at_a_time_than_asked_for(tmp_path):
    model, shapes = tiny_model(), []
    trainer = make_trainer(tmp_path, trainer={"model": model}, max_steps=1, generation_rows=3)
    model.get_input_embeddings().register_forward_hook(lambda module, ids, output: shapes.append(ids[0].shape))
    trainer.train()
    # Four rows of one prompt: three at a time, then the last one; the prompt is read once.
    assert {shape[0] for shape in shapes if shape[1] == 1} <= {1, 2, 3}
    assert shapes.count((1, int(trainer.window.samples.prompt_lengths[0]))) == 1
    with pytest.raises(ConfigError, match="generation_rows=0"):
        make_trainer(tmp_path, generation_rows=0)


def test_equal_draws_where_no_prompt_is_shared_and_no_row_ends_early(loop, monkeypatch):
    # Given the way to draw, as on an accelerator; on a CPU another one is faster.
    monkeypatch.setattr(decoding, "draw", lambda probabilities: torch.multinomial(probabilities, 1)[:, 0])
    model = tiny_model()
    sampling = Sampling(max_new_tokens=6, pad_token_id=2, eos_token_ids=(1,), top_k=9, top_p=0.9, min_p=0.02)
    torch.manual_seed(3)
    expected = plain(model, [[5, 6], [7]], sampling)
    assert [len(row) for row in expected] == [6, 6]
    torch.manual_seed(3)
    assert generate(model, prompts([5, 6], [7]), sampling).completion_ids == expected
    assert loop[0] is not None


def test_columns_are_drawn_with_their_probabilities():
    torch.manual_seed(0)
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]).repeat(5000, 1)
    drawn = decoding.draw(probabilities).reshape(5000, 2)
    counts = drawn[:, 0].bincount(minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    expected = torch.tensor([2500.0, 1000.0, 1500.0])
    assert ((counts[[1, 3, 4]] - expected) ** 2 / expected).sum() < 13.8  # p = 0.001 with two degrees of freedom
    assert drawn[:, 1].unique().tolist() == [5]


def test_what_is_no_probability_is_refused():
    with pytest.raises(RuntimeError, match="nan"):
        decoding.draw(torch.tensor([[0.5, float("nan")]]))


UNKNOWN = {
    "beams": {"num_beams": 2},
    "no cache": {"use_cache": False},
    "preallocated cache": {"cache_implementation": "static"},
    "prompt in pieces": {"prefill_chunk_size": 2},
    "processor that counts rows": {"encoder_repetition_penalty": 1.5},
}


@pytest.mark.parametrize("options", UNKNOWN)
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_other_modes_are_left_to_generate(options, loop):
    model = tiny_model()
    sampling = Sampling(max_new_tokens=6, eos_token_ids=(1,), pad_token_id=2, extra=UNKNOWN[options])
    torch.manual_seed(0)
    expected = plain(model, GROUPS, sampling)
    torch.manual_seed(0)
    assert generate(model, prompts(*GROUPS), sampling).completion_ids == expected
    assert loop == [None]


def test_generate_of_the_models_own_class_is_used(loop):
    class Own(LlamaForCausalLM):
        def generate(self, input_ids, attention_mask, generation_config):
            assert len(input_ids) <= 2
            return torch.cat([input_ids, input_ids.new_full((len(input_ids), 2), 9)], 1)

    model = Own(LlamaConfig(**SMALL))
    assert generate(model, prompts([5, 6], [7]), greedy()).completion_ids == [[9, 9], [9, 9]]
    assert loop == []
    assert generate(model, prompts([5, 6], [7], [8]), greedy(rows=2)).completion_ids == [[9, 9]] * 3


def test_adapter_decodes_with_the_own_loop(loop):
    peft = pytest.importorskip("peft")
    model = family("llama")
    before = plain(model, GROUPS, greedy())
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    expected = plain(model, GROUPS, greedy())
    assert expected != before
    assert generate(model, prompts(*GROUPS), greedy()).completion_ids == expected
    assert loop[0] is not None
