"""The conformance kit: sound algorithms pass it, and each kind of fault fails the one check that is named after it."""

import re
from unittest import SkipTest

import pytest

from trl_core.errors import AlgorithmNotFoundError, ConfigError, ConformanceError
from trl_core.testing import Subject, conformance, conformance_checks
from trl_core.testing.checks import (
    CHECKS,
    check_evaluation_changes_nothing,
    check_layout_does_not_matter,
    check_micro_batches_do_not_matter,
    check_resumes_exactly_at_every_step,
)

from .helpers_dist import write_distribution

# Algorithms with one option: a factor of the advantages, of the losses of pairs, or of a term. Faults are put in by
# replacing a piece of one.
SOUND = """
from dataclasses import dataclass
import random
from trl_core import Algorithm, hookimpl, option

@dataclass
class Options:
    factor: float = option(1.0, "Multiplies.")

class Hooks:
    def __init__(self, context):
        self.context, self.factor, self.calls = context, context.args.factor, 0
{hooks}
    @hookimpl
    def after_step(self, policy):
        pass

algorithm = Algorithm(name=NAME, summary="For tests.", extends="{base}", config=Options, hooks=Hooks)
"""
REFINED = """
    @hookimpl(wrapper=True)
    def {}:
        result = yield
        return result * self.factor
"""
TERM = """
    @hookimpl
    def loss_terms(self, samples, logps):
        return {}
"""
SQUARE = "{'square': logps**2} if self.factor != 1 else {}"
HOOKS = {
    "grpo": REFINED.format("advantages(self, rollouts)") + TERM,
    "dpo": REFINED.format("pair_loss(self, pairs)"),
    "sft": TERM.replace("{}", SQUARE),
}
SOUND = {base: SOUND.format(base=base, hooks=hooks) for base, hooks in HOOKS.items()}
RESULT = "return result * self.factor"
COUNTS = (RESULT, "self.calls += self.context.training and self.factor != 1\n        return result * (1 + self.calls)")
STATE = (
    "\n    def state_dict(self):\n        return {{'calls': self.calls}}\n\n    def load_state_dict(self, state):\n{}\n"
)
AFTER_STEP = "def after_step(self, policy):\n        pass\n"

# Name of the fault: the check that finds it, what is replaced by what, and in an extension of what (if not of GRPO).
FAULTS = {
    "imported_at_start": ("check_is_listed_without_import", "", ""),
    "without_range": ("check_declares_its_range", "", ""),
    "private_import": (
        "check_imports_only_public_names",
        "import random",
        "import random\nfrom trl_core.training.online import OnlineTrainer",
    ),
    "other_name": ("check_loads", "name=NAME", "name='other'"),
    "import_error": ("check_loads", "import random", "import no_such_module_at_all"),
    "default_argument": ("check_hooks_fit_the_contract", "(self, rollouts)", "(self, rollouts=None)"),
    "misspelt_hook": ("check_hooks_fit_the_contract", "def loss_terms", "def loss_term"),
    "unknown_argument": ("check_hooks_fit_the_contract", "(self, samples, logps)", "(self, samples, log_probs)"),
    "without_help": ("check_options_have_default_and_help", 'option(1.0, "Multiplies.")', "1.0"),
    "without_default": ("check_options_have_default_and_help", ' = option(1.0, "Multiplies.")', ""),
    "option_of_base": (
        "check_options_are_new",
        "class Options:",
        "class Options:\n    beta: float = option(0.0, 'B.')",
    ),
    "function_as_option": (
        "check_options_can_be_written_down",
        "class Options:",
        "class Options:\n    kind: object = option(len, 'A function.')",
    ),
    "tuple_as_option": (
        "check_options_can_be_written_down",
        "class Options:",
        "class Options:\n    pair: tuple[int, int] = option((1, 2), 'No list.')",
    ),
    "scalar_term": ("check_trains", "return {}", "return {'mine': logps.mean()}"),
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
    "writes_elsewhere": (
        "check_writes_only_into_output_dir",
        AFTER_STEP,
        AFTER_STEP.replace("pass", "open('x', 'a').close()"),
    ),
    "changes_argument": (
        "check_hooks_leave_their_arguments_alone",
        "result = yield\n        return result * self.factor",
        "rollouts.reward *= self.factor\n        return (yield)",
    ),
    "fills_in_rewards": (
        "check_hooks_leave_their_arguments_alone",
        "result = yield\n        return result * self.factor",
        "rollouts.rewards.nan_to_num_()\n        return (yield) * self.factor",
    ),
    "changes_texts": (
        "check_hooks_leave_their_arguments_alone",
        "result = yield\n        return result * self.factor",
        "rollouts.columns['row'].reverse()\n        return (yield) * self.factor",
    ),
    "scalar_of_pairs": ("check_trains", RESULT, RESULT + ".mean()", "dpo"),
    "infinite": ("check_trains", "logps**2", "logps / 0", "sft"),
    "mean_of_texts": ("check_micro_batches_do_not_matter", "logps**2", "logps**2 / samples.num_rows", "sft"),
    "knows_layout": ("check_layout_does_not_matter", RESULT, RESULT + " * (1 + self.context.args.padding_free)", "dpo"),
    "forgets_pairs": (
        "check_resumes_exactly_at_every_step",
        f"{RESULT}\n\n    @hookimpl\n    {AFTER_STEP}",
        f"{RESULT}**self.calls\n\n    @hookimpl\n    {AFTER_STEP.replace('pass', 'self.calls += 1')}",
        "dpo",
    ),
    "writes_policy": (
        "check_hooks_leave_their_arguments_alone",
        AFTER_STEP,
        AFTER_STEP.replace("pass", "self.factor == 1 or policy.lm_head.weight.data.mul_(0.9)"),
        "dpo",
    ),
}


