"""The conformance kit as its users meet it: three lines in a test, `trl-core check`, and the report that is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl_core.cli.main import main
from trl_core.errors import ConfigError, ConformanceError, ProjectError
from trl_core.promotion.conformance import fingerprint, read
from trl_core.testing import Subject, conformance
from trl_core.testing.checks import CHECKS

from .helpers_dist import write_distribution

NAMES = [check.__name__ for check in CHECKS]
PLUGIN = """
from dataclasses import dataclass
from trl_core import Algorithm, hookimpl, option

@dataclass
class Options:
    scale: float = option(1.0, "Multiplies advantages.")

class Hooks:
    def __init__(self, context):
        self.scale = context.args.scale

    @hookimpl(wrapper=True)
    def advantages(self):
        return (yield) * self.scale

algorithm = Algorithm(name="scaled", summary="For tests.", extends="grpo", config=Options, hooks=Hooks)
"""
TEST = """
from trl_core.testing import Subject, conformance

SCALED = Subject("trl-scaled:scaled", options={"scale": 2.0, "max_steps": 2}, neutral=NEUTRAL)

test_conformance = conformance(SCALED, EXEMPT)
"""
PYPROJECT = """
[project]
name = "trl-scaled"
version = "1.0"
dependencies = ["trl-core>=0.1,<0.3"]

