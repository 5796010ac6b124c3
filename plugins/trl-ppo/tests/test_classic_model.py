"""The model with a value head, the reference model, and sampling of the classic API."""

import copy
import json
import pickle
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from trl_core import errors
from trl_core.testing import tiny_model, tiny_tokenizer
from trl_ppo.classic import (
    AutoModelForCausalLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
    respond_to_batch,
)
from trl_ppo.classic.modeling import read_head

HEAD = ("v_head.summary.weight", "v_head.summary.bias")
IDS = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_head(model=None, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLMWithValueHead.from_pretrained(model or tiny_model().eval(), **options)


def gpt2(**options):
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def step(trainer):
    return trainer.step([IDS[0], IDS[1, :2]], [IDS[1], IDS[0, :3]], [torch.tensor(1.0), torch.tensor(-1.0)])


def trainer_of(model, ref_model=None, **options):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    config = PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=2, **options)
    return PPOTrainer(config, model, ref_model, tiny_tokenizer(), optimizer=optimizer)


# -- the head ----------------------------------------------------------------------------------------------------------
def test_forward_gives_logits_loss_and_values():
    base = tiny_model().eval()
    model = with_head(base)
    logits, loss, values = model(IDS, attention_mask=torch.ones_like(IDS), labels=IDS)
    plain = base(IDS, labels=IDS, output_hidden_states=True)
    assert torch.equal(logits, plain.logits) and torch.equal(loss, plain.loss)
    head = model.v_head.summary
    expected = (plain.hidden_states[-1] * head.weight[0]).sum(-1) + head.bias
    assert values.shape == IDS.shape and torch.allclose(values, expected, atol=1e-6)
    assert model(IDS)[1] is None


def test_the_head_sees_what_the_output_layer_sees():
    base = tiny_model().eval()
    seen = []
    base.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model = with_head(base)
    _, _, values = model(IDS)
    assert torch.allclose(values, model.v_head(seen[0]))


def test_half_precision_models_have_a_float32_head():
    model = with_head(tiny_model().to(torch.bfloat16).eval())
    logits, _, values = model(IDS)
    assert {p.dtype for p in model.v_head.parameters()} == {torch.float32}
    assert {p.dtype for p in model.pretrained_model.parameters()} == {torch.bfloat16}
    assert logits.dtype == values.dtype == torch.float32


def test_dropout_and_initialisation_of_the_head():
    assert with_head().v_head.dropout.p == 0.1
    assert with_head(summary_dropout_prob=0.3).v_head.dropout.p == 0.3
    configured = tiny_model()
    configured.config.summary_dropout_prob = 0.25
    assert with_head(configured, summary_dropout_prob=0.3).v_head.dropout.p == 0.25

    normal = with_head(tiny_model(hidden_size=1024), v_head_init_strategy="normal").v_head.summary
    assert float(normal.weight.detach().std()) == pytest.approx(0.2, rel=0.1)
    assert float(normal.bias.detach()) == 0
    narrow = with_head(tiny_model(hidden_size=1024), v_head_init_strategy="normal", v_head_initializer_range=0.01)
    assert float(narrow.v_head.summary.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert with_head().v_head.summary.bias.abs() > 0
    with pytest.raises(errors.ConfigError, match="xavier"):
        with_head(v_head_init_strategy="xavier")


def test_a_model_that_projects_its_hidden_states():
    config = OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8
    )
    _, _, values = with_head(OPTForCausalLM(config).eval())(IDS)
    assert values.shape == IDS.shape


def test_it_passes_on_what_the_language_model_has():
    model = with_head()
    assert model.config is model.pretrained_model.config
    assert model.generation_config is model.pretrained_model.generation_config
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), model.pretrained_model.generate(IDS, **options))
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


# -- saving and loading ------------------------------------------------------------------------------------------------
def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("tied", [False, True])
def test_the_state_dict_has_the_names_of_the_language_model(tied):
    model = with_head(tiny_model(tie_word_embeddings=tied))
    state = model.state_dict()
    assert set(state) == {*model.pretrained_model.state_dict(), *HEAD}
    other = with_head(tiny_model(1, tie_word_embeddings=tied))
    assert not same(model, other)
    other.load_state_dict(state)
    assert same(model, other)
    # Also inside another module, as wrappers of distributed training have it.
    nested = nn.ModuleDict({"module": with_head(tiny_model(2, tie_word_embeddings=tied))})
    assert set(nested.state_dict()) == {f"module.{name}" for name in state}
    nested.load_state_dict({f"module.{name}": value for name, value in state.items()})
    assert same(model, nested["module"])
    copied = copy.deepcopy(other)
    copied.load_state_dict(with_head(tiny_model(3)).state_dict())
    assert same(model, other) and not same(model, copied)


