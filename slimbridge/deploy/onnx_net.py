"""An ONNX graph as Python lists, to be read and edited; nothing else in slimbridge touches protobuf messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np

from slimbridge.errors import FAILURES, BackendError, ModelError, first_line
from slimbridge.ports import Array

ModelProto: TypeAlias = Any
Node: TypeAlias = Any
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators of convolution and linear layers: input 0 is the data, input 1 the weight."""


def require(module: str) -> Any:
    """An optional package; BackendError that says how to install it when it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        extra = "openvino" if module.startswith("openvino") else "deploy"
        raise BackendError(f"{module} is not installed: pip install 'slimbridge[{extra}]'") from error


def failures() -> tuple[type[BaseException], ...]:
    """What onnx, protobuf and the runtimes raise; they share no base class, and each is optional."""
    found: list[type[BaseException]] = []
    for module in (
        *("onnxruntime.capi.onnxruntime_pybind11_state", "google.protobuf.message"),
        *("onnx.checker", "onnx.version_converter", "onnx.shape_inference"),
    ):
        with suppress(ImportError):
            known = vars(import_module(module)).values()
            found.extend(item for item in known if isinstance(item, type) and issubclass(item, Exception))
    return (*FAILURES, *found)


def attributes(node: Node) -> dict[str, Any]:
    """A node's attributes as Python values, strings as str."""
    helper = require("onnx.helper")
    values = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


@dataclass
class Net:
    """The parts of a graph that change.

    Attributes:
        source: the model they came from.
        nodes: in topological order.
        constants: initialiser -> array.
        stored: initialiser -> tensor message, for types that NumPy has not.
        opset: version of ONNX's own operators.
    """

    source: ModelProto
    nodes: list[Node]
    constants: dict[str, Array]
    stored: dict[str, Any] = field(default_factory=dict)
    opset: int = 0

    @classmethod
    def of(cls, model: ModelProto) -> Net:
        """A copy of a model's graph, with `Constant` nodes among the constants.

        Raises:
            ModelError: it has control flow, or an opset below 13 (which has no scales per channel).
        """
        onnx = require("onnx")
        opset = next((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)
        if opset < 13:
            raise ModelError(f"the ONNX file has opset {opset}; needed: 13 or higher")
        net = cls(model, [], {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer})
        net.opset = opset
        for node in model.graph.node:
            if any(item.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for item in node.attribute):
                raise ModelError(f"the ONNX file has control flow ({node.op_type}), which is not supported")
            if node.op_type == "Constant":
                net.constants[node.output[0]] = _constant(node)
            else:
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                net.nodes.append(copy)
        return net

    @property
    def inputs(self) -> list[str]:
        """Names of the graph's inputs."""
        return [item.name for item in self.source.graph.input if item.name not in self.constants]

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return [item.name for item in self.source.graph.output]

    def makers(self) -> dict[str, Node]:
        """Tensor -> the node that makes it."""
        return {name: node for node in self.nodes for name in node.output if name}

    def readers(self) -> dict[str, list[Node]]:
        """Tensor -> the nodes that read it, once for each input."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    def scalar(self, name: str) -> float | None:
        """The value of a constant of one entry, else None."""
        array = self.constants.get(name)
        return None if array is None or array.size != 1 else float(array.reshape(()))

    def rename(self, names: Mapping[str, str]) -> None:
        """Let every node read other tensors instead of these."""
        for node in self.nodes:
            for place, name in enumerate(node.input):
                while name in names:
                    name = names[name]
                node.input[place] = name

    def model(self, opset: int | None = None) -> ModelProto:
        """A new model, checked by ONNX, with shapes inferred and without the constants that nobody reads.

        Raises:
            ModelError: ONNX finds it not valid.
        """
        onnx = require("onnx")
        used = {name for node in self.nodes for name in node.input} | set(self.outputs)
        made = {name: onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in self.constants.items()}
        graph = onnx.helper.make_graph(
            self.nodes,
            self.source.graph.name or "model",
            [item for item in self.source.graph.input if item.name not in self.constants],
            list(self.source.graph.output),
            [tensor for name, tensor in {**made, **self.stored}.items() if name in used],
        )
        own = onnx.helper.make_opsetid("", opset or self.opset)
        domains = {node.domain for node in self.nodes} - {"", "ai.onnx"}
        others = [item for item in self.source.opset_import if item.domain in domains]
        # 8, 9 and 10 are the IR versions of opsets 17, 20 and 21: newer ones are refused by older runtimes.
        version = 10 if (opset or self.opset) > 20 else 9 if (opset or self.opset) > 18 else 8
        model = onnx.helper.make_model(graph, opset_imports=[own, *others], ir_version=version)
        model.producer_name = "slimbridge"
        try:
            onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise ModelError(f"the ONNX file is not valid: {first_line(error)}") from error
        return onnx.shape_inference.infer_shapes(model)


def node(kind: str, inputs: Sequence[str], output: str, **options: Any) -> Node:
    """A node with one output, named after it."""
    return require("onnx.helper").make_node(kind, list(inputs), [output], name=f"{output}/{kind}", **options)


def run_all(model: ModelProto, inputs: Iterable[Array]) -> dict[str, Array]:
    """Every float32 tensor's value, in topological order: onnxruntime, graph optimisations off, one thread.

    Raises:
        ModelError: onnxruntime cannot run it.
    """
    onnx, runtime = require("onnx"), require("onnxruntime")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    shown = {item.name for item in copy.graph.output}
    made = [name for item in copy.graph.node for name in item.output if name]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in shown)
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    fed = dict(zip(Net.of(model).inputs, inputs, strict=True))
    try:
        session = runtime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values = dict(zip([item.name for item in session.get_outputs()], session.run(None, fed), strict=True))
    except failures() as error:
        raise ModelError(f"the ONNX file does not run: {first_line(error)}") from error
    order = [*fed, *made]
    return {name: array for name in order if (array := {**fed, **values}[name]).dtype == np.float32}


def _constant(item: Node) -> Array:
    onnx = require("onnx")
    for attribute in item.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name == "value":
            return np.asarray(onnx.numpy_helper.to_array(value))
        if attribute.name in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if attribute.name in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
    raise ModelError(f"the ONNX file has a constant of an unknown form: {item.name or item.output[0]}")
