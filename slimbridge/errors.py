"""The errors a user may meet: each one or two lines, saying what, where, what was found, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SlimbridgeError(Exception):
    """Base of every error that slimbridge raises on purpose."""


class PlanError(SlimbridgeError):
    """A plan that cannot be used; `findings` holds one line for each mistake."""

    def __init__(self, findings: Iterable[str]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(self.findings))


class BackendError(SlimbridgeError):
    """A backend is unknown, not installed, or cannot do what was asked."""


class ModelError(SlimbridgeError):
    """A model that cannot be traced, pruned, quantized or matched with its weights."""


class RunError(SlimbridgeError):
    """A run folder that cannot be read, written, resumed or compared."""


FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(OSError, RuntimeError, TypeError, ValueError),
)
"""What a user's model or a framework raises when a pass fails."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(word: str, allowed: Iterable[str]) -> str:
    """A hint " (did you mean 'x'?)" for the allowed word closest to `word`, or the empty string."""
    found = get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""


def listed(words: Iterable[str], limit: int = 12) -> str:
    """The words in one line, cut after `limit` with the number left out."""
    items = list(words)
    tail = f", ... {len(items) - limit} more" if len(items) > limit else ""
    return (", ".join(items[:limit]) + tail) or "none"