def test_a_state_dict_that_does_not_fit_is_refused():
    model = with_head()
    state = model.state_dict()
    state["surplus"] = state.pop("model.norm.weight")
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*"model.norm.weight".*Unexpected.*"surplus"'):
        model.load_state_dict(state)


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back(tmp_path, shards, tied):
    model = with_head(tiny_model(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path, **({"max_shard_size": "40KB"} if shards else {}))
    files = {path.name for path in tmp_path.iterdir()}
    assert ("model.safetensors.index.json" in files) == shards
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    torch.manual_seed(9)
    assert same(model, AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path))
    assert same(model, AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path)))


def test_the_saved_head_is_named_v_head(tmp_path):
    with_head().save_pretrained(tmp_path)
    assert set(HEAD) < set(load_file(tmp_path / "model.safetensors"))


def test_a_saved_model_loads_without_its_head(tmp_path):
    model = with_head()
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(plain) is type(model.pretrained_model)
    expected = model.pretrained_model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in plain.state_dict().items())


def test_a_plain_model_gets_a_new_head(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    torch.manual_seed(1)
    one = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    torch.manual_seed(2)
    two = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert not torch.equal(one.v_head.summary.weight, two.v_head.summary.weight)
    one.v_head.load_state_dict(two.v_head.state_dict())
    assert same(one, two)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_of_the_old_kind_is_read(tmp_path, sharded):
    model = with_head()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = model.state_dict()
    if sharded:
        parts = {"pytorch_model-00001-of-00002.bin": state.copy(), "pytorch_model-00002-of-00002.bin": {}}
        for name in ("lm_head.weight", *HEAD):
            parts["pytorch_model-00002-of-00002.bin"][name] = parts["pytorch_model-00001-of-00002.bin"].pop(name)
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        parts = {"pytorch_model.bin": state}
    for file, part in parts.items():
        torch.save(part, tmp_path / file)
    torch.manual_seed(9)
    assert same(model, AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path))


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("sprung"),))


def test_a_checkpoint_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({HEAD[0]: Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        read_head(str(tmp_path))
    assert not Path("sprung").exists()


def test_weights_are_float32_unless_asked_otherwise(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    for options, expected in (
        ({}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
    ):
        loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, **options)
        assert loaded.pretrained_model.dtype == expected
        assert loaded.v_head.summary.weight.dtype == torch.float32


def test_push_to_hub_uploads_what_is_saved(tmp_path, monkeypatch):
    sent = {}

    def upload(self, working_dir, repo_id, **_):
        sent[repo_id] = sent.get(repo_id, set()) | {path.name for path in Path(working_dir).iterdir()}

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

    class Card:
        def save(self, path):
            pass

    from transformers.utils import hub

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    with_head().push_to_hub("me/model")
    assert {"config.json", "model.safetensors"} <= sent["me/model"]
    trainer_of(with_head()).push_to_hub("me/run")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= sent["me/run"]


# -- adapters ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], lora_dropout=0.5)


def test_an_adapter_is_trained_against_the_model_without_it(lora):
    model = with_head(peft_config=lora)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n in dict(model.named_parameters()) if "lora_" in n or n.startswith("v_head.")}
    trainer = trainer_of(model)
    assert trainer.ref_model is None
    first, second = step(trainer), step(trainer)
    assert first["objective/kl"] == 0
    assert second["objective/kl"] != 0
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in base.items())
    # The same numbers as with the untouched base model as a reference.
    explicit = trainer_of(with_head(peft_config=lora), tiny_model())
    assert [step(explicit)["objective/kl"] for _ in range(2)] == pytest.approx([0, second["objective/kl"]], abs=1e-6)


def test_a_saved_adapter_comes_back_with_its_head(lora, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "base", peft_config=lora)
    trainer = trainer_of(model)
    step(trainer)
    trainer.save_pretrained(tmp_path / "adapter")
    assert "model.safetensors" not in {path.name for path in (tmp_path / "adapter").iterdir()}
    assert set(load_file(tmp_path / "adapter" / "v_head.safetensors")) == set(HEAD)
    torch.manual_seed(9)
    frozen = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter")
    assert same(model, frozen)
    assert not any(p.requires_grad for p in frozen.pretrained_model.parameters())
    trainable = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert same(model, trainable)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} == wanted


