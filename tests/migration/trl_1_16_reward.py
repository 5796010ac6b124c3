# TRL 1.16: a reward model from a name, with messages.
import os

import trl.trainer.reward_trainer as rewards
from datasets import Dataset
from trl import RewardConfig

question = {"role": "user", "content": "What colour is snow?"}
dataset = Dataset.from_dict(
    {
        "prompt": [[question]] * 4,
        "chosen": [[{"role": "assistant", "content": "White."}]] * 4,
        "rejected": [[{"role": "assistant", "content": "Black."}]] * 4,
    }
)
trainer = rewards.RewardTrainer(
    model=os.environ.get("MODEL_PATH", "Qwen/Qwen3-0.6B"),
    args=RewardConfig("reward", per_device_train_batch_size=2, max_steps=2, use_cpu=True, report_to="none"),
    train_dataset=dataset,
)
trainer.train()
