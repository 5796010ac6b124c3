"""Why a check says nothing: test runners show all three as skipped, the report of the kit tells them apart."""

from __future__ import annotations

from unittest import SkipTest


class NotApplicable(SkipTest):
    """The check says nothing about this algorithm."""

    outcome = "not applicable"


class Blocked(SkipTest):
    """The check was not made, because one it builds on fails."""

    outcome = "blocked"


class Exempt(SkipTest):
    """The check fails, and the test names the reason why it may."""

    outcome = "exempt"
