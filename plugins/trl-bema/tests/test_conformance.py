"""BEMA keeps what every algorithm must: the conformance kit, as any plugin would run it."""

from trl_core.testing import Subject, conformance

BEMA = Subject(
    "trl-bema:bema",
    options={"update_freq": 1, "ref_model_update_freq": 2, "lag": 1},
    neutral={"update_ref_model": False},
)


test_conformance = conformance(BEMA)
