"""The ten lines that TRL 0.7 greeted with: answer a query, score the answer, make one step.

python classic_ten_lines.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse

import torch
from transformers import AutoTokenizer

from trl_ppo.classic import (
    AutoModelForCausalLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
    respond_to_batch,
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="gpt2", help="id or folder of a causal language model")
name = parser.parse_args().model

# the model with a value head, its frozen copy, and the tokenizer
model = AutoModelForCausalLMWithValueHead.from_pretrained(name)
ref_model = create_reference_model(model)
tokenizer = AutoTokenizer.from_pretrained(name)

# a batch of one row
ppo_config = PPOConfig(batch_size=1, mini_batch_size=1)

# a query and a response
query_tensor = tokenizer.encode("This morning I went to the ", return_tensors="pt")
response_tensor = respond_to_batch(model, query_tensor)

# one step with a score, which could come from a person or a model
ppo_trainer = PPOTrainer(ppo_config, model, ref_model, tokenizer)
reward = [torch.tensor(1.0)]
train_stats = ppo_trainer.step([query_tensor[0]], [response_tensor[0]], reward)

print("response:", repr(tokenizer.decode(response_tensor[0])))
for key in ("objective/kl", "ppo/mean_scores", "ppo/loss/policy", "ppo/loss/value", "ppo/loss/total"):
    print(f"{key}: {train_stats[key]:.4f}")
