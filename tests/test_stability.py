import subprocess
import sys
import warnings

import pytest

from trl_core import stability
from trl_core.algorithm import Algorithm
from trl_core.discovery import AlgorithmInfo
from trl_core.errors import ConfigError, StabilityError, TRLDeprecationWarning, TRLExperimentalWarning
from trl_core.stability import Stability, guard, warn_on_use


def info(tag: str, name: str = "zeta") -> AlgorithmInfo:
    return AlgorithmInfo(name, Stability(tag), f"trl-{name}", "1.2", f"trl_{name}:algorithm")


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """As if nothing had warned yet and no variable were set."""
    monkeypatch.setattr(stability, "_warned", set())
    monkeypatch.delenv(stability.SILENCE, raising=False)
    monkeypatch.delenv(stability.REQUIRE, raising=False)


def warnings_of(*uses):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for use in uses:
            use()
    return caught


# -- the order of the tags --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tag", "required", "expected"),
    [
        ("stable", "stable", True),
        ("stable", "experimental", True),
        ("stable", "deprecated", True),
        ("experimental", "stable", False),
        ("experimental", "experimental", True),
        ("experimental", "deprecated", True),
        ("deprecated", "stable", False),
        ("deprecated", "experimental", False),
        ("deprecated", "deprecated", True),
    ],
)
def test_satisfies_orders_deprecated_below_experimental_below_stable(tag, required, expected):
    assert Stability(tag).satisfies(Stability(required)) is expected


# -- warnings ---------------------------------------------------------------------------------------------------------
def test_experimental_warning_names_distribution_meaning_and_silence():
    (warning,) = warnings_of(lambda: warn_on_use(info("experimental")))
    assert warning.category is TRLExperimentalWarning
    text = str(warning.message)
    for part in ("'zeta'", "trl-zeta 1.2", "may change", "TRL_EXPERIMENTAL_SILENCE=1"):
        assert part in text


def test_experimental_warning_comes_once_per_algorithm():
    caught = warnings_of(
        lambda: warn_on_use(info("experimental")),
        lambda: warn_on_use(info("experimental")),
        lambda: warn_on_use(info("experimental", "eta")),
    )
    assert [str(warning.message).split("'")[1] for warning in caught] == ["zeta", "eta"]


def test_experimental_warning_is_silenced_by_the_variable(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    assert warnings_of(lambda: warn_on_use(info("experimental"))) == []


def test_experimental_warning_is_not_silenced_by_zero(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "0")
    assert len(warnings_of(lambda: warn_on_use(info("experimental")))) == 1


def test_silenced_use_does_not_use_up_the_warning(monkeypatch):
    with monkeypatch.context() as silenced:
        silenced.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        warn_on_use(info("experimental"))
    assert len(warnings_of(lambda: warn_on_use(info("experimental")))) == 1


def test_warning_turned_into_an_error_stays_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(TRLExperimentalWarning):
                warn_on_use(info("experimental"))


def test_warning_points_at_the_code_outside_trl_core():
    (warning,) = warnings_of(lambda: warn_on_use(info("experimental")))
    assert warning.filename == __file__


def test_deprecated_warning_names_removal_and_replacement():
    algorithm = Algorithm(name="zeta", summary="", removal="2.0", replacement="'eta'")
    (warning,) = warnings_of(lambda: warn_on_use(info("deprecated"), algorithm))
    assert warning.category is TRLDeprecationWarning
    assert "removed in version 2.0 of trl-zeta" in str(warning.message)
    assert "Use 'eta' instead" in str(warning.message)


def test_deprecated_warning_without_the_algorithm_is_still_given():
    (warning,) = warnings_of(lambda: warn_on_use(info("deprecated")))
    assert "removed in a later version" in str(warning.message)
    assert "No replacement" in str(warning.message)


def test_deprecated_warning_is_not_silenced_by_the_variable(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    assert len(warnings_of(lambda: warn_on_use(info("deprecated")))) == 1


def test_stable_use_gives_no_warning():
    assert warnings_of(lambda: warn_on_use(info("stable"))) == []


def test_warnings_are_shown_by_default_in_a_new_process():
    """Python hides some categories by default; ours must not be among them, in any module."""
    script = (
        "from trl_core.discovery import AlgorithmInfo\n"
        "from trl_core.stability import Stability, warn_on_use\n"
        "def use():\n"
        "    for tag in ('experimental', 'deprecated'):\n"
        "        warn_on_use(AlgorithmInfo(tag, Stability(tag), 'trl-x', '1', 'x:y'))\n"
    )
    code = f"import types; m = types.ModuleType('users_library'); exec({script!r}, m.__dict__); m.use()"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "TRLExperimentalWarning" in process.stderr
    assert "TRLDeprecationWarning" in process.stderr


# -- the production guard ---------------------------------------------------------------------------------------------
def test_guard_without_a_demand_accepts_everything():
    guard([info("stable"), info("experimental"), info("deprecated")])


@pytest.mark.parametrize(
    ("required", "tag"), [("stable", "experimental"), ("stable", "deprecated"), ("experimental", "deprecated")]
)
def test_guard_refuses_a_less_stable_algorithm(required, tag):
    with pytest.raises(StabilityError, match=rf"trl-zeta:zeta 1\.2 is {tag}"):
        guard([info("stable", "eta"), info(tag)], require=required)


@pytest.mark.parametrize(
    ("required", "tag"), [("stable", "stable"), ("experimental", "stable"), ("experimental", "experimental")]
)
def test_guard_accepts_an_algorithm_that_is_stable_enough(required, tag):
    guard([info(tag)], require=required)


def test_guard_names_every_refused_algorithm():
    with pytest.raises(StabilityError, match=r"trl-zeta:zeta.*trl-eta:eta"):
        guard([info("experimental"), info("experimental", "eta")], require="stable")


def test_guard_accepts_a_stability_as_demand():
    with pytest.raises(StabilityError):
        guard([info("experimental")], require=Stability.STABLE)


def test_guard_reads_the_environment(monkeypatch):
    monkeypatch.setenv("TRL_CORE_REQUIRE", "stable")
    with pytest.raises(StabilityError, match="TRL_CORE_REQUIRE"):
        guard([info("experimental")])


def test_guard_argument_does_not_relax_the_environment(monkeypatch):
    monkeypatch.setenv("TRL_CORE_REQUIRE", "stable")
    with pytest.raises(StabilityError):
        guard([info("experimental")], require="experimental")


def test_guard_environment_does_not_relax_the_argument(monkeypatch):
    monkeypatch.setenv("TRL_CORE_REQUIRE", "experimental")
    with pytest.raises(StabilityError):
        guard([info("experimental")], require="stable")


def test_guard_takes_an_empty_variable_as_unset(monkeypatch):
    monkeypatch.setenv("TRL_CORE_REQUIRE", "")
    guard([info("deprecated")])


@pytest.mark.parametrize("value", ["stabel", "deprecated", ""])
def test_guard_with_a_bad_argument_names_the_allowed_values(value):
    with pytest.raises(ConfigError, match=r"require(?s:.)*stable, experimental"):
        guard([info("stable")], require=value)


def test_guard_with_a_bad_variable_names_it_and_the_allowed_values(monkeypatch):
    monkeypatch.setenv("TRL_CORE_REQUIRE", "production")
    with pytest.raises(ConfigError, match=r"'production'.*TRL_CORE_REQUIRE(?s:.)*stable, experimental"):
        guard([info("stable")])
