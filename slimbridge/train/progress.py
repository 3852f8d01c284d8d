"""How long work tells that it goes on. The library is quiet; the command line draws bars."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the state of one piece of work at a time."""

    def start(self, text: str, total: int) -> None:
        """A piece of work of `total` steps begins; the one before is over."""

    def step(self, note: str = "") -> None:
        """One step is done; the note says what a watcher wants to know."""

    def say(self, text: str) -> None:
        """One line that stays."""


class Quiet:
    """Shows nothing."""

    def start(self, text: str, total: int) -> None:
        """Nothing."""

    def step(self, note: str = "") -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""
