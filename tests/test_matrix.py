"""What docs/composition.md says of every pair of algorithms of this repository is so."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch

from trl_core import get_config, get_trainer
from trl_core.errors import CompositionError, HookResultError, PluginConflict
from trl_core.testing import Subject

ROOT = Path(__file__).resolve().parent.parent
_SPEC = importlib.util.spec_from_file_location("gen_docs", ROOT / "tools" / "gen_docs.py")
gen_docs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(gen_docs)

PAIRS = [pair for names in gen_docs.families().values() for pair in itertools.permutations(names, 2)]
REASONS = {"+".join(pair): gen_docs.refusal(*pair) for pair in PAIRS}
COMPOSED = [name for name, reason in REASONS.items() if reason is None]
REFUSED = [name for name, reason in REASONS.items() if reason is not None]
TRIPLES = ["+".join(names) for names in itertools.permutations(("gfpo", "gspo_token", "replay"))]

# Under these each algorithm acts, and this is how it shows.
OPTIONS = {"gfpo": {"num_remains_in_group": 2}, "replay": {"replay_buffer_size": 3}, "bema": {"update_freq": 1}}
ARGUMENTS = {"gfpo": {"group_filter_func": "shortest"}}
SHORT = {"max_steps": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 1}


def signs(trainer):
    """The algorithms that left a trace in a run."""
    names = {name for line in trainer.state.log_history for name in line}
    found = {name for name in ("gfpo", "replay") if any(metric.startswith(f"{name}/") for metric in names)}
    level = getattr(trainer.args, "importance_sampling_level", None)
    found |= {"sequence": {"gspo"}, "sequence_token": {"gspo_token"}}.get(level, set())
    return (
        found | {"bema"}
        if hasattr(trainer.args, "update_ref_model") and trainer.hooks.objects["bema"].state_dict()
        else found
    )


def subject_of(name):
    parts = name.split("+")
    options = {key: value for part in parts for key, value in OPTIONS.get(part, {}).items()}
    arguments = {key: value for part in parts for key, value in ARGUMENTS.get(part, {}).items()}
    return Subject(name, options={**options, "logging_steps": 1}, arguments=arguments)


def test_there_is_a_pair_of_every_kind():
    assert {"gfpo+replay", "replay+gspo_token", "bema+dpo"} <= set(COMPOSED)
    assert "gspo+gspo_token" in REFUSED


@pytest.mark.parametrize("name", [*COMPOSED, *TRIPLES])
def test_composition_trains_and_resumes(name, tmp_path):
    subject = subject_of(name)
    steps = SHORT if subject.online else {"max_steps": 4}
    trainer = subject.trainer(tmp_path / "all", save_strategy="steps", save_steps=1, **steps)
    before = subject.weights(trainer)
    trainer.train()
    after = subject.weights(trainer)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert signs(trainer) == set(name.split("+")) - {"grpo", "dpo"}
    resumed = subject.train(tmp_path / "resumed", resume=tmp_path / "all" / "checkpoint-3", **steps)
    assert all(torch.equal(value, resumed[key]) for key, value in after.items())


@pytest.mark.parametrize("name", REFUSED)
def test_composition_is_refused_for_the_reason_given(name):
    with pytest.raises(PluginConflict) as error:
        get_config(name)
    assert error.value.what == REASONS[name]
    assert error.value.mend
    assert REASONS[name] in (ROOT / "docs" / "composition.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["ppo+gfpo", "dpo+gspo", "sft+reward", "bema+replay"])
def test_different_bases_do_not_compose(name):
    with pytest.raises(CompositionError, match="builds on"):
        get_trainer(name)


def doubled(completion_ids, advantages):
    """Per token: twice the row's advantage at the first token, nothing elsewhere."""
    return [[2 * value] + [0.0] * (len(ids) - 1) for ids, value in zip(completion_ids, advantages, strict=True)]


def test_gfpo_refuses_to_drop_advantages_of_another_algorithm(tmp_path):
    options, arguments = {**OPTIONS["gfpo"], "gfpo_std": "population"}, {**ARGUMENTS["gfpo"], "advantage_func": doubled}
    outer = Subject("gspo_token+gfpo", options=options, arguments=arguments)
    with pytest.raises(HookResultError, match="drop those of another algorithm"):
        outer.train(tmp_path / "outer", **SHORT)
    Subject("gfpo+gspo_token", options=options, arguments=arguments).train(tmp_path / "inner", **SHORT)
