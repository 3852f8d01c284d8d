"""The port, for PyTorch: each method is thin and hands over to the module that knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from slimbridge.decisions import PruneDecision, QuantizeDecision, Site
from slimbridge.errors import BackendError, ModelError
from slimbridge.graph import Graph
from slimbridge.ports import (
    Array,
    Capabilities,
    Device,
    DType,
    FakeQuant,
    Layer,
    Loss,
    NativeRequest,
    NativeResult,
    Optimizer,
    OptimizerSettings,
    Pass,
    QuantRequest,
    Statistics,
    tensors_in,
)
from slimbridge_torch import export as exporting
from slimbridge_torch import names, native_quant, quant, surgery
from slimbridge_torch import native as toolkits
from slimbridge_torch import nn as layer_names
from slimbridge_torch import reduce as reduction
from slimbridge_torch import train as training
from slimbridge_torch.ops import TorchOps
from slimbridge_torch.trace import trace

Tensor = Any

_DEVICES = {"cpu": "cpu", "gpu": "cuda"}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_COMPANIONS = ("torch", "torchao", "torch-pruning")


class TorchBackend:
    """`slimbridge.ports.Backend` for PyTorch."""

    name = "torch"

    def __init__(self) -> None:
        self.ops = TorchOps()
        self.nn: Any = layer_names

    def capabilities(self) -> Capabilities:
        """Versions, devices and engines on this machine; nothing is imported for it."""
        versions = {name: version for name in _COMPANIONS if (version := _version(name)) is not None}
        return Capabilities(
            backend=self.name,
            versions=versions,
            devices=_devices(),
            threads=torch.get_num_threads(),
            native_engines=toolkits.engines(),
            native_quantizers=native_quant.quantizers(),
            forms=exporting.forms(),
            runtimes=exporting.runtimes(),
        )

    def owns(self, model: object) -> bool:
        """Is it a torch module?"""
        return isinstance(model, nn.Module)

    def seed(self, seed: int) -> None:
        """Seed torch's generators, those of the GPUs too."""
        torch.manual_seed(seed)

    def place(self, model: nn.Module, device: Device = "cpu", dtype: DType = "float32") -> nn.Module:
        """Move the model; parameters stay the same objects."""
        if device not in _devices():
            raise BackendError(f"torch: device '{device}' is not there; this machine has: {', '.join(_devices())}")
        if dtype not in _DTYPES:
            raise BackendError(f"torch: dtype '{dtype}' is unknown; allowed: {', '.join(_DTYPES)}")
        names.check_ready(model, "place")
        names.check_full_precision(model)
        return model.to(device=_DEVICES[device], dtype=_DTYPES[dtype])

    def layers(self, model: nn.Module) -> tuple[Layer, ...]:
        """The layers that hold parameters or saved buffers, in order of definition."""
        return names.layers(model)

    def module_paths(self, model: nn.Module) -> tuple[str, ...]:
        """All module paths but the model's own, "", which `capture` takes as well."""
        return tuple(path for path, _ in model.named_modules(remove_duplicate=False) if path)

    def trace(self, model: nn.Module, inputs: Sequence[Array]) -> Graph:
        """The neutral graph of one forward pass in eval mode."""
        return trace(model, self._inputs(model, inputs))

    def read(self, model: nn.Module) -> dict[str, Array]:
        """Copies of all parameters and saved buffers; a tied tensor once, under its first name."""
        return names.read(model)

    def write(self, model: nn.Module, arrays: Mapping[str, Array], partial: bool = False) -> nn.Module:
        """Set parameters and buffers in place; see `names.write` for the errors."""
        names.write(model, {name: np.asarray(array) for name, array in arrays.items()}, partial)
        return model

    def clone(self, model: nn.Module) -> nn.Module:
        """An independent copy.

        Raises:
            ModelError: a part of the model cannot be copied, or has no data yet.
        """
        return names.copied(model)

    def tensor(self, model: nn.Module, array: Array) -> Tensor:
        """A tensor of its own memory on the model's device.

        Raises:
            ModelError: the array holds no real numbers.
        """
        array = np.asarray(array)
        like = _like(model)
        kinds = {"f": like.dtype, "i": torch.int64, "u": torch.int64, "b": torch.bool}
        if array.dtype.kind not in kinds:
            raise ModelError(f"input: dtype {array.dtype} is not allowed; floating, integer and bool arrays are")
        if array.dtype.kind == "u":
            array = array.astype(np.int64)
        return torch.tensor(np.asarray(array, order="C"), dtype=kinds[array.dtype.kind], device=like.device)

    def forward(self, model: nn.Module, inputs: Sequence[Array | Tensor], capture: Sequence[str] = ()) -> Pass:
        """Eval mode, no gradient. A layer that runs several times gives its last output."""
        with _mode(model, train=False), torch.no_grad():
            return _run(model, self._inputs(model, inputs), capture)

    def gradients(self, model: nn.Module, inputs: Sequence[Array], loss: Loss, train: bool = False) -> dict[str, Array]:
        """Gradient of the summed terms by parameter name; zeros where the loss does not reach a parameter."""
        wanted = {n: t for n, t in names.canonical(model).items() if isinstance(t, nn.Parameter) and t.requires_grad}
        with _mode(model, train), _buffers_kept(model), torch.enable_grad():
            summed = training.total(loss(_run(model, self._inputs(model, inputs), ())))
            found = torch.autograd.grad(summed, list(wanted.values()), allow_unused=True)
        return {
            name: self.ops.numpy(torch.zeros_like(parameter) if gradient is None else gradient)
            for (name, parameter), gradient in zip(wanted.items(), found, strict=True)
        }

    def make_optimizer(self, model: nn.Module, settings: OptimizerSettings) -> training.TorchOptimizer:
        """An optimizer over the model's trainable parameters; `set_lr` comes before the first step."""
        return training.TorchOptimizer(model, settings)

    def train_step(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        inputs: Sequence[Array],
        loss: Loss,
        capture: Sequence[str] = (),
    ) -> dict[str, float]:
        """One step in train mode; each module's own mode is restored.

        Raises:
            ModelError: a term of the loss is not finite; no step is taken.
        """
        native = _own(optimizer)
        native.zero_grad()
        with _mode(model, train=True), torch.enable_grad():
            terms = loss(_run(model, self._inputs(model, inputs), capture))
            training.total(terms).backward()
        try:
            numbers = training.values(terms)
        except ModelError:
            native.zero_grad()
            raise
        native.step()
        return numbers

    def remove_channels(
        self, model: nn.Module, decision: PruneDecision, optimizer: Optimizer | None = None
    ) -> nn.Module:
        """Slice the decision's tensors, the layers' attributes and the optimizer's state."""
        surgery.remove_channels(model, decision, None if optimizer is None else _own(optimizer))
        return model

    def insert_quant(self, model: nn.Module, quants: Mapping[Site, FakeQuant]) -> nn.Module:
        """Fake-quantize these sites from now on; replaces an earlier call."""
        quant.insert_quant(model, quants, self.ops, partial(self.tensor, model))
        return model

    def hold_statistics(self, model: nn.Module, hold: bool) -> nn.Module:
        """BatchNorm layers keep and use their running statistics in training steps."""
        quant.hold_statistics(model, hold)
        return model

    def reduce(
        self, model: nn.Module, inputs: Sequence[Array], sites: Sequence[Site], histogram: bool = False
    ) -> dict[Site, Statistics]:
        """Statistics of tensors over one batch, as the layers are given or give them."""
        return reduction.reduce(model, lambda: self.forward(model, inputs), sites, histogram)

    def native(self, model: nn.Module, request: NativeRequest, inputs: Sequence[Array]) -> NativeResult:
        """Let Torch-Pruning or torch.nn.utils.prune choose; see `native.native` for the errors."""
        return toolkits.native(model, request, self._inputs(model, inputs))

    def native_quantize(
        self, model: nn.Module, request: QuantRequest, batches: Sequence[Sequence[Array]]
    ) -> QuantizeDecision:
        """Let torchao decide, on a copy on the CPU in float32; see `native_quant.native_quantize` for the errors."""
        copy = self.place(self.insert_quant(self.clone(model), {}))
        return native_quant.native_quantize(copy, request, [self._inputs(copy, batch) for batch in batches])

    def export(
        self,
        model: nn.Module,
        inputs: Sequence[Array],
        folder: Path,
        form: str,
        decision: QuantizeDecision | None = None,
    ) -> None:
        """Write a form from a copy of the model, on the CPU and in float32; see `exporting.export`."""
        sites = exporting.quants(form, decision)
        copy = self.place(self.insert_quant(self.clone(model), sites))
        exporting.export(copy, self._inputs(copy, inputs), folder, form, decision)

    def load_exported(self, folder: Path, form: str, threads: int) -> Callable[[Sequence[Array]], list[Array]]:
        """A function that runs program.pt2, compiled for this machine; see `pt2e.load`."""
        return exporting.load(folder, form, threads)

    def _inputs(self, model: nn.Module, inputs: Sequence[Array | Tensor]) -> tuple[Tensor, ...]:
        if not isinstance(inputs, (list, tuple)):
            found = type(inputs).__name__
            raise ModelError(f"input: a list with one array for each argument of forward is needed, found {found}")
        return tuple(item if isinstance(item, torch.Tensor) else self.tensor(model, item) for item in inputs)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> tuple[Device, ...]:
    return ("cpu", "gpu") if torch.cuda.is_available() else ("cpu",)


