"""GFPO keeps what every algorithm must: the conformance kit, as any plugin would run it."""

import pytest

from trl_core.testing import Subject, conformance

GFPO = Subject(
    "trl-gfpo:gfpo",
    options={"num_remains_in_group": 2},
    arguments={"group_filter_func": "shortest"},
    neutral={"num_remains_in_group": 4},
)
LEVELS = {"k_very_hard": 4, "k_hard": 3, "k_medium": 3, "k_easy": 2}
ADAPTIVE = Subject(
    "trl-gfpo:gfpo",
    options={"adaptive_difficulty": True, "difficulty_warmup": 2, **LEVELS},
    arguments={"group_filter_func": "token_efficiency"},
    neutral=dict.fromkeys(LEVELS, 4),
)
AS_IN_THE_PAPER = Subject(
    "trl-gfpo:gfpo",
    options={"num_remains_in_group": 2, "gfpo_denominator": "all", "gfpo_std": "population"},
    arguments={"group_filter_func": "shortest"},
)


test_conformance = conformance(GFPO)
test_conformance_with_adaptive_difficulty = pytest.mark.slow(conformance(ADAPTIVE))
test_conformance_with_the_papers_options = pytest.mark.slow(conformance(AS_IN_THE_PAPER))
