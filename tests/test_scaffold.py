"""`trl-core new`: what it makes is complete, in style, installs, trains and conforms; what cannot be is refused."""

import contextlib
import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from trl_core.cli.main import main
from trl_core.project import Project

from .helpers_dist import write_distribution, write_plugin
from .helpers_wheels import build_wheel, install, make_environment, run

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"online": ("--extends", "grpo"), "offline": ("--extends", "dpo"), "alone": ("--stands-alone",)}
OTHERS = {"texts": ("--extends", "sft"), "scores": ("--extends", "trl-core:reward")}
COMMON = {
    ".github/workflows/ci.yml",
    ".gitignore",
    "CHANGELOG.md",
    "EVIDENCE.md",
    "LICENSE",
    "README.md",
    "examples/train.py",
    "pyproject.toml",
    "tests/test_conformance.py",
}
LONG = "w" * 28


def new(folder, name, *words):
    """Run `trl-core new` and return the folder of the plugin."""
    target = folder / name
    assert main(["new", name, *words, "--folder", str(target)]) == 0
    return target


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# -- what is made ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("words", [*SHAPES.values(), *OTHERS.values()], ids=[*SHAPES, *OTHERS])
def test_makes_exactly_these_files_and_none_is_left_to_fill_in(words, tmp_path, capsys):
    folder = new(tmp_path, "my-Algo", *words)
    own = {"trl_my_algo/__init__.py", "trl_my_algo/my_algo.py", "trl_my_algo/py.typed", "tests/test_my_algo.py"}
    assert files_of(folder) == COMMON | own
    told = capsys.readouterr().out
    assert all(path in told for path in COMMON | own)
    assert told.splitlines()[-3:] == [
        f'  cd {folder} && pip install -e ".[test]"',
        "  python examples/train.py",
        "  trl-core check .",
    ]
    for path in files_of(folder) - {".github/workflows/ci.yml"}:
        assert "$" not in (folder / path).read_text(encoding="utf-8"), f"a field of {path} is not filled in"
    assert "python-version: ${{ matrix.python }}" in (folder / ".github/workflows/ci.yml").read_text(encoding="utf-8")


def test_project_registers_the_algorithm_as_experimental(tmp_path):
    project = Project(new(tmp_path, "trl-my_algo", "--author", "Ada Lovelace <ada@example.org>", "--summary", "So."))
    assert project.name == "trl-my-algo"
    assert {name: (tag.value, value) for name, (tag, value) in project.algorithms.items()} == {
        "my_algo": ("experimental", "trl_my_algo:algorithm")
    }
    assert project.table["description"] == "So."
    assert project.table["maintainers"] == [{"name": "Ada Lovelace", "email": "ada@example.org"}]
    assert project.table["license"] == "Apache-2.0"
    module = (project.folder / "trl_my_algo" / "my_algo.py").read_text(encoding="utf-8")
    assert 'name="my_algo",\n    summary="So.",\n    extends="grpo",\n' in module


def test_capitals_of_the_name_stay_in_its_classes(tmp_path):
    made = new(tmp_path, "GFXO")
    assert "class GFXOOptions" in (made / "trl_gfxo" / "gfxo.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("core", "expected"),
    [
        ("0.1.0", "trl-core>=0.1,<0.3"),
        ("1.3.2", "trl-core>=1.3,<1.5"),
        ("2.0.0.dev1", "trl-core>=2.0.0.dev1,<2.2"),
    ],
)
def test_range_is_this_minor_release_and_the_next(core, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_core.cli.new.core_version", lambda: core)
    assert Project(new(tmp_path, "ranged", "--stands-alone")).table["dependencies"] == [expected]


def test_base_of_another_distribution_is_required_too(tmp_path, packages):
    write_plugin(packages, "somebase", version="1.4.2")
    project = Project(new(tmp_path, "onit", "--extends", "somebase"))
    assert project.table["dependencies"][1:] == ["trl-somebase>=1.4.2"]
    assert 'extends="somebase"' in (project.folder / "trl_onit" / "onit.py").read_text(encoding="utf-8")


def test_author_is_who_git_says(tmp_path, monkeypatch):
    (tmp_path / "config").write_text("[user]\n\tname = Grace Hopper\n", encoding="utf-8")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.chdir(tmp_path)
    assert Project(new(tmp_path, "known")).table["maintainers"] == [{"name": "Grace Hopper"}]
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "none"))
    assert Project(new(tmp_path, "unknown")).table["maintainers"] == []