def _like(model: nn.Module) -> Tensor:
    """The model's first floating tensor, a float32 one on the CPU if it has none."""
    tensors = (t for held in (model.parameters(), model.buffers()) for t in held if t.is_floating_point())
    return next(tensors, torch.empty(0))


def _own(optimizer: Optimizer) -> training.TorchOptimizer:
    if not isinstance(optimizer, training.TorchOptimizer):
        raise BackendError(f"torch: the optimizer is a {type(optimizer).__name__}; make_optimizer gives the right one")
    return optimizer


@contextmanager
def _mode(model: nn.Module, train: bool) -> Iterator[None]:
    """Train or eval mode inside; each module's own flag is restored."""
    flags = [(module, module.training) for module in model.modules()]
    model.train(train)
    if train:
        quant.keep_held(model)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers that a pass changes or replaces get their old values and objects back."""
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in saved:
                buffer.copy_(values)
                module._buffers[name] = buffer


def _run(model: nn.Module, inputs: tuple[Tensor, ...], capture: Sequence[str]) -> Pass:
    """One pass with the captured layers' outputs.

    Raises:
        ModelError: a path that does not exist, did not run, or returned no tensor.
    """
    features: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = [item for item in tensors_in(output) if isinstance(item, torch.Tensor)]
            if not found:
                raise ModelError(f"capture: layer '{path}' returned no tensor but a {type(output).__name__}")
            features[path] = found[0]

        return hook

    modules = names.find_modules(model, tuple(capture), "capture")
    handles = [module.register_forward_hook(keep(path)) for path, module in modules.items()]
    try:
        output = model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    silent = [path for path in capture if path not in features]
    if silent:
        raise ModelError(f"capture: layer '{silent[0]}' did not run in the forward pass")
    return Pass(output, {path: features[path] for path in capture}, names.Parameters(model))
