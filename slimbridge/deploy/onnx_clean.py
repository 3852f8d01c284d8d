"""Bringing exported ONNX files to one form, whichever exporter wrote them, so that int8 patterns are found in them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from slimbridge.deploy.onnx_net import ModelProto, Net, Node, attributes, failures, node, require
from slimbridge.errors import ModelError, first_line


def clean(model: ModelProto) -> ModelProto:
    """The same function in fewer nodes.

    `Constant` nodes become initialisers; Identity, Dropout and steps that multiply by 1 or add 0 go; hard sigmoids and
    means over space that were written out become one node; a BatchNorm after a convolution goes into its weight, a
    constant that is added to one into its bias, MatMul and Add become Gemm; shapes that are computed from constants
    become constants. The larger part is onnxruntime's "basic" level, which leaves standard operators only.

    Args:
        model: float32, opset 13 or higher.

    Returns:
        A new model with inferred shapes.

    Raises:
        ModelError: it has control flow or an older opset, or onnxruntime cannot load it.
        BackendError: onnx or onnxruntime is not installed.
    """
    net = Net.of(model)
    _drop_copies(net)
    _find_hard_sigmoids(net)
    net = Net.of(_basic(net.model()))
    _fix_reshapes(net)
    if net.opset >= 14:
        _restore_hard_swishes(net)
    _pool_means(net)
    return net.model()


def _drop_copies(net: Net) -> None:
    """Take out the nodes whose output is their input, where that is no output of the graph."""
    renamed: dict[str, str] = {}
    for item in list(net.nodes):
        source = _copied(net, item)
        if source is not None and item.output[0] not in net.outputs:
            renamed[item.output[0]] = source
            net.nodes.remove(item)
    net.rename(renamed)


def _copied(net: Net, item: Node) -> str | None:
    kind, inputs = str(item.op_type), [str(name) for name in item.input]
    if kind in ("Identity", "Dropout"):
        return inputs[0]
    neutral = {"Mul": 1.0, "Add": 0.0}.get(kind)
    if neutral is None:
        return None
    for constant, other in (inputs, inputs[::-1]):
        array = net.constants.get(constant)
        if array is not None and array.size == 1 and array.ndim < 2 and array.reshape(()) == neutral:
            return None if other in net.constants else other
    return None


def _find_hard_sigmoids(net: Net) -> None:
    """clip(x + 3, 0, 6) / 6 as the one operator for it; else the 3 goes into the bias of the layer before."""
    makers, readers = net.makers(), net.readers()
    for last in list(net.nodes):
        sixth = next((value for name in last.input if (value := net.scalar(name)) is not None), None)
        if sixth is None or not np.isclose({"Mul": sixth, "Div": 1 / (sixth or 1)}.get(last.op_type, 0), 1 / 6):
            continue
        clip = next((makers[name] for name in last.input if name in makers), None)
        if clip is None or clip.op_type != "Clip" or [net.scalar(name) for name in clip.input[1:]] != [0.0, 6.0]:
            continue
        add = makers.get(clip.input[0])
        if add is None or add.op_type != "Add" or 3.0 not in [net.scalar(name) for name in add.input]:
            continue
        if any(len(readers[inner]) > 1 or inner in net.outputs for inner in (add.output[0], clip.output[0])):
            continue
        source = next(name for name in add.input if net.scalar(name) != 3.0)
        net.nodes[net.nodes.index(last)] = node("HardSigmoid", [source], last.output[0], alpha=1 / 6, beta=0.5)
        net.nodes.remove(clip)
        net.nodes.remove(add)


def _basic(model: ModelProto) -> ModelProto:
    """What onnxruntime makes of it at the level that changes no type and adds no operators of its own."""
    onnx, runtime = require("onnx"), require("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "basic.onnx"
        options.optimized_model_filepath = str(path)
        try:
            runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except failures() as error:
            raise ModelError(f"the ONNX file cannot be loaded: {first_line(error)}") from error
        return onnx.load(str(path))


def _fix_reshapes(net: Net) -> None:
    """Shapes that are computed become constants: lengths that are not known are copied, or one of them is left over."""
    shapes = _shapes(net)
    for place, item in enumerate(net.nodes):
        if item.op_type != "Reshape" or item.input[1] in net.constants:
            continue
        lengths, before = _lengths(net, shapes, item.input[1]), shapes.get(item.input[0])
        if lengths is None or before is None:
            continue
        copied = [
            0 if isinstance(length, str) and before[index : index + 1] == [length] else length
            for index, length in enumerate(lengths)
        ]
        fixed = [-1 if isinstance(length, str) else length for length in copied]
        if fixed.count(-1) > 1:
            continue
        name = f"{item.output[0]}/shape"
        net.constants[name] = np.asarray(fixed, np.int64)
        net.nodes[place] = node("Reshape", [item.input[0], name], item.output[0])
    _drop_unread(net)


def _lengths(net: Net, shapes: dict[str, list[int | str]], name: str) -> list[int | str] | None:
    """The entries of a tensor that is computed from shapes and constants; a name stands for a length not known."""
    if name in net.constants:
        return [int(entry) for entry in net.constants[name].ravel()]
    maker = net.makers().get(name)
    if maker is None:
        return None
    options = attributes(maker)
    if maker.op_type == "Shape":
        found = shapes.get(maker.input[0])
        return None if found is None else found[slice(options.get("start", 0), options.get("end"))]
    parts = [_lengths(net, shapes, source) for source in maker.input]
    if any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    if maker.op_type in ("Cast", "Squeeze", "Unsqueeze"):
        return known[0]
    if maker.op_type == "Concat":
        return [entry for part in known for entry in part]
    numbers = [[entry for entry in part if isinstance(entry, int)] for part in known[1:]]
    if maker.op_type == "Gather":
        return [known[0][index] for index in numbers[0]]
    if maker.op_type == "Slice" and all(step == 1 for step in (numbers[3:] or [[1]])[0]):
        return known[0][numbers[0][0] : numbers[1][0]]
    return None


def _drop_unread(net: Net) -> None:
    while True:
        used = {name for item in net.nodes for name in item.input} | set(net.outputs)
        kept = [item for item in net.nodes if used & set(item.output)]
        if len(kept) == len(net.nodes):
            return
        net.nodes = kept


def _restore_hard_swishes(net: Net) -> None:
    """One node again for x * hard sigmoid(x), which onnxruntime's basic level writes out."""
    makers, readers, spent = net.makers(), net.readers(), set()
    for place, item in enumerate(net.nodes):
        if item.op_type != "Mul":
            continue
        for gate, source in (tuple(item.input), tuple(item.input)[::-1]):
            maker = makers.get(gate)
            if maker is None or maker.op_type != "HardSigmoid" or maker.input[0] != source:
                continue
            if len(readers[gate]) == 1 and gate not in net.outputs and _is_sixth(attributes(maker)):
                net.nodes[place] = node("HardSwish", [source], item.output[0])
                spent.add(gate)
                break
    net.nodes = [item for item in net.nodes if item.output[0] not in spent]


