"""The rules of the house: who may import whom, what is never used, what a distribution carries, how long it is."""

import ast
import copy
import functools
import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import trl_core
from trl_core import errors

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "trl_core"
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
PACKAGES = [CORE, *(package for plugin in PLUGINS for package in plugin.glob("trl_*"))]

# What a run imports. The online half is about 3,700 lines; the offline family (data, layouts, losses, trainers) added
# about 2,100; models beside the policy and notes about rows, for PPO, about 250; speed about 1,100: the decoding loop
# 300, rewards beside other work 350, the chunked head 170, rows in parts and without gradient 140. What a run that can
# be trusted takes is about 3,300: answers and declarations of plugins 430; ranges, types and names of options and
# arguments 610; what is compared on resume 450; stops, folders and checksums 600; secrets and the card 350; completions
# 150; inputs and workers of rewards 300; the rest at the places that call them.
CORE_BUDGET = 10450
# Commands, conformance kit, records of interfaces, promotion, migration (a third of it the table of names), scaffold.
TOOLS_BUDGET = 4350
# Of trl_ppo the classic API is 555.
PLUGIN_BUDGETS = {"trl_bema": 160, "trl_gfpo": 150, "trl_gspo": 110, "trl_ppo": 950, "trl_replay": 150}

# What each part of trl_core may import from the others, one way: a part never reaches back up. `trl_core` itself is
# the public facade; inside the core only the registered algorithms, which are plugins like any other, go through it.
_CONTRACT = {"redaction", "errors", "install", "names", "options", "batch", "hookspecs"}
_DISCOVERY = {"errors", "install", "algorithm", "stability", "discovery"}
_COMPOSED = _CONTRACT | _DISCOVERY | {"stages", "models", "answers", "declared", "composition"}
_AUTHORS = {"files", "project", "scaffold", "migration", "contract", "promotion"}
TOOLS = _AUTHORS | {"cli", "testing", "pytest_plugin"}
MAY_IMPORT = {
    "redaction": set(),
    "errors": {"redaction"},
    "processes": set(),
    "files": set(),
    "markdown": set(),
    "algorithm": set(),
    "install": set(),
    "names": {"errors"},
    "options": {"redaction", "errors", "names"},
    "stability": {"errors", "algorithm"},
    "discovery": {"errors", "install", "algorithm", "stability"},
    "project": _DISCOVERY,
    "pytest_plugin": {"promotion"},
    "batch": {"errors"},
    "hookspecs": {"errors", "batch"},
    "stages": _CONTRACT | {"processes"},
    "models": _CONTRACT,
    "answers": _CONTRACT | {"stages"},
    "declared": _CONTRACT | {"answers"},
    "composition": _COMPOSED,
    "data": {"errors", "options"},
    "training": _COMPOSED | {"data", "markdown"},
    "algorithms": _CONTRACT | {"trl_core", "algorithm", "stages", "models", "data", "training"},
    "testing": _COMPOSED | {"trl_core", "data", "training"},
    # For authors and for those who come from TRL; no run imports them.
    "scaffold": {"errors"},
    "migration": {"errors", "install", "files", "markdown"},
    "contract": _COMPOSED | {"project", "trl_core"},
    "promotion": _COMPOSED | {"project", "contract", "testing", "markdown"},
    "cli": _COMPOSED | {"trl_core", "data", "training", "testing", "markdown", *_AUTHORS},
}


# -- reading imports ---------------------------------------------------------------------------------------------------
def python_files(folder):
    return sorted(folder.rglob("*.py"))


def module_name(file, base):
    parts = file.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk_run_time(node):
    """Like `ast.walk`, without what only type checkers see."""
    yield node
    children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)
    for child in children:
        yield from walk_run_time(child)


