"""One forward pass of a float and of integer models: which runtimes run whose files, and how each is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from benchmarks.harness import Competitor, Series
from benchmarks.quant_setting import FARTHEST, FLOAT_DIFFERENCE, FULL, RESNET18, Network, fused, size_of
from benchmarks.quant_toolkits import Images, Nncf, OnnxRuntime, quiet
from slimbridge.decisions import QuantizeDecision
from slimbridge.deploy.onnx_run import open_runtime
from slimbridge.exports import FLOAT
from slimbridge.ports import Array

IMAGES = 32
COMMON = ("slimbridge", "numpy", "onnx", "onnxruntime", "openvino", "nncf")
DISTRIBUTIONS = {"torch": (*COMMON, "torch", "torchao"), "paddle": (*COMMON, "paddlepaddle", "paddle2onnx")}
OURS = "slimbridge int8"

Run = Callable[[Sequence[Array]], list[Array]]


@dataclass
class Files:
    """The files of a network, each written when it is first asked for.

    Attributes:
        network: the float model.
        images: calibration images, the same for all.
        needed: what onnxruntime must compute in integers of our file.
    """

    network: Network
    images: int
    needed: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def data(self) -> Images:
        """What every toolkit calibrates on."""
        return Images(lambda: self.network.batches(self.images), self.images // self.network.batch)

    @cached_property
    def decision(self) -> QuantizeDecision:
        """Ours."""
        return self.network.decide(FULL, self.data)

    @cached_property
    def plain(self) -> Path:
        """Float ONNX."""
        return self.network.float_onnx()

    @cached_property
    def ours(self) -> Path:
        """Our Q/DQ ONNX."""
        return self.network.int8_onnx(self.decision)

    @cached_property
    def theirs(self) -> Path:
        """onnxruntime's."""
        return OnnxRuntime().quantize(self.plain, self.network.folder("onnxruntime") / "model.onnx", self.data)

    @cached_property
    def nncf_onnx(self) -> Path:
        """NNCF's, of the ONNX model."""
        return Nncf().onnx(self.plain, self.network.folder("nncf_onnx") / "model.onnx", self.data)

    @cached_property
    def nncf_openvino(self) -> Path:
        """NNCF's, of OpenVINO's model."""
        return Nncf().openvino(self.plain, self.network.folder("nncf_openvino") / "model.xml", self.data)

    def own_form(self, form: str) -> Path:
        """The folder of a form of the framework's own."""
        return self.network.own_form(form, None if form.endswith(FLOAT) else self.decision)


WARM = 3
"""Untimed passes before a timed one, so that what the competitor before it left in caches counts less."""


def _passes(
    name: str,
    network: Network,
    opened: Callable[[], tuple[Run, Mapping[str, int]]],
    allowed: float,
    note: str = "",
) -> Competitor:
    """One pass of the example, with `WARM` before it that are not timed; opened when first prepared."""
    made: list[tuple[Run, Mapping[str, int]]] = []

    def prepare() -> Run:
        if not made:
            with quiet():
                made.append(opened())
        for _ in range(WARM):
            made[0][0](network.example)
        return made[0][0]

    def check(outputs: list[Array]) -> Mapping[str, int]:
        return {**made[0][1], **network.check(outputs[0], allowed)}

    return Competitor(name, prepare, lambda run: run(network.example), check, note)


def eager(network: Network) -> Competitor:
    """PyTorch itself."""

    def opened() -> tuple[Run, Mapping[str, int]]:
        weights = {"file kB": round(network.weights_bytes / 1000)}
        return lambda inputs: [network.logits(network.model, inputs)], weights

    return _passes("PyTorch fp32 eager", network, opened, FLOAT_DIFFERENCE, "file: its arrays")


def in_runtime(
    name: str,
    network: Network,
    path: Callable[[], Path],
    runtime: str,
    needed: Mapping[str, tuple[int, int]] | None = None,
    allowed: float = FARTHEST,
    note: str = "",
) -> Competitor:
    """A file in onnxruntime or OpenVINO; what is fused is counted in onnxruntime's own rows."""

    def opened() -> tuple[Run, Mapping[str, int]]:
        place = path()
        both = [place, place.with_suffix(".bin")] if place.suffix == ".xml" else [place]
        size = {"file kB": sum(size_of(part)["file kB"] for part in both)}
        counts = fused(place, needed) if runtime == "onnxruntime" else {}
        return open_runtime(place, runtime, network.threads), {**size, **counts}

    return _passes(f"{name}, {runtime}", network, opened, allowed, note)


