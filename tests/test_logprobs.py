"""Log-probabilities of flat rows equal those of one plain forward per row, for models of every kind."""

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from trl_core.models.layout import PADDED, lay_out
from trl_core.models.logprobs import batched_token_logps, token_logps
from trl_core.testing import tiny_model

from .helpers_online import make_rows, plain_logps

VOCABULARY = 120


def gpt2():
    """Learned positions: a token that is shifted by padding would be scored elsewhere."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    )


def gemma():
    """Changes its logits after the head."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=32,
            final_logit_softcapping=0.5,
            initializer_range=0.5,
            attn_implementation="eager",
        )
    )


class OwnHead(nn.Module):
    """A language model whose logits come from no module: `head` says what it calls its output embeddings."""

    def __init__(self, head=None, forbidden=()):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.mix = nn.GRU(16, 16, batch_first=True)
        self.forbidden = list(forbidden)
        self.head = head

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        hidden, _ = self.mix(self.embed(input_ids))
        if self.head is None:
            logits = 3 * hidden @ self.embed.weight.T
        else:  # sees rows and positions as one dimension
            logits = self.head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        logits[..., self.forbidden] = float("-inf")
        return CausalLMOutput(logits=logits)


class Wrapped(nn.Module):
    """As a wrapper for distributed training."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


MODELS = {
    "llama": lambda: tiny_model(vocab_size=VOCABULARY),
    "gpt2": gpt2,
    "gemma": gemma,
    "no_head_module": OwnHead,
    "flattening_head": lambda: OwnHead(nn.Linear(16, VOCABULARY)),
    "wrapped": lambda: Wrapped(gpt2()),
}
PROMPTS = [[5, 6], [7], [8, 9, 10, 11]]
COMPLETIONS = [[20, 21, 22], [30, 2], [2, 41, 42, 43]]


def make(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]().eval()


def rows_of(prompts=PROMPTS, completions=COMPLETIONS, **fields):
    return make_rows(
        [len(row) for row in completions],
        prompt_ids=torch.tensor([token for row in prompts for token in row]),
        prompt_lengths=torch.tensor([len(row) for row in prompts]),
        completion_ids=torch.tensor([token for row in completions for token in row]),
        **fields,
    )


def expected(model, temperature=1.0):
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    return [value for pair in pairs for value in plain_logps(model, *pair, temperature)]


def scored(model, rows, **options):
    """Log-probabilities, entropies and output."""
    scores = token_logps(model, rows, statistics=("entropy",), **options)
    return scores.logps, scores.statistics["entropy"], scores.output


# -- log-probabilities ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_logps_equal_one_forward_per_row(name):
    model = make(name)
    # The pad token 2 is also a sampled token.
    logps, _, _ = scored(model, rows_of(), pad_token_id=2)
    assert logps.dtype is torch.float32
    assert logps.tolist() == pytest.approx(expected(model), abs=1e-5)
    assert logps.std() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_logps_are_of_the_scaled_logits(name):
    model = make(name)
    logps, _, _ = scored(model, rows_of(), pad_token_id=2, temperature=0.5)
    assert logps.tolist() == pytest.approx(expected(model, 0.5), abs=1e-5)


def test_soft_capping_of_the_test_model_acts():
    model = make("gemma")
    capped = expected(model)
    model.config.final_logit_softcapping = None
    assert max(abs(a - b) for a, b in zip(capped, expected(model), strict=True)) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name):
    model, rows = make(name), rows_of()
    together, entropy, _ = scored(model, rows, pad_token_id=2)
    for i, (logps, entropies) in enumerate(zip(together.split([3, 2, 4]), entropy.split([3, 2, 4]), strict=True)):
        alone, its_entropy, _ = scored(model, rows.take([i]), pad_token_id=77)
        torch.testing.assert_close(alone, logps, rtol=0, atol=1e-5)
        torch.testing.assert_close(its_entropy, entropies, rtol=0, atol=1e-5)


def test_tokens_out_of_the_loss_are_seen_but_not_scored():
    model = make("llama")
    mask = torch.tensor([True, False, True, False, False, True, True, True, True])
    logps, entropy, _ = scored(model, rows_of(loss_mask=mask), pad_token_id=2)
    wanted = [value for value, flag in zip(expected(model), mask.tolist(), strict=True) if flag]
    assert logps.tolist() == pytest.approx(wanted, abs=1e-5)
    assert entropy.shape == (6,)


def test_rows_without_any_loss_token_have_no_logps():
    logps, entropy, _ = scored(make("llama"), rows_of(loss_mask=torch.zeros(9, dtype=torch.bool)), pad_token_id=2)
    assert logps.shape == entropy.shape == (0,)


@pytest.mark.parametrize(
    ("name", "listened", "positions"),
    [
        # Formed outside of the model: 3 rows of no position.
        ("llama", False, (3, 0)),
        ("wrapped", False, (3, 0)),
        ("gemma", False, (3, 0)),
        ("llama", True, (1, 9)),
        # 3 rows of at most 8 tokens where the head cannot be reached.
        ("no_head_module", False, (3, 8)),
        ("flattening_head", False, (3, 8)),
    ],
)
def test_model_computes_its_head_at_loss_tokens_only(name, listened, positions):
    model = make(name)
    if listened:
        model.lm_head.register_forward_hook(lambda *_: None)
    _, _, output = scored(model, rows_of(), pad_token_id=2)
    assert output.logits.shape == (*positions, VOCABULARY)


def test_head_is_left_as_it_was():
    model = make("llama")
    ids = torch.tensor([[5, 6, 7]])
    scored(model, rows_of(), pad_token_id=2)
    assert model(ids).logits.shape == (1, 3, VOCABULARY)
    with pytest.raises(IndexError):
        scored(model, rows_of(completions=[[20], [VOCABULARY + 1], [21]]), pad_token_id=2)
    assert model(ids).logits.shape == (1, 3, VOCABULARY)


def test_weights_in_bfloat16_give_float32():
    logps, entropy, _ = scored(make("llama").bfloat16(), rows_of(), pad_token_id=2)
    assert logps.dtype is entropy.dtype is torch.float32


def test_padded_layout_puts_prompt_and_completion_first():
    layout = lay_out(rows_of(), PADDED, pad_token_id=2)
    row, position = layout.predicting
    ids = [[5, 6, 20, 21, 22, 2, 2, 2], [7, 30, 2, 2, 2, 2, 2, 2], [8, 9, 10, 11, 2, 41, 42, 43]]
    assert layout.inputs["input_ids"].tolist() == ids
    assert layout.inputs["attention_mask"].sum(1).tolist() == [5, 3, 8]
    assert row.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert position.tolist() == [1, 2, 3, 0, 1, 3, 4, 5, 6]
    assert [x.tolist() for x in layout.last] == [[0, 1, 2], [4, 2, 7]]


# -- gradients and entropies ------------------------------------------------------------------------------------------
def all_logits(model, temperature=1.0):
    """(9, V) at the places that predict the completions, row by row."""
    parts = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        parts.append(logits[len(prompt) - 1 : -1] / temperature)
    return torch.cat(parts)


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "no_head_module"])
def test_gradient_equals_that_of_one_forward_per_row(name):
    model, weights = make(name), torch.linspace(-1, 1, 9)
    ours = gradient(model, (scored(model, rows_of(), pad_token_id=2)[0] * weights).sum())
    chosen = all_logits(model).log_softmax(-1).gather(1, rows_of().completion_ids[:, None]).squeeze(1)
    plain = gradient(model, (chosen * weights).sum())
    assert (ours - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_is_that_of_the_scaled_distribution(temperature):
    model = make("llama")
    _, entropy, _ = scored(model, rows_of(), pad_token_id=2, temperature=temperature)
    logs = all_logits(model, temperature).log_softmax(-1)
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(-1), rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad


def test_entropy_carries_gradient_if_asked_to():
    model, weights = make("llama"), torch.linspace(-1, 1, 9)
    _, entropy, _ = scored(model, rows_of(), pad_token_id=2, entropy_grad=True)
    ours = gradient(model, (entropy * weights).sum())
    logs = all_logits(model).log_softmax(-1)
    plain = gradient(model, (-(logs.exp() * logs).sum(-1) * weights).sum())
    assert (ours - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("with_gradient", [True, False])
def test_forbidden_tokens_do_not_spoil_the_entropy(with_gradient):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OwnHead(forbidden=range(60, VOCABULARY))
    logps, entropy, _ = scored(model, rows_of(), pad_token_id=2, entropy_grad=with_gradient)
    allowed = all_logits(model)[:, :60].log_softmax(-1)
    torch.testing.assert_close(entropy, -(allowed.exp() * allowed).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(logps).all()


def test_entropy_of_many_tokens_is_complete():
    model = tiny_model(vocab_size=VOCABULARY, max_position_embeddings=400)
    tokens = [[(7 * i + row) % 100 for i in range(300)] for row in range(2)]
    rows = rows_of([[5], [6]], tokens)
    with torch.no_grad():
        _, entropy, _ = scored(model, rows, pad_token_id=2)
        logits = torch.cat(
            [model(torch.tensor([[p, *row]])).logits[0, :-1] for p, row in zip((5, 6), tokens, strict=True)]
        )
    logs = logits.log_softmax(-1)
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(-1), rtol=1e-4, atol=1e-4)


# -- in batches -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_give_the_same_logps_in_evaluation_mode(batch_size):
    model = tiny_model(vocab_size=VOCABULARY, attention_dropout=0.9).train()
    logps = batched_token_logps(model, rows_of(), batch_size=batch_size, pad_token_id=2, temperature=1.0)
    assert model.training
    assert not logps.requires_grad
    assert logps.tolist() == pytest.approx(expected(model), abs=1e-5)


def test_no_rows_have_no_logps():
    logps = batched_token_logps(make("llama"), rows_of().take([]), batch_size=4, pad_token_id=2, temperature=1.0)
    assert logps.shape == (0,)
