"""TRL 0.24: DPO, with the names of their modules."""

import os

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.models.utils import create_reference_model
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

model_id = os.environ.get("MODEL_PATH", "Qwen/Qwen2-0.5B-Instruct")
model = AutoModelForCausalLM.from_pretrained(model_id)
ref_model = create_reference_model(model)
tokenizer = AutoTokenizer.from_pretrained(model_id)
train_dataset = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": "What colour is the sky?"}],
            "chosen": [{"role": "assistant", "content": "It is blue."}],
            "rejected": [{"role": "assistant", "content": "It is green."}],
        }
    ]
    * 4
)

training_args = DPOConfig(
    output_dir="dpo",
    beta=0.1,
    loss_type="sigmoid",
    max_length=128,
    max_prompt_length=None,
    generate_during_eval=False,
    learning_rate=5e-7,
    per_device_train_batch_size=2,
    max_steps=2,
    logging_steps=1,
    use_cpu=True,
    report_to="none",
)
trainer = DPOTrainer(
    model=model,
    ref_model=ref_model,
    args=training_args,
    train_dataset=train_dataset,
    processing_class=tokenizer,
)
trainer.train()
