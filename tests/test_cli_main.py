"""What every command of `trl-core` does alike: in a pipe, on Ctrl-C, with an output that cannot be written."""

import io
import os
import subprocess
import sys

import pytest

from trl_core.cli import list as cli_list
from trl_core.cli.main import COMMANDS, main

SCRIPT = "from trl import GRPOConfig, GRPOTrainer\n"


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A command line for each kind of output, and the folder to run it in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "elsewhere").mkdir()


WORDS = [
    ["list"],
    ["list", "--json"],
    ["list", "--format", "md"],
    ["info", "gfpo"],
    ["new", "brief", "--folder", "made"],
    ["api", "check", "trl-gfpo", "--json"],
    ["promote", "gfpo", "--json"],
    ["deprecate", "gfpo", "--removal", "9.0", "--replacement", "grpo"],
    ["migrate", "script.py"],
    ["--help"],
    ["list", "--help"],
    ["--version"],
]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_reader_that_goes_away_ends_a_command_without_a_word(words, commands, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8", closefd=False) as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(words) == 141
        print("what is still to be written")  # as Python does when it ends
    os.close(writing)
    assert capsys.readouterr().err == ""


def test_pipe_ends_a_process_without_a_word(tmp_path):
    command = f"{sys.executable} -m trl_core.cli.main list; echo $? >&2"
    done = subprocess.run(["bash", "-c", f"({command}) | true"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.strip() in ("141", "0")  # 0 where all was written before the reader went


def test_full_disk_is_told(commands, monkeypatch, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["list"]) == 2
    assert "The output cannot be read or written: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_is_one_line(command, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_core.cli.main.importlib.import_module", stop)
    assert main([command]) == 130
    assert capsys.readouterr().err == "trl-core: stopped by Ctrl-C.\n"


def test_text_that_the_terminal_cannot_show_is_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(cli_list, "run", lambda _: print("Größe, \udcff") or 0)
    assert main(["list"]) == 0
    assert out.buffer.getvalue() == b"Gr\\xf6\\xdfe, \\udcff\n"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_every_command_has_help_and_asks_for_what_is_missing(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and "usage: trl-core" in told and COMMANDS[command].capitalize()[:20] in told
    if command not in ("list",):
        with pytest.raises(SystemExit) as ended:
            main([command])
        assert ended.value.code == 2 and "required" in capsys.readouterr().err
