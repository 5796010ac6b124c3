"""GFPO in a minute: reward a digit in the answer, without the length that such a reward breeds.

Longer answers hold a digit more often, so GRPO learns to go on. GFPO trains only on the four shortest of sixteen: the
reward rises nearly as far and the length stays. The tiny model goes from 16 tokens to 23 with `--keep 16`, which is
GRPO, and stays at 16 with `--keep 4`, the default.

    python shortest_answer.py --keep 16
    python shortest_answer.py --model Qwen/Qwen3-0.6B --steps 20
"""

import argparse
import tempfile

from datasets import Dataset

from trl_core.testing import tiny_model, tiny_tokenizer
from trl_gfpo import GFPOConfig, GFPOTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="id or folder of a causal language model; default: a tiny untrained one")
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--keep", type=int, default=4, help="completions of each group of 16 to train on")
options = parser.parse_args()

model, tokenizer = options.model, None
if model is None:
    model, tokenizer = tiny_model(initializer_range=0.02), tiny_tokenizer()
    # Punctuation ends an answer: the tiny model has never seen a text and would hardly ever stop.
    model.generation_config.eos_token_id = tokenizer(" .,;:!?\n")["input_ids"]


def has_digit(completions, **_):
    """1 for a completion with a digit in it."""
    return [float(any(letter.isdigit() for letter in text)) for text in completions]


with tempfile.TemporaryDirectory() as folder:
    args = GFPOConfig(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=64,
        num_generations=16,
        num_remains_in_group=options.keep,
        max_completion_length=24,
        learning_rate=1e-6 if options.model else 3e-3,
        logging_steps=options.steps // 8 or 1,
        save_strategy="no",
        report_to=[],
    )
    prompts = Dataset.from_list([{"prompt": f"{a} + {b} = "} for a in range(5) for b in range(5)])
    trainer = GFPOTrainer(model, has_digit, args, prompts, processing_class=tokenizer, group_filter_func="shortest")
    trainer.train()

for line in trainer.state.log_history[:-1]:
    print(f"step {line['step']:4}  reward {line['gfpo/reward_all']:.2f}", end="  ")
    print(f"length {line['completions/mean_length']:4.1f}, of kept {line['gfpo/mean_kept_length']:4.1f}")
