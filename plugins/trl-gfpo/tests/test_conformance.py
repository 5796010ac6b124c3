"""GFPO keeps what every algorithm must: the conformance kit, as any plugin would run it."""

import pytest

from trl_core.testing import Subject, conformance_checks

GFPO = Subject(
    "trl-gfpo:gfpo",
    options={"num_remains_in_group": 2},
    arguments={"group_filter_func": "shortest"},
    neutral={"num_remains_in_group": 4},
)


@pytest.mark.parametrize("check", conformance_checks(GFPO))
def test_conformance(check, tmp_path):
    check(tmp_path)
