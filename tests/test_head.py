"""Scores straight from hidden states equal those of whole logits, in their gradients too, and take little memory."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from trl_core.models import head as head_module
from trl_core.models.head import STATISTICS, AfterHead, after_head, score_tokens
from trl_core.models.layout import Layouts, head_of
from trl_core.models.logprobs import STATES, token_logps
from trl_core.testing import tiny_model

from .test_layout import KV, MODELS, SMALL, VOCABULARY, make, rows_of

TOKENS = 15  # loss tokens of `rows_of()`


class Scaled(nn.Module):
    """A language model that scales its logits by a number of its own, then bends them."""

    def __init__(self, change=None):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.mix = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.past_head = False
        self.change = change or (lambda model, logits: 5 * torch.tanh(3.0 * logits / 5))

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        hidden = self.mix(self.embed(input_ids))[0]
        logits = nn.functional.linear(hidden, self.head.weight) if self.past_head else self.head(hidden)
        return CausalLMOutput(logits=self.change(self, logits))


FOUND = {
    "llama": (MODELS["llama"], AfterHead()),
    "tied": (lambda: tiny_model(vocab_size=VOCABULARY, tie_word_embeddings=True), AfterHead()),
    "gpt2": (MODELS["gpt2"], AfterHead()),
    "opt": (MODELS["opt"], AfterHead()),
    "mixtral": (lambda: MODELS["mixtral"](experts_implementation="eager"), AfterHead()),
    "bias": (lambda: PhiForCausalLM(PhiConfig(**SMALL)), AfterHead()),
    "gemma2": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**KV, head_dim=8, final_logit_softcapping=0.5)),
        AfterHead(1.0, 0.5),
    ),
    "gemma3": (
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**KV, head_dim=8, final_logit_softcapping=30.0)),
        AfterHead(1.0, 30.0),
    ),
    "cohere": (lambda: CohereForCausalLM(CohereConfig(**KV, logit_scale=0.0625)), AfterHead(0.0625)),
    "granite": (lambda: GraniteForCausalLM(GraniteConfig(**KV, logits_scaling=13.0)), AfterHead(1 / 13)),
    "scaled and bent": (Scaled, AfterHead(3.0, 5.0)),
}


def plus_one(model, logits):
    return logits + nn.functional.one_hot(torch.tensor(7), VOCABULARY)


def without(tokens):
    def change(model, logits):
        return logits.index_fill(-1, torch.tensor(tokens), float("-inf"))

    return change


NOT_FOUND = {
    "a trained scale": lambda model, logits: logits * model.scale,
    "a bias": plus_one,
    "a forbidden token": without([5]),
    "another curve": lambda model, logits: logits / (1 + logits.abs()),
    "lower precision": lambda model, logits: logits.bfloat16(),
    "a smaller vocabulary": lambda model, logits: logits[..., :-1],
    "no tokens": lambda model, logits: logits[:, -1:].clone(),
    "a quick end": lambda model, logits: logits * (1 if logits.shape[1] else 1 / 0),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of four tokens, blocks of two."""
    monkeypatch.setattr(head_module, "_LEAST_TOKENS", 1)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 4 * 4 * VOCABULARY)
    monkeypatch.setattr(head_module, "BLOCK_BYTES", 2 * 4 * VOCABULARY)


def whole(model):
    """The same model, whose logits are formed by itself, because someone listens to its head."""
    model = copy.deepcopy(model)
    head_of(model).register_forward_hook(lambda *_: None)
    return model


def found(model):
    return after_head(model, head_of(model))


def weights(seed=1):
    return torch.randn(3, TOKENS, generator=torch.Generator().manual_seed(seed))


