"""What `trl-core new` writes: the files of a plugin, made from the templates in `template/`."""

from .names import Names
from .render import SHAPES, render, write

__all__ = ["SHAPES", "Names", "render", "write"]