def _is_sixth(options: dict[str, float]) -> bool:
    return bool(np.isclose(options.get("alpha", 0.2), 1 / 6) and options.get("beta", 0.5) == 0.5)


def _pool_means(net: Net) -> None:
    """Means over both axes of space become global average pools, for which runtimes have integer kernels."""
    shapes, made = _shapes(net), []
    for item in net.nodes:
        options, source = attributes(item), item.input[0] if item.input else ""
        axes = net.constants.get(item.input[1]) if len(item.input) > 1 else np.asarray(options.get("axes", ()))
        rank = len(shapes.get(source) or ())
        spatial = axes is not None and rank == 4 and sorted(int(axis) % 4 for axis in axes.ravel()) == [2, 3]
        if item.op_type != "ReduceMean" or not spatial:
            made.append(item)
        elif options.get("keepdims", 1):
            made.append(node("GlobalAveragePool", [source], item.output[0]))
        else:
            made.append(node("GlobalAveragePool", [source], f"{item.output[0]}/mean"))
            made.append(node("Flatten", [f"{item.output[0]}/mean"], item.output[0], axis=1))
    net.nodes = made


def _shapes(net: Net) -> dict[str, list[int | str]]:
    """Tensor -> its shape, a name for lengths that are not known, for tensors whose rank is known."""
    found = {}
    model = net.model()
    for item in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        if item.type.tensor_type.HasField("shape"):
            lengths = item.type.tensor_type.shape.dim
            found[item.name] = [
                part.dim_value if part.HasField("dim_value") else part.dim_param or f"{item.name}/{index}"
                for index, part in enumerate(lengths)
            ]
    return found