def scored(model, *, temperature=0.7, entropy_grad=True, rows=None, **options):
    """All scores, and the gradient of a sum in which each differentiable one has weights of its own."""
    scores = token_logps(
        model,
        rows_of() if rows is None else rows,
        pad_token_id=2,
        temperature=temperature,
        statistics=STATISTICS,
        entropy_grad=entropy_grad,
        **options,
    )
    values = {"logp": scores.logps, **scores.statistics}
    chosen = [values[name] for name in ("logp", "mean_logp", *(["entropy"] if entropy_grad else []))]
    model.zero_grad()
    sum((value * w).sum() for value, w in zip(chosen, weights(), strict=False)).backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in values.items()}, gradient


def plain(model, temperature=0.7):
    """The same in double precision, one forward per row, without any of the core's code."""
    model, rows, parts = copy.deepcopy(model).double(), rows_of(), []
    prompts = rows.prompt_ids.split(rows.prompt_lengths.tolist())
    completions = rows.completion_ids.split(rows.completion_lengths.tolist())
    for prompt, completion in zip(prompts, completions, strict=True):
        parts.append(model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1])
    logits = torch.cat(parts)[rows.loss_mask] / temperature
    targets = rows.completion_ids[rows.loss_mask]
    logs = logits.log_softmax(-1)
    values = {
        "logp": logs.gather(1, targets[:, None]).squeeze(1),
        "entropy": -(logs.exp() * logs).sum(-1),
        "accuracy": (logits.argmax(-1) == targets).double(),
        "mean_logit": logits.mean(-1),
        "mean_logp": logs.mean(-1),
        "log_collision": (2 * logs).logsumexp(-1),
    }
    chosen = (values[name] for name in ("logp", "mean_logp", "entropy"))
    sum((value * w).sum() for value, w in zip(chosen, weights(), strict=True)).backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in values.items()}, gradient


