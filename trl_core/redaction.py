"""What is secret, and copies and texts without it: nothing secret is ever written to a file or shown.

A value is secret by its option (`option(secret=True)`), by its name (`api_token`, `password`, at any depth), by its
shape (`hf_...`, a private key) or by its place in a text (`https://user:password@host`, `--api-key VALUE`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Set, Sized
from typing import Any

HIDDEN = "<hidden>"
_DEEPEST = 30


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Names are read as words: "hfToken", "X-Api-Key" and "API_KEY_2" as well.
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")
_ANYWHERE = _set(
    "password passwords passwd passphrase passcode pwd secret secrets credential credentials cred creds bearer "
    "authorization apikey apikeys apitoken authtoken accesstoken accesskey secretkey privatekey hftoken hubtoken jwt "
    "pgpassword otp pat passwort kennwort sessionid"
)
_LAST = _set("auth oauth cookie cookies authentication")
# A name that ends so speaks about a secret.
_ABOUT = _set("file path dir folder env len length type name policy url uri method mode expiry")
_OF_KEY = _set(
    "api private secret signing encryption decryption ssh account auth service client license subscription storage "
    "master deploy rsa pgp gpg ssl tls wandb openai anthropic hf huggingface aws azure gcp google comet neptune"
)
_OF_TOKEN = _OF_KEY | _set("access hub refresh session security personal login github gitlab git bot slack id sas csrf")
_OF_PASS = _set("db database user smtp proxy ftp http admin root login")
# What language models call a token. Others are secret where the value does not look like a token of a vocabulary.
_OF_LANGUAGE = _set(
    "eos bos pad padding unk sep cls mask stop start end begin image video audio special think decoder extra virtual "
    "forced per first next last loss prefix suffix middle new prompt completion response tool boi eoi gspo"
)
_IN_VOCABULARY = re.compile(r"<.*>|\[.*\]|\W*|.{0,3}", re.DOTALL)
_RANDOM = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])[^\s<>()]{12,}")

_SHAPES = re.compile(
    r"(?<![\w-])(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{8,}"
    r"|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}+\.[\w-]{8,}+\.[\w-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<=hooks\.slack\.com/services/)[\w/]{8,}|(?<=discord\.com/api/webhooks/)[\w/-]{8,}"
    # The signature of a web address that is good for whoever has it.
    r"|(?<=[?&]sig=)[^\s&\"']{8,}|(?<=[?&]X-Amz-Signature=)[^\s&\"']{8,}|(?<=[?&]X-Goog-Signature=)[^\s&\"']{8,}"
    r"|(?<=:_authToken=)[^\s\"']{8,}|(?<=:_password=)[^\s\"']{8,}"
    r"|(?<=Bearer )[\w.~+/=-]{8,}|(?<=Basic )[\w.~+/=-]{8,}",
    re.DOTALL,
)
# With or without a password: what stands before the host of a web address is often a token.
_IN_URL = re.compile(
    r"(?<=://)[^\s/?#@:]*+:[^\s/?#]{0,999}@|(?<=http://)[^\s/?#]{1,999}@|(?<=https://)[^\s/?#]{1,999}@"
)
_NAMED = re.compile(
    r"""(?:(?P<flag>(?<!\S)--?)|(?<![\w-]))(?P<quote>["']?)(?P<name>[A-Za-z][\w-]*+)(?P=quote)"""
    r"""(?P<by>\s*+(?:=>|=|:)\s*+|[ \t]++)"""
)
_NOTHING = ("", "None", "null", "True", "False", "true", "false", HIDDEN)
_VALUE = re.compile(r""""[^"\n]*"?|'[^'\n]*'?|[^\s,;&}\])"']{1,4000}""")

_values: set[str] = set()
_marked: set[str] = set()
_Note = Callable[[str], Any]


def remember(value: Any, *, marked: Iterable[str] = ()) -> None:
    """Note what is secret in options or arguments, so that `hide` finds it wherever it is repeated; see `redacted`."""
    found: list[str] = []
    _copy(value, found.append, frozenset(marked), drop=False)
    # Shorter ones may be parts of other words; their names alone hide them.
    _values.update(text for text in found if len(text) >= 6 and text != HIDDEN)


def marked_in(fields: Iterable[dataclasses.Field[Any]]) -> frozenset[str]:
    """The names of those options that are marked as secret."""
    return frozenset(f.name for f in fields if f.metadata.get("secret"))


def hide(text: str) -> str:
    """The text without secrets: those that `remember` was told of, and what looks like one."""
    for value in sorted(_values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _hide(text)


def redacted(value: Any, *, marked: Iterable[str] = (), drop: bool = False) -> Any:
    """A copy made of JSON values, in which what is secret is hidden.

    Args:
        value: a config, a dictionary, or anything an option may hold.
        marked: names of its entries that are secret whatever they are called.
        drop: leave secrets out instead, so that copies with other ones, or with none, are equal.
    """
    return _copy(value, lambda _: None, frozenset(marked), drop)


def hide_error(error: BaseException) -> BaseException:
    """The error, with no secret in its text nor in those of the errors that it came from."""
    chain: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in chain:
            chain.append(one)
            waiting += [one.__cause__, one.__context__]
    for one in chain:
        one.args = tuple(hide(part) if isinstance(part, str) else part for part in one.args)
        for name in (*vars(one), "filename", "filename2", "strerror", "msg", "doc"):
            with contextlib.suppress(Exception):
                if isinstance(text := getattr(one, name), str):
                    setattr(one, name, hide(text))
    for one in chain:
        # Some make their text out of other things; better without them.
        if one.__cause__ is not None and hide(str(one.__cause__)) != str(one.__cause__):
            one.__cause__ = None
        if one.__context__ is not None and hide(str(one.__context__)) != str(one.__context__):
            one.__context__ = None
    return error


# -- what is a secret -------------------------------------------------------------------------------------------------
def _words(name: Any) -> list[str]:
    return [word.lower() for word in _WORD.findall(str(name)[:999])]


def _may_name_secret(name: str) -> bool:
    return is_named_secret(name) or _words(name)[-1:] in (["token"], ["key"])


def is_named_secret(name: Any) -> bool:
    """Whether whatever has this name is a secret, but for None, True and False."""
    words = _words(name)
    while len(words) > 1 and words[-1] in ("value", "string", "str", "header"):
        words.pop()
    if not words or (words[-1] in _ABOUT and "webhook" not in words):
        return False
    before = {*words[:-1]}
    match words[-1]:
        case "token" | "tokens":
            named = words == ["token"] or bool(before & _OF_TOKEN and not before & _OF_LANGUAGE)
        case "key" | "keys":
            named = bool(before & _OF_KEY)
        case "pass":
            named = not before or bool(before & _OF_PASS)
        case last:
            named = last in _LAST
    return named or not _ANYWHERE.isdisjoint(words) or {"access", "key"} <= {*words} or "webhook" in words


def _is_secret(name: Any, value: Any) -> bool:
    if value is None or isinstance(value, bool) or value == HIDDEN:
        return False
    if is_named_secret(name):
        return True
    words = _words(name)
    if not isinstance(value, str) or not words:
        return False
    if words[-1] == "token" and _OF_LANGUAGE.isdisjoint(words):
        return _IN_VOCABULARY.fullmatch(value) is None
    return words[-1] == "key" and _RANDOM.fullmatch(value) is not None


def _hide(text: str, note: _Note = str, drop: bool = False) -> str:
    """Without what looks like a secret, each of which is noted."""

    def found(match: re.Match[str]) -> str:
        note(match[0])
        return HIDDEN

    def in_url(match: re.Match[str]) -> str:
        for part in match[0].removesuffix("@").split(":", 1)[-1:]:
            note(part)
        return "" if drop else f"{HIDDEN}@"

    text = _IN_URL.sub(in_url, _SHAPES.sub(found, text))
    pieces, at = [], 0
    for match in _NAMED.finditer(text):
        name, by = match["name"], match["by"].strip()
        if match.start() < at or not (name in _marked or _may_name_secret(name)):
            continue
        value = _VALUE.match(text, match.end())
        if value is None:
            continue
        bare = value[0].strip("\"'")
        # In prose a colon says no more than that something is said about a name.
        assigned = by in ("=", "=>") or (by and (match["quote"] or bare != value[0] or _starts(text, match.start())))
        assigned = assigned or (match["flag"] and not by and bare[:1] != "-") or (by and _RANDOM.fullmatch(bare))
        if assigned and bare not in _NOTHING and (name in _marked or _is_secret(name, bare)):
            note(bare)
            pieces += [text[at : match.end()], HIDDEN]
            at = value.end()
    return "".join([*pieces, text[at:]])


def _starts(text: str, at: int) -> bool:
    """Whether a name stands where a key does: at the start of a line, or after a bracket or comma."""
    before = text[max(at - 99, 0) : at].rstrip(" \t-")
    return not before or before[-1] in "\n{,[(:"


def _copy(value: Any, note: _Note, marked: Set[str], drop: bool, depth: int = 0) -> Any:
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return _hide(value, note, drop)
    if depth > _DEEPEST:
        return "..."
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        marked = marked_in(dataclasses.fields(value))
        _marked.update(marked)
        value = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value) if f.init}
    elif not isinstance(value, type | Sized) and callable(as_dict := getattr(value, "to_dict", None)):
        with contextlib.suppress(Exception):
            value = as_dict()
    if isinstance(value, Mapping):
        kept: dict[str, Any] = {}
        # {"name": "API_KEY", "value": VALUE}, as lists of variables have it.
        entry = next((value[key] for key in ("name", "key") if isinstance(value.get(key), str)), None)
        if entry is not None and _is_secret(entry, value.get("value")):
            marked = marked | {"value"}
        for name, item in value.items():
            named = str(name) in marked or is_named_secret(name)
            if secret := (named and not isinstance(item, bool) and item not in (None, "")) or _is_secret(name, item):
                _leaves(item, note)
            if not (drop and (secret or named or (item is None and str(name).endswith("token")))):
                kept[str(name)] = HIDDEN if secret else _copy(item, note, frozenset(), drop, depth + 1)
        return kept if kept or not (drop and value) else None
    if isinstance(value, list | tuple):
        items = [_copy(item, note, frozenset(), drop, depth + 1) for item in value]
        for i, (name, item) in enumerate(itertools.pairwise(value), 1):
            # ("api_key", VALUE), and the words of a command.
            if isinstance(name, str) and (len(value) == 2 or name[:1] == "-") and _is_secret(name, item):
                _leaves(item, note)
                items[i] = HIDDEN
        return items
    if isinstance(value, Set):
        return sorted((_copy(item, note, frozenset(), drop, depth + 1) for item in value), key=str)
    if isinstance(value, type) or callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))  # an address is another one in each process
    return _hide(text.removeprefix("torch.") if type(value).__name__ == "dtype" else text, note, drop)


def _leaves(value: Any, note: _Note) -> None:
    """Note every text in a secret."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | Set):
        for item in value:
            _leaves(item, note)
    elif value is not None and not isinstance(value, bool):
        note(str(value))