# -- gradient checkpointing --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
def test_gradient_checkpointing_changes_no_number(adapted, lora, monkeypatch):
    ends, forwards = [], []
    for checkpointing in (False, True):
        model = with_head(peft_config=lora if adapted else None)
        if checkpointing:
            model.gradient_checkpointing_enable()
        layer = model.get_decoder().layers[0].self_attn.q_proj
        calls = []
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        trainer = trainer_of(model)
        step(trainer)
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
        forwards.append(sum(calls))
        assert not model.training
    assert all(torch.allclose(value, ends[1][name], atol=1e-6) for name, value in ends[0].items())
    assert forwards[1] == 2 * forwards[0]  # it is computed again in the backward pass


# -- the reference -----------------------------------------------------------------------------------------------------
def test_the_reference_is_a_frozen_copy():
    model = with_head(tiny_model())  # in training mode
    reference = create_reference_model(model)
    assert same(model, reference)
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training
    assert all(p.requires_grad for p in model.parameters())
    places = {p.data_ptr() for p in model.parameters()}
    assert not places & {p.data_ptr() for p in reference.parameters()}


@pytest.mark.parametrize(
    ("make", "pattern", "frozen"),
    [
        (tiny_model, None, lambda name: "embed" in name or ".layers.0." in name),
        (
            tiny_model,
            "layers.{layer}.mlp",
            lambda name: "embed" in name or "layers.0." in name or "1.self_attn" in name,
        ),
        (gpt2, None, lambda name: "wte" in name or "wpe" in name or ".h.0." in name),
    ],
    ids=["llama", "pattern", "gpt2"],
)
def test_shared_layers_are_frozen_and_exist_once(make, pattern, frozen):
    model = with_head(make(initializer_range=0.05))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    reference = create_reference_model(model, num_shared_layers=1, pattern=pattern)
    shared = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert shared == {name for name in start if frozen(name)}
    references = dict(reference.named_parameters())
    assert {name for name, p in model.named_parameters() if p is references[name]} == shared
    assert not any(p.requires_grad for p in references.values())
    step(trainer_of(model, reference))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved and not moved & shared
    assert all(torch.equal(p, start[name]) for name, p in references.items())


def test_the_trainer_can_make_the_reference_with_shared_layers():
    model = with_head()
    config = PPOConfig(batch_size=2, mini_batch_size=2, learning_rate=1e-3)
    trainer = PPOTrainer(config, model, num_shared_layers=1)
    first = model.pretrained_model.model.layers[0].mlp.up_proj.weight
    assert trainer.ref_model.pretrained_model.model.layers[0].mlp.up_proj.weight is first
    before = first.detach().clone()
    step(trainer)
    assert torch.equal(first, before)


@pytest.mark.parametrize(("layers", "pattern"), [(2, None), (99, None), (-1, None), (1, "no.such.{layer}.")])
def test_a_block_that_does_not_exist_is_refused(layers, pattern):
    model = with_head()
    with pytest.raises(errors.ConfigError, match="belongs to a block") as caught:
        create_reference_model(model, layers, pattern)
    assert isinstance(caught.value, ValueError)
    assert all(p.requires_grad for p in model.parameters())


