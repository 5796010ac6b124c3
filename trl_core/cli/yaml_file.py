"""The YAML file of a run: a mapping whose keys are text, read as what is written there.

Of YAML 1.1, which PyYAML reads, these are text here: dates, `1:30` and `010`, and keys such as `on`. A number that is
the value of an option stays as it is written until the type of the option is known.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError

_MOST_BYTES, _MOST_VALUES = 2**18, 100_000
_STR, _NUMBERS = "tag:yaml.org,2002:str", ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """Numbers of YAML 1.2, and no dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _NUMBERS[1],
    re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$", re.IGNORECASE),
    list("-+.0123456789"),
)


def read_yaml(path: str) -> dict[str, Any]:
    """The options in a file.

    Raises:
        ConfigError: it is no readable YAML file with one mapping, or has a key twice, or aliases without end.
    """
    try:
        loader = _Loader(_text(path))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path} holds no mapping.", mend="Write lines of the form `option: value`.")
        _check(node, path, {})
        for _, value in node.value:
            if isinstance(value, yaml.ScalarNode) and value.tag in _NUMBERS and value.style is None:
                value.tag = _STR
        return dict(loader.construct_document(node))
    except RecursionError as error:
        raise ConfigError(f"The config {path!r} is nested too deeply.", mend="Flatten it.") from error
    except Exception as error:  # of a tag, PyYAML raises whatever it meets
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"The config {path!r} cannot be read: {error}", mend="Give a YAML file.") from error


def _text(path: str) -> str:
    file = Path(path).expanduser()
    found = file.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
        what = f"has {found.st_size} bytes" if stat.S_ISREG(found.st_mode) else "is no file"
        raise ConfigError(f"The config {path!r} {what}.", mend=f"Give a YAML file of at most {_MOST_BYTES} bytes.")
    data = file.read_bytes()
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def _check(node: yaml.Node, path: str, sizes: dict[int, int]) -> int:
    """How many values a part has once its aliases are put in full; keys become text."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ConfigError(f"{path}, line {node.start_mark.line + 1}: a part holds itself.", mend="Write it out.")
        return sizes[id(node)]
    sizes[id(node)], parts = 0, []
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                key.tag = key.tag if key.tag in (_NUMBERS[0], "tag:yaml.org,2002:merge") else _STR
                if key.value in lines:
                    what = f"{path}, line {line}: the key {key.value!r} is also in line {lines[key.value]}."
                    raise ConfigError(what, mend="Leave one of them out.")
                lines[key.value] = line
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    sizes[id(node)] = 1 + sum(_check(part, path, sizes) for part in parts)
    if sizes[id(node)] > _MOST_VALUES:
        raise ConfigError(
            f"The config {path!r} has more than {_MOST_VALUES} values, aliases put in full.",
            mend="Write what is needed without aliases of aliases.",
        )
    return sizes[id(node)]
