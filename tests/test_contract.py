"""The recorded interface: what is promised is in the record, and no change that breaks a promise passes the check."""

import copy
import json
import re
import shutil
import sys
import types
from datetime import date, timedelta
from pathlib import Path

import pytest

import trl_core
from trl_core.cli.main import main
from trl_core.contract import breaking_changes, changes, check, minors_unchanged, notices, record, records
from trl_core.contract.compare import deprecations
from trl_core.contract.interface import public_api
from trl_core.contract.record import hook_schema
from trl_core.errors import ContractError, ProjectError
from trl_core.hookspecs import HookSpecs, _contribute, _provide
from trl_core.project import Project
from trl_core.stability import deprecated

from .helpers_contract import SOURCES, api, edited, write

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
NOTE = {"since": "0.2", "removal": "0.4", "replacement": None}
ENTRY = 'promise = "trl_promise.promise:algorithm"\n'
DEPRECATION = 'Deprecation(since="0.2", removal="0.4")'
RETIRED = [
    ("trl_core.stable", "trl_core.deprecated"),
    ("config=PromiseOptions", "removal='0.4', config=PromiseOptions"),
]
MARK = '@deprecated(since="0.2", removal="0.4"'


@pytest.fixture(autouse=True)
def no_bytecode(monkeypatch):
    """Sources that change within a second would be taken for the same."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.fixture
def folder(tmp_path):
    yield write(tmp_path, SOURCES)
    write(tmp_path, {})


@pytest.fixture(scope="module")
def core():
    """The record of trl-core as it is now, at a version from which deprecations can be due."""
    return {**record(Project(ROOT)), "version": "0.2.0"}


# -- this repository --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name if path != ROOT else "trl-core")
def test_nothing_promised_has_changed(folder, capsys):
    assert api("check", folder) == 0, capsys.readouterr().out


def test_core_record_has_what_is_promised(core):
    assert set(core["algorithms"]) == {"dpo", "grpo", "reward", "sft"}
    assert core["algorithms"]["grpo"]["options"]["beta"] == {"type": "float", "default": 0.0}
    assert core["algorithms"]["grpo"]["options"]["num_generations"] == {"type": "int", "default": 8}  # of OnlineConfig
    assert "per_device_train_batch_size" not in core["algorithms"]["grpo"]["options"]  # of transformers
    assert set(core["hooks"]) == set(trl_core.hookspecs.hook_kinds())
    assert core["hooks"]["advantages"]["parameters"] == ["rollouts", "keep"]
    facade = "\n".join(core["api"]["trl_core"])
    for name in trl_core.__all__:
        assert f" {name}(" in facade or f"class {name}:" in facade or f"{name}: Any" in facade or name == "errors"
    assert "    learning_rates: dict[str, float]" in facade  # an attribute of HookContext
    assert "    sampling_logps: Tensor | None" in facade  # a field of Rollouts
    assert "def policy_loss(" in "\n".join(core["api"]["trl_core.stages"])  # hidden by the module of that name
    assert "class ConfigError(TRLCoreError, ValueError): ..." in core["api"]["trl_core.errors"]


def test_core_record_is_small():
    assert all(file.stat().st_size < 60_000 for file in (ROOT / "api").glob("*.json"))


def test_a_record_is_the_same_each_time(folder):
    assert api("record", folder) == 0
    (file,) = (folder / "api").glob("*.json")
    first = file.read_bytes()
    write(folder, {})
    assert api("record", folder) == 0
    assert file.read_bytes() == first and file.name == "0.2.0.json"


def part(name):
    """The edit that deprecates an argument, a default or a name of the algorithm."""
    return "config=PromiseOptions", f'deprecated={{"{name}": {DEPRECATION}}}, config=PromiseOptions'


# -- mutations of a distribution --------------------------------------------------------------------------------------
# What is changed, the deprecation that excuses it, and what the check must say.
MUTATIONS = {
    "option removed": (
        [('    mode: str = option("soft", "How to judge.")\n', "")],
        [('"How to judge.")', f'"How to judge.", deprecated={DEPRECATION})')],
        "option 'mode' of 'promise' was removed\n",
    ),
    "option renamed": (
        [("mode: str", "manner: str")],
        [('"How to judge.")', f'"How to judge.", deprecated={DEPRECATION})')],
        "option 'mode' of 'promise' was removed (renamed to 'manner'?)",
    ),
    "option's default changed": (
        [("option(0.5", "option(0.6")],
        [('"Least score.")', f'"Least score.", deprecated={DEPRECATION})')],
        "option 'least' of 'promise' changed its default from 0.5 to 0.6",
    ),
    "option's type changed": (
        [("mode: str", "mode: int")],
        [('"How to judge.")', f'"How to judge.", deprecated={DEPRECATION})')],
        "option 'mode' of 'promise' changed its type from 'str' to 'int'",
    ),
    "option's type narrowed": (
        [("rounds: int | None", "rounds: int")],
        [('"Rounds.")', f'"Rounds.", deprecated={DEPRECATION})')],
        "option 'rounds' of 'promise' changed its type from 'int | None' to 'int'",
    ),
    "option lost its default": (
        [('    least: float = option(0.5, "Least score.")', "    least: float")],
        [('"Least score.")', f'"Least score.", deprecated={DEPRECATION})')],
        "option 'least' of 'promise' lost its default 0.5",
    ),
    "option without default added": (
        [("class PromiseOptions:\n", "class PromiseOptions:\n    needed: int\n")],
        None,
        "option 'needed' of 'promise' was added without a default",
    ),
    "default of the base changed": (
        [('"loss_type": "grpo"', '"loss_type": "dapo"')],
        [part("loss_type")],
        "default of 'loss_type' under 'promise' changed from 'grpo' to 'dapo'",
    ),
    "trainer argument removed": (
        [(', "coach": "Who helps."', "")],
        [part("coach")],
        "argument 'coach' of the trainer of 'promise' was removed",
    ),
    "trainer renamed": (
        [
            ("config=PromiseOptions", 'trainer_name="VowTrainer", config=PromiseOptions'),
            ("PROMISETrainer", "VowTrainer"),
        ],
        [part("PROMISETrainer")],
        "trainer 'PROMISETrainer' of 'promise' was renamed to 'VowTrainer'",
    ),
    "trainer no longer exported": (
        [('"PROMISETrainer", ', "")],
        [part("PROMISETrainer")],
        "'trl_promise.PROMISETrainer' was removed",
    ),
    "algorithm extends another": (
        [('extends="grpo",\n    config=PromiseOptions', 'extends="gfpo",\n    config=PromiseOptions')],
        RETIRED,
        "algorithm 'promise' extends 'gfpo', not 'grpo' any more",
    ),
    "algorithm removed": (
        [(ENTRY, ""), ("PROMISE", "VOW")],
        RETIRED,
        "algorithm 'promise' was removed",
    ),
    "algorithm demoted": (
        [(f"{ENTRY}\n", "\n"), ('experimental"]\n', f'experimental"]\n{ENTRY}')],
        RETIRED,
        "algorithm 'promise' was demoted to experimental",
    ),
    "class removed": (
        [("Brief, Judge, algorithm", "Judge, algorithm"), ('"Brief", ', "")],
        [("@dataclass(frozen=True)\n", f"{MARK})\n@dataclass(frozen=True)\n")],
        "'trl_promise.Brief' was removed",
    ),
    "function removed": (
        [(", algorithm, shorten", ", algorithm"), (', "shorten"]', "]")],
        [("def shorten", f"{MARK})\ndef shorten")],
        "'trl_promise.shorten' was removed",
    ),
    "method removed": (
        [("def score(", "def _score(")],
        [("    def score(", f"    {MARK})\n    def score(")],
        "'trl_promise.Judge.score' was removed",
    ),
    "parameter removed": (
        [(', *, mark: str = "..."', ""), (" + mark", "")],
        [("def shorten", f'{MARK}, parameter="mark")\ndef shorten')],
        "argument 'mark' of 'trl_promise.shorten' was removed",
    ),
    "required parameter added": (
        [("text: str, limit", "text: str, by: str, limit")],
        [("def shorten", f"{MARK})\ndef shorten")],
        "argument 'by' of 'trl_promise.shorten' was added without a default",
    ),
    "parameter became required": (
        [("strict: bool = False", "strict: bool")],
        [("class Judge", f'{MARK}, parameter="strict")\nclass Judge')],
        "argument 'strict' of 'trl_promise.Judge'",
    ),
    "parameter's default changed": (
        [("limit: int = 3, *", "limit: int = 4, *")],
        [("def shorten", f'{MARK}, parameter="limit")\ndef shorten')],
        "argument 'limit' of 'trl_promise.shorten' changed its default from 3 to 4",
    ),
    "parameter moved": (
        [("text: str, weight: float = 1.0", "weight: float = 1.0, text: str = ''")],
        [("    def score(", f"    {MARK})\n    def score(")],
        "argument 'text' of 'trl_promise.Judge.score'",
    ),
    "parameter became keyword-only": (
        [("limit: int = 3, *, mark", "*, limit: int = 3, mark")],
        [("def shorten", f'{MARK}, parameter="limit")\ndef shorten')],
        "argument 'limit' of 'trl_promise.shorten'",
    ),
    "field of a dataclass removed": (
        [("    limit: int = 3\n", "")],
        [("@dataclass(frozen=True)\n", f"{MARK})\n@dataclass(frozen=True)\n")],
        "'trl_promise.Brief.limit' was removed",
    ),
    "field of a dataclass became required": (
        [("    limit: int = 3\n", "    limit: int\n")],
        [("@dataclass(frozen=True)\n", f'{MARK}, parameter="limit")\n@dataclass(frozen=True)\n')],
        "argument 'limit' of 'trl_promise.Brief'",
    ),
}
NEXT = ('version = "0.2.0"', 'version = "0.4.0"')


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_promise_is_caught(mutation, folder, capsys):
    edits, _, expected = MUTATIONS[mutation]
    assert api("record", folder) == 0
    write(folder, edited(SOURCES, *edits))
    assert api("check", folder) == 1
    broken = [line for line in capsys.readouterr().out.splitlines(keepends=True) if line.startswith("breaking: ")]
    assert any(expected in line for line in broken), broken


@pytest.mark.parametrize("mutation", [name for name, (_, notice, _) in MUTATIONS.items() if notice])
def test_what_was_deprecated_may_go_when_due(mutation, folder, capsys):
    edits, notice, expected = MUTATIONS[mutation]
    write(folder, edited(SOURCES, *notice))
    assert api("record", folder) == 0
    write(folder, edited(SOURCES, *edits, ('version = "0.2.0"', 'version = "0.3.0"')))
    assert api("check", folder) == 1, "not yet"
    capsys.readouterr()
    write(folder, edited(SOURCES, *edits, NEXT))
    assert api("check", folder) == 0
    out = capsys.readouterr().out
    assert any(expected in line for line in out.splitlines(keepends=True) if line.startswith("deprecated and due: "))


HARMLESS = {
    "help of an option": [("How to judge.", "How to judge a text.")],
    "docstrings": [("Cut.", "Cut a text."), ("One number.", "A number.")],
    "option with a default": [('"Rounds.")', '"Rounds.")\n    more: int = option(1, "More.")')],
    "type widened": [("mode: str", "mode: str | None")],
    "order in a union": [("rounds: int | None", "rounds: None | int")],
    "optional parameter": [('mark: str = "..."', 'mark: str = "...", more: int = 0')],
    "class and function": [
        ("\nalgorithm = ", "\nclass Added: pass\n\n\nalgorithm = "),
        ("import Brief", "import Added, Brief"),
        ('"Brief"', '"Added", "Brief"'),
    ],
    "method": [("    def score(", "    def weigh(self): ...\n\n    def score(")],
    "trainer argument": [('"judge": "Who judges."', '"judge": "Who judges.", "third": "Another."')],
    "body of a function": [("text[:limit] + mark", "mark + text[:limit]")],
    "private names": [("\nalgorithm = ", "\ndef _private(): ...\n\n\nalgorithm = ")],
    "base class behind a class": [("class Judge:", "class _Base:\n    pass\n\n\nclass Judge(_Base):")],
    "method moved to a private base": [
        ("class Judge:\n", "class _Base:\n"),
        ("\ndef shorten", '\nclass Judge(_Base):\n    """Judges."""\n\n\ndef shorten'),
    ],
    "definition moved to another module": [
        ("from .promise import Brief, Judge, algorithm, shorten", "from .moved import Brief, Judge, algorithm, shorten")
    ],
    "experimental algorithm": [("sketch: int", "outline: str"), ("option(1, ", "option('', ")],
    "experimental algorithm removed": [('draft = "trl_promise.promise:draft"\n', "")],
    "algorithm deprecated": [
        *RETIRED,
    ],
}


@pytest.mark.parametrize("mutation", HARMLESS)
def test_a_harmless_change_passes(mutation, folder, capsys):
    assert api("record", folder) == 0
    changed = edited(SOURCES, *HARMLESS[mutation])
    write(folder, {**changed, "trl_promise/moved.py": changed["trl_promise/promise.py"]})
    assert api("check", folder) == 0, capsys.readouterr().out
    assert "breaking:" not in capsys.readouterr().out


def test_changes_of_what_is_experimental_and_additions_are_told(folder, capsys):
    assert api("record", folder) == 0
    write(folder, edited(SOURCES, ("sketch: int", "outline: int"), ('"judge": "', '"third": "", "judge": "')))
    assert api("check", folder) == 0
    out = capsys.readouterr().out
    assert "allowed, experimental: trl-promise: option 'sketch' of 'draft' was removed (renamed to 'outline'?)" in out
    assert "added: trl-promise: option 'outline' of 'draft'" in out
    assert "added: trl-promise: argument 'third' of the trainer of 'promise'" in out


def test_a_distribution_without_anything_stable_promises_nothing(folder, capsys):
    experimental = edited(SOURCES, ('[project.entry-points."trl_core.experimental"]\n', ""), ("stable", "experimental"))
    write(folder, experimental)
    assert api("record", folder) == 0
    write(folder, edited(experimental, *MUTATIONS["option removed"][0], *MUTATIONS["class removed"][0]))
    assert api("check", folder) == 0
    out = capsys.readouterr().out
    assert "option 'mode'" in out and "'trl_promise.Brief' was removed" in out


def test_with_its_last_stable_algorithm_the_promise_of_names_ends(folder):
    write(folder, edited(SOURCES, *RETIRED))
    assert api("record", folder) == 0
    gone = edited(SOURCES, (ENTRY, ""), *MUTATIONS["class removed"][0])
    write(folder, edited(gone, ('version = "0.2.0"', 'version = "0.3.0"')))
    assert api("check", folder) == 1
    write(folder, edited(gone, NEXT))
    assert api("check", folder) == 0


# -- mutations of the core --------------------------------------------------------------------------------------------
def grpo(made):
    return made["algorithms"]["grpo"]


def rename(table, old, new):
    table[new] = table.pop(old)


CORE_MUTATIONS = {
    "option removed": (lambda now: grpo(now)["options"].pop("beta"), "option 'beta' of 'grpo' was removed"),
    "option renamed": (
        lambda now: rename(grpo(now)["options"], "num_generations", "completions"),
        "option 'num_generations' of 'grpo' was removed (renamed to 'completions'?)",
    ),
    "default changed": (
        lambda now: grpo(now)["options"]["epsilon"].update(default=0.3),
        "option 'epsilon' of 'grpo' changed its default from 0.2 to 0.3",
    ),
    "type changed": (
        lambda now: grpo(now)["options"]["delta"].update(type="int | None"),
        "option 'delta' of 'grpo' changed its type from 'float | None' to 'int | None'",
    ),
    "trainer renamed": (
        lambda now: (
            grpo(now).update(trainer="GroupTrainer"),
            now["api"].update(trl_core=[line for line in now["api"]["trl_core"] if "GRPOTrainer" not in line]),
        ),
        "trainer 'GRPOTrainer' of 'grpo' was renamed to 'GroupTrainer'",
    ),
    "algorithm removed": (lambda now: now["algorithms"].pop("grpo"), "algorithm 'grpo' was removed"),
}


@pytest.mark.parametrize("mutation", CORE_MUTATIONS)
def test_a_broken_promise_of_the_core_is_caught(mutation, core):
    mutate, expected = CORE_MUTATIONS[mutation]
    now = copy.deepcopy(core)
    mutate(now)
    assert f"trl-core: {expected}" in [change.what for change in breaking_changes(core, now)]
    old = copy.deepcopy(core)
    for each in grpo(old)["options"].values():
        each["deprecated"] = NOTE
    if "option" not in expected:
        grpo(old).update(tag="deprecated", removal="0.4")
    assert breaking_changes(old, {**now, "version": "0.3.0"})
    assert breaking_changes(old, {**now, "version": "0.4.0"}) == []


class Other:
    """Hooks as they might be later."""

    @_contribute
    def without_argument(self): ...

    @_contribute
    def renamed_argument(self, samples): ...

    @_provide(refine=True)
    def another_kind(self, rollouts): ...

    @_contribute
    def more_arguments(self, rollouts, step) -> "Tensor": ...  # noqa: F821


HOOK_MUTATIONS = {
    "removed": (None, "hook 'keep' was removed"),
    "argument removed": (Other.without_argument, "hook 'keep': argument 'rollouts' was removed"),
    "argument renamed": (Other.renamed_argument, "hook 'keep': argument 'rollouts' was removed"),
    "kind changed": (Other.another_kind, "hook 'keep' changed its kind from contribute to provide"),
    "returns something else": (
        Other.renamed_argument,
        "hook 'keep' wants <class 'inspect._empty'> returned, not Tensor",
    ),
}


@pytest.mark.parametrize("mutation", HOOK_MUTATIONS)
def test_a_changed_hook_is_caught(mutation, core, monkeypatch):
    replaced, expected = HOOK_MUTATIONS[mutation]
    old = copy.deepcopy(core)
    old["hooks"]["keep"]["deprecated"] = {"": NOTE}
    if replaced is None:
        monkeypatch.delattr(HookSpecs, "keep")
    else:
        monkeypatch.setattr(HookSpecs, "keep", replaced)
    now = {**core, "hooks": hook_schema()}
    assert any(expected in change.what for change in breaking_changes(core, now))
    assert breaking_changes(old, {**now, "version": "0.3.0"})
    assert breaking_changes(old, {**now, "version": "0.4.0"}) == []


def test_a_hook_that_may_not_be_refined_any_more_is_caught(core):
    now = copy.deepcopy(core)
    now["hooks"]["advantages"]["refine"] = False
    (change,) = breaking_changes(core, now)
    assert change.what == "trl-core: hook 'advantages' may not be refined any more"


def test_an_argument_of_a_hook_may_go_on_its_own_notice(core, monkeypatch):
    monkeypatch.setattr(
        HookSpecs, "keep", deprecated(**NOTE, parameter="rollouts")(_contribute(lambda self, rollouts: 0))
    )
    old = {**core, "hooks": hook_schema()}
    now = copy.deepcopy(old)
    now["hooks"]["keep"]["parameters"] = []
    assert breaking_changes(old, now)
    assert breaking_changes(old, {**now, "version": "0.4.0"}) == []


def test_more_hooks_and_arguments_are_harmless(core, monkeypatch):
    monkeypatch.setattr(HookSpecs, "keep", Other.more_arguments)
    monkeypatch.setattr(HookSpecs, "another", Other.another_kind, raising=False)
    assert changes(core, {**core, "hooks": hook_schema()}) == []


SOURCE_MUTATIONS = {
    "function": (
        "discovery.py",
        "def list_algorithms(",
        "def all_algorithms(",
        "'trl_core.list_algorithms': public object",
    ),
    "parameter": (
        "composition.py",
        "def get_trainer(name: str, *, require: str | None = None) -> type:",
        "def get_trainer(name: str) -> type:",
        "argument 'require' of 'trl_core.get_trainer' was removed",
    ),
    "method": ("batch.py", "def mean_per_row(", "def row_means(", "'trl_core.TokenRows.mean_per_row' was removed"),
    "attribute": (
        "hookspecs.py",
        "self.learning_rates:",
        "self.rates:",
        "'trl_core.HookContext.learning_rates' was removed",
    ),
    "base of an error": (
        "errors.py",
        "class ConfigError(TRLCoreError, ValueError)",
        "class ConfigError(TRLCoreError)",
        "'trl_core.errors.ConfigError' does not derive from ValueError any more",
    ),
    "base of an error replaced": (
        "errors.py",
        "class ConfigError(TRLCoreError, ValueError)",
        "class ConfigError(TRLCoreError, RuntimeError)",
        "'trl_core.errors.ConfigError' does not derive from ValueError any more",
    ),
    "another class between": (
        "errors.py",
        "class ConfigError(TRLCoreError, ValueError)",
        "class OptionError(TRLCoreError, ValueError):\n    pass\n\n\nclass ConfigError(OptionError)",
        None,
    ),
    "private method": (
        "batch.py",
        "    def validate(self",
        "    def _hidden(self): ...\n\n    def validate(self",
        None,
    ),
    "docstring": ("options.py", '"""A dataclass field with its help text', '"""An option.', None),
}


@pytest.mark.parametrize("mutation", SOURCE_MUTATIONS)
def test_a_changed_source_of_the_core_is_judged(mutation, core, tmp_path):
    file, old, new, expected = SOURCE_MUTATIONS[mutation]
    shutil.copytree(ROOT / "trl_core", tmp_path / "trl_core", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "trl_core" / file
    assert old in path.read_text(encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    facade = types.ModuleType("trl_core")
    facade.__file__ = str(tmp_path / "trl_core" / "__init__.py")
    facade.__all__, facade.errors = trl_core.__all__, trl_core.errors
    now = copy.deepcopy(core)
    now["api"] |= public_api([facade])
    found = [change.what for change in breaking_changes(core, now)]
    assert found == [] if expected is None else any(each.startswith(f"trl-core: {expected}") for each in found)


# -- deprecations must be kept themselves -----------------------------------------------------------------------------
OVERDUE = {
    "option": (('"Rounds.")', f'"Rounds.", deprecated={DEPRECATION})'), "option 'rounds' of 'promise'"),
    "argument": (part("coach"), "'coach' of 'promise'"),
    "function": (("def shorten", f"{MARK})\ndef shorten"), "'trl_promise.shorten'"),
    "parameter": (
        ("def shorten", f'{MARK}, parameter="mark")\ndef shorten'),
        "argument 'mark' of 'trl_promise.shorten'",
    ),
    "option of an experimental algorithm": (
        ('"Anything.")', f'"Anything.", deprecated={DEPRECATION})'),
        "option 'sketch' of 'draft'",
    ),
}


@pytest.mark.parametrize("thing", OVERDUE)
def test_what_outlives_its_removal_version_fails_the_check(thing, folder, capsys):
    edit, name = OVERDUE[thing]
    write(folder, edited(SOURCES, edit))
    assert api("record", folder) == 0
    assert api("check", folder) == 0
    write(folder, edited(SOURCES, edit, NEXT))
    assert api("check", folder) == 1
    assert f"trl-promise: {name} was to be removed in 0.4" in capsys.readouterr().out


def test_an_algorithm_that_outlives_its_removal_version_fails_the_check(folder, capsys):
    gone = edited(SOURCES, *RETIRED)
    write(folder, gone)
    assert api("record", folder) == 0
    write(folder, edited(gone, NEXT))
    assert api("check", folder) == 1
    assert "algorithm 'promise' was to be removed in 0.4" in capsys.readouterr().out


@pytest.mark.parametrize(("removal", "code"), [("0.3", 1), ("0.4", 0), ("1.0", 0)])
def test_notice_is_two_minor_versions(removal, code, folder, capsys):
    assert api("record", folder) == 0
    note = f'Deprecation(since="0.2", removal="{removal}")'
    write(folder, edited(SOURCES, ('"Rounds.")', f'"Rounds.", deprecated={note})')))
    assert api("check", folder) == code
    if code:
        out = capsys.readouterr().out
        assert "option 'rounds' of 'promise' goes in 0.3, less than two minor versions after 0.2" in out
        assert "Name 0.4 or a later version." in out


def test_an_experimental_option_needs_no_notice(folder):
    note = 'Deprecation(since="0.2", removal="0.3")'
    write(folder, edited(SOURCES, ('"Anything.")', f'"Anything.", deprecated={note})')))
    assert api("record", folder) == 0
    assert api("check", folder) == 0


def test_a_deprecated_algorithm_names_its_removal(folder, capsys):
    assert api("record", folder) == 0
    write(folder, edited(SOURCES, ("stable", "deprecated")))
    assert api("check", folder) == 1
    assert "algorithm 'promise' is deprecated, but nobody says until when" in capsys.readouterr().out


def test_notice_is_six_months(folder):
    """Counted from the day of the first release that said so."""
    write(folder, edited(SOURCES, ('"Rounds.")', f'"Rounds.", deprecated={DEPRECATION})')))
    assert api("record", "--released", "2026-01-31", folder) == 0
    removed = ('    rounds: int | None = option(None, "Rounds.")\n', "")
    write(folder, edited(SOURCES, removed, NEXT))
    released = date(2026, 1, 31)
    early = [
        each.what for each in check(Project(folder), today=released + timedelta(days=182)) if each.kind == "breaking"
    ]
    (change,) = early
    assert change.startswith("trl-promise: option 'rounds' of 'promise' may not go before 2026-08-02, six months after")
    later = check(Project(folder), today=released + timedelta(days=183))
    assert [each.kind for each in later] == ["deprecated and due"]


@pytest.mark.parametrize(
    "mark",
    [
        'WHEN = "0.4"\n\n\n@deprecated(since="0.2", removal=WHEN)',
        'from typing_extensions import deprecated\n\n\n@deprecated("soon")',
    ],
)
def test_a_mark_that_cannot_be_read_is_an_error(mark, folder, capsys):
    write(folder, edited(SOURCES, ("def shorten", f"{mark}\ndef shorten")))
    assert api("record", folder) == 2
    assert "'trl_promise.shorten'" in capsys.readouterr().err


# -- which records count ----------------------------------------------------------------------------------------------
def test_a_second_record_of_an_unreleased_version_hides_nothing(folder):
    assert api("record", "--released", "2026-01-31", folder) == 0
    write(folder, edited(SOURCES, *MUTATIONS["option removed"][0], NEXT))
    assert api("check", folder) == 1
    assert api("record", folder) == 0
    assert [each["version"] for each in records(Project(folder))] == ["0.2.0", "0.4.0"]
    assert api("check", folder) == 1
    assert api("check", "--against", "0.4.0", folder) == 0


def test_records_are_ordered_by_version(folder):
    for version in ("0.10.0", "0.9.0", "0.2.0"):
        write(folder, edited(SOURCES, ("0.2.0", version)))
        assert api("record", folder) == 0
    assert [each["version"] for each in records(Project(folder))] == ["0.2.0", "0.9.0", "0.10.0"]


def test_a_released_record_does_not_change(folder, capsys):
    assert api("record", "--released", "2026-01-31", folder) == 0
    kept = (folder / "api" / "0.2.0.json").read_bytes()
    assert api("record", folder) == 0
    write(folder, edited(SOURCES, *MUTATIONS["option removed"][0]))
    assert api("record", folder) == 2
    assert "0.2.0 was released on 2026-01-31" in capsys.readouterr().err
    assert (folder / "api" / "0.2.0.json").read_bytes() == kept


def test_check_without_a_record_says_how_to_make_one(folder, capsys):
    assert api("check", folder) == 2
    assert "trl-core api record" in capsys.readouterr().err
    assert api("record", folder) == 0
    assert api("check", "--against", "0.1.0", folder) == 2
    assert "it has: 0.2.0" in capsys.readouterr().err


def test_a_damaged_record_is_named(folder):
    assert api("record", folder) == 0
    (folder / "api" / "0.2.0.json").write_text("{", encoding="utf-8")
    with pytest.raises(ContractError, match=r"0\.2\.0\.json"):
        records(Project(folder))


def test_another_copy_of_the_package_is_not_recorded(folder, tmp_path):
    assert api("record", folder) == 0
    other = tmp_path / "other"
    for file, text in SOURCES.items():
        (other / file).parent.mkdir(parents=True, exist_ok=True)
        (other / file).write_text(text, encoding="utf-8")
    with pytest.raises(ProjectError, match="is imported from"):
        record(Project(other))


def test_json_has_every_change(folder, capsys):
    assert api("record", folder) == 0
    write(folder, edited(SOURCES, *MUTATIONS["option removed"][0]))
    capsys.readouterr()
    assert api("check", "--json", folder) == 1
    (found,) = json.loads(capsys.readouterr().out)["trl-promise 0.2.0"]
    assert (found["kind"], found["what"]) == ("breaking", "trl-promise: option 'mode' of 'promise' was removed")
    assert "docs/stability.md" in found["mend"]


# -- what promotion asks ----------------------------------------------------------------------------------------------
def keep(folder, version, core, released="2026-01-01", **options):
    kept = json.loads((folder / "api" / "0.2.0.json").read_text(encoding="utf-8"))
    kept["algorithms"]["promise"]["options"] |= options
    kept |= {"version": version, "core": core, "released": released}
    (folder / "api" / f"{version}.json").write_text(json.dumps(kept), encoding="utf-8")


def test_minors_over_which_the_options_stayed(folder):
    assert api("record", folder) == 0
    project = Project(folder)
    assert minors_unchanged(project, "promise") == (0, None)  # nothing is released
    keep(folder, "0.2.1", "0.3.0")
    assert minors_unchanged(project, "promise") == (0, "0.2.1")
    keep(folder, "0.2.2", "0.3.9")
    assert minors_unchanged(project, "promise") == (0, "0.2.1")  # the same minor
    keep(folder, "0.3.0", "0.4.0")
    keep(folder, "0.3.1", "0.5.0")
    assert minors_unchanged(project, "promise") == (2, "0.2.1")
    keep(folder, "0.2.3", "0.3.9", more={"type": "int", "default": 1})
    assert minors_unchanged(project, "promise") == (1, "0.3.0")  # only what comes after the last change
    keep(folder, "0.4.0", "0.6.0", released=None, more={"type": "int", "default": 1})
    assert minors_unchanged(project, "promise") == (1, "0.3.0")
    keep(folder, "0.4.0", "0.6.0", more={"type": "int", "default": 1})
    assert minors_unchanged(project, "promise") == (0, None)  # the newest release has other options


def test_notices_of_a_record_alone(core):
    now = copy.deepcopy(core)
    grpo(now)["options"]["beta"]["deprecated"] = {**NOTE, "removal": "0.3"}
    (notice,) = notices(now, [], date(2026, 1, 1))
    assert "option 'beta' of 'grpo' goes in 0.3, less than two minor versions after 0.2" in notice.what


# -- the page ---------------------------------------------------------------------------------------------------------
def blocks(language):
    text = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def test_commands_of_the_page_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    lines = [line.split()[1:] for block in blocks("sh") for line in block.splitlines() if line.startswith("trl-core")]
    assert [main(line) for line in lines] == [0, 0, 0]
    assert records(Project(folder))[0]["released"] == "2026-01-31"


def test_deprecations_of_the_page_are_recorded_and_excuse(folder, capsys):
    (module,) = blocks("python")
    sources = {
        "pyproject.toml": SOURCES["pyproject.toml"],
        "trl_promise/__init__.py": "from .brief import cut, shorten\n__all__ = ['cut', 'shorten']\n",
        "trl_promise/brief.py": module + "draft = Algorithm(name='draft', summary='')\n",
    }
    sources = edited(sources, ("promise.promise:", "promise.brief:"), ("promise =", "brief ="))
    write(folder, sources)
    assert api("record", folder) == 0
    assert set(deprecations(records(Project(folder))[0])) == {
        "option 'limit' of 'brief'",
        "'judge' of 'brief'",
        "'trl_promise.cut'",
        "argument 'mark' of 'trl_promise.shorten'",
    }
    write(folder, edited(sources, NEXT))
    assert api("check", folder) == 1
    assert "option 'limit' of 'brief' was to be removed in 0.4" in capsys.readouterr().out
