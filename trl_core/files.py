"""Putting a new text in the place of a file's, all at once: for commands that rewrite what others wrote."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path


def replace_text(file: Path, text: str, encoding: str = "utf-8") -> None:
    """Write a text, line ends as they stand in it, into the place of an existing file, whose mode stays.

    Raises:
        OSError: it cannot be written; the file is then as it was.
    """
    target = file.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(handle, "w", encoding=encoding, newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        shutil.copymode(target, name)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
