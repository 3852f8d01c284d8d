"""Linear layers whose input's step is computed at run time."""

from __future__ import annotations

import numpy as np

from slimbridge.decisions import DynamicGrid
from slimbridge.deploy.onnx_cells import LARGEST
from slimbridge.deploy.onnx_net import Net, Node, attributes, node
from slimbridge.deploy.onnx_weights import Stored


def make_dynamic(net: Net, item: Node, weight: Stored, grid: DynamicGrid) -> str | None:
    """Replace a linear node by MatMulInteger and a product with the two steps.

    The integers of the input are DynamicQuantizeLinear's, over the tensor's own range with 0 in it; of a symmetric grid
    round(x / step) + 128 with step = largest magnitude / high.

    Returns:
        Why the node stays as it is, None when it does not.
    """
    reason = _refusal(item, weight, grid)
    if reason is not None:
        return reason
    source, result = item.input[0], item.output[0]
    numbers, step, zero = (
        f"{source}/{f'even{grid.high}' if grid.symmetric else 'own'}_{part}" for part in ("integers", "step", "zero")
    )
    if not any(numbers in other.output for other in net.nodes):
        shared = _symmetric(net, source, (numbers, step, zero), grid.high) if grid.symmetric else _own(source, numbers)
        start = 1 + max((index for index, other in enumerate(net.nodes) if source in other.output), default=-1)
        net.nodes[start:start] = shared  # where every layer that reads the tensor comes after
    names = [f"{result}/weight", f"{result}/weight_zero", f"{result}/weight_step"]
    integers = weight.integers.T.copy() if attributes(item).get("transB", 0) else weight.integers
    for name, array in zip(names, (integers, weight.zero, weight.step), strict=True):
        net.constants[name] = np.asarray(array)
    products = [f"{result}/sums", f"{result}/real_sums", f"{result}/step", f"{result}/product"]
    bias = [name for name in item.input[2:3] if name]
    last = products[3] if bias else result
    made = [
        node("MatMulInteger", [numbers, names[0], zero, names[1]], products[0]),
        node("Cast", [products[0]], products[1], to=1),
        node("Mul", [step, names[2]], products[2]),
        node("Mul", [products[1], products[2]], last),
    ]
    if bias:
        made.append(node("Add", [last, *bias], result))
    place = net.nodes.index(item)
    net.nodes[place : place + 1] = made
    return None


def _refusal(item: Node, weight: Stored, grid: DynamicGrid) -> str | None:
    options = attributes(item)
    scaled = options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0 or options.get("transA", 0)
    if item.op_type not in ("Gemm", "MatMul"):
        return "only linear layers compute with steps found at run time"
    if scaled or weight.group is not None or weight.integers.ndim != 2:
        return "it is scaled, or its weight has steps for groups"
    if not grid.symmetric and grid.high - grid.low != LARGEST:
        return "asymmetric steps found at run time have 8 bits in an ONNX file"
    out_first = bool(options.get("transB", 0))
    if weight.axis is not None and weight.axis != (0 if out_first else 1):
        return "its weight has steps for input channels"
    return None


def _own(source: str, numbers: str) -> list[Node]:
    made = node("DynamicQuantizeLinear", [source], numbers)
    made.output.extend([f"{source}/own_step", f"{source}/own_zero"])
    return [made]


def _symmetric(net: Net, source: str, names: tuple[str, str, str], high: int) -> list[Node]:
    numbers, step, zero = names
    constants = {f"{step}/high": np.float32(high), f"{step}/least": np.finfo(np.float32).tiny, zero: np.uint8(128)}
    net.constants |= {name: np.asarray(value) for name, value in constants.items()}
    return [
        node("Abs", [source], f"{step}/magnitudes"),
        node("ReduceMax", [f"{step}/magnitudes"], f"{step}/largest", keepdims=0),
        node("Div", [f"{step}/largest", f"{step}/high"], f"{step}/exact"),
        node("Max", [f"{step}/exact", f"{step}/least"], step),
        node("QuantizeLinear", [source, step, zero], numbers),
    ]
