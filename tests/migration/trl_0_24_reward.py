# TRL 0.24: a reward model, the library imported whole.
import os

import trl
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model_id = os.environ.get("MODEL_PATH", "Qwen/Qwen2.5-0.5B")
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForSequenceClassification.from_pretrained(model_id, num_labels=1)
model.config.pad_token_id = tokenizer.pad_token_id

dataset = Dataset.from_dict(
    {"chosen": ["The sky is blue.", "Snow is white."] * 2, "rejected": ["The sky is red.", "Snow is hot."] * 2}
)
args = trl.RewardConfig(
    output_dir="reward",
    max_length=64,
    center_rewards_coefficient=1e-2,
    per_device_train_batch_size=2,
    max_steps=2,
    logging_steps=1,
    use_cpu=True,
    report_to="none",
)
trainer: "trl.RewardTrainer" = trl.RewardTrainer(
    model=model, args=args, processing_class=tokenizer, train_dataset=dataset, eval_dataset=None
)
trainer.train()
