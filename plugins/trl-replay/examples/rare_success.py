"""Replay in a minute: learn to begin an answer with a digit, which is rare at first.

Three of four groups of eight begin without any right answer; such a group teaches nothing. With `--buffer 0`, which is
GRPO, these places of a step are empty; with a buffer groups that taught something before fill them. Watch what is
replaced, and how old it is. The task is so easy that both learn it alike.

    python rare_success.py --buffer 0
    python rare_success.py --model Qwen/Qwen3-0.6B --steps 20
"""

import argparse
import tempfile

from datasets import Dataset

from trl_core.testing import tiny_model, tiny_tokenizer
from trl_replay import GRPOWithReplayBufferConfig, GRPOWithReplayBufferTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="id or folder of a causal language model; default: a tiny untrained one")
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--buffer", type=int, default=32, help="groups of eight to hold for replay; 0: none")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

model, tokenizer = options.model, None
if model is None:
    model, tokenizer = tiny_model(initializer_range=0.02), tiny_tokenizer()


def begins_with_a_digit(completions, **_):
    """1 for a completion whose first character is a digit."""
    return [float(text[:1].isdigit()) for text in completions]


with tempfile.TemporaryDirectory() as folder:
    args = GRPOWithReplayBufferConfig(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=64,
        num_generations=8,
        replay_buffer_size=options.buffer,
        max_completion_length=6,
        learning_rate=1e-6 if options.model else 2e-3,
        logging_steps=options.steps // 8 or 1,
        seed=options.seed,
        save_strategy="no",
        report_to=[],
    )
    prompts = Dataset.from_list([{"prompt": f"{a} + {b} = "} for a in range(5) for b in range(5)])
    trainer = GRPOWithReplayBufferTrainer(model, begins_with_a_digit, args, prompts, processing_class=tokenizer)
    trainer.train()

for line in trainer.state.log_history[:-1]:
    print(f"step {line['step']:4}  reward {line['reward']:.2f}", end="  ")
    print(f"equal rewards {line['frac_reward_zero_std']:.2f}", end="  ")
    print(f"replaced {line.get('replay/replaced_groups', 0):.1f} of 8", end="  ")
    print(f"held {line.get('replay/size', 0):4.1f}  age {line.get('replay/mean_age', float('nan')):4.1f}")
