"""SmolLM2-135M, whose pad token is its terminator, on the rows of the examples. Slow: the model has to be loaded."""

import json
import sys

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl_core import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl_core.models.layout import SHARED
from trl_core.models.logprobs import token_logps

from .test_house import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SHELL = ROOT / "examples" / "shell-helper"


@pytest.fixture(scope="module")
def smollm2():
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    try:
        from model import prepare_model
    finally:
        sys.path.pop(0)
    return str(prepare_model())


def rows(name, count):
    lines = (SHELL / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return Dataset.from_list([json.loads(line) for line in lines[:count]])


def settings(folder, **options):
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_length": 256,
        **options,
    }


def losses(trainer):
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_shared_prompts_give_the_gradient_of_padded_rows(smollm2, tmp_path):
    trainer = DPOTrainer(smollm2, args=DPOConfig(**settings(tmp_path)), train_dataset=rows("preferences_train", 4))
    pairs = trainer.collate([trainer.train_dataset[i] for i in range(2)])
    assert trainer.layouts.choose(pairs) == SHARED
    counts, gradients = [], []
    trainer.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    for layouts in (trainer.layouts, None):
        trainer.model.zero_grad()
        logps = token_logps(trainer.model, pairs, pad_token_id=trainer.pad_token_id, layouts=layouts).logps
        (logps * torch.linspace(-1, 1, logps.numel())).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
    assert counts[0] < counts[1]


def test_preference_training_starts_at_ln_2_and_learns(smollm2, tmp_path):
    args = DPOConfig(**settings(tmp_path, learning_rate=1e-5, max_steps=4))
    found = losses(DPOTrainer(smollm2, args=args, train_dataset=rows("preferences_train", 4)))
    assert found[0] == pytest.approx(0.693147, abs=1e-5)
    assert found[-1] < found[0] - 0.05


def test_packed_conversations_are_learned_and_the_model_is_saved(smollm2, tmp_path):
    args = SFTConfig(**settings(tmp_path, learning_rate=1e-4, packing=True, max_steps=3))
    trainer = SFTTrainer(smollm2, args=args, train_dataset=rows("sft_train", 16))
    found = losses(trainer)
    assert found[-1] < found[0] - 0.2
    trainer.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_reward_model_scores_alike_in_training_and_when_loaded(smollm2, tmp_path):
    args = RewardConfig(**settings(tmp_path, learning_rate=1e-4, max_steps=1))
    trainer = RewardTrainer(smollm2, args=args, train_dataset=rows("preferences_train", 4))
    trainer.train()
    trainer.save_model()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    texts = ["How do I list files?<|im_end|>", "In which folder am I, and who am I?<|im_end|>"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        together = model(**batch).logits[:, 0].tolist()
        alone = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert together == pytest.approx(alone, abs=1e-4)
