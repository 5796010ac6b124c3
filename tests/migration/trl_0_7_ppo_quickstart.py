# TRL 0.7: one query, one response, one score, one step.
import os

import torch
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from trl.core import respond_to_batch

model_name = os.environ.get("MODEL_PATH", "gpt2")

model = AutoModelForCausalLMWithValueHead.from_pretrained(model_name)
model_ref = create_reference_model(model)
tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.eos_token

ppo_config = PPOConfig(batch_size=1, mini_batch_size=1)
ppo_trainer = PPOTrainer(ppo_config, model, model_ref, tokenizer)

query = tokenizer.encode("In the morning I like to ", return_tensors="pt")
response = respond_to_batch(model, query, txt_len=8)
reward = [torch.tensor(1.0)]
train_stats = ppo_trainer.step([query[0]], [response[0]], reward)
print(train_stats["objective/kl"])
