"""The whole contract between slimbridge and a framework.

A backend is one object with the methods of `Backend`. Everything in and out is in the canonical form:

* weights are NumPy arrays laid out (out, in, ...), Linear included; only a transposed convolution keeps the layout
  (in, out / groups, ...) that the frameworks share; module paths are names; activations are NCHW;
* BatchNorm's statistics are called `running_mean` and `running_var`, the running variance is the unbiased one
  (divided by n - 1) and `momentum` is the share that a step updates. A framework with other conventions converts.

Methods that change a model return it, so that a framework with immutable models fits too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from slimbridge.decisions import PruneDecision, QuantizeDecision, Site
from slimbridge.graph import Graph
from slimbridge.values import (
    HISTOGRAM_BINS,
    Array,
    Capabilities,
    Device,
    DType,
    Histogram,
    Layer,
    Loss,
    Model,
    NativeRequest,
    NativeResult,
    OptimizerSettings,
    Pass,
    QuantRequest,
    Statistics,
    Tensor,
    as_float64,
    tensors_in,
)

__all__ = [
    "HISTOGRAM_BINS",
    "Array",
    "Backend",
    "Capabilities",
    "DType",
    "Device",
    "FakeQuant",
    "Histogram",
    "Layer",
    "Loss",
    "Model",
    "NativeRequest",
    "NativeResult",
    "Ops",
    "Optimizer",
    "OptimizerSettings",
    "Pass",
    "QuantRequest",
    "Statistics",
    "Tensor",
    "as_float64",
    "tensors_in",
]


class FakeQuant(Protocol):
    """The fake quantization of one tensor, written over `Ops`; a backend calls it where the tensor is.

    A backend keeps the object that it is given; only `Backend.clone` copies it.
    """

    @property
    def parameters(self) -> Mapping[str, Array]:
        """Name -> initial value, of what is trained with the model."""

    @property
    def buffers(self) -> Mapping[str, Array]:
        """Name -> initial value, of what is kept beside it and saved with it."""

    @property
    def reads(self) -> Mapping[str, str]:
        """Name -> canonical name of a parameter or buffer of the model that it looks at."""

    def __call__(
        self, ops: Ops, x: Tensor, state: Mapping[str, Tensor], training: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The tensor on its grid.

        Args:
            ops: of the backend.
            x: the tensor; of a weight in canonical layout, differentiable.
            state: native tensors under the names of `parameters`, `buffers` and `reads`.
            training: is the pass one of a training step?

        Returns:
            the new tensor, and the buffers that change, by name.
        """


@runtime_checkable
class Optimizer(Protocol):
    """A native optimizer behind a few calls."""

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next steps."""

    def state(self) -> dict[str, Array]:
        """Slots as "<canonical parameter name>/<slot>" -> array in canonical layout, plus "step" where it counts."""

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` gave; ModelError names what does not fit."""

    def hold_zeros(self, masks: Mapping[str, Array]) -> None:
        """After each step from now on, entries whose mask is False are 0; replaces an earlier call, {} lifts it.

        Args:
            masks: canonical parameter name -> bool array of its canonical shape, True = trained as ever.

        Raises:
            ModelError: a name is unknown, or a shape differs. A parameter that is not trained needs no holding.
        """


