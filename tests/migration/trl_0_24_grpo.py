# TRL 0.24: GRPO with two reward functions.
import os
import re

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

SYSTEM_PROMPT = "Think first, then answer."


def format_reward(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.search(r"<answer>.*</answer>", text) else 0.0 for text in contents]


def length_reward(completions, **kwargs):
    return [-len(completion[0]["content"]) / 100 for completion in completions]


def make_conversation(example):
    return {
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": example["problem"]},
        ]
    }


dataset = Dataset.from_dict({"problem": ["1 + 1 = ?", "2 + 3 = ?"] * 2}).map(make_conversation)
dataset = dataset.remove_columns(["problem"])

training_args = GRPOConfig(
    output_dir="grpo",
    learning_rate=1e-5,
    remove_unused_columns=False,
    gradient_accumulation_steps=1,
    per_device_train_batch_size=4,
    num_generations=4,
    max_completion_length=8,
    use_vllm=False,
    beta=0.04,
    num_iterations=2,
    scale_rewards="group",
    logging_steps=1,
    max_steps=2,
    use_cpu=True,
    report_to=[],
)
trainer = GRPOTrainer(
    model=os.environ.get("MODEL_PATH", "Qwen/Qwen2-0.5B-Instruct"),
    reward_funcs=[format_reward, length_reward],
    args=training_args,
    train_dataset=dataset,
)
trainer.train()
trainer.save_model(training_args.output_dir)