# -- drawing responses -------------------------------------------------------------------------------------------------
class Fixed(nn.Module):
    """The same distribution of five tokens at every place; knows what it was asked."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.tensor(probabilities).log()
        self.asked = []

    def forward(self, ids):
        self.asked.append((ids.clone(), self.training))
        return (self.logits.expand(*ids.shape, -1),)


def drawn(rows=2000, txt_len=1, **options):
    torch.manual_seed(0)
    model = Fixed([0.4, 0.3, 0.15, 0.1, 0.05])
    tokens = respond_to_batch(model, torch.zeros(rows, 3, dtype=torch.long), txt_len, **options)
    assert tokens.shape == (rows, txt_len)
    return tokens.unique(return_counts=True)[1] / tokens.numel()


def test_responses_are_drawn_from_the_distribution():
    assert drawn().tolist() == pytest.approx([0.4, 0.3, 0.15, 0.1, 0.05], abs=0.03)
    assert drawn(top_k=2).tolist() == pytest.approx([0.4 / 0.7, 0.3 / 0.7], abs=0.04)
    assert drawn(top_p=0.75).tolist() == pytest.approx([0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85], abs=0.04)


def test_responses_have_the_length_asked_for_whatever_ends_them():
    model = Fixed([0.0, 1.0, 0.0, 0.0, 0.0]).train()  # token 1 ends a text of the tiny tokenizer
    query = torch.tensor([[4, 3]])
    assert respond_to_batch(model, query).tolist() == [[1] * 20]
    assert model.training
    assert [(ids.tolist(), mode) for ids, mode in model.asked[:2]] == [([[4, 3]], False), ([[4, 3, 1]], False)]
    assert respond_to_batch(model, query, txt_len=3).shape == (1, 3)


def test_responses_follow_the_seed():
    model = with_head()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(respond_to_batch(model, IDS, txt_len=8).tolist())
    assert found[0] == found[1] != found[2]


def test_lengths_are_drawn_below_the_end():
    torch.manual_seed(0)
    sampler = LengthSampler(2, 5)
    lengths = [sampler() for _ in range(300)]
    assert set(lengths) == {2, 3, 4}
    assert statistics.mean(lengths) == pytest.approx(3, abs=0.2)


def queries():
    return [IDS[0], IDS[1, :2], IDS[0, 1:]]


def test_generating_a_list_is_generating_each():
    trainer = trainer_of(with_head())
    greedy = {"max_new_tokens": 6, "do_sample": False}
    alone = [trainer.generate(query, **greedy) for query in queries()]
    assert all(answer.shape[0] == 1 and answer.dim() == 2 for answer in alone)
    listed = trainer.generate(queries(), batch_size=2, **greedy)
    assert [answer.tolist() for answer in listed] == [answer[0].tolist() for answer in alone]
    cut = trainer.generate(queries(), batch_size=2, return_prompt=False, **greedy)
    assert [answer.tolist() for answer in cut] == [
        answer[len(query) :].tolist() for answer, query in zip(listed, queries(), strict=True)
    ]
    assert trainer.generate(IDS[0], return_prompt=False, **greedy)[0].tolist() == cut[0].tolist()


def test_responses_end_with_the_first_token_that_ends_them():
    trainer = trainer_of(with_head())
    greedy = {"max_new_tokens": 6, "do_sample": False, "return_prompt": False}
    free = trainer.generate(queries(), **greedy)
    ending = int(free[0][1])
    # The terminator in a query ends nothing.
    asked = [torch.cat([torch.tensor([ending]), query]) for query in queries()]
    for stop in ({"eos_token_id": ending}, {"eos_token_id": [ending, 260]}):
        answers = trainer.generate(asked, **{**greedy, "return_prompt": True}, **stop)
        for answer, query in zip(answers, asked, strict=True):
            response = answer[len(query) :].tolist()
            assert answer[: len(query)].tolist() == query.tolist()
            assert ending not in response[:-1] and (len(response) == 6 or response[-1] == ending)


def test_lengths_and_reference_in_generation():
    model, reference = with_head(), with_head(tiny_model(1).eval())
    trainer = trainer_of(model, reference)
    lengths = iter([2, 5])
    options = {"do_sample": False, "return_prompt": False, "batch_size": 2}
    answers = trainer.generate(queries(), lambda: next(lengths), **options)
    assert [len(answer) for answer in answers] == [2, 2, 5]
    ours, theirs = trainer.generate(queries(), generate_ref_response=True, max_new_tokens=4, **options)
    assert [a.tolist() for a in ours] == [a.tolist() for a in trainer.generate(queries(), max_new_tokens=4, **options)]
    expected = reference.generate(IDS[:1], do_sample=False, max_new_tokens=4)[0, 4:]
    assert theirs[0].tolist() == expected.tolist() != ours[0].tolist()


def test_the_adapter_is_off_when_the_reference_generates(lora):
    model = with_head(peft_config=lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=1.0)
    options = {"do_sample": False, "max_new_tokens": 6}
    ours, theirs = trainer_of(model).generate(IDS[0], generate_ref_response=True, **options)
    assert theirs.tolist() == tiny_model().eval().generate(IDS[:1], **options).tolist() != ours.tolist()


def test_a_query_of_two_dimensions_is_refused():
    trainer = trainer_of(with_head())
    for query in (IDS, [IDS]):
        with pytest.raises(ValueError, match="To mend"):
            trainer.generate(query, max_new_tokens=2)
