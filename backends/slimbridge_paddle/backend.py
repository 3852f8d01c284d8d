"""The backend: `slimbridge.ports.Backend` for PaddlePaddle, a thin front of the modules beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import PickleError
from typing import Any

import paddle

from slimbridge.decisions import PruneDecision, QuantizeDecision, Site
from slimbridge.errors import BackendError, ModelError, listed
from slimbridge.graph import Graph
from slimbridge.ports import (
    Array,
    Capabilities,
    Device,
    DType,
    FakeQuant,
    Layer,
    Loss,
    Model,
    NativeRequest,
    NativeResult,
    Ops,
    Optimizer,
    OptimizerSettings,
    Pass,
    QuantRequest,
    Statistics,
    Tensor,
)
from slimbridge_paddle import (
    export,
    inference,
    names,
    native,
    native_quant,
    quant,
    reduce,
    run,
    surgery,
    tensors,
    trace,
    train,
)
from slimbridge_paddle.nn import Namespace
from slimbridge_paddle.ops import PaddleOps

_DISTRIBUTIONS = ("paddlepaddle", "paddlepaddle-gpu", "paddleslim")


class PaddleBackend:
    """PaddlePaddle, dynamic graph."""

    name: str = "paddle"
    ops: Ops = PaddleOps()
    nn: Any = Namespace()

    def capabilities(self) -> Capabilities:
        """What Paddle can do on this machine; PaddleSlim is looked up, not imported."""
        flag = "FLAGS_paddle_num_threads"
        return Capabilities(
            backend=self.name,
            versions={name: found for name in _DISTRIBUTIONS if (found := _version(name))},
            devices=tensors.devices(),
            threads=int(paddle.get_flags([flag])[flag]),
            native_engines=native.engines(),
            native_quantizers=native_quant.quantizers(),
            forms=export.forms(),
            runtimes={form: f"Paddle Inference {paddle.__version__}, oneDNN" for form in inference.FORMS},
        )

    def owns(self, model: object) -> bool:
        """Is it a Paddle layer?"""
        return isinstance(model, paddle.nn.Layer)

    def seed(self, seed: int) -> None:
        """Seed the generators of all devices; initialisers and dropout draw from them."""
        paddle.seed(seed)

    def place(self, model: Model, device: Device = "cpu", dtype: DType = "float32") -> Model:
        """Move parameters and buffers in place."""
        if device not in tensors.devices():
            raise BackendError(f"paddle: no device '{device}' here; there is {listed(tensors.devices())}")
        if dtype not in ("float32", "float64"):
            raise BackendError(f"paddle: dtype '{dtype}' is not supported; float32 and float64 are")
        tensors.move(model, device, dtype)
        return model

    def layers(self, model: Model) -> tuple[Layer, ...]:
        """The layers that hold parameters or saved buffers."""
        return names.layers(model)

    def module_paths(self, model: Model) -> tuple[str, ...]:
        """Every layer's path, the model itself ("") left out."""
        return tuple(path for path, _ in names.walk(model) if path)

    def trace(self, model: Model, inputs: Sequence[Array]) -> Graph:
        """The neutral graph of one eval pass."""
        return trace.trace(model, inputs)

    def read(self, model: Model) -> dict[str, Array]:
        """Copies of all parameters and saved buffers."""
        return names.read(model)

    def write(self, model: Model, arrays: Mapping[str, Array], partial: bool = False) -> Model:
        """Set parameters and buffers in place."""
        names.write(model, arrays, partial)
        return model

    def clone(self, model: Model) -> Model:
        """A deep copy: weights, buffers, modes and hooks.

        Raises:
            ModelError: the model, or something that it holds, cannot be copied.
        """
        if isinstance(model, paddle.DataParallel):
            raise ModelError("clone: a paddle.DataParallel cannot be copied; give the model inside, `model._layers`")
        try:
            return copy.deepcopy(model)
        except (TypeError, RuntimeError, PickleError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise ModelError(f"clone: this {type(model).__name__} cannot be copied: {reason}") from error

    def tensor(self, model: Model, array: Array) -> Tensor:
        """A tensor on the model's device, in its dtype."""
        return run.to_native(model, [array])[0]

    def forward(self, model: Model, inputs: Sequence[Array | Tensor], capture: Sequence[str] = ()) -> Pass:
        """One eval pass without gradient."""
        return run.forward(model, inputs, capture)

    def gradients(self, model: Model, inputs: Sequence[Array], loss: Loss, train: bool = False) -> dict[str, Array]:
        """Gradient of the loss; the model is left unchanged."""
        return run.gradients(model, inputs, loss, train)

    def make_optimizer(self, model: Model, settings: OptimizerSettings) -> Optimizer:
        """A Paddle optimizer with exactly these settings."""
        return train.PaddleOptimizer(model, settings)

    def train_step(
        self,
        model: Model,
        optimizer: Optimizer,
        inputs: Sequence[Array],
        loss: Loss,
        capture: Sequence[str] = (),
    ) -> dict[str, float]:
        """One step in train mode."""
        if not isinstance(optimizer, train.PaddleOptimizer):
            raise BackendError(f"train_step: the optimizer is a {type(optimizer).__name__}, not Paddle's")
        return train.train_step(model, optimizer, inputs, loss, capture)

    def remove_channels(self, model: Model, decision: PruneDecision, optimizer: Optimizer | None = None) -> Model:
        """Slice parameters, buffers, attributes and optimizer state in place."""
        surgery.remove_channels(model, decision, optimizer)
        return model

    def insert_quant(self, model: Model, quants: Mapping[Site, FakeQuant]) -> Model:
        """Fake-quantize these tensors from now on."""
        quant.insert_quant(model, quants)
        return model

    def hold_statistics(self, model: Model, hold: bool) -> Model:
        """BatchNorm layers keep and use their running statistics in training steps."""
        quant.hold_statistics(model, hold)
        return model

    def reduce(
        self, model: Model, inputs: Sequence[Array], sites: Sequence[Site], histogram: bool = False
    ) -> dict[Site, Statistics]:
        """Statistics of tensors over one eval pass."""
        return reduce.reduce(model, inputs, sites, histogram)

    def native(self, model: Model, request: NativeRequest, inputs: Sequence[Array]) -> NativeResult:
        """Let a pruner of PaddleSlim choose, on a copy."""
        return native.choose(self.clone(model), request, inputs)

    def native_quantize(
        self, model: Model, request: QuantRequest, batches: Sequence[Sequence[Array]]
    ) -> QuantizeDecision:
        """Let an observer of PaddleSlim decide, on a copy."""
        return native_quant.decide(self.clone(model), request, batches)

    def export(self, model: Model, inputs: Sequence[Array], folder: Path, form: str, decision: Any = None) -> None:
        """Write ONNX in float, or a program of Paddle Inference."""
        export.export(self.clone(model), inputs, folder, form, decision)

    def load_exported(self, folder: Path, form: str, threads: int) -> Callable[[Sequence[Array]], list[Array]]:
        """A program of Paddle Inference, run by oneDNN."""
        return inference.load(folder, form, threads)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
