"""The conformance kit: the checks as tests.

The whole conformance test of a plugin:

    from trl_core.testing import Subject, conformance

    test_conformance = conformance(Subject("trl-gfpo:gfpo", options={"num_remains_in_group": 2}))

`trl-core check gfpo` runs such tests and writes what came out into a file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .checks import CHECKS, Check, require
from .outcomes import Exempt, NotApplicable
from .subject import Subject


def conformance(subject: Subject, exempt: Mapping[str, str] | None = None) -> Callable[..., None]:
    """A pytest test of all checks, each with its name as an id; assign it to a name that begins with `test_`.

    Args:
        subject: what to check.
        exempt: name of a check to the reason why the subject does not keep it. A check that passes all the same
            fails, so that no exemption outlives its reason.

    Raises:
        ConfigError: `exempt` names no check.
    """
    import pytest

    def test(check: Callable[[Path], None], tmp_path: Path) -> None:
        check(tmp_path)

    checks = conformance_checks(subject, exempt)
    named = pytest.mark.parametrize("check", checks, ids=[check.__name__ for check in checks])(test)
    return pytest.mark.conformance(_described(subject, exempt or {}))(named)


def _described(subject: Subject, exempt: Mapping[str, str]) -> dict[str, Any]:
    """What a report says of a subject, in JSON's types."""
    return {
        "name": subject.name,
        "distributions": {info.distribution: info.version for info in subject.infos},
        "options": {name: _plain(value) for name, value in subject.options.items()},
        "neutral": subject.neutral and {name: _plain(value) for name, value in subject.neutral.items()},
        "arguments": sorted(subject.arguments),
        "exempt": dict(exempt),
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def conformance_checks(subject: Subject, exempt: Mapping[str, str] | None = None) -> list[Callable[[Path], None]]:
    """All checks of one subject, each to be called with an empty folder: for any test runner.

    Args:
        subject: what to check.
        exempt: see `conformance`.

    Raises:
        ConfigError: `exempt` names no check.
    """
    exempt, names = dict(exempt or {}), [check.__name__ for check in CHECKS]
    if unknown := set(exempt) - set(names):
        raise ConfigError(f"Exemptions name unknown checks: {sorted(unknown)}.", mend=f"Known are {', '.join(names)}.")
    if silent := sorted(name for name, reason in exempt.items() if not str(reason).strip()):
        raise ConfigError(f"Exemptions give no reason: {silent}.", mend="Say why the algorithm cannot keep the check.")
    return [_bound(check, subject, exempt.get(check.__name__)) for check in CHECKS]


def _bound(check: Check, subject: Subject, reason: str | None) -> Callable[[Path], None]:
    @functools.wraps(check)
    def run(folder: Path) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a model this small gains nothing from more, and they wait for each other
        try:
            check(subject, folder)
        except NotApplicable:
            require(reason is None, f"{check.__name__} does not apply, but is exempt.", "Remove the exemption.")
            raise
        except Exception as error:
            if reason is None or hasattr(error, "outcome"):
                raise
            raise Exempt(f"Exempt, {reason}: {error}") from error
        finally:
            torch.set_num_threads(threads)
        require(reason is None, f"{check.__name__} passes, but is exempt.", "Remove the exemption.")

    return run
