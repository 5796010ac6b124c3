"""The names of a new plugin, all made from one."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from dataclasses import dataclass

from ..errors import ConfigError

LONGEST = 28
"""Letters of a name; with more the lines of the templates would be too long."""
_PREFIX = re.compile(r"trl[-_.]", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*([-_.][A-Za-z0-9]+)*")
_TAKEN = {"conformance": "the test of that name is there already"}


@dataclass(frozen=True)
class Names:
    """The names of one algorithm: `my-algo` gives my_algo, trl-my-algo, trl_my_algo, MyAlgoConfig."""

    algorithm: str
    classes: str
    """What the names of its classes begin with."""

    @property
    def distribution(self) -> str:
        """What is uploaded and installed."""
        return f"trl-{self.algorithm.replace('_', '-')}"

    @property
    def package(self) -> str:
        """What is imported."""
        return f"trl_{self.algorithm}"

    @classmethod
    def parse(cls, text: str) -> Names:
        """From what a user types, with or without `trl-`. Capitals stay in the names of classes: GFPO, not Gfpo.

        Raises:
            ConfigError: it cannot be the name of a module, or hides one that exists.
        """
        bare = _PREFIX.sub("", text.strip(), count=1)
        if not _NAME.fullmatch(bare) or len(bare) > LONGEST:
            raise ConfigError(
                f"{text!r} cannot be the name of a plugin.",
                mend=f"Use at most {LONGEST} letters and digits, a letter first, with - or _ between words.",
            )
        words = re.split(r"[-_.]", bare)
        names = cls("_".join(words).lower(), "".join(word[0].upper() + word[1:] for word in words))
        if why := names._clash():
            raise ConfigError(f"{text!r} cannot be the name of a plugin: {why}.", mend="Choose another name.")
        return names

    def _clash(self) -> str | None:
        name = self.algorithm
        if keyword.iskeyword(name) or keyword.issoftkeyword(name):
            return f"{name!r} is a word of Python's own"
        if name in sys.stdlib_module_names or _is_importable(name):
            return f"there is a module {name!r}, which a script beside the plugin's own {name}.py could not import"
        if _is_importable(self.package):
            return f"a module {self.package!r} is installed"
        return _TAKEN.get(name)


def _is_importable(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a mere folder has no origin