class Ops(Protocol):
    """Differentiable operations on native tensors, for losses and fake quantization.

    Python operators (+ - * / ** @, comparison, negation) work on native tensors and are used directly.
    `axis` is an int or a tuple of ints; None means all axes.
    """

    def numpy(self, x: Tensor) -> Array: ...
    def shape(self, x: Tensor) -> tuple[int, ...]: ...
    def stop_gradient(self, x: Tensor) -> Tensor: ...
    def cast(self, x: Tensor, like: Tensor) -> Tensor: ...
    def constant(self, array: Array, like: Tensor) -> Tensor:
        """A tensor of an array of numbers, in the dtype and on the device of `like`; no gradient."""

    def divide(self, x: Tensor, y: Tensor) -> Tensor:
        """The quotient x / y, rounded as IEEE 754 says; the operator may be one unit in the last place off."""

    def sum(self, x: Tensor, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
    def mean(self, x: Tensor, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
    def max(self, x: Tensor, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
    def abs(self, x: Tensor) -> Tensor: ...
    def exp(self, x: Tensor) -> Tensor: ...
    def log(self, x: Tensor) -> Tensor: ...
    def sqrt(self, x: Tensor) -> Tensor: ...
    def relu(self, x: Tensor) -> Tensor: ...
    def clip(self, x: Tensor, low: float, high: float) -> Tensor: ...
    def round(self, x: Tensor) -> Tensor:
        """To the nearest integer, half to even; its gradient is zero."""

    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor: ...
    def softmax(self, x: Tensor, axis: int) -> Tensor: ...
    def log_softmax(self, x: Tensor, axis: int) -> Tensor: ...
    def one_hot(self, labels: Tensor, classes: int, like: Tensor) -> Tensor:
        """Integer labels of any shape -> a last axis of `classes`, in the dtype and on the device of `like`."""

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor: ...
    def transpose(self, x: Tensor, perm: Sequence[int]) -> Tensor: ...
    def concat(self, xs: Sequence[Tensor], axis: int) -> Tensor: ...
    def extremes(self, x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
        """Smallest and largest entry, of all or for each index of one axis, shape () or (channels,); no gradient."""

    def fake_quant(
        self,
        x: Tensor,
        step: Tensor,
        zero_point: Tensor | None,
        low: int,
        high: int,
        axis: int | None = None,
        away: bool = False,
    ) -> Tensor:
        """(clip(round(x / step) + zero_point, low, high) - zero_point) * step, all in the dtype of `x`.

        Exactly these operations, each rounded as IEEE 754 says: a true division, not a product with a reciprocal.

        Args:
            x: any shape.
            step: positive, of the dtype of `x`, shape (), or (channels,) with `axis`.
            zero_point: whole numbers, shape as `step`; None is 0. It gets no gradient.
            low, high: smallest and largest integer.
            axis: channel axis of `x`.
            away: halves are rounded away from zero, not to even.

        Its gradient, v = x / step: for x the gradient itself where low <= round(v) + zero_point <= high, else 0
        (straight-through estimator, Bengio et al. 2013, clipped); for step, where it is differentiable, the sum over
        all entries that share it of round(v) - v inside, low - zero_point below and high - zero_point above (Esser et
        al. 2020, "Learned step size quantization", equation 3).
        """


@runtime_checkable
class Backend(Protocol):
    """A framework, as slimbridge sees it."""

    name: str
    ops: Ops
    nn: Any
    """Layer factories by PyTorch's names, so that a zoo model is written once: Module, Sequential, ModuleList,
    Conv2d, ConvTranspose2d, Linear, BatchNorm2d, LayerNorm, GroupNorm, ReLU, ReLU6, LeakyReLU, GELU, SiLU, Sigmoid,
    Hardswish, Hardsigmoid, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, Dropout, Flatten, Identity; functions relu,
    sigmoid, gelu, softmax(x, axis), matmul, flatten(x, start), concat(xs, axis), split(x, sizes, axis), reshape,
    transpose, mean, upsample(x, factor) (nearest), pad(x, before_after_pairs), parameter(array) (a trainable array,
    set as an attribute of a Module)."""

    def capabilities(self) -> Capabilities:
        """Versions, devices and engines on this machine."""

    def owns(self, model: object) -> bool:
        """Is it a model of this framework?"""

    def seed(self, seed: int) -> None:
        """Seed every generator that the framework uses (dropout, initialisation)."""

    def place(self, model: Model, device: Device = "cpu", dtype: DType = "float32") -> Model:
        """Move the model; BackendError names the devices that exist."""

    def layers(self, model: Model) -> tuple[Layer, ...]:
        """The layers that hold parameters, in order of definition."""

    def module_paths(self, model: Model) -> tuple[str, ...]:
        """Every module path that `capture` may name, parameters or not."""

    def trace(self, model: Model, inputs: Sequence[Array]) -> Graph:
        """The neutral graph of one forward pass in eval mode. The model is left as it was, mode included."""

    def read(self, model: Model) -> dict[str, Array]:
        """Copies of all parameters and buffers, canonical names and layout (no `num_batches_tracked`)."""

    def write(self, model: Model, arrays: Mapping[str, Array], partial: bool = False) -> Model:
        """Set parameters and buffers in place; ModelError names unknown, missing (unless partial), misshapen ones."""

    def clone(self, model: Model) -> Model:
        """An independent copy: weights, mode, device, inserted quantization."""

    def tensor(self, model: Model, array: Array) -> Tensor:
        """A native tensor on the model's device; floating arrays take the model's dtype, integers become int64."""

    def forward(self, model: Model, inputs: Sequence[Array | Tensor], capture: Sequence[str] = ()) -> Pass:
        """Eval mode, no gradient; the model's mode is restored. ModelError for a path that does not exist."""

    def gradients(self, model: Model, inputs: Sequence[Array], loss: Loss, train: bool = False) -> dict[str, Array]:
        """Gradient of the loss by canonical parameter name; the model is left unchanged, statistics included."""

    def make_optimizer(self, model: Model, settings: OptimizerSettings) -> Optimizer:
        """An optimizer over the model's trainable parameters."""

    def train_step(
        self,
        model: Model,
        optimizer: Optimizer,
        inputs: Sequence[Array],
        loss: Loss,
        capture: Sequence[str] = (),
    ) -> dict[str, float]:
        """One step in train mode, the mode restored; returns the terms of the loss before the step."""

    def remove_channels(self, model: Model, decision: PruneDecision, optimizer: Optimizer | None = None) -> Model:
        """Slice each parameter and buffer of `decision.kept`, layer attributes and optimizer state with them.

        A GroupNorm loses whole groups: its number of groups shrinks as its channels do. For each layer of
        `decision.heads` the integer attributes whose name speaks of heads, but not of their size, and that hold the
        old number get the new one; ModelError where there is none.
        """

    def insert_quant(self, model: Model, quants: Mapping[Site, FakeQuant]) -> Model:
        """Pass these tensors through their fake quantizations from now on, in eval and training steps alike.

        It replaces what an earlier call inserted, with its parameters; {} takes all out. What a fake quantization
        keeps (`FakeQuant.parameters`, `buffers`) becomes a parameter or saved buffer of the site's layer, called
        "<path>.quant_<side>_<name>" ("quant_<side><argument>_<call>_<name>" where the site names those): it is read,
        written, cloned and trained like any other. A layer whose weight is a site computes with what the fake
        quantization gives; `read` still gives the weight itself. `trace` sees the model without any of it.

        Raises:
            ModelError: a path does not exist, a layer has no weight, or a parameter to be read is unknown; the model
                is then unchanged.
        """

    def hold_statistics(self, model: Model, hold: bool) -> Model:
        """From now on BatchNorm layers normalise by their running statistics in training steps too, and keep them;
        or no longer.
        """

    def reduce(
        self, model: Model, inputs: Sequence[Array], sites: Sequence[Site], histogram: bool = False
    ) -> dict[Site, Statistics]:
        """Statistics of tensors over one batch in eval mode, reduced on the device, before any fake quantization.

        A site that names no call gives them over all calls of the pass; one that did not run is absent.
        """

    def native_quantize(
        self, model: Model, request: QuantRequest, batches: Sequence[Sequence[Array]]
    ) -> QuantizeDecision:
        """Let another toolkit calibrate on the batches and decide, on a copy; the model is left as it was.

        Raises:
            BackendError: the quantizer is unknown (the message lists those there are), its toolkit is not installed,
                it does not know an option, or it is known to be broken (the message says how).
            ModelError: the toolkit failed, or quantized nothing.
        """

    def export(self, model: Model, inputs: Sequence[Array], folder: Path, form: str, decision: Any = None) -> None:
        """Write the model in a form of `Capabilities.forms` into an empty folder.

        "onnx_float" is `model.onnx`, float32, eval mode, no fake quantization, weights as initialisers or constants,
        the batch axis free where the framework's exporter allows it. The other forms are the framework's own int8
        forms, made from a `QuantizeDecision` whose folds and integer weights are in the model already.

        Raises:
            BackendError: the form is unknown, what it needs is not installed, or the decision cannot be expressed in
                it; the message says what and why.
            ModelError: the framework's exporter failed.
        """

    def load_exported(self, folder: Path, form: str, threads: int) -> Callable[[Sequence[Array]], list[Array]]:
        """A function that runs what `export` wrote, from inputs to outputs, with that many threads.

        "eager" is no exported form: see `forward`. BackendError as for `export`.
        """

    def native(self, model: Model, request: NativeRequest, inputs: Sequence[Array]) -> NativeResult:
        """Let another toolkit choose, on a copy; the model is left as it was.

        Raises:
            BackendError: the pruner is unknown (the message lists those there are), its toolkit is not installed, or
                it does not know an option.
            ModelError: the toolkit failed, changed nothing, or left a model that does not run.
        """
