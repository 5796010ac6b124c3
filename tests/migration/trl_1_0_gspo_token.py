# TRL 1.0: GSPO-token; the trainer has the name of GRPO's.
import os

from datasets import Dataset
from trl import GRPOConfig
from trl.experimental.gspo_token import GRPOTrainer

training_args = GRPOConfig(
    output_dir="gspo-token",
    importance_sampling_level="sequence_token",
    loss_type="grpo",
    beta=0.0,
    epsilon=3e-4,
    epsilon_high=4e-4,
    gradient_accumulation_steps=1,
    steps_per_generation=2,
    num_generations=4,
    per_device_train_batch_size=4,
    max_completion_length=8,
    max_steps=2,
    logging_steps=1,
    use_cpu=True,
    report_to="none",
)
trainer = GRPOTrainer(
    model=os.environ.get("MODEL_PATH", "Qwen/Qwen3-0.6B"),
    reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
    args=training_args,
    train_dataset=Dataset.from_dict({"prompt": ["one", "two", "three", "four"]}),
)
trainer.train()
