"""The documentation says what is so: generated parts are current, links resolve, and what it shows runs."""

import ast
import dataclasses
import importlib.util
import inspect
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from trl_core import errors, get_trainer, hookspecs
from trl_core.cli.main import COMMANDS, main
from trl_core.composition import _check_hooks, compose
from trl_core.testing import tiny_model, tiny_tokenizer

from .helpers_dist import write_plugin

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/*.md")]
GUIDE = ROOT / "docs" / "writing-a-plugin.md"
HOOKS = ROOT / "docs" / "hooks.md"
README = ROOT / "README.md"
ALGORITHM_PAGES = {f"trl-core:{name}": f"{name}.md" for name in ("dpo", "grpo", "reward", "sft")} | {
    "trl-bema:bema": "bema.md",
    "trl-gfpo:gfpo": "gfpo.md",
    "trl-gspo:gspo": "gspo.md",
    "trl-gspo:gspo_token": "gspo.md",
    "trl-ppo:ppo": "ppo.md",
    "trl-replay:replay": "replay.md",
}


def read(page):
    return page.read_text(encoding="utf-8")


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """(info string, content) of each fenced block in a language."""
    found = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", read(page), flags=re.DOTALL | re.MULTILINE)
    return [(info.strip(), content) for kind, info, content in found if kind == language]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def gen_docs():
    spec = importlib.util.spec_from_file_location("gen_docs", ROOT / "tools" / "gen_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_thread():
    """More gain nothing for a tiny model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- what is generated -------------------------------------------------------------------------------------------------
def test_generated_parts_are_current(gen_docs):
    stale = [name_of(page) for page, text in gen_docs.pages().items() if text != read(page)]
    assert not stale, f"run `python tools/gen_docs.py`: {stale}"


def test_readme_lists_every_algorithm_of_this_repository(gen_docs):
    table = read(README).partition("<!-- algorithms:begin -->\n")[2].partition("\n<!-- algorithms:end -->")[0]
    assert table == gen_docs.algorithms()
    for name in ("grpo", "gfpo"):
        assert f"| {name} |" in table


def test_generated_part_is_replaced_and_the_rest_kept(gen_docs):
    page = "before\n<!-- hook keep:begin -->\nold\n<!-- hook keep:end -->\nafter\n"
    text = gen_docs.current(page)
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text and "def keep(self, rollouts: Rollouts) -> Tensor" in text
    assert gen_docs.current(text) == text


# -- hooks, options, errors, commands ----------------------------------------------------------------------------------
@pytest.mark.parametrize("hook", hookspecs.hook_kinds())
def test_hook_is_documented(hook, gen_docs):
    section = re.search(rf"^## {hook}\n(.*?)(?=^## |\Z)", read(HOOKS), flags=re.DOTALL | re.MULTILINE)
    assert section, f"docs/hooks.md has no heading {hook}"
    assert f"def {hook}{gen_docs.signature(getattr(hookspecs.HookSpecs, hook))}\n" in section.group(1)
    assert section.group(1).count("```python") == 2, "a signature and an example"


def test_hook_examples_fit_the_contract():
    examples = [content for _, content in blocks(HOOKS, "python") if "@hookimpl" in content]
    assert len(examples) == len(hookspecs.hook_kinds())
    for example in examples:
        namespace = {"hookimpl": hookspecs.hookimpl}
        exec("from __future__ import annotations\nclass Hooks:\n" + textwrap.indent(example, "    "), namespace)
        _check_hooks(namespace["Hooks"], "docs/hooks.md")
        assert len(example.splitlines()) <= 7


@pytest.mark.parametrize("name", ALGORITHM_PAGES)
def test_every_option_is_documented_with_its_default(name):
    text = read(ROOT / "docs" / "algorithms" / ALGORITHM_PAGES[name])
    algorithm = compose(name).own.algorithm
    defaults = dict(algorithm.defaults)
    for field in dataclasses.fields(algorithm.config) if algorithm.config else ():
        if field.name in inspect.get_annotations(algorithm.config):
            made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            defaults[field.name] = made
    for option, value in defaults.items():
        default = "none" if value is None else f"`{value!r}`"
        assert re.search(rf"^\| `{option}` \| [^\n]* \| {re.escape(default)} \| \S", text, re.MULTILINE), option


def test_every_error_is_documented():
    text = read(ROOT / "docs" / "architecture.md")
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.TRLCoreError) and value is not errors.TRLCoreError:
            assert f"| `{name}` |" in text


def test_commands_of_the_readme_exist():
    shown = set(re.findall(r"^ {4}trl-core ([a-z]+)", read(README), flags=re.MULTILINE))
    assert "list" in shown
    assert shown <= set(COMMANDS)


# -- links and examples ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_decisions_are_numbered_and_complete():
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for page in pages:
        assert read(page).startswith(f"# {page.name[:4]} ")
        headings = re.findall(r"^## (.*)$", read(page), flags=re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences", "Rejected"], page.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_compile(page):
    for _, content in blocks(page, "python"):
        # A lone signature, as in the hook reference, lacks only a body.
        ast.parse(content.rstrip() + ": ...\n" if re.fullmatch(r"def [^\n]*\n", content) else content)


# The classic API has no trainer.train(); its own tests run its page.
EXAMPLES = [page for page in (ROOT / "docs" / "algorithms").glob("*.md") if page.name != "ppo-classic.md"]


@pytest.mark.parametrize("page", [README, *EXAMPLES, *ROOT.glob("plugins/*/README.md")], ids=name_of)
@pytest.mark.usefixtures("one_thread")
def test_example_trains(page, tmp_path, monkeypatch):
    """With a tiny model in place of the one from the Hub."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(40, 90))  # short completions
    model.save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    (example,) = [content for _, content in blocks(page, "python") if "trainer.train()" in content]
    assert "Qwen/Qwen3-0.6B" in example
    example = example.replace("Qwen/Qwen3-0.6B", "model").replace('output_dir="out"', 'output_dir="out", max_steps=2')
    namespace = {"__name__": "__main__"}
    exec(compile(example, name_of(page), "exec"), namespace)
    assert namespace["trainer"].state.global_step == 2


def test_readme_example_has_ten_lines():
    (example,) = [content for _, content in blocks(README, "python") if "trainer.train()" in content]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10


# -- the walk-through --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the files of the guide; the plugin is installed into its folder `site`."""
    folder = tmp_path_factory.mktemp("walk")
    for language in ("toml", "python"):
        for info, content in blocks(GUIDE, language):
            title, mode = re.fullmatch(r'title="([^"]+)"( append)?', info).groups()
            file = folder / title
            assert file.exists() == bool(mode), f"{title} is given twice, or is to be extended before it is there"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text((file.read_text(encoding="utf-8") if mode else "") + content, encoding="utf-8")
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def walk(installed, monkeypatch):
    monkeypatch.syspath_prepend(installed / "site")
    monkeypatch.chdir(installed)
    return installed


