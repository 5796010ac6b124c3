"""BEMA keeps what every algorithm must: the conformance kit, as any plugin would run it."""

import pytest

from trl_core.testing import Subject, conformance_checks

BEMA = Subject(
    "trl-bema:bema",
    options={"update_freq": 1, "ref_model_update_freq": 2, "lag": 1},
    neutral={"update_ref_model": False},
)


@pytest.mark.parametrize("check", conformance_checks(BEMA))
def test_conformance(check, tmp_path):
    check(tmp_path)
