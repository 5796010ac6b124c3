# TRL 1.16: supervised fine-tuning on messages.
import os

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

messages = [
    {"role": "user", "content": "What colour is the sky?"},
    {"role": "assistant", "content": "Blue."},
]
trainer = SFTTrainer(
    model=os.environ.get("MODEL_PATH", "Qwen/Qwen3-0.6B"),
    args=SFTConfig(
        output_dir="sft",
        model_init_kwargs={"dtype": "float32"},
        max_length=None,
        packing=False,
        loss_type="nll",
        per_device_train_batch_size=2,
        num_train_epochs=1,
        max_steps=2,
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"messages": [messages] * 4}),
)
trainer.train()
