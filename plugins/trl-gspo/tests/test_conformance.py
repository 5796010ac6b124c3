"""GSPO and GSPO-token keep what every algorithm must: the conformance kit, as any plugin would run it."""

import pytest

from trl_core.testing import Subject, conformance

AS_GRPO = {"importance_sampling_level": "token", "loss_type": "dapo", "epsilon": 0.2, "epsilon_high": None}


def late(completion_ids, advantages):
    """The row's advantage, more of it at later tokens."""
    pairs = zip(completion_ids, advantages, strict=True)
    return [[advantage * (i + 1) / len(ids) for i in range(len(ids))] for ids, advantage in pairs]


GSPO = Subject("trl-gspo:gspo", neutral=AS_GRPO)
# Beside GRPO with the same loss, so that the ratio alone makes the difference.
GSPO_TOKEN = Subject(
    "trl-gspo:gspo_token", options={"loss_type": "grpo", "epsilon": 0.1, "beta": 0.1}, neutral={**AS_GRPO, "beta": 0.0}
)
# In a composition, which is where rows are dropped and the answer of another algorithm is in between.
WITH_FUNCTION = Subject(
    "trl-gspo:gspo_token+trl-gfpo:gfpo",
    options={"loss_type": "dapo", "epsilon": 0.1, "num_remains_in_group": 2},
    arguments={"advantage_func": late, "group_filter_func": "shortest"},
)


test_conformance_of_gspo = conformance(GSPO)
test_conformance_of_gspo_token = conformance(GSPO_TOKEN)
test_conformance_with_an_advantage_function = pytest.mark.slow(conformance(WITH_FUNCTION))
