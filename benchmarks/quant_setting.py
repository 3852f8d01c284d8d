"""What the cases of quantization share: a network with what it is calibrated on, its files, and the checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.harness import require
from benchmarks.setting import CLASSES, RATIO
from slimbridge.decisions import QuantizeDecision, Site
from slimbridge.deploy.onnx_file import write_onnx
from slimbridge.deploy.onnx_run import fusion
from slimbridge.discovery import get_backend
from slimbridge.parity.measure import relative
from slimbridge.plan import PruneStage, QuantizeStage
from slimbridge.ports import Array, Backend, Model, tensors_in
from slimbridge.prune import Pruner
from slimbridge.quantize.fake import Recorder
from slimbridge.quantize.quantizer import Quantizer, apply
from slimbridge.quantize_stage import decide_grids
from slimbridge.zoo import build

FULL = QuantizeStage(observer="minmax", placement="full")
FARTHEST = 0.2
"""Relative L2 difference of an integer model's logits from the float model's, over a batch, that is still a result.

With random weights every toolkit here stays under half of it; a wrong scale or a lost layer gives 1 or more.
"""
FLOAT_DIFFERENCE = 1e-3
"""The same of a float file: runtimes sum in other orders; a wrong layer is far above."""
# Layer kinds that onnxruntime counts, and how the table calls those that are computed in integers.
_FUSED = {"convolutions": "int8 convolutions", "adds": "int8 adds"}
RESNET18 = {"convolutions": (20, 20), "adds": (8, 8)}

Batch = tuple[Array, ...]


@dataclass(frozen=True)
class Network:
    """A network of the zoo, with equal weights on either framework.

    Attributes:
        framework, network: names.
        size: side of its images, pixels.
        batch: images in a calibration batch.
        pruned: without half of its channels, chosen by L1 magnitude in every group.
    """

    framework: str
    network: str = "resnet18"
    size: int = 224
    batch: int = 1
    pruned: bool = False

    @cached_property
    def backend(self) -> Backend:
        """Ours."""
        return get_backend(self.framework)

    @cached_property
    def model(self) -> Model:
        """Never changed."""
        model = build(self.network, self.backend, num_classes=CLASSES, seed=0)
        if not self.pruned:
            return model
        pruner = Pruner(PruneStage(pruning_ratio=RATIO))
        decision = pruner.decide(self.backend.trace(model, self.example), self.backend.read(model))
        return pruner.apply(self.backend, model, decision)

    @property
    def threads(self) -> int:
        """That one operation may use."""
        return self.backend.capabilities().threads

    @cached_property
    def weights_bytes(self) -> int:
        """Memory of the model's arrays."""
        return sum(array.nbytes for array in self.backend.read(self.model).values())

    def images(self, number: int, batch: int | None = None) -> Batch:
        """A batch of noise; equal numbers give equal ones."""
        shape = (batch or self.batch, 3, self.size, self.size)
        return (np.random.default_rng(number).standard_normal(shape, np.float32),)

    @cached_property
    def example(self) -> Batch:
        """One image."""
        return self.images(0, 1)

    def batches(self, images: int) -> Iterator[Batch]:
        """So many images, made as they are asked for, so that they take no memory of their own."""
        return (self.images(number) for number in range(images // self.batch))

    def logits(self, model: Model, inputs: Sequence[Array]) -> Array:
        """Of a model of the framework."""
        return self.backend.ops.numpy(tensors_in(self.backend.forward(model, inputs).output)[0])

    @cached_property
    def expected(self) -> Array:
        """The float model's logits of the example."""
        return self.logits(self.model, self.example)

    def check(self, logits: Array, allowed: float = FARTHEST) -> Mapping[str, int]:
        """Logits of the example are finite, of the right shape, and near to the float model's."""
        require(logits.shape == (1, CLASSES), f"logits of shape {logits.shape}, expected (1, {CLASSES})")
        require(bool(np.isfinite(logits).all()), "logits are not finite")
        difference = relative(logits, self.expected)
        require(difference <= allowed, f"logits differ from the float model's by {difference:.3g}, allowed {allowed:g}")
        return {"difference, per mille": round(1000 * difference)}

    # ------------------------------------------------------------------------------------------------- our files

    @cached_property
    def _place(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory()

    def folder(self, name: str) -> Path:
        """A folder for files of that name; gone when the network is."""
        path = Path(self._place.name) / name
        path.mkdir(exist_ok=True)
        return path

    def decide(self, stage: QuantizeStage, batches: Iterable[Batch]) -> QuantizeDecision:
        """Calibrate and decide."""
        return decide_grids(self.backend, self.model, stage, self.example, batches)

    def quantizer(self, stage: QuantizeStage) -> Quantizer:
        """Of the stage."""
        return Quantizer(stage, self.backend.layers(self.model), self.backend.trace(self.model, self.example))

    def applied(self, decision: QuantizeDecision) -> Model:
        """The simulation of a decision."""
        return apply(self.backend, self.backend.clone(self.model), decision)

    def float_onnx(self) -> Path:
        """A float file, its BatchNorms folded."""
        return self._onnx(None, "float")

    def int8_onnx(self, decision: QuantizeDecision) -> Path:
        """Our integer file."""
        return self._onnx(decision, "int8")

    def _onnx(self, decision: QuantizeDecision | None, name: str) -> Path:
        folder = self.folder(name)
        plain = self._plain(decision)
        self.backend.export(plain, self.example, folder, "onnx_float", None)
        sites = self._site_values(plain, decision) if decision is not None else {}
        write_onnx(folder / "model.onnx", decision, self.backend.read(plain), sites, self.example)
        return folder / "model.onnx"

    def _plain(self, decision: QuantizeDecision | None) -> Model:
        """A copy whose weights are on their grids, without fake quantization."""
        if decision is None:
            return self.backend.clone(self.model)
        return self.backend.insert_quant(self.applied(decision), {})

    def _site_values(self, model: Model, decision: QuantizeDecision) -> dict[str, Array]:
        recorders = {key: Recorder() for key in decision.activations}
        quants = {Site.parse(key): recorder for key, recorder in recorders.items()}
        watched = self.backend.insert_quant(self.backend.clone(model), quants)
        self.backend.forward(watched, self.example)
        return {key: recorder.value for key, recorder in recorders.items() if recorder.value is not None}

    def own_form(self, form: str, decision: QuantizeDecision | None) -> Path:
        """The folder of an export in a form of the framework's own."""
        folder = self.folder(form)
        self.backend.export(self._plain(decision), self.example, folder, form, decision)
        return folder


def size_of(path: Path) -> Mapping[str, int]:
    """Of a file, or of all files in a folder."""
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return {"file kB": round(sum(file.stat().st_size for file in files) / 1000)}


def fused(path: Path, needed: Mapping[str, tuple[int, int]] | None = None) -> Mapping[str, int]:
    """What onnxruntime computes in integers; BenchmarkError where it is not what is needed."""
    counts = fusion(path).counts
    for kind, count in (needed or {}).items():
        found = counts.get(kind, (0, 0))
        require(found == count, f"{found[0]} of {found[1]} {kind} fused, expected {count[0]} of {count[1]}")
    return {name: counts[kind][0] for kind, name in _FUSED.items() if kind in counts}
