"""What a hook returns is checked where it is returned, with the hook's name."""

import inspect

import pytest
import torch
from datasets import Dataset

import trl_core
from trl_core import errors
from trl_core.hookspecs import HookSpecs
from trl_core.testing import FixedRollouts, tiny_model, tiny_tokenizer

GENERATION = {"completion_ids": [[7, 1], [8, 9, 1], [9, 1], [5, 6, 7, 1]]}  # 11 tokens


def make_trainer(folder, backend, **options):
    args = trl_core.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        **options,
    )
    return trl_core.GRPOTrainer(
        model=tiny_model(),
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "ab"}]),
        processing_class=tiny_tokenizer(),
        rollouts=backend,
    )


def backend_with(hook, answer):
    """A backend that replays completions and gives this answer, a function of what the hook takes, to a hook."""
    arguments = list(inspect.signature(getattr(HookSpecs, hook)).parameters)
    scope = {"answer": answer, "hookimpl": trl_core.hookimpl}
    named = ", ".join(arguments[1:])
    exec(f"@hookimpl\ndef {hook}({', '.join(arguments)}): return answer({named})", scope)
    return type("Backend", (FixedRollouts,), {hook: scope[hook]})([GENERATION])


def backend_that_selects(answer):
    return backend_with("select", answer)


@pytest.mark.parametrize(
    ("hook", "answer", "named"),
    [
        ("loss_terms", {"policy": torch.tensor(1.0)}, "loss term 'policy'"),
        ("loss_terms", {"mine": torch.zeros(4)}, "loss term 'mine'"),
        ("log_ratio", torch.zeros(4), "log_ratio"),
        ("advantages", [0.0, 0.0, 0.0, 0.0], "advantages returned a list"),
        ("advantages", torch.zeros(3), r"shape \(3,\); expected a real tensor of shape \(4,\) or \(11,\) or \(11, 1\)"),
        ("score", [[0.0]] * 4, "score returned a list"),
        ("score", torch.zeros(4, 2), r"\(4, 1\)"),
        ("reference_logps", torch.zeros(3), "reference_logps"),
        ("generate", [[7, 1]] * 4, "generate returned a list"),
    ],
)
def test_answer_of_wrong_form_names_what_was_wrong(tmp_path, hook, answer, named):
    options = {"beta": 0.1} if hook == "reference_logps" else {}
    trainer = make_trainer(tmp_path, backend_with(hook, lambda *_: answer), **options)
    with pytest.raises(errors.HookResultError, match=f"{named}(?s:.)*It is the hook {hook!r} of rollouts"):
        trainer.train()


def test_select_that_returns_none_is_told(tmp_path):
    # pluggy takes None for "no answer": without a check the trainer's own provider would answer in its place.
    trainer = make_trainer(tmp_path, backend_that_selects(lambda samples: None))
    with pytest.raises(errors.HookResultError, match="select returned nothing"):
        trainer.train()


def test_select_of_wrong_type_names_the_hook(tmp_path):
    trainer = make_trainer(tmp_path, backend_that_selects(lambda samples: [samples]))
    with pytest.raises(errors.HookResultError, match="select returned a list"):
        trainer.train()


def test_provider_of_select_gets_old_logps(tmp_path):
    seen = []

    def answer(samples):
        seen.append(samples.old_logps)
        return samples

    make_trainer(tmp_path, backend_that_selects(answer)).train()
    assert seen[0].shape == (11,)
