"""Linear layers whose input's step is computed at run time."""

from __future__ import annotations

import numpy as np

from slimbridge.deploy.onnx_net import Net, Node, attributes, node
from slimbridge.deploy.onnx_weights import Stored


def make_dynamic(net: Net, item: Node, weight: Stored) -> str | None:
    """Replace a linear node by DynamicQuantizeLinear, MatMulInteger and the two steps' product.

    The grid of the input is ONNX's: 0..255 over the tensor's own range with 0 in it.

    Returns:
        Why the node stays as it is, None when it does not.
    """
    options = attributes(item)
    scaled = options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0 or options.get("transA", 0)
    if item.op_type not in ("Gemm", "MatMul"):
        return "only linear layers compute with steps found at run time"
    if scaled or weight.group is not None or weight.integers.ndim != 2:
        return "it is scaled, or its weight has steps for groups"
    out_first = bool(options.get("transB", 0))
    if weight.axis is not None and weight.axis != (0 if out_first else 1):
        return "its weight has steps for input channels"
    place, source, result = net.nodes.index(item), item.input[0], item.output[0]
    made = _quantized_input(net, source)
    names = [f"{result}/weight", f"{result}/weight_zero", f"{result}/weight_step"]
    integers = weight.integers.T.copy() if out_first else weight.integers
    for name, array in zip(names, (integers, weight.zero, weight.step), strict=True):
        net.constants[name] = np.asarray(array)
    products = [f"{result}/sums", f"{result}/real_sums", f"{result}/step", f"{result}/product"]
    bias = list(item.input[2:3])
    last = products[3] if bias else result
    made += [
        node("MatMulInteger", [f"{source}/integers", names[0], f"{source}/zero", names[1]], products[0]),
        node("Cast", [products[0]], products[1], to=1),
        node("Mul", [f"{source}/step", names[2]], products[2]),
        node("Mul", [products[1], products[2]], last),
    ]
    if bias:
        made.append(node("Add", [last, *bias], result))
    net.nodes[place : place + 1] = made
    return None


def _quantized_input(net: Net, source: str) -> list[Node]:
    integers = f"{source}/integers"
    if any(integers in item.output for item in net.nodes):
        return []
    made = node("DynamicQuantizeLinear", [source], integers)
    made.output.extend([f"{source}/step", f"{source}/zero"])
    return [made]
