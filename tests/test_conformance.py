"""The conformance kit: sound algorithms pass it, and each kind of fault fails the one check that is named after it."""

from unittest import SkipTest

import pytest

from trl_core.errors import AlgorithmNotFoundError, ConfigError, ConformanceError
from trl_core.testing import Subject, conformance_checks
from trl_core.testing.conformance import CHECKS

from .helpers_dist import write_distribution

# An algorithm with one option: it multiplies advantages. Faults are put in by replacing a piece of it.
SOUND = """
from dataclasses import dataclass
import random
from trl_core import Algorithm, hookimpl, option

@dataclass
class Options:
    factor: float = option(1.0, "Multiplies advantages.")

class Hooks:
    def __init__(self, context):
        self.context, self.factor, self.calls = context, context.args.factor, 0

    @hookimpl(wrapper=True)
    def advantages(self, rollouts):
        result = yield
        return result * self.factor

    @hookimpl
    def loss_terms(self, samples, logps):
        return {}

    @hookimpl
    def after_step(self):
        pass

algorithm = Algorithm(name=NAME, summary="For tests.", extends="grpo", config=Options, hooks=Hooks)
"""
RESULT = "return result * self.factor"
COUNTS = (RESULT, "self.calls += self.context.training and self.factor != 1\n        return result * (1 + self.calls)")
STATE = (
    "\n    def state_dict(self):\n        return {{'calls': self.calls}}\n\n    def load_state_dict(self, state):\n{}\n"
)
AFTER_STEP = "def after_step(self):\n        pass\n"

# Name of the fault: the check that finds it, what is replaced by what.
FAULTS = {
    "imported_at_start": ("check_is_listed_without_import", "", ""),
    "without_range": ("check_declares_its_range", "", ""),
    "other_name": ("check_loads", "name=NAME", "name='other'"),
    "import_error": ("check_loads", "import random", "import no_such_module_at_all"),
    "default_argument": ("check_hooks_fit_the_contract", "(self, rollouts)", "(self, rollouts=None)"),
    "misspelt_hook": ("check_hooks_fit_the_contract", "def loss_terms", "def loss_term"),
    "unknown_argument": ("check_hooks_fit_the_contract", "(self, samples, logps)", "(self, samples, log_probs)"),
    "without_help": ("check_options_have_default_and_help", 'option(1.0, "Multiplies advantages.")', "1.0"),
    "without_default": ("check_options_have_default_and_help", ' = option(1.0, "Multiplies advantages.")', ""),
    "option_of_base": (
        "check_options_are_new",
        "class Options:",
        "class Options:\n    beta: float = option(0.0, 'B.')",
    ),
    "seedless": ("check_same_seed_gives_same_weights", "* self.factor", "* random.SystemRandom().random()"),
    "does_nothing": ("check_acts", RESULT, "return result"),
    "not_neutral": ("check_neutral_setting_equals_base", "* self.factor", "* (self.factor + 0.001)"),
    "denominator": (
        "check_micro_batches_do_not_matter",
        "return {}",
        "return {'mine': logps * (self.factor - 1) / samples.num_rows}",
    ),
    "forgets_state": ("check_resumes_exactly_at_every_step", *COUNTS),
    "learns_in_evaluation": (
        "check_evaluation_changes_nothing",
        RESULT,
        "self.calls += not self.context.training\n        return result * (self.factor + self.calls)\n"
        + STATE.format("        self.calls = state['calls']"),
    ),
    "drops_state": (
        "check_state_survives_storage",
        AFTER_STEP,
        "def after_step(self):\n        self.calls += 1\n" + STATE.format("        pass"),
    ),
    "changes_argument": (
        "check_hooks_leave_their_arguments_alone",
        "result = yield\n        return result * self.factor",
        "rollouts.reward *= self.factor\n        return (yield)",
    ),
}


