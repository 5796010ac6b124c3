# TRL 1.0: PPO has moved to the experimental part.

import os

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

sft_path = os.environ.get("MODEL_PATH", "EleutherAI/pythia-160m")
tokenizer = AutoTokenizer.from_pretrained(sft_path, padding_side="left")

value_model = AutoModelForSequenceClassification.from_pretrained(sft_path, num_labels=1)
reward_model = AutoModelForSequenceClassification.from_pretrained(sft_path, num_labels=1)
ref_policy = AutoModelForCausalLM.from_pretrained(sft_path)
policy = AutoModelForCausalLM.from_pretrained(sft_path)


def tokenize(element):
    return {"input_ids": tokenizer(element["prompt"])["input_ids"]}


dataset = Dataset.from_dict({"prompt": ["the sun", "a cat", "two", "water is"]})
dataset = dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)

training_args = PPOConfig(
    output_dir="ppo",
    learning_rate=3e-6,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
    num_ppo_epochs=1,
    num_mini_batches=1,
    total_episodes=4,
    response_length=6,
    missing_eos_penalty=1.0,
    stop_token="eos",
    kl_coef=0.05,
    use_cpu=True,
    report_to="none",
)
trainer = PPOTrainer(
    args=training_args,
    processing_class=tokenizer,
    model=policy,
    ref_model=ref_policy,
    reward_model=reward_model,
    value_model=value_model,
    train_dataset=dataset,
)
trainer.train()
trainer.save_model(training_args.output_dir)
