"""The documentation says what is so: generated parts are current, links resolve, and what it shows runs."""

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import math
import re
import runpy
import shlex
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import TrainerCallback

from trl_core import errors, get_config, get_trainer, hookspecs, list_algorithms
from trl_core.cli.flags import groups_of
from trl_core.cli.main import COMMANDS, main
from trl_core.cli.train import RunOptions
from trl_core.composition import compose
from trl_core.declared import check_hooks
from trl_core.options import fields_of
from trl_core.testing import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/*.md")]
GUIDE = ROOT / "docs" / "writing-a-plugin.md"
HOOKS = ROOT / "docs" / "hooks.md"
REFERENCE = ROOT / "docs" / "options.md"
ERROR_PAGE = ROOT / "docs" / "errors.md"
README = ROOT / "README.md"
START = ROOT / "docs" / "getting-started.md"
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
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


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(page, heading):
    """What stands under a heading, with its subsections."""
    found, depth, fence = [], 0, False
    for line in read(page).splitlines():
        fence ^= line.startswith("```")
        level = 0 if fence else len(line) - len(line.lstrip("#"))
        if depth and level and level <= depth:
            break
        if depth:
            found.append(line)
        elif level and line[level:].strip() == heading:
            depth = level
    assert depth, f"{name_of(page)} has no heading {heading}"
    return "\n".join(found)


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
    kind, refine = hookspecs.hook_kinds()[hook]
    assert f"\nKind: {kind}{', may be refined' if refine else ''}.\n" in section.group(1)


def test_hook_examples_fit_the_contract():
    examples = [content for _, content in blocks(HOOKS, "python") if "@hookimpl" in content]
    assert len(examples) == len(hookspecs.hook_kinds())
    for example in examples:
        namespace = {"hookimpl": hookspecs.hookimpl}
        exec("from __future__ import annotations\nclass Hooks:\n" + textwrap.indent(example, "    "), namespace)
        check_hooks(namespace["Hooks"], "docs/hooks.md")
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


OPTIONS = [(name, owner) for name in ALGORITHM_PAGES for owner in groups_of(compose(name)) if "." not in owner]


@pytest.mark.parametrize(("name", "owner"), OPTIONS, ids=lambda value: value)
def test_reference_has_every_option_with_its_default(name, owner):
    rows = set(
        re.findall(r"^\| `(\w+)` \| `[^|]+(?:\\\| [^|]+)*` \| (none|`[^`]*`) \| \S", read(REFERENCE), re.MULTILINE)
    )
    for field in groups_of(compose(name))[owner]:
        default = "none" if field.default is None else f"`{field.default!r}`"
        assert (field.name, default) in rows, field.name


def test_reference_has_no_table_twice():
    headings = re.findall(r"^### (.*)$", read(REFERENCE), flags=re.MULTILINE)
    assert len(headings) == len(set(headings)) > len(ALGORITHM_PAGES)
    tables = re.findall(r"^\| option .*?\n\n", read(REFERENCE), flags=re.MULTILINE | re.DOTALL)
    assert len(tables) == len(set(tables))


ERRORS = [
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, Exception) and value is not errors.TRLCoreError
]


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_documented_with_its_mend(name):
    assert f"<!-- error {name}:begin -->" in read(ERROR_PAGE)
    assert re.search(r"^\*\*To mend\.\*\* [A-Z`]", section(ERROR_PAGE, name), flags=re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_command_is_documented(name):
    text = section(ROOT / "docs" / "cli.md", name)
    assert f"trl-core {name}" in text
    for flag in flags_of(parser_of(name)):
        assert flag in text


def test_subcommands_are_written_too(gen_docs):
    parser = argparse.ArgumentParser(prog="trl-core api", add_help=False)
    record = parser.add_subparsers().add_parser("record", help="write the interface")
    record.add_argument("names", nargs="*", help="which")
    record.add_argument("--into", metavar="FILE", required=True, help="where to, default: %(default)s")
    lines = gen_docs._command(parser)
    assert lines[:2] == ["### api record", ""] and "Write the interface." in lines
    assert "trl-core api record [names...] --into FILE" in lines
    assert "| `names...` | which |\n| `--into FILE` | where to, default: None |" in "\n".join(lines)


def parser_of(command):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"trl_core.cli.{command}").add_arguments(parser)
    return parser


def flags_of(parser):
    """The flags of a command and its subcommands, but for --help."""
    inner = [
        choice for action in parser._actions if isinstance(action.choices, dict) for choice in action.choices.values()
    ]
    own = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    return (own - {"--help"}).union(*(flags_of(parser) for parser in inner))


def test_keys_of_a_run_are_documented():
    text = section(ROOT / "docs" / "cli.md", "The keys of a run")
    assert all(f"| `{field.name}` |" in text for field in fields_of(RunOptions))


# -- pages of algorithms -----------------------------------------------------------------------------------------------
HEADINGS = [
    "Example", "Formula", "Options", "Metrics", "Composition", "Traps", "Differences from TRL", "Evidence"
]  # fmt: skip


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "algorithms").glob("*.md")), ids=name_of)
def test_algorithm_page_has_the_same_parts(page):
    headings = re.findall(r"^## (.*)$", prose(page), flags=re.MULTILINE)
    assert [heading for heading in headings if heading in HEADINGS] == HEADINGS
    start = read(page).partition("\n## ")[0]
    assert re.search(r"^Papers?: .*\[\d{4}\.\d{5}\]\(https://arxiv\.org/abs/\d{4}\.\d{5}\)", start, re.M | re.S) or (
        "There is no paper" in start
    )
    for tag, distribution in re.findall(r"Tag:\s(\w+)\.\sDistribution:\s+`([\w-]+)`", start):
        assert tag in {info.stability.value for info in list_algorithms() if info.distribution == distribution}
    assert re.search(r"Tag:\s\w+\.\sDistribution:", start)
    assert re.search(r"^ {4,}\S|^\| `loss_type`", section(page, "Formula"), flags=re.MULTILINE)
    assert "```python" in section(page, "Example") and "| option | type | default |" in section(page, "Options")
    evidence = section(page, "Evidence")
    assert "EVIDENCE.md)" in evidence or "tests/parity/README.md)" in evidence
    named = re.findall(r"`((?:tests|plugins)/[^`]+)`", evidence)
    assert named and all(list(ROOT.glob(path)) for path in named), named


@pytest.mark.parametrize("name", ALGORITHM_PAGES)
def test_algorithm_page_has_its_row_of_the_matrix(name):
    _, _, short = name.partition(":")
    page = ROOT / "docs" / "algorithms" / ALGORITHM_PAGES[name]
    assert f"<!-- composition {short}:begin -->" in section(page, "Composition")


def test_every_algorithm_of_this_repository_has_a_page(gen_docs):
    assert {info.qualified for info in gen_docs._ours()} == set(ALGORITHM_PAGES)


def test_row_of_the_matrix_agrees_with_the_matrix(gen_docs):
    row = gen_docs.composition("gspo")
    assert (
        row.startswith("| on grpo | grpo | gfpo | gspo_token | replay |\n")
        and "| **gspo** | yes | yes | no | yes |" in row
    )
    assert "`gspo+gspo_token`" in row
    assert gen_docs.composition("sft").startswith("No other algorithm")


# -- hooks are tested --------------------------------------------------------------------------------------------------
def implementations(file):
    """The names of the functions of a file that are marked as hooks."""
    for node in ast.walk(ast.parse(read(file))):
        if isinstance(node, ast.FunctionDef) and any("hookimpl" in ast.unparse(mark) for mark in node.decorator_list):
            yield node.name


@pytest.fixture(scope="module")
def implemented():
    """Where each hook is implemented: in a test, or in a plugin, whose conformance test trains with it."""
    files = [*ROOT.glob("tests/*.py"), *ROOT.glob("plugins/*/tests/*.py"), *ROOT.glob("plugins/*/trl_*/*.py")]
    found = {}
    for file in files:
        trains = file.parent.name.startswith("trl_") or re.search(r"trainer|train\(|run\(", read(file), re.IGNORECASE)
        for name in implementations(file) if trains else ():
            found.setdefault(name, []).append(file)
    return found


@pytest.mark.parametrize("hook", hookspecs.hook_kinds())
def test_hook_has_a_test(hook, implemented):
    assert implemented.get(hook), f"no test and no plugin implements {hook}"


class Doubled(TrainerCallback):
    """Doubles the loss of each pair."""

    @hookspecs.hookimpl(wrapper=True)
    def pair_loss(self, pairs):
        loss = yield
        assert loss.shape == (pairs.num_pairs,)
        return 2 * loss


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("callbacks", "factor"), [([], 1), ([Doubled()], 2)])
def test_loss_of_pairs_can_be_refined(callbacks, factor, tmp_path):
    trainer = get_trainer("dpo")(
        model=tiny_model(),
        args=get_config("dpo")(output_dir=str(tmp_path), max_steps=1, logging_steps=1, save_strategy="no"),
        train_dataset=Dataset.from_list([{"prompt": "ask", "chosen": " yes", "rejected": " no"}]),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )
    trainer.train()
    # Policy and reference agree before the first step.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(factor * math.log(2), abs=1e-4)


# -- links and examples ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_decisions_are_numbered_and_complete():
    assert [page.name[:4] for page in DECISIONS] == [f"{number:04}" for number in range(1, len(DECISIONS) + 1)]
    for page in DECISIONS:
        assert read(page).startswith(f"# {page.name[:4]} ")
        headings = re.findall(r"^## (.*)$", read(page), flags=re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences", "Rejected"], page.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_compile(page):
    for _, content in blocks(page, "python"):
        # A lone signature, as in the hook reference, lacks only a body.
        ast.parse(content.rstrip() + ": ...\n" if re.fullmatch(r"def [^\n]*\n", content) else content)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_toml_and_yaml_blocks_are_read(page):
    for _, content in blocks(page, "toml"):
        tomllib.loads(content)
    for _, content in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(content), dict | list)


PROGRAMS = {"accelerate", "cat", "cd", "git", "ls", "make", "pip", "pytest", "python", "trl-core", "twine"}


def commands(page):
    """The command lines of a page, as words: those of its sh blocks, and indented ones of trl-core."""
    lines = "".join(content for _, content in blocks(page, "sh"))
    lines += "".join(re.findall(r"^ {4}(trl-core [a-z][^\n]*\n)", prose(page), flags=re.MULTILINE))
    for line in lines.replace("\\\n", " ").splitlines():
        if words := [word for word in shlex.split(line, comments=True) if not re.match("[A-Z_]+=", word)]:
            yield words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    for words in commands(page):
        assert words[0] in PROGRAMS, words
        if "trl_core.cli.main" in words:
            words = ["trl-core", *words[words.index("trl_core.cli.main") + 1 :]]
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        if words[0] == "make":
            assert all(re.search(rf"^{word}:", read(ROOT / "Makefile"), re.M) for word in words[1:2]), words
        if words[0] != "trl-core" or words[1].startswith("-"):
            continue
        assert words[1] in COMMANDS, words
        known = flags_of(parser_of(words[1])) | {"--help"}
        if words[1] == "train":
            if page == GUIDE and words[2] not in {name.partition(":")[2] for name in ALGORITHM_PAGES}:
                continue  # the plugin that the page makes
            composition = compose(words[2] if words[2] != "NAME" else "grpo")
            names = {f.name for fields in [*groups_of(composition).values(), fields_of(RunOptions)] for f in fields}
            known |= {f"--{name}" for name in names | composition.arguments.keys()}
        assert given <= known, (words, given - known)


def test_the_rule_of_commands_sees(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    for line in ("trl-core trian grpo", "trl-core list --no-such", "trl-core train sft --packign true", "rm -r out"):
        page.write_text(f"```sh\n{line}\n```\n", encoding="utf-8")
        with pytest.raises(AssertionError):
            test_commands_exist(page)


@pytest.mark.usefixtures("one_thread")
def test_getting_started_runs(tmp_path, monkeypatch, capsys):
    """Its files and commands in their order; only the installation is left out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    ran = []
    for language, info, content in re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", read(START), re.DOTALL | re.MULTILINE):
        if language != "sh":
            (title,) = re.fullmatch(r' title="([\w.]+)"', info).groups()
            Path(title).write_text(content, encoding="utf-8")
            continue
        for line in content.splitlines():
            program, *words = shlex.split(line)
            if program == "trl-core":
                assert main(words) == 0, line
            elif program == "python":
                runpy.run_path(words[0], run_name="__main__")
            else:
                assert program == "pip"
            ran.append(line)
    sys.modules.pop("rewards", None)
    said = capsys.readouterr().out
    assert len(ran) == 9 and re.findall(r"^(\d) [\d.]+ 0\.5$", said, flags=re.MULTILINE) == ["1", "2", "3", "4"]
    steps = [json.loads(line)["step"] for line in read(tmp_path / "out" / "metrics.jsonl").splitlines()]
    assert max(steps) == 6 and steps.count(5) == 1
    for folder in ("out", "out-composed", "out-python"):
        assert (Path(folder) / "model.safetensors").exists()
    for name in re.findall(r"`([\w.-]+)`", section(START, "What a run leaves").split("```")[0]):
        assert name == "out" or (Path("out") / name).exists(), name


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
