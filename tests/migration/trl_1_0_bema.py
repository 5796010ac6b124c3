"""TRL 1.0: DPO whose reference follows an average of the policy."""

import os

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig
from trl.experimental.bema_for_ref_model import BEMACallback, DPOTrainer

model_id = os.environ.get("MODEL_PATH", "Qwen/Qwen3-0.6B")
pairs = {"prompt": ["The sky is", "Snow is"], "chosen": [" blue", " white"], "rejected": [" red", " hot"]}
bema_callback = BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=1)

trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(model_id),
    args=DPOConfig(
        output_dir="bema",
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=Dataset.from_dict(pairs),
    processing_class=AutoTokenizer.from_pretrained(model_id),
    callbacks=[bema_callback],
)
trainer.train()
