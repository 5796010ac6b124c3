"""PPO in a minute: reward digits in an answer, at a price for leaving the first policy.

Of its 16 tokens the tiny model writes one digit in two answers; after 40 batches nearly all are digits. With a high
price (`--kl 1`) it stays near where it began, at about one digit in an answer. The critic is a linear head on the
policy, or with `--critic network` a model of its own, which each checkpoint holds as `value_model.safetensors`.

    python ppo_digits.py --kl 1
    python ppo_digits.py --critic network
    python ppo_digits.py --model Qwen/Qwen3-0.6B --steps 40
"""

import argparse
import tempfile

from datasets import Dataset

from trl_core.testing import tiny_classifier, tiny_model, tiny_tokenizer
from trl_ppo import PPOConfig, PPOTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="id or folder of a causal language model; default: a tiny untrained one")
parser.add_argument("--critic", choices=("head", "network"), default="head")
parser.add_argument("--kl", type=float, default=0.05, help="price of a nat of divergence from the first policy")
parser.add_argument("--steps", type=int, default=160, help="optimizer steps, four to a batch")
parser.add_argument("--seed", type=int, default=42)
options = parser.parse_args()

model, tokenizer, critic = options.model, None, None
if options.critic == "network":
    critic = options.model or tiny_classifier(initializer_range=0.02)
if model is None:
    model, tokenizer = tiny_model(initializer_range=0.02), tiny_tokenizer()


def digits(completions, **_):
    """How many digits are in each completion."""
    return [float(sum(letter.isdigit() for letter in text)) for text in completions]


with tempfile.TemporaryDirectory() as folder:
    args = PPOConfig(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=64,
        response_length=16,
        stop_token="eos",
        temperature=1.0,
        kl_coef=options.kl,
        vf_coef=0.5,
        learning_rate=1e-6 if options.model else 3e-3,
        seed=options.seed,
        logging_steps=4,
        save_strategy="no",
        report_to=[],
    )
    prompts = Dataset.from_list([{"prompt": f"{a} + {b} = "} for a in range(8) for b in range(8)])
    trainer = PPOTrainer(model, digits, args, prompts, processing_class=tokenizer, value_model=critic)
    trainer.train()

lines = [line for line in trainer.state.log_history if "loss" in line]
for line in lines[:: len(lines) // 8 or 1]:
    print(f"episode {line['episode']:5}  reward {line['reward']:.2f}  KL {line.get('objective/kl', 0):5.2f}", end="  ")
    print(f"value loss {line['loss/value_avg']:.4f}  entropy {line['policy/entropy_avg']:.2f}")
last = lines[-10:]
print(f"mean reward of the last {len(last)} batches: {sum(line['reward'] for line in last) / len(last):.2f}")