def assert_near(ours, theirs, tolerance):
    for name, value in theirs[0].items():
        torch.testing.assert_close(ours[0][name].double(), value.double(), rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(value.double().norm() for value in theirs[1].values())
    for name, value in theirs[1].items():
        assert (ours[1][name].double() - value.double()).norm() < tolerance * largest, name


# -- what a model does after its head ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FOUND)
def test_what_follows_the_head_is_found(name):
    build, expected = FOUND[name]
    model = make(build).train()
    before = torch.get_rng_state()
    result = found(model)
    assert result.scale == pytest.approx(expected.scale, rel=1e-6)
    assert result.cap == (expected.cap and pytest.approx(expected.cap, rel=1e-6))
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert not head_of(model)._forward_hooks and not head_of(model)._forward_pre_hooks


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_is_not_known_leaves_the_logits_to_the_model(name):
    model = make(lambda: Scaled(NOT_FOUND[name]))
    assert found(model) is None
    if name in ("a trained scale", "a bias", "another curve"):
        assert_near(scored(model), plain(model), 1e-5)


def test_small_logits_do_not_hide_a_cap():
    # Of a new model the logits are so small that a cap would not be seen in them.
    model = make(lambda: Gemma2ForCausalLM(Gemma2Config(**{**KV, "initializer_range": 1e-3}, head_dim=8)))
    assert found(model) == AfterHead(1.0, 30.0)


def test_it_is_tried_once_per_model():
    model, calls = make(MODELS["llama"]), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    Layouts(model).choose(rows_of())
    before = len(calls)
    assert found(model) == found(model) == AfterHead()
    assert len(calls) == before


@pytest.mark.parametrize("listen", ["register_forward_hook", "register_forward_pre_hook"])
def test_who_listens_to_the_head_hears_every_loss_token(listen):
    model, seen = make(MODELS["llama"]), []
    handle = getattr(head_of(model), listen)(lambda module, args, *_: seen.append(args[0].shape))
    token_logps(model, rows_of(), pad_token_id=2)
    handle.remove()
    token_logps(model, rows_of(), pad_token_id=2)
    assert len(seen) == 1
    assert found(model) is not None


@pytest.mark.parametrize("spoil", ["class", "forward", "tensor", "shard"])
def test_heads_that_are_not_plain_are_left_alone(spoil):
    class Other(nn.Linear):
        pass

    model = make(MODELS["llama"])
    head = head_of(model)
    if spoil == "class":
        head.__class__ = Other
    elif spoil == "forward":
        head.forward = lambda hidden: nn.Linear.forward(head, hidden)
    elif spoil == "tensor":
        weight = head.weight.detach().clone()
        del head.weight
        head.weight = weight
    else:
        head.weight.ds_id = 0
    assert found(model) is None
    assert token_logps(model, rows_of(), pad_token_id=2).output.logits.shape == (1, TOKENS, VOCABULARY)


def test_logits_that_came_past_the_head_after_all_are_taken_as_they_are():
    model = make(Scaled)
    expected = plain(model)
    assert found(model) is not None
    model.past_head = True
    assert_near(scored(model), expected, 1e-5)


# -- the same numbers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FOUND)
def test_scores_and_gradients_are_those_of_double_precision(name, small_chunks):
    model = make(FOUND[name][0])
    ours = scored(model)
    assert_near(ours, plain(model), 3e-6)
    assert_near(ours, scored(whole(model)), 3e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bias"])
def test_how_many_tokens_go_at_a_time_changes_nothing(name, monkeypatch):
    model = make(FOUND[name][0])
    expected = scored(model)
    monkeypatch.setattr(head_module, "_LEAST_TOKENS", 1)
    for chunk in (1, 4, TOKENS - 1, TOKENS, TOKENS + 1):
        for block in (1, 3, TOKENS):
            monkeypatch.setattr(head_module, "CHUNK_BYTES", chunk * 4 * VOCABULARY)
            monkeypatch.setattr(head_module, "BLOCK_BYTES", block * 4 * VOCABULARY)
            assert_near(scored(model), expected, 1e-6)


CASES = {
    "plain": {},
    "cap": {"after": AfterHead(1.5, 0.8), "temperature": 0.7},
    "scale": {"after": AfterHead(0.3), "temperature": 1.3},
    "bias": {"bias": True, "temperature": 1.3},
    "logits": {"logits": True, "temperature": 0.7},
}


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name, entropy_grad, small_chunks):
    options = dict(CASES[name])
    given, targets = torch.randn(7, 3, dtype=torch.float64), torch.randint(0, VOCABULARY, (7,))
    head = nn.Linear(3, VOCABULARY, bias=options.pop("bias", False)).double()
    if options.pop("logits", False):
        given, head = torch.randn(7, VOCABULARY, dtype=torch.float64), None
    names = ("logp", "mean_logp", *(["entropy"] if entropy_grad else []))

    def values(given, *parameters):
        found = score_tokens(given, targets, STATISTICS, head=head, entropy_grad=entropy_grad, **options)
        assert {n for n, value in found.items() if value.requires_grad} == set(names)
        return tuple(found[n] for n in names)

    parameters = () if head is None else tuple(head.parameters())
    assert torch.autograd.gradcheck(values, (given.requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize("with_bias", [True, False])
def test_forbidden_tokens_do_no_harm(with_bias, small_chunks):
    logits, targets = torch.randn(9, VOCABULARY), torch.randint(0, 60, (9,))
    head = None
    if with_bias:  # of the head
        head, logits = nn.Linear(3, VOCABULARY), torch.randn(9, 3)
        head.bias.data[60:] = float("-inf")
    else:
        logits[:, 60:] = float("-inf")
    logits.requires_grad_()
    found = score_tokens(logits, targets, ("entropy", "log_collision", "accuracy"), head=head, entropy_grad=True)
    allowed = (logits if head is None else head(logits))[:, :60].log_softmax(-1)
    entropy = -(allowed.exp() * allowed).sum(-1)
    torch.testing.assert_close(found["entropy"], entropy)
    torch.testing.assert_close(found["log_collision"], (2 * allowed).logsumexp(-1))
    (ours,) = torch.autograd.grad((found["entropy"] * targets + found["logp"]).sum(), logits)
    chosen = allowed.gather(1, targets[:, None]).squeeze(1)
    (theirs,) = torch.autograd.grad((entropy * targets + chosen).sum(), logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_of_equal_logits_the_first_is_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 3.0], [3.0, 3.0, 0.0]])
    assert score_tokens(logits, torch.tensor([2, 0]), ("accuracy",))["accuracy"].tolist() == [0.0, 1.0]


def test_no_loss_tokens_give_empty_scores_and_a_gradient_of_zero():
    model, rows = make(MODELS["llama"]), rows_of()
    rows.loss_mask[:] = False
    token_logps(model, rows, pad_token_id=2).logps.sum().backward()
    assert {float(p.grad.abs().max()) for p in model.parameters()} == {0.0}


def test_hidden_states_are_given_out_with_gradient():
    results = []
    for model in (make(MODELS["llama"]), whole(make(MODELS["llama"]))):
        scores = token_logps(model, rows_of(), pad_token_id=2, statistics=(STATES,))
        loss = scores.states.square().sum() + scores.last_states.sum() + scores.logps.sum()
        gradients = torch.autograd.grad(loss, model.parameters())
        results.append((scores.states.detach(), scores.last_states.detach(), *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# -- beside other ways to train ---------------------------------------------------------------------------------------
def test_gradient_checkpointing(small_chunks):
    model = make(MODELS["llama"])
    expected = scored(model)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert_near(scored(model.train()), expected, 1e-6)


@pytest.mark.parametrize("chunked", [True, False])
def test_scoring_is_recomputed_where_it_is_checkpointed(chunked, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    model = make(MODELS["llama"])
    _, expected = scored(model, temperature=1.0, entropy_grad=False)
    model.zero_grad()
    token_logps(model, rows_of(), pad_token_id=2)

    def score(rows):
        scores = token_logps(model, rows, pad_token_id=2, statistics=("mean_logp",))
        return scores.logps, scores.statistics["mean_logp"]

    values = checkpoint(score, rows_of(), use_reentrant=False)
    sum((value * w).sum() for value, w in zip(values, weights(), strict=False)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunked", [True, False])
def test_gradient_may_be_asked_for_twice(chunked, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    model = make(MODELS["gemma3"])
    logps = token_logps(model, rows_of(), pad_token_id=2, temperature=0.7).logps
    first = torch.autograd.grad(logps.square().sum(), model.parameters(), retain_graph=True)
    second = torch.autograd.grad(logps.square().sum(), model.parameters())
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("on_head", [False, True])
def test_adapters(on_head, small_chunks):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", *(["lm_head"] if on_head else [])]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(make(MODELS["llama"]), config).eval()
    assert (found(model) is None) is on_head
    ours = scored(model)
    assert all("lora" in name for name in ours[1])
    if not on_head:
        assert_near(ours, scored(whole(model)), 3e-6)
    assert_near(ours, plain(model), 3e-6)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_multiplies_as_the_head_would(autocast, small_chunks):
    model = make(MODELS["llama"])
    model = model if autocast else model.bfloat16()
    forward = model.forward

    def lower(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return forward(*args, **kwargs)

    model.forward = lower  # as accelerate does; the scores are formed outside
    ours = scored(model)
    listener = head_of(model).register_forward_hook(lambda *_: None)
    theirs = scored(model)
    listener.remove()
    assert {value.dtype for value in ours[0].values()} == {torch.float32}
    assert {value.dtype for value in ours[1].values()} == {torch.float32 if autocast else torch.bfloat16}
    for name in ("logp", "entropy", "mean_logp"):  # the products are the very same
        torch.testing.assert_close(ours[0][name], theirs[0][name], rtol=1e-5, atol=1e-5)
    assert_near(ours, theirs, 2e-2)
    head = next(name for name in ours[1] if "lm_head" in name)
    assert (ours[1][head] - theirs[1][head]).norm() < 1e-2 * theirs[1][head].norm()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_gradients_of_all_weights_are_reduced_once(options, tmp_path):
    model = make(FOUND["tied"][0])
    _, expected = scored(model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, **options)

        def doubled(state, bucket):
            future = torch.futures.Future()
            future.set_result(bucket.buffer() * 2)
            return future

        wrapped.register_comm_hook(None, doubled)
        for _ in range(3):  # a weight without gradient would be noticed in the next step
            _, gradient = scored(wrapped)
            for name, value in gradient.items():
                torch.testing.assert_close(value, 2 * expected[name.removeprefix("module.")], rtol=1e-4, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


# -- memory -----------------------------------------------------------------------------------------------------------
class Largest(TorchDispatchMode):
    """Notes the numbers of the largest tensor over the vocabulary that is made, weights and their gradients apart."""

    def __init__(self, apart):
        super().__init__()
        self.apart, self.numbers = apart, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and VOCABULARY in value.shape and value.shape not in self.apart:
                self.numbers = max(self.numbers, value.numel())
        return result


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bias"])
def test_logits_of_all_tokens_never_exist(name, entropy_grad, monkeypatch):
    model = make(FOUND[name][0])
    rows = rows_of(sizes=((35, 25), (20, 20)))
    tokens, size = int(rows.loss_mask.sum()), 8 * VOCABULARY
    assert found(model)  # tried before
    monkeypatch.setattr(head_module, "_LEAST_TOKENS", 1)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 4 * size)
    monkeypatch.setattr(head_module, "BLOCK_BYTES", 2 * size)
    saved = []
    apart = {p.shape for p in model.parameters()} | {p.T.shape for p in model.parameters() if p.dim() == 2}
    source = torch.randn(tokens, head_of(model).in_features, requires_grad=True)
    options = {"head": head_of(model), "after": found(model), "entropy_grad": entropy_grad}
    with (
        Largest(apart) as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x),
    ):
        scores = score_tokens(source, rows.completion_ids[rows.loss_mask], STATISTICS, **options)
        (scores["logp"] + scores["entropy"] + scores["mean_logp"]).sum().backward()
    assert largest.numbers == size < tokens * VOCABULARY / 10
    weight = sum(p.numel() for p in head_of(model).parameters())
    assert sum(saved) <= weight + source.numel() + 3 * tokens + size

    with Largest(apart) as largest:
        scored_rows = token_logps(model, rows, pad_token_id=2, statistics=STATISTICS, entropy_grad=entropy_grad)
        (scored_rows.logps + scored_rows.statistics["entropy"]).sum().backward()
    with Largest(apart) as usual:
        token_logps(whole(model), rows, pad_token_id=2).logps.sum().backward()
    assert largest.numbers == size
    assert usual.numbers == tokens * VOCABULARY


def test_logits_are_formed_twice_only_where_they_were_not_kept(monkeypatch):
    made = []
    real = head_module._Chunks.fill
    monkeypatch.setattr(head_module._Chunks, "fill", lambda self, at: made.append(at.stop - at.start) or real(self, at))
    model = make(MODELS["llama"])
    scored(model)
    assert made == [TOKENS]
    made.clear()
    monkeypatch.setattr(head_module, "_LEAST_TOKENS", 1)
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 6 * 4 * VOCABULARY)
    scored(model)
    assert made == [3, 6, 6, 6, 3]


def test_logits_of_a_model_that_forms_them_itself_are_not_copied_whole():
    model = whole(make(MODELS["llama"]))
    zeros = []

    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = str(function)
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCABULARY,) and result.dim() == 3:
                zeros.extend([name] if "zero" in name or "select_backward" in name else [])
            return result

    with Zeros():
        token_logps(model, rows_of(), pad_token_id=2).logps.sum().backward()
    assert zeros == []
    assert math.isfinite(float(head_of(model).weight.grad.sum()))
