"""What the trainer of reward models does: the scores it trains, and that they are the same wherever the model goes."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_core import RewardConfig, RewardTrainer, get_config, get_trainer
from trl_core.errors import ConfigError
from trl_core.models.layout import SHARED
from trl_core.testing import FixedRollouts, tiny_model, tiny_tokenizer

from .helpers_offline import (
    EOS,
    TOKENIZER,
    apart,
    gradient,
    ids_of,
    lines,
    losses,
    make_trainer,
    pairs,
    tiny_classifier,
    tokens_through,
    trained,
    weights,
)

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def score(model, text):
    """The score of a text, alone and without padding."""
    kept, model.config.pad_token_id = model.config.pad_token_id, None
    with torch.no_grad():
        value = model.eval()(input_ids=torch.tensor([ids_of(text)])).logits.item()
    model.config.pad_token_id = kept
    return value


def scores(rows, model=None):
    """The scores of the preferred and of the rejected rows."""
    model = model or tiny_classifier()
    sides = [[score(model, row["prompt"] + row[side]) for row in rows] for side in ("chosen", "rejected")]
    return torch.tensor(sides)


def batched(model, tokenizer, rows):
    """The scores as a user of the saved model gets them: one padded batch, the last token found by transformers."""
    whole = [ids_of(row["prompt"] + row[side]) for side in ("chosen", "rejected") for row in rows]
    assert tokenizer.pad_token_id != EOS
    batch = tokenizer.pad({"input_ids": whole}, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits.reshape(2, -1)


# -- the loss ---------------------------------------------------------------------------------------------------------
def test_loss_and_metrics_are_those_of_the_scores(tmp_path):
    chosen, rejected = scores(pairs())
    (line,) = lines(trained(tmp_path, "Reward"))
    assert line["loss"] == pytest.approx(-torch.nn.functional.logsigmoid(chosen - rejected).mean().item(), abs=1e-5)
    both = torch.cat([chosen, rejected])
    expected = {
        "min_reward": both.min(),
        "mean_reward": both.mean(),
        "max_reward": both.max(),
        "accuracy": (chosen > rejected).float().mean(),
        "margin": (chosen - rejected).mean(),
        "num_tokens": 2 * sum(len(r["prompt"]) for r in pairs())
        + sum(len(r["chosen"] + r["rejected"]) + 2 for r in pairs()),
    }
    assert {name: line[name] for name in expected} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, abs=1e-5
    )


def test_margin_of_the_dataset_is_demanded(tmp_path):
    margins = [0.5, 0.0, 2.0, 1.0]
    chosen, rejected = scores(pairs())
    trainer = trained(tmp_path, "Reward", {"train_dataset": pairs(margin=margins)})
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - torch.tensor(margins)).mean().item()
    assert losses(trainer) == [pytest.approx(expected, abs=1e-5)]
    # The metric leaves it out.
    assert lines(trainer)[0]["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)


def test_centring_adds_the_square_of_the_sum(tmp_path):
    chosen, rejected = scores(pairs())
    plain, centred = (losses(trained(tmp_path, "Reward", center_rewards_coefficient=c))[0] for c in (None, 0.1))
    assert centred - plain == pytest.approx(0.1 * ((chosen + rejected) ** 2).mean().item(), abs=1e-5)


def test_cutting_a_step_into_micro_batches_changes_nothing(tmp_path):
    ends = [
        trained(tmp_path, "Reward", per_device_train_batch_size=b, gradient_accumulation_steps=a, max_steps=2)
        for b, a in ((4, 1), (1, 4))
    ]
    assert (weights(ends[0]) - weights(ends[1])).abs().max() < 1e-6
    assert apart(weights(ends[0]), weights(make_trainer(tmp_path, "Reward"))) > 1e-3


def test_implicit_prompt_gives_the_same(tmp_path):
    joined = Dataset.from_list(
        [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in pairs()]
    )
    ends = [trained(tmp_path, "Reward", {"train_dataset": rows}) for rows in (pairs(), joined)]
    assert torch.equal(weights(ends[0]), weights(ends[1]))


# -- layouts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prefix_gives_the_same_loss_and_gradient(checkpointing, tmp_path):
    options = {"activation_checkpointing": checkpointing}
    shared, plain = (gradient(tmp_path, "Reward", share_prompts=share, **options) for share in (True, False))
    assert apart(shared, plain) < 1e-5
    ends = [losses(trained(tmp_path, "Reward", share_prompts=share)) for share in (True, False)]
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def test_common_start_goes_through_the_model_once(tmp_path):
    # 10 tokens in common, the "a" that both answers start with included; 3 and 3 of their own, the end included.
    rows = Dataset.from_list([{"prompt": "question?", "chosen": "axy", "rejected": "auv"}] * 2)
    for share, expected in ((True, 2 * (10 + 3 + 3)), (False, 4 * (10 + 3))):
        trainer = make_trainer(tmp_path, "Reward", {"train_dataset": rows}, share_prompts=share)
        counts = tokens_through(trainer.model)
        trainer.train()
        assert counts[-1] == expected
        assert lines(trainer)[0]["num_tokens"] == 4 * 13
        assert (trainer.layouts.choose(trainer.collate(list(trainer.train_dataset))) == SHARED) is share


def test_answer_that_continues_the_other_is_scored_at_its_own_end(tmp_path):
    # Tokenised rows without an end: all of the shorter one is also in the longer one.
    rows = Dataset.from_list(
        [
            {"chosen_ids": [10, 11, 12], "rejected_ids": [10, 11, 12, 13, 14]},
            {"chosen_ids": [10, 11], "rejected_ids": [10]},
        ]
    )
    trainer = make_trainer(tmp_path, "Reward", {"train_dataset": rows})
    model = tiny_classifier().eval()
    model.config.pad_token_id = None
    expected = [
        model(input_ids=torch.tensor([row[f"{side}_ids"]])).logits.item()
        for row in rows
        for side in ("chosen", "rejected")
    ]
    trainer.train()
    (line,) = lines(trainer)
    assert line["max_reward"] == pytest.approx(max(expected), abs=1e-5)
    assert line["mean_reward"] == pytest.approx(sum(expected) / 4, abs=1e-5)
    assert line["margin"] == pytest.approx((expected[0] - expected[1] + expected[2] - expected[3]) / 2, abs=1e-5)


# -- the model elsewhere ----------------------------------------------------------------------------------------------
def ended_by_padding():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, ended_by_padding])
@pytest.mark.parametrize("model", [lambda: tiny_classifier(pad_token_id=None), "language model"])
def test_saved_model_gives_the_scores_of_training(tokenizer, model, tmp_path):
    if model == "language model":
        tiny_model(pad_token_id=None).save_pretrained(tmp_path / "base")
        model = str(tmp_path / "base")
    trainer = trained(
        tmp_path, "Reward", {"model": model, "processing_class": tokenizer(), "eval_dataset": pairs(6)}, max_steps=2
    )
    expected = trainer.evaluate()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert loaded.config.num_labels == 1
    chosen, rejected = batched(loaded, AutoTokenizer.from_pretrained(tmp_path / "saved"), pairs(6))
    assert expected["eval_margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert expected["eval_max_reward"] == pytest.approx(max(chosen.max(), rejected.max()).item(), abs=1e-5)
    assert torch.allclose(torch.stack([chosen, rejected]), scores(pairs(6), loaded), atol=1e-5)


@pytest.mark.parametrize("form", ["module", "path"])
def test_trained_model_is_a_reward_function(form, tmp_path):
    trainer = trained(tmp_path / "reward", "Reward", max_steps=2)
    trainer.save_model(str(tmp_path / "saved"))
    completions = [[10, 11, 12, EOS], [13, EOS], [14, 15, EOS], [16, 17, 18, 19, EOS]]
    online = get_trainer("grpo")(
        tiny_model(),
        reward_funcs=[trainer.model if form == "module" else str(tmp_path / "saved")],
        reward_processing_classes=[trainer.processing_class if form == "module" else None],
        args=get_config("grpo")(
            output_dir=str(tmp_path / "grpo"),
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "say a"}]),
        processing_class=TOKENIZER,
        rollouts=FixedRollouts([{"completion_ids": completions}]),
    )
    online.train()
    texts = ["say a" + TOKENIZER.decode(ids, skip_special_tokens=True) for ids in completions]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    model.config.pad_token_id = None
    with torch.no_grad():
        expected = [model(**TOKENIZER(text, return_tensors="pt")).logits.item() for text in texts]
    (line,) = lines(online)
    assert line["reward"] == pytest.approx(sum(expected) / 4, abs=1e-5)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_adapter_is_saved_with_its_head(task, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type=task, **LORA)
    trainer = make_trainer(
        tmp_path,
        "Reward",
        {"model": str(tmp_path / "base"), "peft_config": config},
        max_steps=3,
        activation_checkpointing=True,
    )
    start = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, start[name])}
    assert [name for name in moved if "score" in name and "original" not in name]
    assert {name for name in moved if "lora_" not in name and "modules_to_save" not in name} == set()
    trainer.save_model(str(tmp_path / "saved"))
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    loaded = PeftModel.from_pretrained(base, tmp_path / "saved")
    loaded.config.pad_token_id = TOKENIZER.pad_token_id
    metrics = trainer.evaluate(pairs(6))
    chosen, rejected = batched(loaded, TOKENIZER, pairs(6))
    assert metrics["eval_margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    # The user's configuration is not written to.
    assert not config.modules_to_save or task == "SEQ_CLS"


def test_new_head_depends_on_the_seed_alone(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(heads))
        trainer = make_trainer(tmp_path, "Reward", {"model": str(tmp_path / "base")}, seed=seed)
        heads.append(trainer.model.score.weight.detach().clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    body = tiny_model().model.state_dict()
    assert all(torch.equal(value, body[name]) for name, value in trainer.model.model.state_dict().items())


@pytest.mark.parametrize("form", ["module", "path"])
def test_classifier_with_other_outputs_is_refused(form, tmp_path):
    model = tiny_classifier(num_labels=3)
    model.save_pretrained(tmp_path / "three")
    with pytest.raises(ConfigError, match="3 outputs; a score is one number"):
        make_trainer(tmp_path, "Reward", {"model": model if form == "module" else str(tmp_path / "three")})


def test_tokenizer_without_any_end_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a pad token nor an end-of-sequence token"):
        make_trainer(tmp_path, "Reward", {"processing_class": tokenizer})


def test_end_and_padding_may_be_given_as_options(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    trainer = trained(tmp_path, "Reward", {"processing_class": tokenizer}, eos_token="<eos>", pad_token="<pad>")
    assert losses(trainer) == losses(trained(tmp_path, "Reward"))
    assert trainer.model.config.pad_token_id == 2


def test_rows_that_are_too_long_are_left_out(tmp_path, caplog):
    rows = Dataset.from_list(
        [{"prompt": "a", "chosen": "b" * n, "rejected": "c" * m} for n, m in ((3, 9), (9, 3), (3, 8))]
    )
    trainer = make_trainer(tmp_path, "Reward", {"train_dataset": rows}, max_length=10)
    assert [row["chosen_ids"] for row in trainer.train_dataset] == [ids_of("abbb")]
    assert "2 of 3 rows of train_dataset" in caplog.text


# -- data and evaluation ----------------------------------------------------------------------------------------------
def test_stream_trains_as_the_dataset_does(tmp_path):
    ends = [
        trained(tmp_path, "Reward", {"train_dataset": rows}, max_steps=3, per_device_train_batch_size=2)
        for rows in (pairs(), pairs().to_iterable_dataset())
    ]
    assert torch.equal(weights(ends[0]), weights(ends[1]))


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_evaluation_is_over_all_pairs_whatever_the_batch(rows, tmp_path):
    trainer = make_trainer(tmp_path, "Reward", {"eval_dataset": pairs(7)}, per_device_eval_batch_size=rows)
    chosen, rejected = scores(pairs(7))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(
        -torch.nn.functional.logsigmoid(chosen - rejected).mean().item(), abs=1e-5
    )
    assert metrics["eval_accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert metrics["eval_min_reward"] == pytest.approx(min(chosen.min(), rejected.min()).item(), abs=1e-5)


def test_dropout_is_off_unless_wanted(tmp_path):
    given = {"model": lambda: tiny_classifier(attention_dropout=0.5)}
    plain = losses(trained(tmp_path, "Reward"))
    assert losses(trained(tmp_path, "Reward", given)) == plain
    (noisy,) = losses(trained(tmp_path, "Reward", given, disable_dropout=False))
    assert math.isfinite(noisy) and noisy != pytest.approx(plain[0], abs=1e-4)


def test_trainer_is_made_as_in_trl(tmp_path):
    args = RewardConfig(output_dir=str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    tiny_model().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    trainer = RewardTrainer(model=str(tmp_path / "base"), args=args, train_dataset=pairs())
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| 0 | reward | trl-core |" in card
    assert trainer.processing_class.chat_template == TOKENIZER.chat_template
