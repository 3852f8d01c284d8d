"""The one ratio that reaches a target: a share of the parameters, of the MACs, or of a measured latency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

CLOSE = 0.02
"""How near to the target counts as reached: 2 % of what the model cost before."""
ROUNDS = {"parameters": 40, "macs": 40, "latency": 9}
"""Halvings of the interval; a measured latency is too noisy for many, and takes time."""


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    Attributes:
        ratio: pruning ratio, 0..1.
        removed: share of the cost that it removes.
    """

    ratio: float
    removed: float


def search_ratio(removed_by: Callable[[float], float], wanted: float, rounds: int) -> Found:
    """The ratio whose removed share of the cost is nearest to the wanted one, by bisection.

    Args:
        removed_by: from a ratio in 0..1 to the share of the cost that it removes; it should not fall.
        wanted: share, 0..1.
        rounds: evaluations beside that of the largest ratio.
    """
    low, high = 0.0, 0.999
    best = Found(high, removed_by(high))
    if best.removed <= wanted:
        return best
    for _ in range(rounds):
        middle = (low + high) / 2
        here = Found(middle, removed_by(middle))
        if abs(here.removed - wanted) < abs(best.removed - wanted):
            best = here
        if here.removed < wanted:
            low = middle
        elif here.removed > wanted:
            high = middle
        else:
            break
    return best


def target_note(of: str, wanted: float, found: float, why: str) -> str:
    """A line for the report; with the reason where the target was missed by more than 2 %."""
    line = f"target: {wanted:.1%} of {of} to remove, {found:.1%} removed"
    return line if abs(found - wanted) <= CLOSE else f"{line}; not nearer because {why}"