def test_evidence_is_a_claim_that_is_not_reproduced(tmp_path):
    text = (new(tmp_path, "brief") / "EVIDENCE.md").read_text(encoding="utf-8")
    claim = tomllib.loads(text.partition('```toml title="evidence"\n')[2].partition("```")[0])
    assert claim.pop("algorithm") == "brief"
    assert claim.pop("reproduced") is False
    assert set(claim) == {"claim", "source", "command", "seeds", "figure", "versions", "hardware", "date"}
    assert not any(claim.values())
    assert "## Not shown" in text


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Every shape under the shortest and the longest name, and one of several words."""
    folder = tmp_path_factory.mktemp("many") / "plugins"
    for shape, words in (SHAPES | OTHERS).items():
        for name in ("q", LONG, "Two-Words3"):
            assert main(["new", name, *words, "--folder", str(folder / f"{shape}-{name}")]) == 0
    return folder


@pytest.mark.parametrize("config", [["--config", str(ROOT / "pyproject.toml")], []], ids=["ours", "its own"])
def test_style_is_kept_whatever_the_name(config, many):
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *config, "plugins"],
            cwd=many.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.slow  # mypy reads torch and transformers
@pytest.mark.timeout(600)
def test_types_fit(many):
    for shape in (*SHAPES, *OTHERS):
        command = [sys.executable, "-m", "mypy", "--config-file=", "--ignore-missing-imports", "trl_two_words3"]
        command += ["--cache-dir", str(many.parent / "types")]
        done = subprocess.run(command, cwd=many / f"{shape}-Two-Words3", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


# -- the way of an algorithm, with the commands for authors ------------------------------------------------------------
@pytest.fixture
def ours(tmp_path, monkeypatch):
    """Forget what a test imports of the plugins that it makes."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    before = set(sys.modules)
    yield tmp_path / "a folder, so to speak"
    for name in set(sys.modules) - before:
        if name.startswith("trl_my_"):
            del sys.modules[name]


def command(*words, code=0):
    """Run `trl-core`; what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*map(str, words)]) == code, out.getvalue()
    return out.getvalue()


def install_from(folder, site):
    """As `pip install -e` leaves it, but for the path, which a test sets."""
    project = Project(folder)
    points = {f"trl_core.{tag.value}": {name: value} for name, (tag, value) in project.algorithms.items()}
    info = write_distribution(site, project.name, points, requires=project.dependencies)
    (info / "direct_url.json").write_text(json.dumps({"url": folder.as_uri(), "dir_info": {"editable": True}}))
    sys.path.insert(0, str(folder))


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "not installed"])
@pytest.mark.parametrize(
    "shape", [shape if shape == "online" else pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES | OTHERS]
)
def test_what_is_made_can_be_checked_recorded_promoted_and_deprecated(shape, installed, ours, packages, monkeypatch):
    name = f"My-{shape}"
    folder = new(ours, name, *(SHAPES | OTHERS)[shape], "--author", "Zoë <z@example.org>")
    before = {path: (folder / path).read_bytes() for path in files_of(folder)}
    where = () if installed else ("--project", folder)
    if installed:
        install_from(folder, packages)
    assert command("api", "record", folder).strip() == str(folder / "api" / "0.1.0.json")
    assert "no breaking changes" in command("api", "check", folder)
    lacking = "is experimental: not ready: conformance, claim, releases."
    assert lacking in command("promote", name, *where, code=1)
    if not installed or shape != "online":
        # The kit runs in a process of its own; here only what takes no training.
        monkeypatch.setenv("PYTHONPATH", str(packages))
        quick = ["--pytest", "-k 'listed or range or public or contract or have_default' -p no:cacheprovider"]
        assert "5 passed" in command("check", folder, *quick, "--report", ours / "report.json")
        assert (ours / "report.json").is_file()
    change = ("deprecate", name, *where, "--removal", "0.2", "--replacement", "grpo")
    assert "Nothing was written" in command(*change)
    assert {path: (folder / path).read_bytes() for path in before} == before
    command(*change, "--apply")
    assert Project(folder).algorithm(name)[0].value == "deprecated"
    monkeypatch.chdir(folder)
    command("demote", ".", "--apply")
    assert {path: (folder / path).read_bytes() for path in before} == before
    assert lacking in command("promote", name.lower(), code=1)


# -- what is refused ---------------------------------------------------------------------------------------------------
def refused(capsys, *words):
    """What `trl-core new` says when it refuses."""
    assert main(["new", *words]) == 2
    said = capsys.readouterr().err
    assert "To mend:" in said
    return said


@pytest.mark.parametrize("name", ["", "trl-", "1st", "a b", "a/b", "a--b", "-", "ümlaut", "a+b", f"{LONG}w", "a_"])
def test_names_that_no_module_can_have_are_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("--", name) if name.startswith("-") else (name,)
    assert "cannot be the name of a plugin" in refused(capsys, *words)
    assert not files_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("class", "a word of Python's own"),
        ("match", "a word of Python's own"),
        ("random", "there is a module 'random'"),
        ("Torch", "there is a module 'torch'"),
        ("core", "a module 'trl_core' is installed"),
        ("conformance", "the test of that name is there already"),
        ("grpo", "trl-core:grpo is installed"),
        ("trl-GRPO", "trl-core:grpo is installed"),
    ],
)
def test_names_that_are_taken_are_refused(name, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert why in refused(capsys, name)
    assert not files_of(tmp_path)


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    assert "is not empty" in refused(capsys, "brief", "--folder", str(tmp_path / "full"))
    assert "is not empty" in refused(capsys, "brief", "--folder", str(tmp_path / "full" / "mine.txt"))
    assert "cannot be written" in refused(capsys, "brief", "--folder", str(tmp_path / "full" / "mine.txt" / "in"))
    assert files_of(tmp_path) == {"full/mine.txt"}
    (tmp_path / "empty").mkdir()
    assert main(["new", "brief", "--folder", str(tmp_path / "empty")]) == 0


def test_unknown_base_is_refused_with_what_was_meant(tmp_path, capsys):
    said = refused(capsys, "brief", "--extends", "grop", "--folder", str(tmp_path / "x"))
    assert "Did you mean 'grpo'?" in said
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("summary", ["two\nlines", 'a "word"', "back\\slash", "x" * 101])
def test_summary_that_is_no_plain_line_is_refused(summary, tmp_path, capsys):
    assert "is no plain line" in refused(capsys, "brief", "--summary", summary, "--folder", str(tmp_path / "x"))


def test_base_and_none_together_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["new", "brief", "--extends", "grpo", "--stands-alone"])
    assert "not allowed with" in capsys.readouterr().err


# -- installed from its wheel ------------------------------------------------------------------------------------------
RUN_EXAMPLES = """
import contextlib, io, json, os, re, runpy, sys
from pathlib import Path
from trl_core.testing import tiny_model, tiny_tokenizer

