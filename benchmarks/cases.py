"""The cases."""

from __future__ import annotations

from benchmarks import series
from benchmarks.harness import BenchmarkError, Case, Series
from slimbridge.errors import listed, nearest

_CASES = (
    Case(
        "prune_resnet50",
        "Trace ResNet-50 at 224 px, choose half of the channels of every group by L1 magnitude, and remove them. "
        "Definitions of the criterion differ (see the notes), so the channels chosen differ.",
        {"torch": series.prune_torch, "paddle": series.prune_paddle},
    ),
    Case(
        "prune_stage_resnet50",
        "Half of ResNet-50's channels by L1 magnitude, as a run of a plan removes them: ours leaves the given model "
        "alone, prunes a copy, and proves on the example and on noise that removing the channels gives the outputs of "
        "zeroing them. The other toolkits have no such proof: they do what they do in prune_resnet50.",
        {"torch": series.prune_stage_torch, "paddle": series.prune_stage_paddle},
    ),
    Case(
        "fpgm_resnet18",
        "Trace ResNet-18 at 224 px, choose half of the channels of every group by their distances to the other filters "
        "(FPGM), and remove them. The definition is the other toolkit's (a preset); arrays as ours: parameters and "
        "buffers of the pruned model that are equal, bit for bit, to those of the model that ours pruned.",
        {"torch": series.fpgm_torch, "paddle": series.fpgm_paddle},
        repeats=3,  # PaddleSlim takes about ten seconds
    ),
    Case(
        "trace_resnet50",
        "Trace ResNet-50 at 224 px and find its channel groups.",
        {"torch": series.trace_torch, "paddle": series.trace_paddle},
    ),
)


def cases() -> dict[str, Case]:
    """All cases by name, in the order they run."""
    return {item.name: item for item in _CASES}


def case(name: str) -> Case:
    """The case of that name; BenchmarkError names the nearest and all others."""
    known = cases()
    if name not in known:
        raise BenchmarkError(f"case '{name}' is unknown{nearest(name, known)}; known: {listed(known)}")
    return known[name]


def series_of(name: str, framework: str) -> Series:
    """Build one series of a case in this process; BenchmarkError when the case has none for the framework."""
    builders = case(name).series
    if framework not in builders:
        raise BenchmarkError(f"case '{name}' has no series for '{framework}'; it has: {listed(builders)}")
    return builders[framework]()