def install(packages, name, old="", new="", base="grpo", **options):
    """Install SOUND under this name, with `old` replaced, and return how to test it."""
    assert old in SOUND[base]
    source = (SOUND[base].replace(old, new) if old else SOUND[base]).replace("NAME", repr(name))
    files = {f"trl_{name}.py": source}
    if name == "imported_at_start":
        files["sitecustomize.py"] = f"import trl_{name}"
    requires = ["trl-core" if name == "without_range" else "trl-core>=0.1"]
    points = {"trl_core.experimental": {name: f"trl_{name}:algorithm"}}
    write_distribution(packages, f"trl-{name}", points, files=files, requires=requires)
    return Subject(name, options={"factor": 3.0, "max_steps": 3, **options}, neutral={"factor": 1.0})


def outcomes(subject, folder, exempt=None, only=None):
    """What became of each check, or of some: None, or the error it raised."""
    found = {}
    for check in conformance_checks(subject, exempt):
        if only is not None and check.__name__ not in only:
            continue
        try:
            found[check.__name__] = check(folder / check.__name__)
        except Exception as error:
            found[check.__name__] = error
    return found


def failed(found):
    return [name for name, error in found.items() if error is not None and not isinstance(error, SkipTest)]


# -- sound algorithms --------------------------------------------------------------------------------------------------
DPO = Subject("trl-core:dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2})

test_dpo_conforms = conformance(DPO)
test_grpo_conforms = conformance(
    Subject("trl-core:grpo", {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2})
)
test_reward_conforms = pytest.mark.slow(conformance(Subject("trl-core:reward", {"center_rewards_coefficient": 0.01})))
test_sft_conforms = pytest.mark.slow(conformance(Subject("trl-core:sft")))


def test_reference_that_is_let_go_conforms(tmp_path):
    subject = Subject("trl-core:dpo", {"precompute_ref_log_probs": True, "max_steps": 3})
    for check in (check_layout_does_not_matter, check_resumes_exactly_at_every_step, check_evaluation_changes_nothing):
        check(subject, tmp_path / check.__name__)


def test_trainer_without_data_is_refused(packages, tmp_path):
    source = (
        "from trl_core import Algorithm\n"
        "from trl_core.training.base import CoreTrainer as Bare\n"
        "from trl_core.training.config import CoreConfig\n"
        "algorithm = Algorithm(name='bare', summary='.', config=CoreConfig, trainer='trl_bare:Bare')\n"
    )
    write_distribution(
        packages, "trl-bare", {"trl_core.experimental": {"bare": "trl_bare:algorithm"}}, files={"trl_bare.py": source}
    )
    with pytest.raises(ConfigError, match="no data to check BARETrainer with"):
        Subject("bare").trainer(tmp_path)


ENTROPY = Subject("trl-core:grpo", {"entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_target": 99.0})
PER_MICRO_BATCH = {"check_micro_batches_do_not_matter": "the entropy bonus is a mean over each micro-batch"}


test_grpo_with_adaptive_entropy_conforms = pytest.mark.slow(conformance(ENTROPY, PER_MICRO_BATCH))


@pytest.mark.parametrize("base", ["grpo", *(pytest.param(base, marks=pytest.mark.slow) for base in ("dpo", "sft"))])
def test_sound_plugin_passes_every_check(base, packages, tmp_path):
    found = outcomes(install(packages, f"sound_{base}", base=base), tmp_path)
    assert {name for name, error in found.items() if error is not None} == set()


NAMES = [check.__name__ for check in CHECKS]


# Losses that are 0, but for rounding, where the policy equals its reference, as at the start of a run it does, and one
# that is next to nothing everywhere.
SQUARED = "return result if self.factor == 1 else (result - 0.6931471805599453) ** 2"
HARDLY_ANY = {
    "only_kl": ("grpo", "return result * (self.factor == 1)", {"beta": 0.1}),
    "squared": ("dpo", SQUARED, {}),
    "tiny": ("dpo", "return result if self.factor == 1 else result * 1e-9", {}),
}
SAME_STEPS = (check_micro_batches_do_not_matter, check_layout_does_not_matter)


@pytest.mark.parametrize("name", HARDLY_ANY)
def test_rounding_of_a_loss_that_is_hardly_any_is_no_fault(name, packages, tmp_path):
    base, answer, options = HARDLY_ANY[name]
    subject = install(packages, name, RESULT, answer, base, **options)
    for check in SAME_STEPS:
        check(subject, tmp_path / check.__name__)


def test_fault_in_a_loss_that_is_hardly_any_is_found_and_told_with_what_was_measured(packages, tmp_path):
    subject = install(packages, "divided", RESULT, f"{SQUARED} / len(result)", "dpo")
    with pytest.raises(ConformanceError) as raised:
        check_micro_batches_do_not_matter(subject, tmp_path)
    told = (
        r"'divided' trains otherwise under \{.*\} than under \{.*\}: .* move the weights by (\S+) and end (\S+) apart"
    )
    told += r"\. Rounding explains (\S+), the larger of 1e-05 of the way and (\S+), which"
    said = re.search(told, str(raised.value))
    step, gap, allowed, resolved = map(float, said.groups())
    assert step > gap > step / 100  # a loss of half the size, say
    assert resolved <= allowed < gap / 3


# -- faults ------------------------------------------------------------------------------------------------------------
# With these nothing is trained, or not for long; the others take some ten seconds each.
UNTOUCHED = {"check_is_listed_without_import", "check_declares_its_range", "check_imports_only_public_names"}
"""What no other check builds on: with such a fault the algorithm trains as a sound one."""
QUICK = {"check_trains", *(name for name in NAMES if NAMES.index(name) < NAMES.index("check_trains"))}


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[] if check in QUICK else pytest.mark.slow) for f, (check, *_) in FAULTS.items()]
)
def test_fault_fails_exactly_its_check(fault, packages, tmp_path, monkeypatch):
    check, *replaced = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    only = QUICK if check in UNTOUCHED else None
    assert failed(outcomes(install(packages, fault, *replaced), tmp_path, only=only)) == [check]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault, (check, *_) in FAULTS.items() if check in UNTOUCHED])
def test_fault_that_no_training_sees_fails_no_other_check(fault, packages, tmp_path):
    check, *replaced = FAULTS[fault]
    assert failed(outcomes(install(packages, fault, *replaced), tmp_path)) == [check]


def test_every_check_has_a_fault():
    assert {check.__name__ for check in CHECKS} == {check for check, *_ in FAULTS.values()}


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
