# TRL 1.0: GRPO with a replay buffer, by its module.
import os

from datasets import Dataset
from trl.experimental import grpo_with_replay_buffer as replay


def accuracy(completions, answer, **kwargs):
    return [1.0 if right in text else 0.0 for text, right in zip(completions, answer, strict=True)]


dataset = Dataset.from_list([{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "1 + 2 =", "answer": "3"}] * 2)
trainer = replay.GRPOWithReplayBufferTrainer(
    model=os.environ.get("MODEL_PATH", "Qwen/Qwen3-0.6B"),
    reward_funcs=[accuracy],
    args=replay.GRPOWithReplayBufferConfig(
        output_dir="replay",
        replay_buffer_size=8,
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=8,
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=dataset,
)
trainer.train()