def install(packages, name, old="", new=""):
    """Install SOUND under this name, with `old` replaced, and return how to test it."""
    assert old in SOUND
    source = (SOUND.replace(old, new) if old else SOUND).replace("NAME", repr(name))
    files = {f"trl_{name}.py": source}
    if name == "imported_at_start":
        files["sitecustomize.py"] = f"import trl_{name}"
    requires = ["trl-core" if name == "without_range" else "trl-core>=0.1"]
    points = {"trl_core.experimental": {name: f"trl_{name}:algorithm"}}
    write_distribution(packages, f"trl-{name}", points, files=files, requires=requires)
    return Subject(name, options={"factor": 3.0, "max_steps": 3}, neutral={"factor": 1.0})


def outcomes(subject, folder, exempt=None):
    """What became of each check: None, or the error it raised."""
    found = {}
    for check in conformance_checks(subject, exempt):
        try:
            found[check.__name__] = check(folder / check.__name__)
        except Exception as error:
            found[check.__name__] = error
    return found


def failed(found):
    return [name for name, error in found.items() if error is not None and not isinstance(error, SkipTest)]


# -- sound algorithms --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("check", conformance_checks(Subject("trl-core:grpo")))
def test_grpo_conforms(check, tmp_path):
    check(tmp_path)


WITH_STATE = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "entropy_coef": 0.01}
PER_MICRO_BATCH = {"check_micro_batches_do_not_matter": "the entropy bonus is a mean over each micro-batch"}


@pytest.mark.parametrize(
    "check",
    conformance_checks(
        Subject("trl-core:grpo", {**WITH_STATE, "use_adaptive_entropy": True, "entropy_target": 99.0}), PER_MICRO_BATCH
    ),
)
def test_grpo_with_reference_and_adaptive_entropy_conforms(check, tmp_path):
    check(tmp_path)


def test_sound_plugin_passes_every_check(packages, tmp_path):
    assert set(outcomes(install(packages, "sound"), tmp_path).values()) == {None}


# -- faults ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_fails_exactly_its_check(fault, packages, tmp_path):
    check, old, new = FAULTS[fault]
    assert failed(outcomes(install(packages, fault, old, new), tmp_path)) == [check]


def test_every_check_has_a_fault():
    assert {check.__name__ for check in CHECKS} == {check for check, _, _ in FAULTS.values()}


def test_every_check_says_what_it_checks():
    assert all(check.__doc__ for check in CHECKS)


def test_failure_says_how_to_mend(packages, tmp_path):
    found = outcomes(install(packages, "mend_me", *FAULTS["without_help"][1:]), tmp_path)
    assert "'factor' has no help text.\n  To mend: Write factor: ... = option" in str(
        found["check_options_have_default_and_help"]
    )


def test_checks_that_build_on_a_failed_one_name_it(packages, tmp_path):
    found = outcomes(install(packages, "skipped", *FAULTS["default_argument"][1:]), tmp_path)
    skipped = found["check_resumes_exactly_at_every_step"]
    assert isinstance(skipped, SkipTest)
    assert "check_hooks_fit_the_contract: The hook 'advantages'" in str(skipped)


# -- exemptions --------------------------------------------------------------------------------------------------------
def test_exempt_failure_is_skipped_with_its_reason(packages, tmp_path):
    subject = install(packages, "exempted", *FAULTS["without_help"][1:])
    found = outcomes(subject, tmp_path, {"check_options_have_default_and_help": "it explains itself"})
    assert failed(found) == []
    assert "Exempt, it explains itself: The option 'factor'" in str(found["check_options_have_default_and_help"])


def test_stale_exemption_fails(tmp_path):
    checks = conformance_checks(Subject("grpo"), {"check_loads": "it once did not"})
    check = next(check for check in checks if check.__name__ == "check_loads")
    with pytest.raises(ConformanceError, match="check_loads passes, but is exempt"):
        check(tmp_path)


def test_exemption_of_an_unknown_check_is_refused():
    with pytest.raises(ConfigError, match="check_lods"):
        conformance_checks(Subject("grpo"), {"check_lods": "a typo"})


def test_subject_that_is_not_installed_is_refused():
    with pytest.raises(AlgorithmNotFoundError, match="'no_such_algorithm'"):
        Subject("no_such_algorithm")
