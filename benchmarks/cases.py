"""The cases."""

from __future__ import annotations

from functools import partial

from benchmarks import int8_series, ptq_series, qat_series, series
from benchmarks.harness import BenchmarkError, Case, Series
from slimbridge.errors import listed, nearest

_PASSES = 25
_DIFFERENCE = "Difference: relative L2 difference of the logits of one image from the float model's."

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
    Case(
        "int8_resnet18",
        f"One pass of one image through ResNet-18 at 224 px, random weights, three untimed passes just before; integer "
        f"files are calibrated on the same {int8_series.IMAGES} images of noise. {_DIFFERENCE} What onnxruntime "
        "computes in integers is counted in its rows.",
        {"torch": int8_series.resnet18_torch, "paddle": int8_series.resnet18_paddle},
        repeats=_PASSES,
        memory_runs=0,
    ),
    *(
        Case(
            f"int8_{network}",
            f"As int8_resnet18, {title}.",
            {
                "torch": partial(int8_series.mobilenet_torch, network),
                "paddle": partial(int8_series.mobilenet_paddle, network),
            },
            repeats=_PASSES,
            memory_runs=0,
        )
        for network, title in (("mobilenet_v2", "MobileNetV2"), ("mobilenet_v3_small", "MobileNetV3-small"))
    ),
    Case(
        "ptq_resnet18",
        f"From a float ResNet-18 to the grids of its weights and activations, {ptq_series.IMAGES} images of noise at "
        "224 px, one at a time, made when they are asked for. The result that is checked is that of two images. "
        f"{_DIFFERENCE}",
        {"torch": ptq_series.resnet18_torch, "paddle": ptq_series.resnet18_paddle},
        repeats=1,  # minutes for a round
        warmup=0,
        memory_runs=1,
    ),
    Case(
        "ptq_memory",
        "Our calibration over 300 and over 3,000 images of noise at 64 px, ten at a time: its memory does not grow "
        "with their number.",
        {"torch": partial(ptq_series.memory, "torch"), "paddle": partial(ptq_series.memory, "paddle")},
        repeats=1,
        warmup=0,
    ),
    Case(
        "qat_step_resnet18",
        "One step of quantization-aware training of ResNet-18, 8 bits, 112 px, batch 8: inputs of convolutions and "
        "linear layers, and their weights.",
        {"torch": qat_series.resnet18_torch, "paddle": qat_series.resnet18_paddle},
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
