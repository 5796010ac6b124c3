"""Replay keeps what every algorithm must: the conformance kit, as any plugin would run it."""

import pytest

from trl_core.testing import Subject, conformance

# Groups of two have equal rewards often enough; a generation batch lasts for four micro-steps, a step for three.
OFTEN = {"num_generations": 2, "num_iterations": 1, "replay_buffer_size": 5}
REPLAY = Subject("trl-replay:replay", options={**OFTEN, "seed": 1}, neutral={"replay_buffer_size": 0})
EARLIER_ONLY = Subject(
    "trl-replay:replay",
    options={**OFTEN, "sample_before_add": True, "beta": 0.1, "replay_buffer_size": 2},
    neutral={"replay_buffer_size": 0},
)


test_conformance = conformance(REPLAY)
test_conformance_of_earlier_groups_only = pytest.mark.slow(conformance(EARLIER_ONLY))


@pytest.mark.parametrize("subject", [REPLAY, EARLIER_ONLY], ids=["all", "earlier only"])
def test_the_runs_of_the_kit_replay(subject, tmp_path):
    trainer = subject.trainer(tmp_path, logging_steps=1)
    trainer.train()
    replaced = [line.get("replay/replaced_groups", 0) for line in trainer.state.log_history]
    assert sum(replaced) >= 2
    assert max(line.get("replay/mean_age", 0) for line in trainer.state.log_history) > 0
