"""Compares two runs of one plan: exact, numeric and behavioural claims, each with figure and tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from slimbridge.decisions import Decision, DistillDecision, MaskDecision, PruneDecision, QuantizeDecision, load_decision
from slimbridge.errors import RunError
from slimbridge.parity.measure import differing, relative
from slimbridge.parity.replay_records import read_replay
from slimbridge.parity.tolerances import Tolerance, tolerance
from slimbridge.plan.registries import ENTRY_IMPORTANCES, IMPORTANCES, as_importance
from slimbridge.report.records import Verdict
from slimbridge.runfolder import RunFolder, load_probe, stage_names
from slimbridge.weights import load_stored

Class = Literal["exact", "numeric", "behavioural"]


def compare(reference: RunFolder, other: RunFolder, replayed: Path | None, why_not: str = "") -> tuple[Verdict, ...]:
    """All verdicts of `other` against `reference`.

    Args:
        reference: a complete run.
        other: a complete run of the same stages.
        replayed: folder of the reference's replay on the other's backend; None when there is none.
        why_not: then the reason, for the verdicts that cannot be given.

    Raises:
        RunError: a run is not complete, the runs have different stages, or the replay is of another run.
    """
    names = stage_names(reference.plan())
    if names != stage_names(other.plan()):
        raise RunError(f"{reference.path} and {other.path} have different stages: they cannot be compared")
    digests = []
    for folder in (reference, other):
        folder.require_complete()
        digests.append(folder.digest())
    if replayed is not None and read_replay(replayed).reference_digest != digests[0]:
        raise RunError(f"{replayed}: is the replay of another run than {reference.path}")
    return tuple(verdict for name in names for verdict in _Stage(reference, other, replayed, why_not, name).verdicts())


class _Stage:
    """The verdicts of one stage."""

    def __init__(self, reference: RunFolder, other: RunFolder, replayed: Path | None, why_not: str, name: str) -> None:
        self.reference, self.other, self.name, self.why_not = reference, other, name, why_not
        self.replayed = replayed / name if replayed is not None else None
        self.decision = reference.decision(name)
        first = stage_names(reference.plan())[0]
        self.same_start = reference.record(first).weights_digest == other.record(first).weights_digest

    def verdicts(self) -> Iterator[Verdict]:
        if self.decision is not None:
            yield from self._decisions(self.decision)
        yield from self._macs()
        row = "forward_quantized" if isinstance(self.decision, QuantizeDecision) else "forward"
        claim = "outputs of the reference's weights on both frameworks"
        yield self._verdict("numeric", claim, row, self._forward_difference())
        ours, theirs = self.reference.record(self.name), self.other.record(self.name)
        yield self._verdict("behavioural", "metric of the two runs", "metric", abs(ours.metric - theirs.metric))

    def _decisions(self, ours: Decision) -> Iterator[Verdict]:
        theirs = self._replayed_decision()
        if isinstance(ours, QuantizeDecision):
            yield from self._quantization(ours, theirs if isinstance(theirs, QuantizeDecision) else None)
            return
        figure = None if theirs is None else _decision_difference(ours, theirs)
        if isinstance(ours, (PruneDecision, MaskDecision)) and _from_data(ours):
            share = None if figure is None else figure / max(_gone(ours), 1)
            claim = f"{_CLAIMS[type(ours)]} and equal data"
            yield self._verdict("numeric", claim, "decision_from_data", share)
            return
        yield self._verdict("exact", _CLAIMS[type(ours)], "decision", figure)

    def _quantization(self, ours: QuantizeDecision, theirs: QuantizeDecision | None) -> Iterator[Verdict]:
        integers = steps = activations = None
        if theirs is not None and self.replayed is not None:
            replayed = load_stored(self.replayed / "integers.safetensors")
            integers = float(differing(self.reference.integers(self.name), replayed))
            steps = float(
                sum(ours.weights.get(key) != theirs.weights.get(key) for key in {*ours.weights, *theirs.weights})
            )
            activations = _step_difference(ours, theirs)
        yield self._verdict("exact", "int8 weights, from equal weights", "integers", integers)
        yield self._verdict("exact", "grids of the weights, from equal weights", "decision", steps)
        yield self._verdict("numeric", "steps of the activations, from equal weights", "activation_step", activations)

    def _macs(self) -> Iterator[Verdict]:
        """Of one model; two runs that chose from their own weights may rightly end with other widths."""
        figure = None
        if self.replayed is not None:
            found = {stage.name: stage.macs for stage in read_replay(self.replayed.parent).stages}
            figure = float(abs(self.reference.record(self.name).macs - found[self.name]))
        yield self._verdict("exact", "MACs of the reference's model, counted on both frameworks", "macs", figure)

    def _forward_difference(self) -> float | None:
        if self.replayed is None:
            return None
        (ours, inputs), (theirs, other_inputs) = self.reference.probe(self.name), load_probe(self.replayed)
        if inputs != other_inputs:
            self.why_not = "the test loader gave other samples: it must not shuffle"
            return None
        return relative(theirs, ours)

    def _replayed_decision(self) -> Decision | None:
        path = self.replayed / "decision.json" if self.replayed is not None else None
        return load_decision(path) if path is not None and path.exists() else None

    def _verdict(self, parity: Class, claim: str, row: str, figure: float | None) -> Verdict:
        allowed = tolerance(row)
        why_not = self.why_not or "it rests on a training, a metric or times of its own, which no replay repeats"
        return Verdict(
            stage=self.name,
            parity=parity,
            claim=claim,
            figure=figure,
            tolerance=allowed.value,
            unit=allowed.unit,
            passed=None if figure is None else bool(figure <= allowed.value),
            reason=why_not if figure is None else self._reason(parity, allowed, figure),
        )

    def _reason(self, parity: Class, allowed: Tolerance, figure: float) -> str:
        """Why the tolerance is what it is; of a failure also what is known of its cause."""
        if figure <= allowed.value:
            return allowed.reason
        if not self.same_start:
            return "the two runs started from different weights; give both the same baseline weights"
        if parity == "behavioural":
            return "the two runs were trained apart and ended apart; compare several seeds"
        return f"a fault in one of the two backends: {allowed.reason}"


_CLAIMS: dict[type, str] = {
    PruneDecision: "channels removed, from equal weights",
    MaskDecision: "weights masked, from equal weights",
    DistillDecision: "loss terms and teacher",
}


def _from_data(decision: PruneDecision | MaskDecision) -> bool:
    """Does the importance look at gradients or activations?"""
    name = decision.importance
    if isinstance(decision, MaskDecision):
        return name in ENTRY_IMPORTANCES.names() and ENTRY_IMPORTANCES.get(name).needs != "weights"
    return name in IMPORTANCES.names() and as_importance(IMPORTANCES.get(name)).needs != "weights"


def _gone(decision: PruneDecision | MaskDecision) -> int:
    """Channels that are removed, or weights that are masked."""
    if isinstance(decision, MaskDecision):
        return sum(int((~mask.array()).sum()) for mask in decision.masks.values())
    return sum(len(group.removed) for group in decision.groups)


def _decision_difference(ours: Decision, theirs: Decision) -> float:
    """Channels that one side alone removes, entries that one alone masks; else 1 when they differ at all."""
    if isinstance(ours, MaskDecision) and isinstance(theirs, MaskDecision):
        masks = [{name: mask.array() for name, mask in side.masks.items()} for side in (ours, theirs)]
        return float(max(differing(*masks), ours.digest() != theirs.digest()))
    if isinstance(ours, PruneDecision) and isinstance(theirs, PruneDecision):
        if ours.digest() == theirs.digest():
            return 0.0
        mine, other = ({(g.layers, i) for g in side.groups for i in g.removed} for side in (ours, theirs))
        return float(max(len(mine ^ other), 1))
    return float(ours.digest() != theirs.digest())


def _step_difference(ours: QuantizeDecision, theirs: QuantizeDecision) -> float:
    """Largest relative difference of two activation steps; infinite when other tensors or other grids are used.

    A zero point may be the neighbouring integer, where its rounding is near a tie.
    """
    forms = [
        {key: (grid.low, grid.high, grid.rounding) for key, grid in side.activations.items()} for side in (ours, theirs)
    ]
    if forms[0] != forms[1] or ours.dynamic != theirs.dynamic:
        return float("inf")
    if any(
        abs(grid.zero_point[0] - theirs.activations[key].zero_point[0]) > 1 for key, grid in ours.activations.items()
    ):
        return float("inf")
    pairs = [(grid.step[0], theirs.activations[path].step[0]) for path, grid in ours.activations.items()]
    steps = np.array(pairs, dtype=np.float64)
    return float(np.max(np.abs(steps[:, 0] - steps[:, 1]) / steps[:, 0], initial=0.0))
