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
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from slimbridge.decisions import PruneDecision, QuantizeDecision
from slimbridge.graph import Graph

Array: TypeAlias = NDArray[Any]
Model: TypeAlias = Any
Tensor: TypeAlias = Any
Device = Literal["cpu", "gpu"]
DType = Literal["float32", "float64"]


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do on this machine.

    Attributes:
        backend: the backend's name.
        versions: distribution -> version, of the framework and its companions that are installed.
        devices: devices present now, "cpu" always.
        dtypes: floating types it computes in.
        threads: threads that one operation may use on the CPU.
        native_engines: pruners of other toolkits reachable as `engine: native`, "<toolkit>.<pruner>".
    """

    backend: str
    versions: Mapping[str, str]
    devices: tuple[Device, ...] = ("cpu",)
    dtypes: tuple[DType, ...] = ("float32", "float64")
    threads: int = 1
    native_engines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A layer that holds parameters: its module path, graph kind, and role -> canonical parameter name."""

    path: str
    kind: str
    params: Mapping[str, str]


@dataclass(frozen=True)
class OptimizerSettings:
    """One definition for all frameworks (SGD, Adam and AdamW agree between them to 2e-6).

    Attributes:
        kind: "sgd", "adam" or "adamw".
        momentum: SGD only, share of the old velocity kept.
        nesterov: SGD only.
        weight_decay: added to the gradient (sgd, adam) or decoupled (adamw).
        betas: Adam's moment decays.
        eps: Adam's denominator offset.
    """

    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class Pass(NamedTuple):
    """What one forward pass gave.

    Attributes:
        output: the model's own output, native tensors, nested as the model returns it.
        features: layer path -> that layer's output tensor (native), for each captured path.
        parameters: canonical name -> the parameter as a native tensor in canonical layout, differentiable; made when
            it is asked for.
    """

    output: Any
    features: Mapping[str, Tensor] = MappingProxyType({})
    parameters: Mapping[str, Tensor] = MappingProxyType({})


Loss: TypeAlias = Callable[[Pass], Mapping[str, Tensor]]
"""From a forward pass to named scalar terms, already weighted; their sum is minimised."""


@dataclass(frozen=True)
class NativeRequest:
    """What another toolkit's pruner is asked to do, on a copy of the model.

    Attributes:
        pruner: a name of `Capabilities.native_engines`.
        ratio: share of channels to remove, or of entries to zero, 0..1.
        layer_ratios: layer path -> share, where it differs; empty: `ratio` for every layer that the toolkit takes.
        ignored: layer paths whose output channels or entries stay.
        options: the pruner's own options, by its own names.
    """

    pruner: str
    ratio: float
    layer_ratios: Mapping[str, float] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class NativeResult(NamedTuple):
    """What a toolkit's pruner chose.

    Attributes:
        kept: weight's canonical name -> output channels that stay, ascending, for each weight that lost any.
        masks: weight's canonical name -> bool array of its canonical shape, True = stays, for pruners that only mask.
        output: outputs of the toolkit's own pruned model on the example, to be compared; None for masks.
    """

    kept: Mapping[str, tuple[int, ...]]
    masks: Mapping[str, Array]
    output: tuple[Array, ...] | None = None


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

    def insert_quant(self, model: Model, decision: QuantizeDecision) -> Model:
        """Fake-quantize the first input of each layer of `decision.activations` from now on.

        Weights are not touched: neutral code writes their dequantized values.
        """

    def reduce(self, model: Model, inputs: Sequence[Array], layers: Sequence[str]) -> dict[str, dict[str, float]]:
        """{"absmax", "min", "max"} of the first input of each layer over one batch, reduced on the device.

        A layer that ran several times in the pass gives the extremes over its runs; one that did not run is absent.
        """

    def native(self, model: Model, request: NativeRequest, inputs: Sequence[Array]) -> NativeResult:
        """Let another toolkit choose, on a copy; the model is left as it was.

        Raises:
            BackendError: the pruner is unknown (the message lists those there are), its toolkit is not installed, or
                it does not know an option.
            ModelError: the toolkit failed, changed nothing, or left a model that does not run.
        """


def tensors_in(output: object) -> list[Tensor]:
    """The tensors of a nested output (tuples, lists, dicts in insertion order), flattened; plain values left out."""
    if isinstance(output, Mapping):
        return [tensor for item in output.values() for tensor in tensors_in(item)]
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in tensors_in(item)]
    return [] if output is None or isinstance(output, (bool, int, float, complex, str, bytes)) else [output]


def as_float64(array: Array) -> NDArray[np.float64]:
    """Importances and statistics are computed in this type, so that equal weights give equal decisions."""
    return np.asarray(array, dtype=np.float64)
