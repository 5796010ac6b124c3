"""From templates to files.

A template is a file that ends in `.tmpl`, so that no tool takes it for what it will become. `$field` is replaced in its
text, `NAME` and `PACKAGE` in its path. What is in a folder `parts` becomes no file but a field, named like it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from ..errors import OutputDirError
from .names import Names

SHAPES: dict[str, tuple[str, dict[str, str]]] = {
    "online": ("online", {"hook": "advantages"}),
    "pairs": ("pairs", {"hook": "pair_loss", "tiny": "tiny_model"}),
    "scores": ("pairs", {"hook": "pair_loss", "tiny": "tiny_classifier"}),
    "texts": ("texts", {"hook": "loss_terms"}),
    "alone": ("alone", {"hook": "advantages, log_ratio and loss_terms"}),
}
"""What a plugin may build on: its folder of templates, and further fields."""
_SUFFIX = ".tmpl"
_PARTS = "parts/"


def render(shape: str, names: Names, fields: Mapping[str, str]) -> dict[str, str]:
    """The files of a plugin, path to text.

    Args:
        shape: one of `SHAPES`.
        names: of the plugin.
        fields: for the templates: base, core, author, dependencies, and the summary as a literal of Python and TOML.
    """
    folder, more = SHAPES[shape]
    own = {"name": names.algorithm, "classes": names.classes}
    own |= {"distribution": names.distribution, "package": names.package, **more, **fields}
    root = files(__package__) / "template"
    templates = {path: text for part in ("common", folder) for path, text in _templates(root / part)}
    parts = {path for path in templates if path.startswith(_PARTS)}
    own |= {path.removeprefix(_PARTS): Template(templates[path]).substitute(own).rstrip("\n") for path in parts}
    return {
        path.replace("PACKAGE", names.package).replace("NAME", names.algorithm): Template(text).substitute(own)
        for path, text in sorted(templates.items())
        if path not in parts
    }


def _templates(folder: Traversable, inside: str = "") -> Iterator[tuple[str, str]]:
    """Path, without the suffix, and text of every template."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _templates(entry, f"{inside}{entry.name}/")
        elif entry.name.endswith(_SUFFIX):
            yield inside + entry.name.removesuffix(_SUFFIX), entry.read_text(encoding="utf-8")


def write(folder: Path, contents: Mapping[str, str]) -> None:
    """Write files into a folder that is new or empty.

    Raises:
        OutputDirError: there is something in it, or it cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputDirError(
                f"{folder} is not empty; nothing is overwritten.", mend="Give another folder: --folder FOLDER"
            )
        for path, text in contents.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="\n")
    except OutputDirError:
        raise
    except OSError as error:
        raise OutputDirError(
            f"{folder} cannot be written: {error}.", mend="Give another one: --folder FOLDER"
        ) from error
