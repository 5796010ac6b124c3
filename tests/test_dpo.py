"""What the trainer of DPO does: losses, references, how often a prompt goes through the model, and evaluation."""

import gc
import math
import weakref

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_core import DPOConfig, DPOTrainer
from trl_core.errors import CheckpointError, ConfigError
from trl_core.models.layout import PACKED, SHARED
from trl_core.stages.preference_loss import LOSSES
from trl_core.testing import tiny_model, tiny_tokenizer

from .helpers_offline import (
    EOS,
    TOKENIZER,
    apart,
    chat,
    even_pairs,
    gradient,
    ids_of,
    lines,
    losses,
    make_trainer,
    pairs,
    row_logps,
    tokens_through,
    trained,
    weights,
)
from .helpers_train import adapted_model, lora_config

LN2 = math.log(2.0)
OTHER = {"ref_model": lambda: tiny_model(seed=1)}
"""A reference that is not the policy."""


def sums(rows, model=None):
    """log pi(y_w) and log pi(y_l) of text rows, from forwards of their own."""
    model = (model or tiny_model()).eval()
    with torch.no_grad():
        return [
            torch.stack([row_logps(model, ids_of(r["prompt"] + r[side]), len(r["prompt"])).sum() for r in rows])
            for side in ("chosen", "rejected")
        ]


def margin(rows, reference, model=None):
    """beta Delta of each pair."""
    (chosen, rejected), (ref_chosen, ref_rejected) = sums(rows, model), sums(rows, reference)
    return 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))


def reference_logps(trainer):
    """What the trainer's reference says of the training set, without gradient."""
    return trainer._reference_logps(trainer.collate(list(trainer.train_dataset)))