[project.entry-points."trl_core.experimental"]
scaled = "trl_scaled:algorithm"
"""


def make_project(folder, *, source=PLUGIN, neutral="{'scale': 1.0}", exempt="None", test=TEST):
    """A project, installed from its folder as `pip install -e` leaves it."""
    project, site = folder / "trl-scaled", folder / "site"
    (project / "tests").mkdir(parents=True)
    (project / "pyproject.toml").write_text(PYPROJECT)
    (project / "trl_scaled.py").write_text(source)
    if test:
        (project / "tests" / "test_conformance.py").write_text(
            test.replace("NEUTRAL", neutral).replace("EXEMPT", exempt)
        )
    info = write_distribution(site, "trl-scaled", {"trl_core.experimental": {"scaled": "trl_scaled:algorithm"}})
    (info / "direct_url.json").write_text(json.dumps({"url": project.as_uri(), "dir_info": {"editable": True}}))
    return project, {"PYTHONPATH": os.pathsep.join(map(str, (site, project, Path(__file__).parent.parent)))}


def check(project, environment, *arguments):
    """Run `trl-core check` in another process, outside of the project."""
    command = [sys.executable, "-m", "trl_core.cli.main", "check", *map(str, arguments)]
    settings = {"OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=project.parent, env=os.environ | settings, capture_output=True, text=True)


# -- the command -------------------------------------------------------------------------------------------------------
@pytest.mark.slow  # all of the kit
def test_check_runs_a_projects_tests_and_leaves_a_report(tmp_path):
    project, environment = make_project(tmp_path)
    done = check(project, environment, "scaled")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(NAMES)} passed" in done.stdout
    (subject,) = read(project / "evidence" / "conformance.json").subjects
    assert [*subject.checks] == NAMES
    assert not subject.red and subject.covers("trl-scaled:scaled") and not subject.covers("trl-core:grpo")
    assert subject.test == "test_conformance.py::test_conformance"


def test_check_reports_failures_exemptions_and_what_does_not_apply(tmp_path):
    project, environment = make_project(
        tmp_path,
        source=PLUGIN.replace('option(1.0, "Multiplies advantages.")', "1.0"),
        neutral="None",
        exempt="{'check_options_have_default_and_help': 'it is plain'}",
    )
    done = check(project, environment, "trl-scaled", "--report", "elsewhere/report.json")
    assert not (project / "evidence").exists()
    (subject,) = read(tmp_path / "elsewhere" / "report.json").subjects
    outcomes = {name: found["outcome"] for name, found in subject.checks.items()}
    assert outcomes["check_loads"] == "passed"
    assert outcomes["check_options_have_default_and_help"] == "exempt"
    assert outcomes["check_options_are_new"] == "blocked"
    assert "the option" in subject.checks["check_options_have_default_and_help"]["says"].lower()
    assert subject.exempt == {"check_options_have_default_and_help": "it is plain"}
    assert done.returncode == 0  # an exemption is no failure; promotion counts it


def test_check_fails_with_the_mend_where_a_check_does(tmp_path):
    project, environment = make_project(tmp_path, source=PLUGIN.replace("self.scale\n", "2.0\n"))
    done = check(project, environment, project, "--pytest", "-k 'loads or neutral'", "--report", "report.json")
    assert done.returncode == 1
    assert "Let every hook return what it was given when there is nothing to do." in done.stdout
    (subject,) = read(tmp_path / "report.json").subjects
    assert subject.red == ["check_neutral_setting_equals_base"]
    assert subject.checks["check_neutral_setting_equals_base"]["outcome"] == "failed"


@pytest.mark.slow
def test_check_of_an_algorithm_without_its_folder_takes_options(tmp_path):
    project, environment = make_project(tmp_path)
    for file in tmp_path.glob("site/*/direct_url.json"):
        file.unlink()
    keyword = ["--pytest", "-k 'loads or contract or neutral'"]
    done = check(project, environment, "trl-scaled:scaled", "--set", "scale=3", "--report", "report.json", *keyword)
    assert done.returncode == 0, done.stdout + done.stderr
    (subject,) = read(tmp_path / "report.json").subjects
    assert subject.checks["check_neutral_setting_equals_base"]["outcome"] == "not applicable"
    record = json.loads((tmp_path / "report.json").read_text())["subjects"][0]
    assert record["options"] == {"scale": 3.0}
    assert not (project / "evidence").exists()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["grpo", "--set", "betta=1"], "has no option 'betta'"),
        (["grpo", "--set", "beta=high"], "beta='high' (str) is not a finite number"),
        (["no_such_algorithm"], "No installed distribution"),
    ],
)
def test_check_refuses_what_it_cannot_check(arguments, what, capsys):
    assert main(["check", *arguments]) == 2
    assert what in capsys.readouterr().err


def test_check_that_could_not_be_made_leaves_the_evidence_alone(tmp_path):
    project, environment = make_project(tmp_path, test="import no_such_module_at_all\n")
    (project / "evidence").mkdir()
    (project / "evidence" / "conformance.json").write_text("as it was")
    done = check(project, environment, project)
    assert done.returncode == 2
    assert "no_such_module_at_all" in done.stdout and "Correct what pytest says above." in done.stderr
    (project / "tests" / "test_conformance.py").write_text(TEST.replace("NEUTRAL", "None").replace("EXEMPT", "None"))
    assert check(project, environment, project, "--pytest", "-k loads").returncode == 0
    assert (project / "evidence" / "conformance.json").read_text() == "as it was"


def test_check_of_a_project_without_conformance_tests_shows_the_lines(tmp_path):
    project, environment = make_project(tmp_path, test="")
    done = check(project, environment, project)
    assert done.returncode == 2
    assert "test_conformance = conformance(Subject('trl-scaled:scaled', options={}))" in done.stderr


def test_check_of_a_folder_without_pyproject_is_refused(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "pyproject.toml cannot be read" in capsys.readouterr().err


# -- in pytest ---------------------------------------------------------------------------------------------------------
def test_pytest_loads_the_plugin_without_torch_and_without_fixtures(tmp_path):
    (tmp_path / "test_nothing.py").write_text(
        "import sys\n"
        "def test_nothing(request):\n"
        "    assert request.config.pluginmanager.hasplugin('trl_core') or "
        "request.config.pluginmanager.hasplugin('trl_core.pytest_plugin')\n"
        "    assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "    assert request.fixturenames == ['request']\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_report_is_the_same_with_workers(tmp_path):
    pytest.importorskip("xdist")
    project, environment = make_project(tmp_path)
    keyword = "-k 'loads or contract'"
    for name, more in {"one": keyword, "two": f"{keyword} -n 2"}.items():
        assert check(project, environment, project, "--report", f"{name}.json", "--pytest", more).returncode == 0
    one, two = (read(tmp_path / f"{name}.json").subjects for name in ("one", "two"))
    assert [s.checks.keys() for s in one] == [s.checks.keys() for s in two] and len(one[0].checks) == 2


def test_conformance_names_each_check():
    (mark,) = [mark for mark in conformance(Subject("grpo")).pytestmark if mark.name == "parametrize"]
    assert mark.kwargs["ids"] == NAMES


@pytest.mark.parametrize("exempt", [{"check_lods": "a typo"}, {"check_loads": " "}])
def test_exemption_without_a_check_or_a_reason_is_refused(exempt):
    with pytest.raises(ConfigError, match="|".join(exempt)):
        conformance(Subject("grpo"), exempt)


def test_exemption_of_what_does_not_apply_fails(tmp_path):
    test = conformance(Subject("trl-core:grpo"), {"check_acts": "it has no base"})
    (check,) = [check for check in test.pytestmark[0].args[1] if check.__name__ == "check_acts"]
    with pytest.raises(ConformanceError, match="does not apply, but is exempt"):
        check(tmp_path)


# -- the report --------------------------------------------------------------------------------------------------------
def test_fingerprint_follows_the_source(packages):
    module = packages / "trl_printed.py"
    module.write_text("x = 1\n")
    (packages / "other.py").write_text("")
    first = fingerprint("trl_printed:x")
    (packages / "other.py").write_text("y = 2\n")  # a neighbour that is no part of it
    assert fingerprint("trl_printed:x") == first
    module.write_text("x = 2\n")
    assert fingerprint("trl_printed:x") != first


def test_fingerprint_of_a_package_is_about_all_of_it(packages):
    inner = packages / "trl_printed_package" / "inner" / "part.py"
    inner.parent.mkdir(parents=True)
    (packages / "trl_printed_package" / "__init__.py").write_text("")
    inner.write_text("x = 1\n")
    first = fingerprint("trl_printed_package:x")
    inner.write_text("x = 2\n")
    assert fingerprint("trl_printed_package:x") != first


@pytest.mark.parametrize("text", ["[]", "{", '{"subjects": [{"name": "x"}]}'])
def test_file_that_is_no_report_is_refused(text, tmp_path):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ProjectError, match="no report of the conformance kit"):
        read(tmp_path / "report.json")
