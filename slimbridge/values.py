"""What goes through the port: the plain types of its arguments and results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

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
        native_quantizers: likewise, quantizers.
        forms: what `export` can write with what is installed: "onnx_float" and the framework's own; those that hold no
            integers end in "_float".
        runtimes: form -> name and version of the runtime that `load_exported` runs it in.
    """

    backend: str
    versions: Mapping[str, str]
    devices: tuple[Device, ...] = ("cpu",)
    dtypes: tuple[DType, ...] = ("float32", "float64")
    threads: int = 1
    native_engines: tuple[str, ...] = ()
    native_quantizers: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    runtimes: Mapping[str, str] = field(default_factory=dict)


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


HISTOGRAM_BINS = 8192
"""Bins of a `Histogram`, half of them below 0."""


class Histogram(NamedTuple):
    """Counts of a tensor's entries over [-2**exponent, 2**exponent), in bins of equal width.

    A power of two, so that two histograms are brought to one range by adding neighbours, without an error, and so
    that the bins are the same on every framework. An entry of exactly 2**exponent is counted in the last bin.

    Attributes:
        exponent: the smallest whole number that holds all entries, -126 at least.
        counts: int64, shape (HISTOGRAM_BINS,).
    """

    exponent: int
    counts: Array


class Statistics(NamedTuple):
    """What one batch says of a tensor, real units; NaN where the tensor has one.

    Attributes:
        min, max: over all entries.
        mean_absmax: mean over the samples (first axis) of the largest magnitude in each.
        histogram: where it was asked for and all entries are finite.
    """

    min: float
    max: float
    mean_absmax: float
    histogram: Histogram | None = None

    @property
    def absmax(self) -> float:
        """Largest magnitude."""
        return max(-self.min, self.max)


@dataclass(frozen=True)
class QuantRequest:
    """What another toolkit's quantizer is asked to do, on a copy of the model.

    Attributes:
        quantizer: a name of `Capabilities.native_quantizers`.
        weight_bits, activation_bits: word lengths.
        ignored: layer paths that stay in float.
        options: the toolkit's own options, by its own names.
    """

    quantizer: str
    weight_bits: int = 8
    activation_bits: int = 8
    ignored: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


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
