"""The page on writing a plugin, as a stranger follows it: every command is run and every file written as printed."""

import os
import re
import sys
from pathlib import Path

import pytest

from trl_core import errors, get_trainer
from trl_core.testing.checks import CHECKS

from .helpers_dist import write_plugin
from .helpers_wheels import build_wheel, make_environment, run

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "writing-a-plugin.md"
TEXT = GUIDE.read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# There is no index here: the core comes from its wheel, what it needs from the environment that runs the tests.
INSTEAD = {
    "pip install -e '.[authors]'": "trl-core --version",
    "pip install": "python -m pip install --quiet --no-index --no-build-isolation --no-deps",
}


def edit(folder, title, content):
    """Write a file as it is printed; of TOML, which is printed in part, replace the table that it begins with."""
    file = folder / title
    if file.suffix == ".toml":
        header, text = content.partition("\n")[0], file.read_text(encoding="utf-8")
        assert text.count(f"{header}\n") == 1
        before, _, after = text.partition(f"{header}\n")
        content = before + content + after[re.search(r"^(?=\[)|\Z|^$", after, re.MULTILINE).start() :]
    file.write_text(content, encoding="utf-8")


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """What each command said, and the folder of the plugin afterwards."""
    base = tmp_path_factory.mktemp("walk")
    environment = make_environment(base / "environment", build_wheel(ROOT, base))
    told, folder = {}, base / "work"
    folder.mkdir()
    path = os.pathsep.join([str(environment / "bin"), os.environ["PATH"]])
    for language, info, content in BLOCK.findall(TEXT):
        if title := re.fullmatch(r' title="([^"]+)"', info):
            edit(folder, title[1], content)
            continue
        assert (language, info) == ("sh", ""), f"a block that is neither run nor written: {language}{info}"
        for command in content.splitlines():
            ours = command
            for printed, done in INSTEAD.items():
                ours = ours.replace(printed, done)
            done = run("bash", "-c", f"set -e; {ours}; pwd", cwd=folder, PATH=path)
            *lines, place = done.stdout.splitlines()
            told[command], folder = "\n".join(lines), Path(place)
    return told, folder


def test_ten_commands_and_edits_lead_to_a_passing_plugin():
    steps = TEXT[: TEXT.index("## Other beginnings")]
    assert re.findall(r"^\*\*Step (\d+)\. ", steps, flags=re.MULTILINE) == [str(number) for number in range(1, 11)]
    blocks = BLOCK.findall(steps)
    assert len(blocks) == 10
    assert all(len(content.splitlines()) == 1 for language, _, content in blocks if language == "sh")
    assert blocks[-1][2] == "trl-core check .\n"


@pytest.mark.slow  # the walk takes more than a minute
def test_information_names_option_and_hook(walk):
    told = walk[0]["trl-core info brief"]
    assert "brief_limit" in told
    assert re.search(r"advantages +grpo provides, brief refines", told)


@pytest.mark.slow  # the walk takes more than a minute
def test_plugin_passes(walk):
    told, folder = walk
    assert " passed" in told["python -m pytest -q tests/test_brief.py"]
    assert f"{len(CHECKS)} passed" in told["trl-core check ."].splitlines()[-2]
    assert (folder / "evidence" / "conformance.json").is_file()


@pytest.mark.slow  # the walk takes more than a minute
def test_example_trains(walk):
    assert len(re.findall(r"^step .* reward ", walk[0]["python examples/train.py --limit 6"], re.MULTILINE)) == 8


@pytest.mark.slow  # the walk takes more than a minute
def test_both_algorithms_compose(walk):
    assert "generations seen: 2" in walk[0]["python examples/compose.py"]
    assert re.search(r"advantages +grpo provides, ramp refines", walk[0]["trl-core info brief+ramp"])


@pytest.mark.slow  # the walk takes more than a minute
def test_workflow_of_the_plugin_would_pass(walk, tmp_path):
    for command in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        run(sys.executable, "-m", "ruff", *command, ".", cwd=walk[1])


# -- what is refused ---------------------------------------------------------------------------------------------------
PLUGIN = """
from dataclasses import dataclass
from trl_core import Algorithm, hookimpl, option

@dataclass
class Options:
    refused_limit: int = option(1, "For a test.")

class Hooks:
    def __init__(self, context):
        pass

    @hookimpl
    def keep(self, rollouts):
        return rollouts.reward > 0

algorithm = Algorithm(name="refused", summary="For a test.", extends="grpo", config=Options, hooks=Hooks)
"""
REFUSED = {
    "a misspelt hook": ("def keep(", "def kept("),
    "without `@hookimpl`": ("    @hookimpl\n", ""),
    "an argument that the hook does not have": ("(self, rollouts)", "(self, samples)"),
    "an argument with a default value": ("(self, rollouts)", "(self, rollouts=None)"),
    "a wrapper of a contribute hook": ("@hookimpl\n", "@hookimpl(wrapper=True)\n"),
    "`tryfirst` or `trylast`": ("@hookimpl\n", "@hookimpl(tryfirst=True)\n"),
    "an option that the base": ("refused_limit", "beta"),
    "`defaults` for an option that does not exist": ("hooks=Hooks", "hooks=Hooks, defaults={'no_such': 1}"),
    "a `name` that differs": ('name="refused"', 'name="other"'),
}


@pytest.mark.parametrize("what", REFUSED)
def test_guide_names_the_error(what, tmp_path, monkeypatch):
    (expected,) = re.findall(rf"^\| [^|\n]*{re.escape(what)}[^|\n]*\| `(\w+)` \|$", TEXT, flags=re.MULTILINE)
    old, new = REFUSED[what]
    assert old in PLUGIN
    monkeypatch.syspath_prepend(tmp_path)
    # A name of its own, so that no module of another case is found again.
    distribution = f"trl-refused-{list(REFUSED).index(what)}"
    write_plugin(tmp_path, "refused", distribution=distribution, source=PLUGIN.replace(old, new))
    with pytest.raises(errors.TRLCoreError) as caught:
        assert get_trainer("refused").composition.config_class
    assert type(caught.value).__name__ == expected
