"""GSPO-token in a minute: reward the share of digits in an answer, and tell each token what it had to do with it.

One advantage for a whole answer praises its letters along with its digits. An advantage function can do better: here a
digit gets what it adds to the share and a letter what it takes away, measured against the share of all answers.

    python credit_per_token.py             # an advantage for each token
    python credit_per_token.py --rows      # the same with GRPO's advantage for each answer
    python credit_per_token.py --model Qwen/Qwen3-0.6B --steps 20
"""

import argparse
import tempfile

from datasets import Dataset
from transformers import AutoTokenizer

from trl_core.testing import tiny_model, tiny_tokenizer
from trl_gspo import GSPOTokenConfig, GSPOTokenTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="id or folder of a causal language model; default: a tiny untrained one")
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--rows", action="store_true", help="one advantage per answer")
parser.add_argument("--seed", type=int, default=42)
options = parser.parse_args()

model, tokenizer = options.model, AutoTokenizer.from_pretrained(options.model) if options.model else tiny_tokenizer()
if model is None:
    model = tiny_model(initializer_range=0.02)
digits = {i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip().isdecimal()}


def share_of_digits(completion_ids, **_):
    """The reward: how many of the tokens are digits."""
    return [sum(token in digits for token in ids) / len(ids) for ids in completion_ids]


def for_what_it_is(completion_ids, rewards):
    """For each token, whether it is a digit, against the mean share of digits."""
    usual = sum(rewards) / len(rewards)
    return [[(token in digits) - usual for token in ids] for ids in completion_ids]


with tempfile.TemporaryDirectory() as folder:
    args = GSPOTokenConfig(
        output_dir=folder,
        seed=options.seed,
        max_steps=options.steps,
        per_device_train_batch_size=16,
        steps_per_generation=4,  # of which each makes a step, so the ratios leave 1
        num_generations=8,
        max_completion_length=16,
        epsilon=0.05,  # the ratio of an answer stays closer to 1 than that of a token; the paper has 3e-4
        learning_rate=1e-6 if options.model else 1e-3,
        lr_scheduler_type="constant",
        logging_steps=options.steps // 8 or 1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    prompts = Dataset.from_list([{"prompt": f"{a} + {b} = "} for a in range(5) for b in range(5)])
    function = None if options.rows else for_what_it_is
    trainer = GSPOTokenTrainer(
        model, share_of_digits, args, prompts, processing_class=tokenizer, advantage_func=function
    )
    trainer.train()

for line in (line for line in trainer.state.log_history if "reward" in line and "loss" in line):
    print(f"step {line['step']:4}  share of digits {line['reward']:.3f}")
