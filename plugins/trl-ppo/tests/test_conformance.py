"""PPO keeps what every algorithm must: the conformance kit, with a head on the policy and with a critic of its own."""

import tempfile

import pytest

from trl_core.testing import Subject, conformance, conformance_checks, tiny_classifier

CRITIC = tempfile.TemporaryDirectory()  # by its path, so that every run starts from the same weights
# Batches of 12 completions in six micro-batches; an optimizer step takes three, and a batch lasts for four steps.
PARTS = {"steps_per_generation": None, "num_mini_batches": 2, "stop_token": "eos"}
HEAD = Subject("trl-ppo:ppo", options=PARTS)
NETWORK = Subject("trl-ppo:ppo", options=PARTS, arguments={"value_model": CRITIC.name})
# One optimizer step to a pass, and no term but the policy's, averaged over the tokens of the step.
POLICY = Subject(
    "trl-ppo:ppo",
    options={"steps_per_generation": None, "stop_token": "eos", "loss_type": "dapo", "vf_coef": 0.0},
    arguments={"value_model": CRITIC.name},
)
# The check cuts a step into 1, 2, 4 or 8 micro-batches, which are no two mini-batches. And the losses of the policy
# (bnpo) and of the critic are means over the tokens of a micro-batch by definition; POLICY shows that nothing else is.
EXEMPT = {"check_micro_batches_do_not_matter": "losses are means over micro-batches, which make up mini-batches"}


@pytest.fixture(scope="module", autouse=True)
def critic():
    tiny_classifier(seed=1).save_pretrained(CRITIC.name)
    yield
    CRITIC.cleanup()


test_conformance_with_a_head = conformance(HEAD, EXEMPT)
test_conformance_with_a_network = pytest.mark.slow(conformance(NETWORK, EXEMPT))


@pytest.mark.parametrize(
    "check", [c for c in conformance_checks(POLICY) if c.__name__ == "check_micro_batches_do_not_matter"]
)
def test_split_of_a_step_does_not_matter_to_the_policy(check, tmp_path):
    check(tmp_path)
