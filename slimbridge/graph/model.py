"""The neutral graph: what a backend's tracer returns and every algorithm reads.

The vocabulary of node kinds is small and close to ONNX. Each kind with its attributes (shapes are NCHW or
whatever the model uses; axes are never negative):

==============  =========================================================================================
kind            attributes and parameter roles
==============  =========================================================================================
input           a model input (no inputs, one output)
constant        a buffer, literal, or a parameter used outside a convolution/linear/normalisation layer
                (no inputs; params {"value": name} when it is a parameter or a named buffer)
conv            groups, transposed (False), stride, padding, dilation (tuples); params weight, bias?
linear          acts on the last axis; params weight, bias?
batch_norm      eps; channel axis 1; params weight?, bias?, running_mean?, running_var?
layer_norm      axes (normalised axes); params weight?, bias?
group_norm      groups; params weight?, bias?
elementwise     op (e.g. "relu"); one activation in, same shape out; acts on each entry alone
binary          op ("add", "sub", "mul", "div", ...); two inputs, broadcast as in NumPy
concat          axis
split           axis, sizes (tuple); several outputs
slice           axis, start, stop, step
reshape         nothing: the shapes of input and output say all (view, flatten, squeeze, unsqueeze)
transpose       perm (tuple)
expand          broadcast to the output's shape
pad             pads: ((before, after), ...) one pair per axis; mode ("constant", "reflect", ...)
pool            op ("max" or "avg"); spatial, channels kept in place (global pooling too)
resize          spatial interpolation
reduce          op ("mean", "sum", "max", "min"), axes (tuple), keepdims (bool)
softmax         axis
matmul          two activations, as numpy.matmul
unknown         op (the framework's name): everything it touches is frozen
==============  =========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = frozenset(
    (
        *("input", "constant", "unknown"),
        *("conv", "linear", "batch_norm", "layer_norm", "group_norm"),
        *("elementwise", "binary", "softmax", "reduce", "matmul"),
        *("concat", "split", "slice", "reshape", "transpose", "expand", "pad"),
        *("pool", "resize"),
    )
)


@dataclass(frozen=True)
class Node:
    """One operation of the model.

    Attributes:
        kind: a word of `KINDS`.
        name: path of the layer that ran it ("" is the model itself); not unique: a layer may run many operations.
        inputs: ids of the tensors it reads, in order.
        outputs: ids of the tensors it makes.
        params: role ("weight", "bias", "running_mean", ...) -> canonical parameter name.
        attrs: the attributes that the table above lists for the kind.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, str] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"node '{self.name}': unknown kind '{self.kind}'")


@dataclass(frozen=True)
class Call:
    """One call of a module: its path, and the tensors that it was given and that it returned, nested ones flattened."""

    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """A traced model.

    Attributes:
        nodes: in execution order; a node reads only what an earlier node made.
        shapes: tensor id -> shape.
        inputs: tensor ids of the model's inputs.
        outputs: tensor ids of the model's outputs, nested outputs flattened in order.
        parameters: canonical name -> canonical shape, of all parameters and buffers of the model, used or not.
        calls: the module calls, in the order in which they returned, leaves and containers alike but not the model
            itself; a call is left out where a tensor of it is none of the graph's. Empty where they were not seen.
    """

    nodes: tuple[Node, ...]
    shapes: Mapping[int, tuple[int, ...]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: Mapping[str, tuple[int, ...]]
    calls: tuple[Call, ...] = ()

    def layer_nodes(self) -> tuple[Node, ...]:
        """The convolution and linear nodes, in order; a layer that runs twice is there twice."""
        return tuple(node for node in self.nodes if node.kind in ("conv", "linear"))

    def unknown_ops(self) -> tuple[str, ...]:
        """`op in 'layer'` of every operation that the tracer did not know."""
        return tuple(f"{node.attrs.get('op', '?')} in '{node.name}'" for node in self.nodes if node.kind == "unknown")