@functools.cache
def imports_of(file, base):
    """(line, module, name or None) of every import in a file, relative ones made absolute."""
    package = module_name(file, base).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in walk_run_time(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found += [(node.lineno, module, alias.name) for alias in node.names]
    return found


def core_target(module, name):
    """The module of trl_core that an import reaches, or `trl_core` for a name of the facade; None if elsewhere."""
    if module.split(".")[0] != "trl_core":
        return None
    if name is not None and (ROOT / module.replace(".", "/") / name).is_dir():
        return f"{module}.{name}"
    if name is not None and (ROOT / module.replace(".", "/") / f"{name}.py").exists():
        return f"{module}.{name}"
    return module


def place(file, line):
    return f"{file.relative_to(ROOT)}:{line}"


# -- who may import whom -----------------------------------------------------------------------------------------------
def test_core_imports_go_one_way():
    broken = []
    for file in python_files(CORE):
        part = file.relative_to(CORE).with_suffix("").parts[0]
        if part == "__init__":
            continue  # the facade resolves its names lazily; see test_import_brings_no_torch
        assert part in MAY_IMPORT, f"trl_core/{part} is new: say in MAY_IMPORT what it may import"
        for line, module, name in imports_of(file, ROOT):
            target = core_target(module, name)
            if target is None or (target == "trl_core" and name in ("__version__", "PUBLIC_MODULES")):
                continue
            reached = target.split(".")[1] if "." in target else "trl_core"
            if reached != part and reached not in MAY_IMPORT[part]:
                broken.append(f"{place(file, line)}: {part} imports {target}")
    assert not broken, "\n".join(broken)


def test_core_has_no_import_cycle():
    graph = {module_name(file, ROOT): file for file in python_files(CORE)}
    edges = {
        name: {
            target
            for _, module, imported in imports_of(file, ROOT)
            if (target := core_target(module, imported)) in graph and target not in (name, "trl_core")
        }
        for name, file in graph.items()
        if name != "trl_core"
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for target in sorted(edges[name]):
                visit(target)
            done.add(path.pop())

    for name in sorted(edges):
        visit(name)


def test_core_knows_no_plugin_and_nothing_knows_trl():
    plugins = {package.name for package in PACKAGES} - {"trl_core"}
    broken = []
    for package in PACKAGES:
        for file in python_files(package):
            for line, module, _ in imports_of(file, package.parent):
                top = module.split(".")[0]
                if top == "trl" or (top in plugins and top != package.name):
                    broken.append(f"{place(file, line)}: imports {module}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_plugin_uses_only_public_names(plugin):
    broken = []
    for file in python_files(plugin):
        for line, module, name in imports_of(file, plugin):
            if module == "trl_core" and name in trl_core.__all__:
                continue
            target = core_target(module, name)
            if target is not None and (
                target not in trl_core.PUBLIC_MODULES or (target == "trl_core" and name is not None)
            ):
                broken.append(f"{place(file, line)}: {target}{f' ({name})' if name else ''} is not public")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    "statement", ["import trl_core", "import trl_core.hookspecs", "import trl_core; trl_core.list_algorithms()"]
)
def test_import_brings_no_torch(statement):
    heavy = ["torch", "transformers", "accelerate", "datasets", *(package.name for package in PACKAGES[1:])]
    code = f"{statement}\nimport sys\nprint(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_public_names_resolve():
    missing = [name for name in trl_core.__all__ if not hasattr(trl_core, name)]
    assert not missing


# -- dependencies ------------------------------------------------------------------------------------------------------
def normal(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def required(project, *extras):
    lines = project.get("dependencies", []) + [
        line for extra in extras for line in project.get("optional-dependencies", {}).get(extra, [])
    ]
    return {normal(re.match(r"[\w.-]+", line).group()) for line in lines}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_every_import_is_a_declared_dependency(package):
    project, core = (
        tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for folder in (package.parent, ROOT)
    )
    providers = importlib.metadata.packages_distributions() | {"trl_core": ["trl-core"]}
    used = {
        top: ({normal(distribution) for distribution in providers.get(top, [])}, place(file, line))
        for file in python_files(package)
        for line, module, _ in imports_of(file, package.parent)
        if (top := module.split(".")[0]) not in sys.stdlib_module_names | {package.name}
    }
    # A plugin may use what the core brings. pytest is there wherever trl_core.testing is of use.
    allowed = required(project, *project.get("optional-dependencies", {})) | {"pytest"}
    allowed |= required(core) if "trl-core" in allowed else set()
    undeclared = [f"{where}: imports {top}" for top, (found, where) in used.items() if not allowed & found]
    assert not undeclared, "\n".join(undeclared)
    # transformers runs its training loop on accelerate, but leaves it to others to declare it.
    spare = required(project).difference({"accelerate"}, *(found for found, _ in used.values()))
    assert not spare, f"declared but never imported: {spare}"


def test_constraints_pin_every_dependency_within_its_range():
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split("\n") if "==" in line
    )
    pins = {normal(name): version for name, version in pins.items()}
    for folder in [ROOT, *PLUGINS]:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        groups = project.get("optional-dependencies", {})
        # What no target installs, because not all of it has wheels, is not pinned.
        extras = [line for name, lines in groups.items() if name != "tasks" for line in lines]
        for requirement in map(Requirement, project["dependencies"] + extras):
            if normal(requirement.name) != "trl-core":
                assert normal(requirement.name) in pins, f"{requirement} is not pinned"
                assert pins[normal(requirement.name)] in requirement.specifier, f"{requirement} excludes its pin"


# -- what is never used ------------------------------------------------------------------------------------------------
def loads_pickle(node):
    """Why a call or import may run code from a file, or None."""
    pickles = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    if isinstance(node, ast.Import) and (found := {alias.name.split(".")[0] for alias in node.names} & pickles):
        return f"imports {found.pop()}"
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in pickles:
        return f"imports {node.module}"
    if isinstance(node, ast.Call):
        called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called == "torch.save":
            return "torch.save writes a pickle"
        if called == "torch.load" and options.get("weights_only") != "True":
            return "torch.load without weights_only=True"
        if options.get("allow_pickle", "False") != "False" or options.get("trust_remote_code", "") == "True":
            return f"{called}(...) runs code from a file"
    return None


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_no_pickle_and_no_remote_code(package):
    broken = [
        f"{place(file, node.lineno)}: {why}"
        for file in python_files(package)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        # What travels over a pipe between a program and its own worker processes is no file.
        if (why := loads_pickle(node)) and (file.name, why) != ("processes.py", "imports pickle")
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("import pickle", True),
        ("from dill import loads", True),
        ("torch.load(f)", True),
        ("torch.load(f, weights_only=False)", True),
        ("torch.load(f, weights_only=True)", False),
        ("torch.save(x, f)", True),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", True),
        ("AutoModel.from_pretrained(x, trust_remote_code=args.trust_remote_code)", False),
        ("np.load(f, allow_pickle=True)", True),
        ("safetensors.torch.load_file(f)", False),
    ],
)
def test_the_pickle_rule_sees(source, refused):
    assert any(loads_pickle(node) for node in ast.walk(ast.parse(source))) is refused


# -- errors ------------------------------------------------------------------------------------------------------------
ERRORS = [
    value
    for _, value in sorted(vars(errors).items())
    if isinstance(value, type) and issubclass(value, errors.TRLCoreError) and value.__module__ == errors.__name__
]


@pytest.mark.parametrize("error", ERRORS)
def test_error_says_how_to_mend(error):
    mend = inspect.signature(error).parameters["mend"]
    assert mend.kind is mend.KEYWORD_ONLY
    assert mend.default is mend.empty
    with pytest.raises(TypeError, match="mend"):
        error("a thing is wrong")
    assert "turn it" in str(error("a thing is wrong", mend="turn it"))
    # As an error that is raised in a worker process arrives.
    copied = copy.copy(error("a thing is wrong", mend="turn it"))
    assert (type(copied), copied.what, copied.mend) == (error, "a thing is wrong", "turn it")


def test_core_raises_its_own_errors():
    bare = {"Exception", "RuntimeError", "ValueError", "KeyError", "OSError"}
    broken = [
        f"{place(file, node.lineno)}: raise {node.exc.func.id}"
        for file in python_files(CORE)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
        and node.exc.func.id in bare
    ]
    assert not broken, "use a class of trl_core.errors, which asks for a mend:\n" + "\n".join(broken)


# -- what every distribution carries -----------------------------------------------------------------------------------
def test_version_is_the_same_everywhere():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert trl_core.__version__ == declared
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[(Unreleased|{re.escape(declared)})\]", changelog, flags=re.MULTILINE)


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_plugin_is_complete(plugin):
    package = plugin / plugin.name.replace("-", "_")
    for needed in [plugin / "README.md", plugin / "EVIDENCE.md", package / "__init__.py", package / "py.typed"]:
        assert needed.is_file(), f"{needed.relative_to(ROOT)} is missing"
    assert python_files(plugin / "tests"), f"{plugin.name} has no tests"
    project = tomllib.loads((plugin / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == plugin.name
    assert any(line.startswith("trl-core>=") and "<" in line for line in project["dependencies"])


@pytest.mark.parametrize("folder", [ROOT, *PLUGINS], ids=lambda path: path.name if path != ROOT else "trl-core")
def test_entry_points_name_a_stability_and_an_algorithm(folder):
    points = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    groups = {group: names for group, names in points.items() if group.startswith("trl_core.")}
    assert groups
    assert set(groups) <= {"trl_core.stable", "trl_core.experimental", "trl_core.deprecated"}
    for names in groups.values():
        for name, value in names.items():
            module, _, attribute = value.partition(":")
            assert getattr(importlib.import_module(module), attribute).name == name
    if folder != ROOT and "trl_core.stable" in groups:
        evidence = (folder / "EVIDENCE.md").read_text(encoding="utf-8")
        assert len(evidence.split()) > 100, "a stable plugin shows its evidence"


def test_links_between_documents_lead_somewhere():
    broken = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path = target.split("#")[0]
            if path and "://" not in path and not path.startswith("mailto:") and not (page.parent / path).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


# -- how long ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def code_lines():
    spec = importlib.util.spec_from_file_location("code_lines", ROOT / "tools" / "code_lines.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counts_code_and_nothing_else(code_lines):
    source = (
        '"""Two\nlines."""\n\n# comment\nx = """two\nlines"""  # trailing\n"""Of x."""\ndef f(\n    a,\n):\n    "doc"\n'
    )
    assert code_lines.code_lines(source) == {5, 6, 8, 9, 10}


def budgets():
    """Name, files and budget of what has one."""
    parts = {file: file.relative_to(CORE).with_suffix("").parts[0] for file in python_files(CORE)}
    yield "trl_core, runs", [file for file, part in parts.items() if part not in TOOLS], CORE_BUDGET
    yield "trl_core, tools", [file for file, part in parts.items() if part in TOOLS], TOOLS_BUDGET
    for package in PACKAGES[1:]:
        assert package.name in PLUGIN_BUDGETS, f"{package.name} is new: give it a budget in PLUGIN_BUDGETS"
        yield package.name, python_files(package), PLUGIN_BUDGETS[package.name]


def test_code_stays_within_its_budget(code_lines, record_property):
    for name, files, budget in budgets():
        total = sum(sum(code_lines.count(file).values()) for file in files)
        record_property(name, total)
        print(f"{total:6} of {budget:6}  {name}")
        assert total <= budget, f"{name} has {total} code lines, its budget is {budget}"


def test_runs_import_no_tools():
    """What trains does not depend on what authors use; only the command line and the kit import both."""
    reached = [
        f"{place(file, line)}: {target}"
        for file in python_files(CORE)
        if file.relative_to(CORE).with_suffix("").parts[0] not in TOOLS
        for line, module, name in imports_of(file, ROOT)
        if (target := core_target(module, name)) and target.split(".")[1:2] and target.split(".")[1] in TOOLS
    ]
    assert not reached, "\n".join(reached)
