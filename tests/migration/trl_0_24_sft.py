"""TRL 0.24: supervised fine-tuning on question and answer."""

import os

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

model_id = os.environ.get("MODEL_PATH", "Qwen/Qwen2.5-0.5B")
model = AutoModelForCausalLM.from_pretrained(model_id)
tokenizer = AutoTokenizer.from_pretrained(model_id)
dataset = Dataset.from_list(
    [{"prompt": "The sky is", "completion": " blue."}, {"prompt": "2 + 2 =", "completion": " 4"}] * 4
)
dataset = dataset.train_test_split(test_size=0.25)

training_args = SFTConfig(
    output_dir="sft",
    max_length=64,
    packing=False,
    completion_only_loss=True,
    dataset_kwargs=None,
    dataset_num_proc=None,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
    gradient_checkpointing=True,
    warmup_ratio=0.1,
    overwrite_output_dir=True,
    eval_strategy="steps",
    eval_steps=1,
    logging_steps=1,
    max_steps=2,
    use_cpu=True,
    report_to="none",
)
trainer = SFTTrainer(
    model=model,
    args=training_args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(training_args.output_dir)
