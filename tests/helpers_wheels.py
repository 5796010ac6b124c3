"""Wheels, and empty environments to install them into."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def run(*command: object, cwd: Path, limit: int = 280, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command offline, without what this process has in its environment of Python and of trl-core."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRL_"))}
    # The models are so small that threads would only wait for each other.
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | settings | environment,
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def build_wheel(source: Path, folder: Path) -> Path:
    """Build the wheel of a project, without the network, into a folder below `folder`, and return its path."""
    out = folder / source.name
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=folder)
    (wheel,) = out.glob("*.whl")
    return wheel


def make_environment(folder: Path, *wheels: Path) -> Path:
    """Make an environment with these wheels beside the dependencies of the one that runs the tests; return its folder.

    Nothing of the checkout is in it.
    """
    venv.create(folder, with_pip=False)
    install(folder, *wheels)
    python = folder / "bin" / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip())
    # A plain line of a .pth file is searched last, and the .pth files in there (editable installs) are not followed.
    ours = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (own / "dependencies.pth").write_text("\n".join(ours) + "\n", encoding="utf-8")
    return folder


def install(environment: Path, *what: object) -> None:
    """Install wheels, without what they depend on and without an index."""
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--disable-pip-version-check", *what, cwd=environment)