def test_walk_through_lists_the_plugins(walk, capsys):
    assert main(["list", "--format", "md"]) == 0
    listed = capsys.readouterr().out
    assert "| brief | experimental | trl-brief | grpo | Train on brief completions only. |" in listed
    assert "| ramp | experimental | trl-brief | grpo | Let advantages grow to their full size. |" in listed


@pytest.mark.usefixtures("walk", "one_thread")
def test_walk_through_trains(capsys):
    runpy.run_path("train.py", run_name="__main__")
    kept = re.search(r"^kept: \[([\d.]+), ([\d.]+)\]$", capsys.readouterr().out, flags=re.MULTILINE)
    assert all(0 < float(share) < 1 for share in kept.groups())


@pytest.mark.usefixtures("walk", "one_thread")
def test_walk_through_composes(capsys):
    runpy.run_path("compose.py", run_name="__main__")
    assert "generations seen: 2" in capsys.readouterr().out


def test_walk_through_conforms(walk, tmp_path):
    module = runpy.run_path("tests/test_conformance.py")
    (mark,) = module["test_conformance"].pytestmark
    for check in mark.args[1]:
        module["test_conformance"](check, tmp_path / check.__name__)


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
    (expected,) = re.findall(rf"^\| [^|\n]*{re.escape(what)}[^|\n]*\| `(\w+)` \|$", read(GUIDE), flags=re.MULTILINE)
    old, new = REFUSED[what]
    assert old in PLUGIN
    monkeypatch.syspath_prepend(tmp_path)
    # A name of its own, so that no module of another case is found again.
    distribution = f"trl-refused-{list(REFUSED).index(what)}"
    write_plugin(tmp_path, "refused", distribution=distribution, source=PLUGIN.replace(old, new))
    with pytest.raises(errors.TRLCoreError) as caught:
        assert get_trainer("refused").composition.config_class
    assert type(caught.value).__name__ == expected
