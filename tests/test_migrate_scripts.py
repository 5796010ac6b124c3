"""Scripts as users of four releases of TRL wrote them: all imports are mapped, and what comes out runs."""

import ast
import runpy
import sys
from pathlib import Path

import pytest

from trl_core.cli.main import main
from trl_core.testing import tiny_model, tiny_tokenizer

SCRIPTS = sorted((Path(__file__).parent / "migration").glob("*.py"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def imports(source):
    """Top-level packages that are imported anywhere in a script."""
    nodes = list(ast.walk(ast.parse(source)))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in found}


def test_there_are_scripts_of_each_release():
    releases = {"_".join(path.stem.split("_")[1:3]) for path in SCRIPTS}
    assert releases == {"0_7", "0_24", "1_0", "1_16"}
    assert all("trl" in imports(path.read_text(encoding="utf-8")) for path in SCRIPTS)


# One of each release in `make test`.
QUICK = {"trl_0_7_ppo_loop", "trl_0_24_ppo", "trl_1_0_gfpo", "trl_1_16_dpo"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "script",
    [pytest.param(s, id=s.stem, marks=[] if s.stem in QUICK else pytest.mark.slow) for s in SCRIPTS],
)
def test_rewritten_script_runs(script, model, tmp_path, monkeypatch, capsys):
    copy = tmp_path / script.name
    copy.write_bytes(script.read_bytes())
    assert main(["migrate", "--write", str(copy)]) == 0, capsys.readouterr().out
    source = copy.read_text(encoding="utf-8")
    assert "trl" not in imports(source)
    assert main(["migrate", str(copy)]) == 0
    assert "0 to be rewritten" in capsys.readouterr().out
    assert copy.read_text(encoding="utf-8") == source

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL_PATH", str(model))
    monkeypatch.setitem(sys.modules, "trl", None)  # an import of it would raise
    left = runpy.run_path(str(copy))
    if "ppo_trainer" in left:  # the step API
        stats = left.get("train_stats") or left["stats"]
        assert "ppo/loss/total" in stats
    else:
        assert left["trainer"].state.global_step == 2