# -- losses -----------------------------------------------------------------------------------------------------------
EPS = 1e-3
AT_THE_START = {
    "sigmoid": LN2,
    "sigmoid_norm": LN2,
    "cdpo": LN2,
    "hinge": 1.0,
    "ipo": 25.0,
    "exo_pair": -LN2 - 0.5 * math.log(EPS * (1 - EPS)),
    "nca_pair": 2 * LN2,
    "robust": LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 50.0,
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LN2 + 0.5,
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_starts_at_its_value_and_trains(name, tmp_path):
    trainer = make_trainer(tmp_path, "DPO", loss_type=name, label_smoothing=EPS, learning_rate=1e-4)
    start = weights(trainer)
    trainer.train()
    expected = AT_THE_START.get(name)
    if name == "sft":
        rows = list(pairs())
        logps = [row_logps(tiny_model(), ids_of(r["prompt"] + r["chosen"]), len(r["prompt"])) for r in rows]
        expected = -torch.cat(logps).mean().item()
    (line,) = lines(trainer)
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert line["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert not torch.equal(weights(trainer), start)


def test_loss_and_metrics_are_those_of_the_two_models(tmp_path):
    trainer = trained(tmp_path, "DPO", OTHER)
    (chosen, rejected), (ref_chosen, ref_rejected) = sums(pairs()), sums(pairs(), tiny_model(seed=1))
    delta = margin(pairs(), tiny_model(seed=1))
    expected = {
        "loss": -logsigmoid(delta).mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
        "rewards/chosen": 0.1 * (chosen - ref_chosen).mean(),
        "rewards/rejected": 0.1 * (rejected - ref_rejected).mean(),
        "rewards/margins": delta.mean(),
        "rewards/accuracies": (delta > 0).float().mean(),
    }
    (line,) = lines(trainer)
    assert {name: line[name] for name in expected} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, abs=1e-4
    )
    assert {"logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy", "num_tokens"} <= line.keys()


def test_list_of_losses_is_their_weighted_sum(tmp_path):
    names, factors = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    single = [gradient(tmp_path, "DPO", OTHER, loss_type=name) for name in names]
    several = gradient(tmp_path, "DPO", OTHER, loss_type=names, loss_weights=factors)
    assert apart(several, sum(w * g for w, g in zip(factors, single, strict=True))) < 1e-5
    (line,) = lines(trained(tmp_path, "DPO", OTHER, loss_type=names, loss_weights=factors))
    assert line["loss"] == pytest.approx(
        sum(w * line[f"loss/{n}"] for w, n in zip(factors, names, strict=True)), rel=1e-5
    )


def test_swapping_the_sides_turns_the_margin(tmp_path):
    rows = pairs()
    swapped = rows.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    metrics = [make_trainer(tmp_path, "DPO", {**OTHER, "eval_dataset": each}).evaluate() for each in (rows, swapped)]
    delta = margin(rows, tiny_model(seed=1))
    for found, sign in zip(metrics, (1, -1), strict=True):
        assert found["eval_loss"] == pytest.approx(-logsigmoid(sign * delta).mean().item(), abs=1e-5)


def test_cutting_a_step_into_micro_batches_changes_nothing(tmp_path):
    ends = [
        trained(tmp_path, "DPO", OTHER, per_device_train_batch_size=b, gradient_accumulation_steps=a, max_steps=2)
        for b, a in ((4, 1), (1, 4), (2, 2))
    ]
    for end in ends[1:]:
        assert (weights(ends[0]) - weights(end)).abs().max() < 1e-6
        assert losses(ends[0]) == pytest.approx(losses(end), abs=1e-5)
    assert apart(weights(ends[0]), weights(make_trainer(tmp_path, "DPO"))) > 1e-4


def test_pad_token_that_is_the_terminator_stays_in_the_loss(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trained(tmp_path, "DPO", {**OTHER, "processing_class": tokenizer}, share_prompts=False)
    assert trainer.pad_token_id == EOS
    assert lines(trainer)[0]["logps/chosen"] == pytest.approx(sums(pairs())[0].mean().item(), abs=1e-4)


def test_end_of_rows_that_are_too_long_stays_when_told(tmp_path):
    row = {"prompt": "question", "chosen": "a long answer", "rejected": "no"}
    trainer = trained(
        tmp_path,
        "DPO",
        {"train_dataset": Dataset.from_list([row])},
        max_length=10,
        truncation_mode="keep_end",
    )
    # The last ten tokens: of the longer row they are all of the answer, whose first one nothing predicts.
    chosen = row_logps(tiny_model(), ids_of(row["prompt"] + row["chosen"])[-10:]).sum().item()
    rejected = row_logps(tiny_model(), ids_of(row["prompt"] + row["rejected"])[-10:], 7).sum().item()
    (line,) = lines(trainer)
    assert line["logps/chosen"] == pytest.approx(chosen, abs=1e-4)
    assert line["logps/rejected"] == pytest.approx(rejected, abs=1e-4)


def test_conversations_are_rendered_and_tokenised_rows_taken_as_they_are(tmp_path):
    turns = {
        "prompt": chat(("user", "Hi")),
        "chosen": chat(("assistant", "Hello")),
        "rejected": chat(("assistant", "x")),
    }
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = {"prompt_ids": start, "chosen_ids": "Hello<|im_end|>\n", "rejected_ids": "x<|im_end|>\n"}
    tokenised = {name: TOKENIZER(text)["input_ids"] for name, text in ids.items()}
    implicit = {side: turns["prompt"] + turns[side] for side in ("chosen", "rejected")}
    ends = [
        trained(tmp_path, "DPO", {**OTHER, "train_dataset": Dataset.from_list([row])})
        for row in (turns, implicit, tokenised)
    ]
    assert losses(ends[0]) == losses(ends[1]) == losses(ends[2])
    assert losses(ends[0])[0] != pytest.approx(LN2, abs=1e-3)


# -- tokens through the models ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["policy", "reference"])
def test_prompt_goes_through_a_model_once_per_pair(side, tmp_path):
    # Of each pair 8 prompt tokens and two completions of 4.
    for share, expected in ((True, 3 * (8 + 4 + 4)), (False, 6 * (8 + 4))):
        trainer = make_trainer(tmp_path, "DPO", {"train_dataset": even_pairs()}, share_prompts=share)
        counts = tokens_through(trainer.model if side == "policy" else trainer.reference.module)
        trainer.train()
        assert counts[-1] == expected
        assert lines(trainer)[0]["num_tokens"] == 6 * 12


@pytest.mark.parametrize("kind", ["plain", "checkpointing", "adapter", "adapter_checkpointing", "eager", "forward_kl"])
def test_shared_prompts_give_the_gradient_of_rows_apart(kind, tmp_path):
    options = {"activation_checkpointing": "checkpointing" in kind}
    trainer = {"model": lambda: tiny_model(attn_implementation="eager" if kind == "eager" else "sdpa")}
    if kind == "forward_kl":
        options["f_divergence_type"] = "forward_kl"
    if "adapter" in kind:
        trainer = {"model": adapted_model}
    else:
        trainer |= OTHER
    grads = [gradient(tmp_path, "DPO", trainer, share_prompts=share, **options) for share in (True, False)]
    assert grads[1].norm() > 0
    assert apart(*grads) < 1e-5
    made = make_trainer(tmp_path, "DPO", trainer, **options)
    made.train()
    assert made.layouts.choose(made.collate(list(made.train_dataset))) == SHARED


def test_pairs_with_dropout_share_no_noise(tmp_path):
    trainer = make_trainer(tmp_path, "DPO", {"model": lambda: tiny_model(attention_dropout=0.3)}, disable_dropout=False)
    trainer.train()
    batch = trainer.collate(list(trainer.train_dataset))
    assert trainer.layouts.choose(batch) == PACKED
    # The reference has none, whatever the policy has.
    assert torch.equal(reference_logps(trainer), reference_logps(trainer))
    assert losses(trainer)[0] != pytest.approx(LN2, abs=1e-5)
    plain = trained(tmp_path, "DPO", {"model": lambda: tiny_model(attention_dropout=0.3)})
    assert losses(plain) == [pytest.approx(LN2)]


# -- the reference ----------------------------------------------------------------------------------------------------
def test_reference_is_a_copy_of_the_weights_passed_in_memory(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    passed = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(tmp_path, "DPO", {"model": model}, max_steps=2)
    reference = trainer.reference.module
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in reference.parameters()}
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    trainer.train()
    assert all(torch.equal(value, passed[name]) for name, value in reference.state_dict().items())
    assert losses(trainer)[0] != pytest.approx(LN2, abs=1e-3)


@pytest.mark.parametrize("form", ["module", "path"])
def test_reference_may_be_given(form, tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path / "ref")
    reference = tiny_model(seed=1) if form == "module" else str(tmp_path / "ref")
    trainer = trained(tmp_path, "DPO", {"ref_model": reference}, max_steps=1)
    expected = -logsigmoid(margin(pairs(), tiny_model(seed=1))).mean().item()
    assert losses(trainer) == [pytest.approx(expected, abs=1e-5)]


@pytest.mark.parametrize("adapter", [None, lora_config()], ids=["plain", "adapter"])
def test_reference_that_is_the_policy_is_refused(adapter, tmp_path):
    model = tiny_model()
    with pytest.raises(ConfigError, match="The reference model is the model that is trained"):
        make_trainer(tmp_path, "DPO", {"model": model, "ref_model": model, "peft_config": adapter})


class Constants(TrainerCallback):
    """Sets the policy to 0.8 and the reference to 1.0 before the first step."""

    def __init__(self):
        self.trainer = None

    def on_step_begin(self, *_, **__):
        with torch.no_grad():
            for parameter in self.trainer.model.parameters():
                parameter.fill_(0.8)
            for parameter in self.trainer.reference.module.parameters():
                parameter.fill_(1.0)


def test_reference_moves_by_the_share_of_the_policy(tmp_path):
    constants = Constants()
    trainer = make_trainer(
        tmp_path,
        "DPO",
        {"callbacks": [constants]},
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=0.6,
        learning_rate=0.0,
    )
    constants.trainer = trainer
    trainer.train()
    for parameter in trainer.reference.module.parameters():
        assert torch.allclose(parameter, torch.tensor(0.88), rtol=0, atol=1e-7)
        assert not parameter.requires_grad


def test_reference_that_becomes_the_policy_each_step_gives_ln_2(tmp_path):
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = trained(tmp_path, "DPO", OTHER, max_steps=4, **moving)
    first, *later = losses(trainer)
    assert first != pytest.approx(LN2, abs=1e-3)
    assert later == pytest.approx([LN2] * 3, abs=1e-6)
    assert losses(trained(tmp_path, "DPO", max_steps=4))[1] != pytest.approx(LN2, abs=1e-3)


def test_reference_of_a_new_adapter_is_the_model_without_it(tmp_path):
    trainer = trained(tmp_path, "DPO", {"peft_config": lora_config()}, max_steps=3, learning_rate=1.0)
    assert losses(trainer)[0] == pytest.approx(LN2, abs=1e-6)
    assert abs(losses(trainer)[-1] - LN2) > 1e-3
    plain = make_trainer(tmp_path, "DPO")
    assert trainer.reference.module is None
    assert torch.allclose(reference_logps(trainer), reference_logps(plain), rtol=0, atol=1e-5)


def test_reference_of_a_continued_adapter_is_its_start(tmp_path):
    trainer = trained(tmp_path, "DPO", {"model": adapted_model}, max_steps=3, learning_rate=1.0)
    assert losses(trainer)[0] == pytest.approx(LN2, abs=1e-6)
    plain = make_trainer(tmp_path, "DPO", {"ref_model": adapted_model()})
    assert torch.allclose(reference_logps(trainer), reference_logps(plain), rtol=0, atol=1e-5)
    # What is saved is the trained adapter.
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved").eval()
    assert list(loaded.peft_config) == ["default"]
    ids = torch.arange(10, 20)[None]
    assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
    assert not torch.equal(loaded(input_ids=ids).logits, adapted_model().eval()(input_ids=ids).logits)


def test_moving_reference_with_an_adapter_is_refused(tmp_path):
    for trainer in ({"peft_config": lora_config(), "model": "no/such-model"}, {"model": adapted_model}):
        with pytest.raises(ConfigError, match="sync_ref_model=True with an adapter"):
            make_trainer(tmp_path, "DPO", trainer, sync_ref_model=True)


# -- the reference's log-probabilities before training ----------------------------------------------------------------
PRECOMPUTED = {
    "plain": ({}, {}),
    "other_reference": (OTHER, {}),
    "ld_alpha": (OTHER, {"ld_alpha": 0.5}),
    "adapter": ({"peft_config": lora_config()}, {}),
    "continued_adapter": ({"model": adapted_model}, {}),
    "shuffled": (OTHER, {"train_sampling_strategy": "random", "per_device_train_batch_size": 2}),
}


@pytest.mark.parametrize("name", PRECOMPUTED)
def test_precomputed_reference_gives_the_same_run(name, tmp_path):
    trainer, options = PRECOMPUTED[name]
    options = {"max_steps": 4, "precompute_ref_batch_size": 3, **options}
    ends = [
        trained(tmp_path, "DPO", {**trainer, "eval_dataset": pairs(3)}, precompute_ref_log_probs=early, **options)
        for early in (False, True)
    ]
    assert losses(ends[0]) == pytest.approx(losses(ends[1]), abs=1e-6)
    assert (weights(ends[0]) - weights(ends[1])).abs().max() < 2e-7  # the last bit of a weight near 1
    assert len(set(losses(ends[0]))) > 1
    metrics = [{k: v for k, v in end.evaluate().items() if "rewards" in k or "loss" in k} for end in ends]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)


def test_precomputed_reference_is_let_go(tmp_path):
    trainer = make_trainer(tmp_path, "DPO", {"eval_dataset": pairs(2)}, precompute_ref_log_probs=True)
    reference = weakref.ref(trainer.reference.module)
    trainer.train()
    gc.collect()
    assert reference() is None
    assert {"eval_loss", "eval_rewards/margins"} <= trainer.evaluate().keys()
    with pytest.raises(ConfigError, match="the reference is gone"):
        trainer.evaluate(pairs(2))


def test_evaluation_before_training_lets_no_new_dataset_in(tmp_path):
    trainer = make_trainer(tmp_path, "DPO", precompute_ref_log_probs=True)
    with pytest.raises(ConfigError, match="the reference is gone"):
        trainer.evaluate(pairs(2))


def test_reference_without_an_adapter_remains_for_new_datasets(tmp_path):
    trainer = trained(tmp_path, "DPO", {"peft_config": lora_config()}, precompute_ref_log_probs=True, max_steps=2)
    plain = trained(tmp_path, "DPO", {"peft_config": lora_config()}, max_steps=2)
    assert trainer.evaluate(pairs(2))["eval_loss"] == pytest.approx(plain.evaluate(pairs(2))["eval_loss"], abs=1e-6)


def test_reference_is_asked_once_for_each_pair(tmp_path):
    trainer = make_trainer(
        tmp_path,
        "DPO",
        {"train_dataset": even_pairs(4)},
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=2,
        max_steps=3,
    )
    counts = tokens_through(trainer.reference.module)
    trainer.train()
    assert sum(counts[-2:]) == 4 * 16
    before = len(counts)
    trainer.train()
    assert len(counts) == before


def test_resumed_run_takes_the_reference_from_the_checkpoint(tmp_path):
    options = {"precompute_ref_log_probs": True, "max_steps": 4, "learning_rate": 1e-3, "optim": "adamw_torch"}
    whole = trained(tmp_path / "whole", "DPO", **options, save_strategy="steps", save_steps=2)
    resumed = make_trainer(tmp_path / "resumed", "DPO", {"model": lambda: tiny_model(seed=5)}, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(resumed))
    another = make_trainer(tmp_path / "another", "DPO", {"train_dataset": pairs(3)}, **options)
    for check, told in (("strict", "rows: 4 then, 3 now"), ("warn", "log-probabilities of another train_dataset")):
        another.args.resume_check = check
        with pytest.raises(CheckpointError, match=told):
            another.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


# -- data and evaluation ----------------------------------------------------------------------------------------------
def test_stream_trains_as_the_dataset_does(tmp_path):
    ends = [
        trained(tmp_path, "DPO", {"train_dataset": rows}, max_steps=3, per_device_train_batch_size=2)
        for rows in (pairs(), pairs().to_iterable_dataset())
    ]
    assert torch.equal(weights(ends[0]), weights(ends[1]))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_evaluation_is_over_all_pairs_whatever_the_batch(rows, tmp_path):
    trainer = make_trainer(
        tmp_path,
        "DPO",
        {**OTHER, "eval_dataset": {"a": pairs(7), "b": pairs(2)}},
        per_device_eval_batch_size=rows,
    )
    metrics = trainer.evaluate()
    for name, count in (("a", 7), ("b", 2)):
        delta = margin(pairs(count), tiny_model(seed=1))
        assert metrics[f"eval_{name}_loss"] == pytest.approx(-logsigmoid(delta).mean().item(), abs=1e-5)
        assert metrics[f"eval_{name}_rewards/margins"] == pytest.approx(delta.mean().item(), abs=1e-5)
    assert trainer.evaluate(pairs(7))["eval_loss"] == metrics["eval_a_loss"]


# -- what is left -----------------------------------------------------------------------------------------------------
def test_trainer_is_made_as_in_trl_and_its_model_is_loaded_again(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    model = tiny_model()
    trainer = DPOTrainer(
        model, tiny_model(seed=1), args=args, train_dataset=pairs(), eval_dataset=pairs(2), processing_class=TOKENIZER
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "tags:\n- trl-core\n- dpo\n" in card
    assert "| 0 | dpo | trl-core |" in card
    assert '"beta": 0.1' in card
