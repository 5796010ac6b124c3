"""The model card: read as the Hub reads it, its code run on the folder it lies in, and hostile names in it."""

import contextlib
import io
import json
import re

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig

from trl_core.testing import tiny_classifier, tiny_model

from .helpers_offline import make_trainer as make_offline
from .helpers_offline import pairs
from .helpers_online import TOKENIZER, make_trainer, prompts, table

pytestmark = pytest.mark.filterwarnings("ignore::trl_core.TRLExperimentalWarning")


def rows_of(card):
    """The cells of every table, after checking that no text broke one."""
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def told(card):
    return {row[0]: row[1] for row in rows_of(card) if len(row) == 2}


def run_code(card, folder, monkeypatch, **replaced):
    """What the card's code prints, run in the folder."""
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, str(new))
    monkeypatch.chdir(folder)
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), names)
    return printed.getvalue(), names


def test_card_of_a_whole_model(tmp_path, monkeypatch):
    model = tiny_model()
    model.config._name_or_path, model.config._commit_hash = "someone/tiny-model", "abc123"
    given = {"model": model, "group_filter_func": "shortest", "eval_dataset": prompts(2)}
    given["reward_funcs"] = [table(1.0, 0.0, 0.5, -1.0)]
    trainer = make_trainer(
        tmp_path / "run", "gfpo+replay", given, num_remains_in_group=3, max_steps=3, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.base_model == "someone/tiny-model"
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.tags == ["trl-core", "grpo", "gfpo", "replay", "arxiv:2402.03300", "arxiv:2508.09726"]
    facts = told(card)
    assert facts["base model"] == "`someone/tiny-model` at `abc123`"
    assert facts["training data"] == f"rows made in Python, 4 rows, fingerprint `{trainer.train_dataset._fingerprint}`"
    assert facts["evaluation data"].startswith("rows made in Python, 2 rows, fingerprint")
    assert facts["steps"].startswith("3 of 3")
    assert facts["rows of an optimizer step"].startswith("4 = 4 in")
    assert facts["learning rate"] == "0.01, constant schedule, 0 warm-up steps"
    assert facts["optimizer"] == "`AdamW`"
    last = [line for line in trainer.state.log_history if "loss" in line][-1]
    assert float(facts["`reward`"]) == pytest.approx(last["reward"], rel=1e-4)
    evaluated = [line for line in trainer.state.log_history if "eval_reward" in line][-1]
    assert float(facts["`eval_reward`"]) == pytest.approx(evaluated["eval_reward"], rel=1e-4)
    assert "## Last training metrics, step 3" in card.text and "## Last evaluation, step 3" in card.text
    assert not [name for name in facts if "time/" in name or "runtime" in name]
    assert "[arXiv:2508.09726](https://arxiv.org/abs/2508.09726)" in card.text
    options = json.loads(card.text.split("```json")[1].split("```")[0])
    assert options["num_remains_in_group"] == 3
    assert str(tmp_path) not in card.content
    printed, names = run_code(card, tmp_path / "saved", monkeypatch)
    assert printed.endswith("\n")
    assert type(names["model"]).__name__ == "LlamaForCausalLM"
    saved = trainer.model.state_dict()
    assert all((value == saved[name]).all() for name, value in names["model"].state_dict().items())


def test_card_of_an_adapter(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM")
    given = {"model": str(tmp_path / "base"), "peft_config": lora}
    trainer = make_trainer(tmp_path / "run", "grpo", given, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    card = ModelCard.load(tmp_path / "run" / "checkpoint-1" / "README.md")
    facts = told(card)
    assert facts["adapter"] == "LORA, rank 4, alpha 8"
    assert facts["adapted modules"] == "`q_proj`, `v_proj`"
    assert facts["base model"] == "a local one"
    assert (card.data.base_model, card.data.library_name) == (None, "peft")
    assert str(tmp_path) not in card.content
    replaced = {"path/to/the/base-model": tmp_path / "base"}
    _, names = run_code(card, tmp_path / "run" / "checkpoint-1", monkeypatch, **replaced)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"


def test_card_of_a_reward_model(tmp_path, monkeypatch):
    data = pairs()
    data.info.dataset_name, data.info.config_name = "pairs", "default"
    data.info.download_checksums = {"hf://datasets/someone/pairs@0123/train.parquet": {}}
    model = tiny_classifier()
    trainer = make_offline(tmp_path / "run", "Reward", {"model": model, "train_dataset": data}, max_steps=1)
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.datasets == ["someone/pairs"]
    assert told(card)["training data"].startswith("`someone/pairs`, configuration `default`,")
    printed, names = run_code(card, tmp_path / "run", monkeypatch)
    ids = TOKENIZER("Hello", return_tensors="pt")
    assert float(printed) == pytest.approx(trainer.model.eval()(**ids).logits[0, 0].item(), abs=1e-5)
    assert type(names["model"]).__name__ == "LlamaForSequenceClassification"


@pytest.mark.parametrize(
    "name", ["a|b", "a\n\n# A title\n| x |", "`code` <script>", "\ud83d", "x" * 5000, "\x1b[31mred", "---"]
)
def test_no_name_breaks_the_card(name, tmp_path):
    data = prompts()
    data.info.dataset_name = data.info.config_name = name
    trainer = make_trainer(tmp_path, trainer={"train_dataset": data, "eval_dataset": {name: prompts(2)}})
    trainer.state.log_history.append({"loss": 1.0, name: 2.0, "step": 1})
    (tmp_path / "README.md").write_text(trainer.model_card(), encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md")
    assert {len(row) for row in rows_of(card)} == {2, 5}
    assert [line for line in card.text.splitlines() if line.startswith("# ")] == ["# Trained with trl-core: grpo"]
    assert "<script>" not in re.sub(r"`[^`]*`|\\<", "", card.text) and "\x1b" not in card.text
    assert max(map(len, card.text.splitlines())) < 2000


def test_a_stream_and_no_data_have_cards(tmp_path):
    stream = prompts().to_iterable_dataset()
    trainer = make_trainer(tmp_path / "stream", trainer={"train_dataset": stream})
    assert "| training data | rows made in Python, a stream" in trainer.model_card()
    nothing = make_trainer(tmp_path / "none", trainer={"train_dataset": None, "eval_dataset": prompts(2)})
    assert "training data" not in nothing.model_card()
    assert "| steps | 0 of 0" in nothing.model_card()
