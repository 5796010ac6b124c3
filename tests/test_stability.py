import importlib
import inspect
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pluggy
import pytest

from trl_core import HookContext, get_config, hookimpl, stability
from trl_core.algorithm import Algorithm
from trl_core.composition import compose
from trl_core.discovery import AlgorithmInfo
from trl_core.errors import ConfigError, ContractError, StabilityError, TRLDeprecationWarning, TRLExperimentalWarning
from trl_core.stability import Deprecation, Stability, deprecated, guard, warn_on_use

from .helpers_dist import write_plugin


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


# -- deprecated options, arguments, functions, classes, hooks ---------------------------------------------------------
PLUGIN = """
from dataclasses import dataclass
from trl_core import Algorithm, Deprecation, deprecated, option

NOTE = Deprecation(since="1.0", removal="1.2", replacement="'width'")

@dataclass
class Options:
    breadth: int = option(1, "For a test.", deprecated=NOTE)
    layers: list | None = option(None, "For a test.")

class Hooks:
    def __init__(self, context):
        pass

algorithm = Algorithm(
    name="aging", summary="For a test.", extends="grpo", config=Options, hooks=Hooks,
    arguments={"helper": "Help."}, deprecated={"helper": NOTE},
)

@deprecated(since="1.0", removal="1.2", replacement="newer")
def older(x, y=0):
    "Adds."
    return x + y

@deprecated(since="1.0", removal="1.2", parameter="y")
def partly(x, y=0):
    return x + y

@deprecated(since="1.0", removal="1.2")
@dataclass
class Older:
    x: int = 1
"""


@pytest.fixture
def aging(packages):
    """Install the plugin in a version, and import it."""

    def install(version):
        stability._warned.clear()
        path = write_plugin(packages, "aging", source=PLUGIN, version=version)
        importlib.invalidate_caches()
        return SimpleNamespace(**vars(importlib.import_module(path.stem)))

    return install


def quietly(call):
    with warnings.catch_warnings(action="ignore"):
        return call()


def test_deprecated_option_warns_once_when_it_is_given(aging, tmp_path):
    aging("1.0")
    config = quietly(lambda: get_config("aging"))
    stability._warned.clear()
    given = {"output_dir": str(tmp_path), "num_generations": 2, "per_device_train_batch_size": 2, "report_to": "none"}
    assert warnings_of(lambda: config(**given), lambda: config(**given, breadth=1)) == []
    (warning,) = warnings_of(lambda: config(**given, breadth=2), lambda: config(**given, breadth=3))
    assert warning.category is TRLDeprecationWarning and warning.filename == __file__
    for part in ("'breadth' of 'trl-aging:aging'", "removed in version 1.2 of trl-aging", "Use 'width' instead"):
        assert part in str(warning.message)


@pytest.mark.parametrize("version", ["1.2", "1.2.0rc1", "1.3", "2.0"])
def test_deprecated_option_is_refused_when_due(version, aging, tmp_path):
    aging(version)
    config = quietly(lambda: get_config("aging"))
    given = {"output_dir": str(tmp_path), "num_generations": 2, "per_device_train_batch_size": 2, "report_to": "none"}
    config(**given)
    with pytest.raises(ContractError, match=r"'breadth'.*was to be removed in version 1\.2(?s:.)*Use 'width'"):
        config(**given, breadth=2)


def test_deprecated_argument_of_a_trainer_warns_and_is_refused_when_due(aging):
    aging("1.1")
    composition = quietly(lambda: compose("aging"))
    made = composition.instantiate
    assert warnings_of(lambda: made(HookContext(grpo_args(), {"helper": None}))) == []
    (warning,) = warnings_of(*[lambda: made(HookContext(grpo_args(), {"helper": print}))] * 2)
    assert "argument 'helper' of 'trl-aging:aging' is deprecated" in str(warning.message)


def grpo_args():
    return get_config("grpo")(output_dir="unused", report_to="none", per_device_train_batch_size=8)


def test_deprecated_function_class_and_parameter_warn_once(aging):
    module = aging("1.1")
    (warning,) = warnings_of(lambda: module.older(1), lambda: module.older(2))
    assert "trl_aging.older is deprecated and will be removed in version 1.2 of trl-aging. Use newer" in str(
        warning.message
    )
    assert warning.filename == __file__
    assert warnings_of(lambda: module.partly(1)) == []
    for use in (lambda: module.partly(1, 2), lambda: module.Older(2)):
        (warning,) = warnings_of(use, use)
        assert warning.category is TRLDeprecationWarning
    assert module.partly(1, y=2) == 3 and module.Older(5).x == 5 and isinstance(module.Older(), module.Older)
    assert module.older.__deprecated__ == "Will be removed in 1.2. Use newer."  # PEP 702
    assert module.Older.__deprecated__ and not hasattr(module.partly, "__deprecated__")
    assert module.older.__doc__ == "Adds." and list(inspect.signature(module.older).parameters) == ["x", "y"]


def test_deprecated_function_class_and_parameter_are_refused_when_due(aging):
    module = aging("1.2")
    for use in (lambda: module.older(1), lambda: module.partly(1, y=2), lambda: module.Older()):
        with pytest.raises(ContractError, match=r"was to be removed in version 1\.2 of trl-aging, and 1\.2 is"):
            use()
    assert module.partly(1) == 1


def test_deprecated_algorithm_is_refused_when_due():
    algorithm = Algorithm(name="zeta", summary="", removal="1.2", replacement="'eta'")
    with pytest.raises(ContractError, match=r"was to be removed in version 1\.2(?s:.)*Use 'eta'"):
        warn_on_use(info("deprecated"), algorithm)


@pytest.mark.parametrize("parameter", [None, "rollouts"])
def test_implementing_a_deprecated_hook_warns(parameter):
    class Specs:
        @deprecated(since="0.2", removal="0.4", parameter=parameter)
        @pluggy.HookspecMarker("trl_core")
        def keep(self, rollouts):
            pass

    class Plugin:
        @hookimpl
        def keep(self, rollouts):
            return rollouts

    manager = pluggy.PluginManager("trl_core")
    manager.add_hookspecs(Specs)
    (warning,) = warnings_of(lambda: manager.register(Plugin()))
    assert warning.category is TRLDeprecationWarning and "removed in version 0.4" in str(warning.message)
    assert manager.hook.keep(rollouts=3) == [3]


@pytest.mark.parametrize("fields", [{"since": "soon", "removal": "0.4"}, {"since": "0.2", "removal": "next"}])
def test_deprecation_with_a_bad_version_is_refused(fields):
    with pytest.raises(ContractError, match="is no version"):
        Deprecation(**fields)
