"""From the units that go to the decision that a backend can carry out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slimbridge.decisions import GroupChoice, PruneDecision, Skipped
from slimbridge.graph import ChannelGroup, Graph, Units


def assemble(
    graph: Graph,
    units: Units,
    removed: set[int],
    choices: tuple[GroupChoice, ...],
    importance: str,
    ratio: float,
    skipped: tuple[Skipped, ...],
) -> PruneDecision:
    """A decision from the units that go."""
    kept = units.kept(removed)
    gone = np.fromiter(removed, np.int64, len(removed))
    heads = {path: (int(cut.size), int((~np.isin(cut, gone)).sum())) for path, cut in units.heads.items()}
    return PruneDecision(
        importance=importance,
        pruning_ratio=ratio,
        groups=choices,
        kept=kept,
        sizes={name: tuple(graph.parameters[name]) for name in kept},
        heads={path: pair for path, pair in heads.items() if pair[0] != pair[1]},
        skipped=skipped,
        exact=not units.inexact.intersection(removed),
    )


def removed_units(groups: Sequence[ChannelGroup], chosen: Sequence[NDArray[np.int64]]) -> set[int]:
    """The units at the chosen positions of each group."""
    return {unit for group, positions in zip(groups, chosen, strict=True) for unit in group.units[positions].tolist()}
