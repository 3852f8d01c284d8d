"""How much the metric loses when one channel group alone is pruned, and the ratios that follow from it.

The method is that of PaddleSlim 2.6.0 (`sensitive` and `sensitive_prune` in dygraph/prune/filter_pruner.py,
`get_ratios_by_loss` in prune/sensitive.py), with these differences:

* a curve belongs to a channel group, not to one convolution, and starts at ratio 0 with loss 0; there a group whose
  smallest tried ratio loses too much gets nothing (static graph) or is left out (dygraph), here a smaller ratio;
* a ratio is taken before the first loss that is too large; there from the largest ratio whose loss is small enough,
  though a smaller one has lost more;
* the loss is a share of the unpruned metric; dygraph adds 0.001 to the denominator;
* the search for a target keeps the best ratios seen; there it ends as soon as a saving, rounded to four digits, is met
  again, and gives the last ratios tried;
* the curves are kept as JSON with what they were measured on, not as a pickle without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path

from pydantic import ValidationError

from slimbridge.curves import GroupCurve, Sensitivity
from slimbridge.errors import ModelError, RunError
from slimbridge.files import write_file
from slimbridge.graph import ChannelGroup

__all__ = [
    "GroupCurve",
    "Sensitivity",
    "SensitivityJob",
    "loss_for_target",
    "measure",
    "ratios_for_loss",
    "ratios_for_target",
    "read_sensitivity",
]

HALVINGS = 30
"""Steps of a search; its interval shrinks to 1e-9 of itself."""


def _untold(done: int, total: int) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class SensitivityJob:
    """What is to be measured, and how.

    Attributes:
        groups: the channel groups.
        ratios: that are tried in each of them, ascending, 0..1.
        importance, samples, weights_digest, definition: as in `Sensitivity`.
        choose: (index of a group, ratio) -> positions of its units that go, ascending.
        metric_of: (index of a group, ratio) -> the metric with the units that `choose` gives zeroed, which equals
            removing them.
        baseline: the metric of the unpruned model.
        progress: (points that are known, points in all), after each one.
    """

    groups: Sequence[ChannelGroup]
    ratios: Sequence[float]
    importance: str
    samples: int
    weights_digest: str
    definition: str
    choose: Callable[[int, float], Sequence[int]]
    metric_of: Callable[[int, float], float]
    baseline: Callable[[], float]
    progress: Callable[[int, int], None] = _untold


def measure(job: SensitivityJob, path: Path | None = None) -> Sensitivity:
    """Measure the curves; with a path, each point is kept as soon as it is there, and none is measured twice.

    Args:
        job: what to measure.
        path: JSON file; one that was begun on the same model is gone on with. None keeps nothing.

    Raises:
        RunError: the file is damaged, or holds points of another model, criterion or metric (a file without any
            point is begun anew), or cannot be written.
        ModelError: the unpruned metric is not above 0, so that a loss has no share of it.
    """
    found = _known(job, path) or _begun(job)
    if not (isfinite(found.metric) and found.metric > 0):
        raise ModelError(f"sensitivity: a loss is a share of the unpruned model's metric, and that is {found.metric}")
    for index, curve in enumerate(found.curves):
        for points in _points(job, index, found.metric, curve.points):
            ordered = GroupCurve(layers=curve.layers, channels=curve.channels, points=dict(sorted(points.items())))
            curves = (*found.curves[:index], ordered, *found.curves[index + 1 :])
            found = found.model_copy(update={"curves": curves})
            if path is not None:
                write_file(path, found.model_dump_json(indent=1))
            job.progress(sum(len(curve.points) for curve in found.curves), len(job.groups) * len(job.ratios))
    return found


def _points(
    job: SensitivityJob, index: int, unpruned: float, known: Mapping[float, float]
) -> Iterator[dict[float, float]]:
    """The points of one group, one more each time; ratios that remove the same channels are evaluated once."""
    points = dict(known)
    seen: dict[tuple[int, ...], float] = {(): unpruned}
    for ratio in job.ratios:
        chosen = tuple(int(position) for position in job.choose(index, ratio))
        if ratio not in points:
            if chosen not in seen:
                seen[chosen] = float(job.metric_of(index, ratio))
            points[ratio] = seen[chosen]
            yield points
        seen[chosen] = points[ratio]


def _begun(job: SensitivityJob) -> Sensitivity:
    """Curves without points."""
    return Sensitivity(
        importance=job.importance,
        metric=float(job.baseline()),
        samples=job.samples,
        weights_digest=job.weights_digest,
        definition=job.definition,
        curves=tuple(GroupCurve(layers=g.layers, channels=int(g.units.size), points={}) for g in job.groups),
    )


def _known(job: SensitivityJob, path: Path | None) -> Sensitivity | None:
    """What the file holds; None when there is none or no point in it. RunError when it cannot be gone on with."""
    if path is None or not path.exists():
        return None
    found = read_sensitivity(path)
    if not any(curve.points for curve in found.curves):
        return None
    words = ("importance", "samples", "weights_digest", "definition")
    differs = [word for word in words if getattr(found, word) != getattr(job, word)]
    if [(c.layers, c.channels) for c in found.curves] != [(g.layers, g.units.size) for g in job.groups]:
        differs.append("channel groups")
    if any(ratio not in job.ratios for curve in found.curves for ratio in curve.points):
        differs.append("ratios")
    if differs:
        raise RunError(f"{path}: holds other sensitivity curves: they differ in {', '.join(differs)}; move it away")
    return found


def read_sensitivity(path: Path) -> Sensitivity:
    """Read a file that `measure` wrote; RunError when it is missing, truncated or something else."""
    try:
        return Sensitivity.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise RunError(f"{path}: not sensitivity curves, or damaged: {where}: {first['msg']}") from error


def ratios_for_loss(found: Sensitivity, max_loss: float) -> dict[str, float]:
    """The largest ratio of each group that loses no more than a share of the unpruned metric, that group alone pruned.

    Args:
        found: the curves.
        max_loss: (unpruned - pruned) / unpruned, 0 or more.

    Returns:
        first layer of the group -> ratio: on straight lines between the ratios that were tried, from loss 0 at ratio
        0; a loss counts as at least the largest one at smaller ratios. Never above the largest ratio tried.
    """
    return {curve.layers[0]: _ratio(_losses(found, curve), max_loss) for curve in found.curves}


def _losses(found: Sensitivity, curve: GroupCurve) -> list[tuple[float, float]]:
    """(ratio, loss) from (0, 0) on, the losses made to never fall."""
    line = [(0.0, 0.0)]
    for ratio, metric in sorted(curve.points.items()):
        line.append((ratio, max(line[-1][1], (found.metric - metric) / found.metric)))
    return line


def _ratio(line: Sequence[tuple[float, float]], max_loss: float) -> float:
    ratio = 0.0
    for (r0, l0), (r1, l1) in pairwise(line):
        if l1 > max_loss:
            # Rounding may carry the sum past r1 by the last digit.
            return min(r1, r0 + (max_loss - l0) / (l1 - l0) * (r1 - r0))
        ratio = r1
    return ratio


def loss_for_target(found: Sensitivity, cost: Callable[[Mapping[str, float]], float], wanted: float) -> float:
    """The loss for `ratios_for_loss` whose ratios save what comes nearest to the target.

    Args:
        found: the curves.
        cost: ratios -> share of the cost that they remove, 0..1, which does not fall when a ratio grows.
        wanted: share to remove, 0..1.

    Returns:
        0 or more. 0 also where ratios that lose nothing remove more than is wanted; `ratios_for_target` lowers them.

    Raises:
        ModelError: the largest ratios that were tried remove less.
    """
    largest = max((loss for curve in found.curves for _, loss in _losses(found, curve)), default=0.0)
    most = cost(ratios_for_loss(found, largest))
    if most < wanted:
        raise ModelError(
            f"sensitivity: {wanted:.4g} is to be removed, the largest ratios that were tried remove {most:.4g}; "
            "try larger ratios, or ask for less"
        )
    return _nearest(lambda loss: cost(ratios_for_loss(found, loss)), largest, wanted)


def ratios_for_target(
    found: Sensitivity, cost: Callable[[Mapping[str, float]], float], wanted: float
) -> dict[str, float]:
    """The ratios of `loss_for_target`; where those that lose nothing remove too much, all lowered by one factor.

    Args and raises as for `loss_for_target`.
    """
    loss = loss_for_target(found, cost, wanted)
    ratios = ratios_for_loss(found, loss)
    if loss > 0 or cost(ratios) <= wanted:
        return ratios
    factor = _nearest(lambda share: cost({layer: share * ratio for layer, ratio in ratios.items()}), 1.0, wanted)
    return {layer: factor * ratio for layer, ratio in ratios.items()}


def _nearest(function: Callable[[float], float], high: float, wanted: float) -> float:
    """The place in 0..high where a function that does not fall comes nearest to a value, by halving."""
    low, best = 0.0, (abs(function(high) - wanted), high)
    best = min(best, (abs(function(low) - wanted), low))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        value = function(middle)
        best = min(best, (abs(value - wanted), middle))
        if value == wanted:
            break
        low, high = (middle, high) if value < wanted else (low, middle)
    return best[1]