model = tiny_model()
model.generation_config.eos_token_id = list(range(40, 90))  # short completions
model.save_pretrained("model")
tiny_tokenizer().save_pretrained("model")
told = {}
for folder in map(Path, sys.argv[1:]):
    (example,) = re.findall(r"^```python\\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    own = 'output_dir=%r, max_steps=2' % ("out-" + folder.name)  # the folder of another run is refused
    example = example.replace("Qwen/Qwen3-0.6B", "model").replace('output_dir="out"', own)
    names = {"__name__": "__main__"}
    exec(compile(example, "README.md", "exec"), names)
    sys.argv = ["train.py", "--steps", "8"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        found = runpy.run_path(str(folder / "examples" / "train.py"), run_name="__main__")
    package = sys.modules[type(found["args"]).__module__]
    told[folder.name] = {
        "readme": names["trainer"].state.global_step,
        "script": found["trainer"].state.global_step,
        "lines": out.getvalue().splitlines(),
        "package": sys.modules["trl_" + folder.name].__file__,
    }
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the core's wheel and those of three plugins that its own command made; folder by shape."""
    base = tmp_path_factory.mktemp("installed")
    environment = make_environment(base / "environment", build_wheel(ROOT, base))
    folders = {}
    for shape, words in SHAPES.items():
        run(environment / "bin" / "trl-core", "new", shape, *words, "--folder", base / shape, cwd=base)
        folders[shape] = base / shape
    install(environment, *(build_wheel(folder, base) for folder in folders.values()))
    return environment, folders


@pytest.mark.slow
def test_installed_plugins_are_listed(installed, tmp_path):
    environment, _ = installed
    listed = json.loads(run(environment / "bin" / "trl-core", "list", "--json", cwd=tmp_path).stdout)
    found = {info["name"]: info for info in listed}
    for shape, base in (("online", "grpo"), ("offline", "dpo"), ("alone", None)):
        told = {key: found[shape][key] for key in ("distribution", "stability", "extends", "broken")}
        expected = {"distribution": f"trl-{shape}", "stability": "experimental", "extends": base, "broken": None}
        assert told == expected


@pytest.mark.slow
def test_examples_of_installed_plugins_train(installed, tmp_path):
    environment, folders = installed
    (tmp_path / "run.py").write_text(RUN_EXAMPLES, encoding="utf-8")
    command = [environment / "bin" / "python", "run.py", *folders.values()]
    done = run(*command, cwd=tmp_path, TRL_EXPERIMENTAL_SILENCE="1")
    told = json.loads(done.stdout.splitlines()[-1])
    for shape in SHAPES:
        assert (told[shape]["readme"], told[shape]["script"], len(told[shape]["lines"])) == (2, 8, 8)
        assert Path(told[shape]["package"]).is_relative_to(environment), "not the wheel was imported"


def own_tests(installed, shape, *options):
    environment, folders = installed
    command = [environment / "bin" / "python", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *options]
    return run(*command, cwd=folders[shape]).stdout


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_installed_plugin_passes_the_tests_of_its_formula(shape, installed):
    told = own_tests(installed, shape, "-m", "not conformance")
    assert " passed" in told and "SKIPPED" not in told


@pytest.mark.slow  # the whole kit for each; test_guide.py runs it for one plugin in `make test`
@pytest.mark.parametrize("shape", SHAPES)
def test_installed_plugin_passes_all_of_its_tests(shape, installed):
    told = own_tests(installed, shape)
    assert told.count("SKIPPED") == (2 if shape == "alone" else 0), "there is no base to compare it with"
