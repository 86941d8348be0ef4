"""How a check ends when it does not end well."""

from __future__ import annotations


class Red(Exception):
    """A check failed: what was found, and what to do about it."""

    def __init__(self, detail: str, remedy: str = "") -> None:
        super().__init__(detail)
        self.detail, self.remedy = detail, remedy


class TimedOut(Red):
    """A check failed because the server did not answer in time."""


class Skipped(Exception):
    """A check does not apply to this server; the message says why."""


class CannotRun(Exception):
    """Nothing can be checked at all; the message holds the remedy."""
