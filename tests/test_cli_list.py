import json
import os
import re
import subprocess
import sys

import pytest

import trl_core.cli.list as cli_list
from trl_core.cli.main import main
from trl_core.discovery import AlgorithmInfo, core_version
from trl_core.errors import TRLCoreError
from trl_core.stability import Stability

from .helpers_dist import algorithm_source, imported, write_distribution, write_plugin

SCRIPT = "import sys; from trl_core.cli.main import main; code = main(sys.argv[1:]); {after}; sys.exit(code)"


def trl_core(folder, *arguments, after="pass", **environment):
    """Run the command in a new process with the distributions of `folder` on its path."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(after=after), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONIOENCODING": "utf-8"} | environment,
    )


def lines_with(text, word):
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if re.search(rf"\b{word}\b", line)]


# -- the table --------------------------------------------------------------------------------------------------------
def test_list_shows_every_column(tmp_path):
    write_plugin(tmp_path, "zeta", version="1.4")
    process = trl_core(tmp_path, "list")
    assert process.returncode == 0, process.stderr
    header = ["name", "tag", "distribution", "version", "extends", "summary"]
    assert lines_with(process.stdout, "summary") == [header]
    assert lines_with(process.stdout, "zeta") == [
        ["zeta", "experimental", "trl-zeta", "1.4", "grpo", "Read from the source."]
    ]


def test_list_shows_broken_ones_apart_with_their_reason(tmp_path):
    write_plugin(tmp_path, "zeta", requires=["trl-core>=99"])
    write_plugin(tmp_path, "eta")
    usable, _, broken = trl_core(tmp_path, "list").stdout.partition("cannot be used")
    assert lines_with(usable, "zeta") == []
    assert len(lines_with(usable, "eta")) == 1
    ((*_, reason),) = lines_with(broken, "zeta")
    assert reason.startswith("it requires trl-core>=99")


def test_list_without_broken_ones_has_one_section(tmp_path):
    write_plugin(tmp_path, "zeta")
    assert "cannot be used" not in trl_core(tmp_path, "list").stdout


def test_list_warns_of_unknown_groups(tmp_path):
    write_distribution(tmp_path, "trl-zeta", {"trl_core.experimntal": {"zeta": "trl_zeta:algorithm"}})
    process = trl_core(tmp_path, "list")
    assert re.search(
        r"warning: trl-zeta registers zeta .*'trl_core\.experimntal'.*trl_core\.experimental", process.stderr
    )


def test_list_keeps_one_line_per_algorithm_in_a_pipe(tmp_path):
    summary = "word " * 100 + "end"
    write_plugin(tmp_path, "zeta", source=algorithm_source("zeta", summary=summary))
    ((*_, shown),) = lines_with(trl_core(tmp_path, "list", COLUMNS="40").stdout, "zeta")
    assert shown == summary


def test_list_prints_markup_of_a_summary_literally(tmp_path):
    write_plugin(tmp_path, "zeta", source=algorithm_source("zeta", summary="[red]loss[/nonsense]"))
    ((*_, shown),) = lines_with(trl_core(tmp_path, "list").stdout, "zeta")
    assert shown == "[red]loss[/nonsense]"


def test_list_prints_where_the_output_is_ascii_only(tmp_path):
    write_plugin(tmp_path, "zeta")
    process = trl_core(tmp_path, "list", PYTHONIOENCODING="ascii")
    assert process.returncode == 0, process.stderr
    assert len(lines_with(process.stdout, "zeta")) == 1


# -- json and markdown ------------------------------------------------------------------------------------------------
def test_json_holds_the_records(tmp_path):
    write_plugin(tmp_path, "zeta", requires=["trl-core>=99"])
    records = json.loads(trl_core(tmp_path, "list", "--json").stdout)
    assert [record for record in records if record["name"] == "zeta"] == [
        {
            "name": "zeta",
            "stability": "experimental",
            "distribution": "trl-zeta",
            "version": "1.0",
            "value": "trl_zeta:algorithm",
            "summary": "Read from the source.",
            "extends": "grpo",
            "broken": f"it requires trl-core>=99, and trl-core {core_version()} is installed",
        }
    ]


def test_json_stays_json_where_there_are_warnings(tmp_path):
    write_distribution(tmp_path, "trl-zeta", {"trl_core.experimntal": {"zeta": "trl_zeta:algorithm"}})
    process = trl_core(tmp_path, "list", "--json")
    assert isinstance(json.loads(process.stdout), list)
    assert "experimntal" in process.stderr


def test_markdown_is_a_table_with_escaped_cells():
    infos = [
        AlgorithmInfo("zeta", Stability.STABLE, "trl-zeta", "1.0", "trl_zeta:algorithm", "a | b", "grpo"),
        AlgorithmInfo("eta", Stability.DEPRECATED, "trl-eta", "1.0", "trl_eta:algorithm"),
    ]
    assert cli_list.as_markdown(infos).splitlines() == [
        "| name | tag | distribution | extends | summary |",
        "| --- | --- | --- | --- | --- |",
        "| zeta | stable | trl-zeta | grpo | a \\| b |",
        "| eta | deprecated | trl-eta |  |  |",
    ]


def test_markdown_leaves_out_broken_ones_with_a_warning(tmp_path):
    write_plugin(tmp_path, "zeta", requires=["trl-core>=99"])
    process = trl_core(tmp_path, "list", "--format", "md")
    assert "zeta" not in process.stdout
    assert "| grpo | stable | trl-core |" in process.stdout
    assert "trl-zeta:zeta" in process.stderr


# -- light ------------------------------------------------------------------------------------------------------------
def test_list_imports_no_plugin_and_nothing_heavy(tmp_path):
    for number in range(20):
        write_plugin(tmp_path, f"zeta{number}")
    heavy = ("torch", "transformers", "datasets", "accelerate", "numpy")
    process = trl_core(tmp_path, "list", after=f"assert not set({heavy!r}) & set(sys.modules), 'heavy import'")
    assert process.returncode == 0, process.stderr
    assert len(lines_with(process.stdout, r"zeta\d+")) == 20
    assert imported(tmp_path) == []


# -- the command itself -----------------------------------------------------------------------------------------------
def test_version_prints_the_version_of_the_core(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trl-core {core_version()}\n"


def test_version_imports_no_subcommand(tmp_path):
    process = trl_core(tmp_path, "--version", after="assert 'rich' not in sys.modules")
    assert process.returncode == 0, process.stderr


def test_no_command_prints_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "list" in capsys.readouterr().err


def test_unknown_command_fails_with_the_choices(capsys):
    assert main(["lits"]) == 2
    assert "Did you mean 'list'?" in capsys.readouterr().err


def test_refusal_is_readable_without_traceback(capsys, monkeypatch):
    def refuse():
        raise TRLCoreError("Nothing works.", mend="Mend it.")

    monkeypatch.setattr(cli_list, "list_algorithms", refuse)
    assert main(["list"]) == 2
    output = capsys.readouterr()
    assert output.err == "trl-core: TRLCoreError: Nothing works.\n  To mend: Mend it.\n"
    assert output.out == ""


def test_programming_error_keeps_its_traceback(monkeypatch):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr(cli_list, "list_algorithms", fail)
    with pytest.raises(ZeroDivisionError):
        main(["list"])
