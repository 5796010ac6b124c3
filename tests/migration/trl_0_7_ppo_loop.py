# TRL 0.7: a loop over the trainer's data loader, with a reward for short answers.
import os

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, set_seed
from trl.core import LengthSampler
from trl.import_utils import is_peft_available

config = PPOConfig(
    model_name=os.environ.get("MODEL_PATH", "lvwerra/gpt2-imdb"),
    learning_rate=1.41e-5,
    batch_size=4,
    mini_batch_size=2,
    gradient_accumulation_steps=1,
    ppo_epochs=2,
    init_kl_coef=0.2,
    adap_kl_ctrl=True,
    log_with=None,
)
set_seed(config.seed)
peft_config = None if is_peft_available() else False


def build_dataset(config, input_min_text_length=2, input_max_text_length=6):
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    tokenizer.pad_token = tokenizer.eos_token
    input_size = LengthSampler(input_min_text_length, input_max_text_length)
    ds = Dataset.from_dict({"review": ["this film is long and dull", "a joy from start to end"] * 4})

    def tokenize(sample):
        sample["input_ids"] = tokenizer.encode(sample["review"])[: input_size()]
        sample["query"] = tokenizer.decode(sample["input_ids"])
        return sample

    ds = ds.map(tokenize, batched=False)
    ds.set_format(type="torch")
    return ds


def collator(data):
    return {key: [d[key] for d in data] for key in data[0]}


dataset = build_dataset(config)
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token

ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)
generation_kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "max_new_tokens": 8}
generation_kwargs["pad_token_id"] = tokenizer.eos_token_id

for epoch, batch in tqdm(enumerate(ppo_trainer.dataloader)):
    query_tensors = batch["input_ids"]
    response_tensors = ppo_trainer.generate(query_tensors, return_prompt=False, **generation_kwargs)
    batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]
    rewards = [torch.tensor(1.0 / (1 + len(text))) for text in batch["response"]]
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    if epoch == 1:
        break
ppo_trainer.save_pretrained("short-answers")
