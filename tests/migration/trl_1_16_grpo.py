# TRL 1.16: GRPO with a function written out and the options of late releases.
import os
from typing import TYPE_CHECKING

from datasets import Dataset

if TYPE_CHECKING:
    from trl import GRPOTrainer


def digits(completions: list, log_metric=None, **kwargs) -> list[float]:
    return [sum(letter.isdigit() for letter in text) / 10 for text in completions]


def build(model: str) -> "GRPOTrainer":
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir="grpo",
        loss_type="dapo",
        beta=0.01,
        epsilon_high=0.28,
        importance_sampling_level="token",
        entropy_coef=0.001,
        num_generations=4,
        num_generations_eval=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=2,
        max_completion_length=8,
        chat_template_kwargs={"enable_thinking": False},
        vllm_importance_sampling_clip_max=2.0,
        log_completions=True,
        max_steps=2,
        use_cpu=True,
        report_to="none",
    )
    return GRPOTrainer(model, digits, args, Dataset.from_dict({"prompt": ["1, 2,", "3, 4,"]}))


trainer = build(os.environ.get("MODEL_PATH", "Qwen/Qwen3-0.6B"))
trainer.train()