def own_form(name: str, files: Files, form: str, allowed: float = FARTHEST, note: str = "") -> Competitor:
    """A form of the framework's own, in the framework's own runtime."""
    network = files.network

    def opened() -> tuple[Run, Mapping[str, int]]:
        folder = files.own_form(form)
        return network.backend.load_exported(folder, form, network.threads), size_of(folder)

    return _passes(name, network, opened, allowed, note)


def both(name: str, files: Files, note: str = "") -> tuple[Competitor, ...]:
    """Our int8 file in either runtime."""
    path = partial(getattr, files, "ours")
    return (
        in_runtime(name, files.network, path, "onnxruntime", files.needed, note=note),
        in_runtime(name, files.network, path, "openvino", note=note),
    )


def both_float(files: Files) -> tuple[Competitor, ...]:
    """The float file in either runtime."""
    path = partial(getattr, files, "plain")
    return tuple(
        in_runtime("float32", files.network, path, runtime, allowed=FLOAT_DIFFERENCE, note=note)
        for runtime, note in (("onnxruntime", "BatchNorms folded"), ("openvino", "the same file; precision hint f32"))
    )


def _series(network: Network, *competitors: Competitor) -> Series:
    ratio = f"times as fast as {competitors[0].name}"
    found = DISTRIBUTIONS[network.framework]
    return Series(competitors, found, network.threads, network.weights_bytes, ratio, faster=True)


def _resnet18(framework: str, size: int, images: int) -> tuple[Files, tuple[Competitor, ...], tuple[Competitor, ...]]:
    """The files of the whole model, and our competitors: whole and pruned."""
    whole = Files(Network(framework, size=size), images, RESNET18)
    half = Files(Network(framework, size=size, pruned=True), images, RESNET18)
    ours = both(OURS, whole, "min/max, placement full, a step for each channel of a weight")
    pruned = both(
        "slimbridge half pruned, int8", half, "half of all channels by L1 magnitude; compared with itself in float"
    )
    return whole, ours, pruned


def resnet18_torch(size: int = 224, images: int = IMAGES) -> Series:
    """PyTorch, float files, ours, onnxruntime's quantizer, NNCF and PT2E."""
    files, ours, pruned = _resnet18("torch", size, images)
    network, theirs = files.network, "unsigned activations, signed weights, a step for each channel; our float file"
    return _series(
        network,
        eager(network),
        *both_float(files),
        *ours,
        in_runtime(
            "onnxruntime quantize_static", network, lambda: files.theirs, "onnxruntime", note=f"MinMax; {theirs}"
        ),
        in_runtime("NNCF on ONNX", network, lambda: files.nncf_onnx, "onnxruntime", note="defaults; our float file"),
        in_runtime(
            "NNCF on OpenVINO", network, lambda: files.nncf_openvino, "openvino", note="defaults; our float file"
        ),
        own_form("slimbridge pt2e, torch.compile", files, "pt2e", note="our grids, Inductor's int8 kernels"),
        *pruned,
    )


def resnet18_paddle(size: int = 224, images: int = IMAGES) -> Series:
    """Paddle Inference, float files and ours."""
    files, ours, pruned = _resnet18("paddle", size, images)
    return _series(
        files.network,
        own_form("Paddle Inference fp32", files, "paddle_float", FLOAT_DIFFERENCE, "oneDNN"),
        own_form(
            "slimbridge paddle_int8, Paddle Inference", files, "paddle_int8", note="our grids, oneDNN's int8 kernels"
        ),
        *both_float(files),
        *ours,
        *pruned,
    )


def mobilenet_torch(network: str, size: int = 224, images: int = IMAGES) -> Series:
    """PyTorch, and float and int8 files."""
    files = Files(Network("torch", network, size=size), images)
    return _series(files.network, eager(files.network), *both_float(files), *both(OURS, files))


def mobilenet_paddle(network: str, size: int = 224, images: int = IMAGES) -> Series:
    """Paddle Inference, and float and int8 files."""
    files = Files(Network("paddle", network, size=size), images)
    return _series(
        files.network,
        own_form("Paddle Inference fp32", files, "paddle_float", FLOAT_DIFFERENCE, "oneDNN"),
        own_form("slimbridge paddle_int8, Paddle Inference", files, "paddle_int8"),
        *both_float(files),
        *both(OURS, files),
    )
