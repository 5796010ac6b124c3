"""What the trainer of SFT does: which tokens it learns, with which weight, however rows are cut, packed and padded."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from trl_core import SFTConfig, SFTTrainer
from trl_core.errors import ConfigError, NonFiniteLossError
from trl_core.models.layout import PACKED, PADDED
from trl_core.testing import tiny_model

from .helpers_offline import (
    TOKENIZER,
    apart,
    chat,
    demonstrations,
    gradient,
    ids_of,
    lines,
    losses,
    make_trainer,
    row_logps,
    texts,
    tokens_through,
    trained,
    weights,
)
from .helpers_train import lora_config


def nll(rows, model=None):
    """Mean of `-logp` over all tokens of texts, one forward each."""
    model = model or tiny_model()
    with torch.no_grad():
        return -torch.cat([row_logps(model, ids_of(row["text"])) for row in rows]).mean().item()


def stepped(loss, model, rate=0.1):
    """All parameters after one step of gradient descent on a loss."""
    model.zero_grad()
    loss.backward()
    return torch.cat([(p.detach().double() - rate * p.grad.double()).flatten() for p in model.parameters()])


def trained_tokens(trainer):
    """The tokens of the training set that enter the loss, as text, by row."""
    rows = trainer.collate(list(trainer.train_dataset))
    kept = rows.completion_ids[rows.loss_mask].split(rows.lengths.tolist())
    return [trainer.processing_class.decode(ids) for ids in kept]


# -- the loss ---------------------------------------------------------------------------------------------------------
def test_loss_is_the_mean_over_all_tokens_the_end_included(tmp_path):
    trainer = trained(tmp_path, trainer={"train_dataset": texts(9, 3, 14, 6)})
    assert losses(trainer) == [pytest.approx(nll(texts(9, 3, 14, 6)), abs=1e-5)]


@pytest.mark.parametrize(("rows", "cuts"), [(1, 4), (2, 2)])
def test_cutting_a_step_into_micro_batches_changes_nothing(rows, cuts, tmp_path):
    ends = [
        trained(tmp_path, per_device_train_batch_size=b, gradient_accumulation_steps=a, max_steps=2)
        for b, a in ((4, 1), (rows, cuts))
    ]
    assert (weights(ends[0]) - weights(ends[1])).abs().max() < 1e-6
    assert losses(ends[0]) == pytest.approx(losses(ends[1]), abs=1e-5)
    assert apart(weights(ends[0]), weights(make_trainer(tmp_path))) > 1e-3


def test_last_incomplete_window_has_its_own_denominator(tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": -1}
    whole = trained(tmp_path, trainer={"train_dataset": texts(9, 3, 14, 6, 11)}, num_train_epochs=1, **options)
    first = trained(tmp_path, trainer={"train_dataset": texts(9, 3, 14, 6)})
    second = trained(tmp_path, trainer={"model": first.model, "train_dataset": texts(9, 3, 14, 6, 11).select([4])})
    assert whole.state.global_step == 2
    assert (weights(whole) - weights(second)).abs().max() < 1e-6


def test_dft_weights_each_tokens_gradient_with_its_probability(tmp_path):
    rows, model = texts(9, 3, 14, 6), tiny_model()
    logps = torch.cat([row_logps(model, ids_of(row["text"])) for row in rows])
    expected = stepped(-(logps.detach().exp() * logps).mean(), model)
    trainer = trained(tmp_path, trainer={"train_dataset": rows}, loss_type="dft")
    assert (weights(trainer) - expected).abs().max() < 1e-6
    assert losses(trainer)[0] == pytest.approx(-(logps.exp() * logps).mean().item(), abs=1e-5)


def test_label_smoothing_spreads_the_target_over_the_vocabulary(tmp_path):
    rows, model = texts(9, 3), tiny_model()
    found = []
    for row in rows:
        ids = ids_of(row["text"])
        logps = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        found.append(0.9 * logps.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0] + 0.1 * logps.mean(-1))
    loss = -torch.cat(found).mean()
    trainer = trained(tmp_path, trainer={"train_dataset": rows}, label_smoothing_factor=0.1)
    assert losses(trainer)[0] == pytest.approx(loss.item(), abs=1e-5)
    assert (weights(trainer) - stepped(loss, model)).abs().max() < 1e-6


def test_batch_without_loss_tokens_is_a_finite_zero(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}]
    trainer = make_trainer(tmp_path, trainer={"train_dataset": Dataset.from_list(rows)})
    batch = trainer.collate([{**row, "loss_mask": [0] * 3} for row in trainer.train_dataset])
    trainer.window[:], trainer.current_gradient_accumulation_steps = 0, 1
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0.0
    assert not any(p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


def test_pad_token_that_is_the_terminator_stays_in_the_loss(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER.save_pretrained(tmp_path / "tokenizer")[0].rpartition("/")[0])
    tokenizer.pad_token = tokenizer.eos_token
    ends = [
        trained(tmp_path, trainer={"processing_class": given}, pad_to_multiple_of=16)
        for given in (TOKENIZER, tokenizer)
    ]
    assert ends[1].pad_token_id == 1
    assert torch.equal(weights(ends[0]), weights(ends[1]))


# -- layouts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{"padding_free": True}, {"pad_to_multiple_of": 32}], ids=str)
def test_padding_changes_nothing(options, tmp_path):
    plain, other = trained(tmp_path, max_steps=2), trained(tmp_path, max_steps=2, **options)
    assert (weights(plain) - weights(other)).abs().max() < 1e-6
    assert losses(plain) == pytest.approx(losses(other), abs=1e-5)


def test_tokens_through_the_model_are_counted(tmp_path):
    for options, expected in (
        ({"padding_free": True}, 10 + 4 + 15 + 7),
        ({}, 2 * 19),  # 15 + 4 and 10 + 7
        ({"pad_to_multiple_of": 8}, 2 * 24),
    ):
        trainer = make_trainer(tmp_path, trainer={"train_dataset": texts(9, 3, 14, 6)}, **options)
        counts = tokens_through(trainer.model)
        trainer.train()
        assert counts[-1] == expected
        assert lines(trainer)[0]["num_tokens"] == 36


PACKING = {"packing": True, "max_length": 16}
SMALL = {"vocab_size": 261, "hidden_size": 16, "num_hidden_layers": 2}
UNPACKABLE = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SMALL, n_head=2)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)),
}


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_packed_documents_give_the_step_of_unpacked_ones(strategy, tmp_path):
    packed = make_trainer(tmp_path, packing_strategy=strategy, **PACKING, per_device_train_batch_size=8)
    assert len(packed.train_dataset) == 5  # of eight rows
    plain = trained(tmp_path, max_length=16, per_device_train_batch_size=8)
    packed.train()
    assert losses(packed) == pytest.approx(losses(plain), abs=1e-5)
    assert (weights(packed) - weights(plain)).abs().max() < 1e-6


def test_split_documents_are_documents_of_their_own(tmp_path):
    # 21 tokens with the end: 16 and 5; the first token of each piece is predicted from nothing.
    text = texts(20)[0]["text"]
    pieces = [{"input_ids": ids_of(text)[:16]}, {"input_ids": ids_of(text)[16:]}]
    split = trained(tmp_path, trainer={"train_dataset": texts(20)}, packing_strategy="bfd_split", **PACKING)
    plain = trained(tmp_path, trainer={"train_dataset": Dataset.from_list(pieces)})
    assert (weights(split) - weights(plain)).abs().max() < 1e-6
    cut = trained(tmp_path, trainer={"train_dataset": texts(20)}, **PACKING)
    first = trained(tmp_path, trainer={"train_dataset": Dataset.from_list(pieces[:1])})
    assert (weights(cut) - weights(first)).abs().max() < 1e-6


def test_wrapped_rows_are_cut_from_one_string_of_tokens(tmp_path):
    ids = [token for row in texts(9, 3, 14, 6) for token in ids_of(row["text"])]
    rows = Dataset.from_list([{"input_ids": ids[i : i + 16]} for i in range(0, len(ids), 16)])
    wrapped = trained(tmp_path, trainer={"train_dataset": texts(9, 3, 14, 6)}, packing_strategy="wrapped", **PACKING)
    assert (weights(wrapped) - weights(trained(tmp_path, trainer={"train_dataset": rows}))).abs().max() < 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_of_a_packed_row_do_not_see_each_other(attention, tmp_path):
    trainer = make_trainer(tmp_path, trainer={"model": tiny_model(attn_implementation=attention)}, **PACKING)
    (row,) = [row for row in trainer.train_dataset if len(row["seq_lengths"]) > 2][:1] or [trainer.train_dataset[0]]
    row = {"input_ids": list(range(20, 45)), "loss_mask": [1] * 25, "seq_lengths": [9, 6, 10]}
    batch = trainer.collate([row])
    assert trainer.layouts.choose(batch) == PACKED
    for changed, (start, stop) in enumerate([(0, 9), (9, 15), (15, 25)]):
        ids = [token + 100 * (start <= i < stop) for i, token in enumerate(row["input_ids"])]
        before, after = (
            trainer.score(trainer.model, trainer.collate([each])).logps.split(batch.lengths.tolist())
            for each in (row, {**row, "input_ids": ids})
        )
        same = [torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(before, after, strict=True)]
        assert same == [i != changed for i in range(3)]


@pytest.mark.parametrize("name", UNPACKABLE)
def test_model_that_cannot_pack_trains_packed_rows_exactly(name, tmp_path):
    # With the small weights of a new model, so that what leaks through attention is small as well.
    def model():
        return seeded(UNPACKABLE[name])

    packed = trained(tmp_path, trainer={"model": model}, **PACKING, per_device_train_batch_size=8)
    plain = trained(tmp_path, trainer={"model": model}, max_length=16, per_device_train_batch_size=8)
    assert packed.layouts.choose(packed.collate(list(packed.train_dataset))) == PADDED
    assert (weights(packed) - weights(plain)).abs().max() < 1e-6
    assert apart(weights(packed), weights(make_trainer(tmp_path, trainer={"model": model}))) > 1e-4


# -- which tokens are learned -----------------------------------------------------------------------------------------
def test_only_the_completion_is_learned(tmp_path):
    rows, model = demonstrations(), tiny_model()
    wholes = [ids_of(row["prompt"] + row["completion"]) for row in rows]
    starts = [len(row["prompt"]) for row in rows]
    for option, first in ((None, starts), (True, starts), (False, [1] * 4)):
        trainer = trained(tmp_path, trainer={"train_dataset": rows}, completion_only_loss=option)
        with torch.no_grad():
            logps = torch.cat([row_logps(model, *args) for args in zip(wholes, first, strict=True)])
        assert losses(trainer) == [pytest.approx(-logps.mean().item(), abs=1e-5)]


def test_completion_of_one_token_gives_its_own_loss(tmp_path):
    rows = Dataset.from_list([{"input_ids": [10, 11, 12, 13], "completion_mask": [0, 0, 0, 1]}])
    trainer = trained(tmp_path, trainer={"train_dataset": rows})
    expected = -row_logps(tiny_model(), [10, 11, 12, 13], 3).item()
    assert losses(trainer) == [pytest.approx(expected, abs=1e-5)]


CONVERSATIONS = Dataset.from_list(
    [
        {"messages": chat(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))},
        {"messages": chat(("user", "c"), ("assistant", "three"))},
    ]
)


def test_only_what_the_assistant_says_is_learned(parity_model, tmp_path):
    trainer = make_trainer(
        tmp_path,
        trainer={"model": str(parity_model), "processing_class": None, "train_dataset": CONVERSATIONS},
        assistant_only_loss=True,
    )
    first, second = trained_tokens(trainer)
    for said in ("one", "two"):
        assert said in first
    assert "three" in second
    assert "user" not in first + second
    trainer.train()
    assert math.isfinite(losses(trainer)[0])


def test_conversation_is_learned_whole_without_markers(tmp_path):
    trainer = make_trainer(tmp_path, trainer={"train_dataset": CONVERSATIONS})
    rendered = TOKENIZER.apply_chat_template(CONVERSATIONS[1]["messages"], tokenize=False)
    # All but the first token; what ends a turn is the template's matter, and no other end is added.
    assert trained_tokens(trainer)[1] == rendered.removeprefix("<|im_start|>")


def test_conversational_completion_is_learned(tmp_path):
    row = {"prompt": chat(("user", "Hi")), "completion": chat(("assistant", "Hello"))}
    trainer = make_trainer(tmp_path, trainer={"train_dataset": Dataset.from_list([row])})
    assert trained_tokens(trainer) == ["Hello<|im_end|>\n"]


@pytest.mark.parametrize("form", ["text", "messages"])
def test_formatting_function_makes_what_is_learned(form, tmp_path):
    rows = Dataset.from_list([{"question": "2+2?", "answer": "4"}])

    def formatted(row):
        text = f"{row['question']} {row['answer']}"
        return text if form == "text" else chat(("user", row["question"]), ("assistant", row["answer"]))

    trainer = make_trainer(tmp_path, trainer={"train_dataset": rows, "formatting_func": formatted})
    expected = {"text": "+2? 4<eos>", "messages": "user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"}
    assert trained_tokens(trainer) == [expected[form]]


def test_text_of_another_column_is_learned(tmp_path):
    rows = texts(9, 3)
    trainer = trained(
        tmp_path, trainer={"train_dataset": rows.rename_column("text", "content")}, dataset_text_field="content"
    )
    assert losses(trainer) == [pytest.approx(nll(rows), abs=1e-5)]


def test_tokenised_rows_are_taken_as_they_are(tmp_path):
    rows = texts(9, 3, 14, 6)
    ids = Dataset.from_list([{"input_ids": ids_of(row["text"])} for row in rows])
    ends = [trained(tmp_path, trainer={"train_dataset": given, "eval_dataset": given}) for given in (rows, ids)]
    assert torch.equal(weights(ends[0]), weights(ends[1]))
    assert ends[0].evaluate()["eval_loss"] == ends[1].evaluate(ids)["eval_loss"]


def test_columns_are_kept_whatever_the_option_says(tmp_path):
    trainer = trained(tmp_path, remove_unused_columns=True)
    assert torch.equal(weights(trainer), weights(trained(tmp_path)))


# -- data and evaluation ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, PACKING], ids=["plain", "packed"])
def test_stream_trains_as_the_dataset_does(options, tmp_path):
    # Eight rows, four a step: the third step begins the second epoch.
    stream = texts().to_iterable_dataset()
    ends = [trained(tmp_path, trainer={"train_dataset": d}, max_steps=3, **options) for d in (texts(), stream)]
    if options:
        return  # a stream is packed in other chunks
    assert torch.equal(weights(ends[0]), weights(ends[1]))


def test_shuffled_order_depends_on_the_seed_and_the_epoch(tmp_path):
    def order(seed):
        trainer = make_trainer(
            tmp_path, train_sampling_strategy="random", data_seed=seed, per_device_train_batch_size=1, max_steps=16
        )
        seen = []
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: seen.append(len(rows[0]["input_ids"])) or collate(rows)
        trainer.train()
        return seen

    first, again, other = order(1), order(1), order(2)
    assert first == again != other
    assert sorted(first[:8]) == sorted(first[8:16]) == sorted(n + 1 for n in (9, 3, 14, 6, 11, 4, 8, 5))
    assert first[:8] != first[8:16]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_evaluation_loss_is_the_mean_over_tokens_whatever_the_batch(rows, tmp_path):
    trainer = make_trainer(tmp_path, trainer={"eval_dataset": texts()}, per_device_eval_batch_size=rows)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(nll(texts()), abs=1e-5)
    assert {"eval_entropy", "eval_mean_token_accuracy"} <= found.keys()


@pytest.mark.parametrize(("packing", "eval_packing", "rows"), [(True, None, 5), (True, False, 8), (False, True, 5)])
def test_evaluation_is_packed_as_told_and_gives_the_same(packing, eval_packing, rows, tmp_path):
    trainer = make_trainer(
        tmp_path, trainer={"eval_dataset": texts()}, packing=packing, eval_packing=eval_packing, max_length=16
    )
    assert len(trainer.eval_dataset) == rows
    assert trainer.evaluate()["eval_loss"] == pytest.approx(nll(texts()), abs=1e-5)


def test_named_datasets_are_evaluated_each(tmp_path):
    given = {"short": texts(3, 4), "long": texts(20, 15)}
    trainer = trained(tmp_path, trainer={"eval_dataset": given}, eval_strategy="steps", eval_steps=1)
    logged = {k: v for line in trainer.state.log_history for k, v in line.items()}
    for name, rows in given.items():
        assert logged[f"eval_{name}_loss"] == pytest.approx(nll(rows, trainer.model), abs=1e-5)


def test_raw_dataset_and_stream_are_evaluated(tmp_path):
    trainer = make_trainer(tmp_path)
    for given in (texts(5, 7, 2), texts(5, 7, 2).to_iterable_dataset()):
        assert trainer.evaluate(given)["eval_loss"] == pytest.approx(nll(texts(5, 7, 2)), abs=1e-5)


def test_evaluation_leaves_training_alone(tmp_path):
    options = {"max_steps": 3, "disable_dropout": False}
    given = {"model": lambda: tiny_model(attention_dropout=0.2), "eval_dataset": texts(3, 4)}
    plain = trained(tmp_path, trainer=given, **options)
    evaluated = trained(tmp_path, trainer=given, eval_strategy="steps", eval_steps=1, **options)
    assert torch.equal(weights(plain), weights(evaluated))


def test_count_of_tokens_is_not_averaged_over_the_interval(tmp_path):
    trainer = trained(tmp_path, max_steps=4, logging_steps=2, per_device_train_batch_size=2)
    lengths = [n + 1 for n in (9, 3, 14, 6, 11, 4, 8, 5)]
    assert [line["num_tokens"] for line in lines(trainer)] == [sum(lengths[:4]), sum(lengths)]


# -- adapters, mixtures of experts, bad losses ------------------------------------------------------------------------
def test_adapter_trains_the_same_with_activation_checkpointing(tmp_path):
    config = lora_config()
    config.lora_dropout = 0.0
    plain, checkpointed = (
        gradient(tmp_path, trainer={"peft_config": config}, activation_checkpointing=on) for on in (False, True)
    )
    assert plain.norm() > 0
    assert apart(checkpointed, plain) < 1e-6
    trainer = trained(tmp_path, trainer={"peft_config": config}, activation_checkpointing=True, max_steps=2)
    with trainer.model.disable_adapter():
        ids = torch.arange(10, 20)[None]
        assert torch.equal(trainer.model.eval()(input_ids=ids).logits, tiny_model().eval()(input_ids=ids).logits)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved")
    assert torch.equal(loaded.eval()(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def mixture(**options):
    config = MixtralConfig(
        **SMALL,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.5,
        **options,
    )
    return seeded(lambda: MixtralForCausalLM(config))


@pytest.mark.parametrize("given", [None, 0.2])
def test_router_of_a_mixture_of_experts_gets_its_loss(given, tmp_path):
    plain = trained(tmp_path, trainer={"model": mixture}, router_aux_loss_coef=0.0)
    balanced = trained(tmp_path, trainer={"model": mixture}, router_aux_loss_coef=given)
    (line,) = lines(balanced)
    coefficient = 0.5 if given is None else given  # the model's own
    assert line["loss"] == pytest.approx(losses(plain)[0] + coefficient * line["aux_loss"], abs=1e-5)
    assert "aux_loss" not in lines(plain)[0]
    gate = next(name for name in balanced.model.state_dict() if "gate.weight" in name)
    assert not torch.equal(balanced.model.state_dict()[gate], plain.model.state_dict()[gate])
    assert balanced.evaluate(texts())["eval_aux_loss"] > 0


def test_router_loss_of_a_model_without_experts_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef=0\.1, but there is no such loss"):
        trained(tmp_path, router_aux_loss_coef=0.1)


def spoiled(folder, how):
    """A run whose second loss is not finite."""
    trainer = make_trainer(folder, max_steps=3, on_nonfinite_loss=how, save_strategy="steps", save_steps=50)
    head = trainer.model.lm_head
    head.register_forward_hook(lambda *args: args[2] * math.nan if trainer.state.global_step == 1 else None)
    return trainer


def test_bad_loss_stops_the_run_and_shows_its_rows(tmp_path):
    trainer = spoiled(tmp_path, "stop")
    with pytest.raises(NonFiniteLossError, match=r"loss at step 2 is nan, as the loss term 'nll' .*; the 4 rows"):
        trainer.train()
    (path,) = (tmp_path / "nonfinite").iterdir()
    shown = json.loads(path.read_text())["rows"]
    assert [row["prompt_ids"] + row["completion_ids"] for row in shown] == [
        ids_of(row["text"]) for row in texts().select(range(4, 8))
    ]
    assert (tmp_path / "checkpoint-1" / "trl_core_state.json").exists()


def test_bad_loss_is_skipped_when_told(tmp_path):
    trainer = spoiled(tmp_path, "skip")
    trainer.train()
    assert trainer.state.global_step == 3
    assert torch.isfinite(weights(trainer)).all()
    assert [line["step"] for line in trainer.state.log_history if "skipped_nonfinite" in line] == [2]


# -- what is left -----------------------------------------------------------------------------------------------------
def test_trainer_is_made_as_in_trl_and_its_model_is_loaded_again(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    model = tiny_model()
    trainer = SFTTrainer(model, args, train_dataset=texts(), processing_class=TOKENIZER)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == TOKENIZER.chat_template
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "tags:\n- trl-core\n- sft\n" in card
    assert "| 0 | sft | trl-core |" in card
    assert '"packing": false' in card


def test_special_tokens_and_template_are_replaced(tmp_path):
    (tmp_path / "plain.jinja").write_text("{% for message in messages %}{{ message['content'] }};{% endfor %}")
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    own = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    trainer = make_trainer(
        tmp_path,
        trainer={"processing_class": own, "train_dataset": CONVERSATIONS},
        chat_template_path=str(tmp_path / "plain.jinja"),
        eos_token="<|im_end|>",
    )
    assert trained_tokens(trainer)[1] == ";three;"
    assert trainer.processing_class.eos_token == "<|im_end|>"


def test_special_tokens_are_no_secret_and_tokens_of_the_hub_are(tmp_path):
    config = SFTConfig(output_dir=str(tmp_path), eos_token="<|im_end|>", hub_token="hf_secret", use_cpu=True)
    shown = config.to_dict()
    assert shown["eos_token"] == "<|im_end|>" and shown["pad_token"] is None
    assert "hf_secret" not in config.to_json_string()
