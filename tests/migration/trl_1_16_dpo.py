# TRL 1.16: DPO with two losses; pairs with the prompt in both sides.
import os

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

question = {"role": "user", "content": "What colour is snow?"}
dataset = Dataset.from_dict(
    {
        "chosen": [[question, {"role": "assistant", "content": "White."}]] * 4,
        "rejected": [[question, {"role": "assistant", "content": "Black."}]] * 4,
    }
)
training_args = DPOConfig(
    "dpo",
    loss_type=["sigmoid", "sft"],
    loss_weights=[1.0, 0.5],
    precompute_ref_log_probs=True,
    max_length=128,
    per_device_train_batch_size=2,
    max_steps=2,
    use_cpu=True,
    report_to="none",
)
trainer = DPOTrainer(os.environ.get("MODEL_PATH", "Qwen/Qwen3-0.6B"), args=training_args, train_dataset=dataset)
trainer.train()
