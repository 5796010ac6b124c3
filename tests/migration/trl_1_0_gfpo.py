"""TRL 1.0: GFPO keeps the shortest answers."""

import os

from datasets import Dataset
from trl.experimental.gfpo import GFPOConfig, GFPOTrainer


class ShortestFilter:
    def __call__(self, group_completions, group_rewards, **kwargs):
        return [[-float(len(text)) for text in completions] for completions in group_completions]


def unique_letters(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


training_args = GFPOConfig(
    output_dir="gfpo",
    num_generations=4,
    num_remains_in_group=2,
    per_device_train_batch_size=4,
    max_completion_length=8,
    max_steps=2,
    logging_steps=1,
    use_cpu=True,
    report_to="none",
)
trainer = GFPOTrainer(
    model=os.environ.get("MODEL_PATH", "Qwen/Qwen3-0.6B"),
    reward_funcs=unique_letters,
    train_dataset=Dataset.from_dict({"prompt": ["one", "two", "three", "four"]}),
    args=training_args,
    group_filter_func=ShortestFilter(),
)
trainer.train()
