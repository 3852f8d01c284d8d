"""Calibration: a network over some hundred images, until its grids are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.harness import Competitor, Series, require
from benchmarks.quant_setting import Network
from benchmarks.quant_toolkits import Images, Nncf, OnnxRuntime, PaddleQuantization, TorchAo
from slimbridge.decisions import QuantizeDecision
from slimbridge.deploy.onnx_run import open_runtime
from slimbridge.plan import QuantizeStage
from slimbridge.ports import Array, Model, tensors_in

IMAGES = 300
MEMORY_IMAGES = (300, 3000)
_TRIAL = 2
"""Batches of the run that is checked."""
_HISTOGRAM_IMAGES = 30
"""Of the methods of onnxruntime that keep every tensor of every image, 31 MB an image."""
_LAYERS = 21
_RATIO = "ratio to the passes alone"
DISTRIBUTIONS = {
    "torch": ("slimbridge", "numpy", "torch", "torchao", "onnx", "onnxruntime", "nncf"),
    "paddle": ("slimbridge", "numpy", "paddlepaddle", "paddleslim"),
}
_STAGES = (
    (
        "slimbridge min/max, layer",
        QuantizeStage(observer="minmax", placement="layer"),
        "inputs of convolutions and linear layers",
    ),
    ("slimbridge min/max, full", QuantizeStage(observer="minmax"), "adds and pools too"),
    ("slimbridge histogram, full", QuantizeStage(observer="histogram"), "histogram"),
    ("slimbridge MSE, full", QuantizeStage(observer="mse"), "histogram"),
    ("slimbridge percentile, full", QuantizeStage(observer="percentile"), "histogram"),
)

Calibrate = Callable[[Any, Images], Any]
Write = Callable[[Path, Path, Images], Path]


class Work:
    """What all calibrate.

    Args:
        network: with its batch.
        images: how many.
    """

    def __init__(self, network: Network, images: int) -> None:
        self.network, self.images = network, images

    def data(self, images: int) -> Images:
        """Batches, made as they are asked for."""
        return Images(lambda: self.network.batches(images), images // self.network.batch)

    def copy(self) -> Model:
        """A fresh model."""
        return self.network.backend.clone(self.network.model)

    @cached_property
    def plain(self) -> Path:
        """The float ONNX file."""
        return self.network.float_onnx()

    def competitor(
        self,
        name: str,
        calibrate: Calibrate,
        check: Callable[[Any], Mapping[str, int]],
        note: str = "",
        given: Callable[[], Any] = lambda: None,
        images: int | None = None,
    ) -> Competitor:
        """One way; the result that is checked is that of two batches."""
        count = images or self.images

        def checked(result: Any) -> Mapping[str, int]:
            return {"images": count, **check(result)}

        return Competitor(
            name,
            lambda: (given(), self.data(count)),
            lambda prepared: calibrate(*prepared),
            checked,
            note,
            lambda: (given(), self.data(_TRIAL * self.network.batch)),
        )

    def passes(self) -> Competitor:
        """Forward passes alone."""
        network = self.network

        def calibrate(model: Model, images: Images) -> Array:
            for batch in images:
                network.backend.forward(model, batch)
            return network.logits(model, network.example)

        return self.competitor("forward passes alone", calibrate, network.check, "eval mode, no gradient", self._model)

    def _model(self) -> Model:
        return self.network.model

    def ours(self, name: str, stage: QuantizeStage, note: str = "", images: int | None = None) -> Competitor:
        """Our calibration and decision."""
        network = self.network

        def calibrate(model: Model, images: Images) -> QuantizeDecision:
            return network.decide(stage, images)

        def check(decision: QuantizeDecision) -> Mapping[str, int]:
            require(len(decision.weights) == _LAYERS, f"{len(decision.weights)} of {_LAYERS} layers quantized")
            found = network.check(network.logits(network.applied(decision), network.example))
            return {**found, "tensors": len(decision.activations)}

        return self.competitor(name, calibrate, check, note, self._model, images)

    def of_file(self, name: str, write: Write, note: str, images: int | None = None) -> Competitor:
        """A quantizer of ONNX files, in onnxruntime."""
        network = self.network

        def calibrate(source: Path, images: Images) -> Path:
            return write(source, network.folder(name) / "model.onnx", images)

        def check(path: Path) -> Mapping[str, int]:
            return network.check(open_runtime(path, "onnxruntime", network.threads)(network.example)[0])

        return self.competitor(name, calibrate, check, note, lambda: self.plain, images)

    def of_model(self, name: str, calibrate: Calibrate, note: str) -> Competitor:
        """A quantizer of the framework's models; its result is a model."""
        network = self.network

        def check(model: Any) -> Mapping[str, int]:
            output = model(network.backend.tensor(network.model, network.example[0]))
            return network.check(network.backend.ops.numpy(tensors_in(output)[0]))

        return self.competitor(name, calibrate, check, note, self.copy)


def _series(work: Work, *competitors: Competitor, ratio: str) -> Series:
    network = work.network
    return Series(competitors, DISTRIBUTIONS[network.framework], network.threads, network.weights_bytes, ratio)


def _ours(work: Work) -> tuple[Competitor, ...]:
    return tuple(work.ours(name, stage, note) for name, stage, note in _STAGES)


def resnet18_torch(size: int = 224, images: int = IMAGES, few: int = _HISTOGRAM_IMAGES, batch: int = 1) -> Series:
    """Ours, torchao, NNCF and onnxruntime."""
    work = Work(Network("torch", size=size, batch=batch), images)

    def method(word: str) -> Write:
        return lambda source, target, data: OnnxRuntime().quantize(source, target, data, word)

    kept = f"keeps every tensor of every image, 31 MB an image at 224 px: {few} images only"
    return _series(
        work,
        work.passes(),
        *_ours(work),
        work.of_model(
            "torchao PT2E",
            lambda model, data: TorchAo().calibrate(model, data),
            "export + prepare + calibrate + convert; histograms",
        ),
        work.of_file("NNCF on ONNX", lambda *given: Nncf().onnx(*given), "passes in onnxruntime; bias correction too"),
        work.of_file("onnxruntime MinMax", method("MinMax"), "passes in onnxruntime"),
        work.of_file("onnxruntime Entropy", method("Entropy"), f"passes in onnxruntime; {kept}", few),
        work.of_file("onnxruntime Percentile", method("Percentile"), f"passes in onnxruntime; {kept}", few),
        ratio=_RATIO,
    )


def resnet18_paddle(size: int = 224, images: int = IMAGES, batch: int = 1) -> Series:
    """Ours and paddle.quantization with PaddleSlim's observers."""
    work = Work(Network("paddle", size=size, batch=batch), images)

    def observer(word: str) -> Calibrate:
        return lambda model, data: PaddleQuantization().calibrate(model, data, word)

    note = "PTQ.quantize + calibrate + convert; inputs of convolutions and linear layers"
    return _series(
        work,
        work.passes(),
        *_ours(work),
        work.of_model("paddle.quantization Absmax", observer("AbsmaxObserver"), note),
        work.of_model("paddle.quantization Hist", observer("HistObserver"), note),
        ratio=_RATIO,
    )


def memory(framework: str, size: int = 64, images: tuple[int, int] = MEMORY_IMAGES, batch: int = 10) -> Series:
    """Ours over fewer and over more images."""
    work = Work(Network(framework, size=size, batch=batch), images[0])
    rows = [
        work.ours(f"{name}, {count} images", stage, images=count)
        for name, stage, _ in (_STAGES[1], _STAGES[3])
        for count in images
    ]
    return _series(work, *rows, ratio="ratio to the first row")
