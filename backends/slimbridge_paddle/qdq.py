"""A model with Paddle's own quantize and dequantize operations in it, to be saved as an int8 program.

The operations are those of a program only: a model that holds them can be saved, and no longer run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import paddle

from slimbridge.decisions import Fold, QuantizeDecision, QuantParams, Site
from slimbridge.errors import BackendError, ModelError, listed
from slimbridge.ports import Array, as_float64
from slimbridge_paddle._compat import ProductAsConvolution
from slimbridge_paddle.names import find_layers, layers, read, walk

INT8 = "paddle_int8"
_SIGNED, _UNSIGNED = ((-128, 127), (-127, 127)), (0, 255)
_MOVING = ("flatten_contiguous_range", "reshape2", "transpose2", "squeeze2", "unsqueeze2", "assign")
_OFF_GRID = 0.01
"""Largest distance of a weight from its grid, in steps: what float32 loses, and no more."""


def check(decision: QuantizeDecision | None) -> QuantizeDecision:
    """The decision, if Paddle's int8 program can express it; else BackendError says what and why not."""
    if not isinstance(decision, QuantizeDecision):
        raise BackendError(f"export: {INT8} is made from a quantize decision, found {type(decision).__name__}")
    if decision.mode != "static" or decision.dynamic:
        raise BackendError(f"export: {INT8} needs steps that are known beforehand: mode static, found {decision.mode}")
    for name, grid in decision.weights.items():
        if grid.group is not None or grid.axis not in (None, 0):
            raise BackendError(f"export: '{name}': {INT8} has a step for each output channel, or one for all")
        _check(f"'{name}'", grid, _SIGNED)
    for key, grid in decision.activations.items():
        if grid.axis is not None or grid.group is not None:
            raise BackendError(f"export: '{key}': {INT8} has one step for each activation, found {len(grid.step)}")
        _check(f"'{key}'", grid, (*_SIGNED, _UNSIGNED))
    return decision


def _check(where: str, grid: QuantParams, allowed: tuple[tuple[int, int], ...]) -> None:
    if any(grid.zero_point):
        reason = "Paddle's oneDNN kernels have no zero point"
        raise BackendError(f"export: {where}: zero point {grid.zero_point[0]}; {INT8} allows 0 only: {reason}")
    if (grid.low, grid.high) not in allowed:
        ranges = " or ".join(f"{low}..{high}" for low, high in allowed)
        raise BackendError(f"export: {where}: integers {grid.low}..{grid.high}; {INT8} allows {ranges} (8 bits)")


def quantize(model: Any, decision: QuantizeDecision) -> Callable[[], tuple[str, ...]]:
    """Put the operations and int8 weights of a checked decision into a model, a copy that is used up.

    BatchNorms that the decision folds become biases of the layers before them.

    Returns:
        a function that gives the sites that no pass has reached so far.

    Raises:
        BackendError: the weight is another layer's than of a Conv2D or Linear.
        ModelError: a site or a weight does not exist, or the weights are not on their grids.
    """
    sites = {Site.parse(key): grid for key, grid in decision.activations.items()}
    if any(site.side == "weight" for site in sites):
        raise BackendError(f"export: a weight is among the activations: {listed(map(str, sites))}")
    made: dict[str, _Snap] = {}
    _weights(model, decision, _fold(model, decision.folds), made)
    owners = find_layers(model, [site.path for site in sites], "export")
    reached: set[str] = set()
    calls = _Calls()
    model.register_forward_pre_hook(lambda layer, args: calls.clear(), prepend=True)
    by_layer: dict[int, dict[Site, _Snap]] = {}
    for number, (site, grid) in enumerate(sites.items()):
        layer = owners[site.path]
        if isinstance(layer, paddle.nn.ReLU6) and site == Site(site.path, "output") and _unsigned(grid, 6):
            layer.__class__ = paddle.nn.ReLU  # the grid clips; the runtime's unsigned integers are for ReLU only
        snap = _Snap(_threshold(grid), partial(reached.add, str(site)), made)
        if isinstance(layer, ProductAsConvolution) and site == Site(site.path):
            del layer.__dict__["on_grid"]
            layer.on_grid = snap
            continue
        layer.add_sublayer(f"quant_site_{number}", snap)
        by_layer.setdefault(id(layer), {})[site] = snap
    for layer in {id(layer): layer for layer in owners.values() if id(layer) in by_layer}.values():
        _hook(layer, by_layer[id(layer)], calls)
    return lambda: tuple(str(site) for site in sites if str(site) not in reached)


def _again(made: Mapping[str, _Snap], x: Any) -> Any:
    """Entries that were moved are still on the grid that they were on; the runtime must be told in front of a layer."""
    name, operation = x.name, x.op
    while name not in made and operation is not None and _moves(operation):
        name = operation.input("X")[0]
        operation = x.block.var(name).op
    return made[name](x) if name in made and name != x.name else x


def _moves(operation: Any) -> bool:
    kind = operation.type
    if kind == "dropout":
        return bool(operation.attr("dropout_implementation") == "upscale_in_train")
    return kind in _MOVING or (kind == "pool2d" and operation.attr("pooling_type") == "max")


class _Calls(Counter[int]):
    """How often each layer has run in this pass."""


def _hook(layer: Any, snaps: Mapping[Site, _Snap], calls: _Calls) -> None:
    """Run a layer's inputs and outputs through their operations."""

    def chosen(side: str, call: int) -> dict[int, _Snap]:
        return {site.argument: snap for site, snap in snaps.items() if site.side == side and site.call in (None, call)}

    def before(layer: Any, args: Any, kwargs: Any) -> Any:
        call = calls[id(layer)]
        calls[id(layer)] += 1
        positions = count()
        found = chosen("input", call)
        return tuple(_mapped(args, found, positions)), _mapped(kwargs, found, positions)

    def after(layer: Any, args: Any, output: Any) -> Any:
        return _mapped(output, chosen("output", calls[id(layer)] - 1), count())

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_post_hook(after)


def _mapped(value: Any, snaps: Mapping[int, _Snap], positions: Iterator[int]) -> Any:
    """The nested value with the operation applied to the tensors at these positions."""
    if isinstance(value, Mapping):
        return {key: _mapped(item, snaps, positions) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_mapped(item, snaps, positions) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if not isinstance(value, (paddle.Tensor, paddle.static.Variable)):
        return value
    position = next(positions)
    return snaps[position](value) if position in snaps else value


def _threshold(grid: QuantParams) -> Array:
    """The value of the largest integer, which is what Paddle calls the scale."""
    return np.asarray(as_float64(np.asarray(grid.step)) * grid.high, np.float32)


def _unsigned(grid: QuantParams, highest: float) -> bool:
    """Does the grid reach from 0 to no more than this?"""
    return grid.low == 0 and bool((_threshold(grid) <= highest).all())


def _operation(kind: str, x: Any, layer: Any, axis: int) -> Any:
    helper = paddle.base.layer_helper.LayerHelper(kind)
    made = helper.create_variable_for_type_inference("float32")
    inputs = {"X": x, "Scale": layer.threshold, "ZeroPoint": layer.zero}
    attributes = {"quant_axis": axis, "bit_length": 8, "qmin": -128, "qmax": 127}
    helper.append_op(type=kind, inputs=inputs, outputs={"Y": made}, attrs=attributes)
    return made


class _Grid(paddle.nn.Layer):
    """Holds thresholds, shape (1,) or (channels,), and zero points."""

    def __init__(self, threshold: Array) -> None:
        super().__init__()
        self.register_buffer("threshold", paddle.to_tensor(threshold.astype(np.float32)))
        self.register_buffer("zero", paddle.to_tensor(np.zeros(threshold.shape, np.float32)))


class _Snap(_Grid):
    """Quantizes and dequantizes an activation; `made` is filled with the names of what it gave."""

    def __init__(self, threshold: Array, note: Callable[[], None], made: dict[str, _Snap]) -> None:
        super().__init__(threshold)
        self._note = note
        self._made = made

    def forward(self, x: Any) -> Any:
        self._note()
        made = _operation("dequantize_linear", _operation("quantize_linear", x, self, -1), self, -1)
        self._made[made.name] = self
        return made


class _Weight(_Grid):
    """An int8 weight, dequantized."""

    def __init__(self, integers: Array, threshold: Array) -> None:
        super().__init__(threshold)
        self.register_buffer("integers", paddle.to_tensor(integers))

    def forward(self) -> Any:
        return _operation("dequantize_linear", self.integers, self, 0)


def _weights(model: Any, decision: QuantizeDecision, factors: Mapping[str, Array], made: Mapping[str, _Snap]) -> None:
    table = dict(walk(model))
    arrays = read(model)
    unknown = [name for name in decision.weights if name not in arrays]
    if unknown:
        raise ModelError(f"export: the model has no weight {listed(unknown)}")
    used = set()
    for layer in layers(model):
        name = layer.params.get("weight", "")
        if name not in decision.weights:
            continue
        used.add(name)
        native = table[layer.path]
        if type(native).forward not in (paddle.nn.Conv2D.forward, paddle.nn.Linear.forward):
            raise BackendError(f"export: '{name}' is a {type(native).__name__}'s; {INT8} takes Conv2D and Linear")
        integers = _integers(name, arrays[name], decision.weights[name])
        threshold = np.broadcast_to(_threshold(decision.weights[name]), integers.shape[:1])
        threshold = threshold * factors.get(name, 1.0)
        if isinstance(native, paddle.nn.Linear):
            native.__class__ = ProductAsConvolution
            native.on_grid = partial(_again, made)
            integers = integers[:, :, None, None]
        else:
            native.register_forward_pre_hook(lambda layer, args: (_again(made, args[0]), *args[1:]) if args else None)
        _replace_weight(native, _Weight(integers, threshold))
    if len(used) < len(decision.weights):
        missing = [name for name in decision.weights if name not in used]
        raise BackendError(f"export: {listed(missing)}: no layer's weight; {INT8} takes those of Conv2D and Linear")


def _integers(name: str, weight: Array, grid: QuantParams) -> Array:
    step = as_float64(np.asarray(grid.step)).reshape((-1,) + (1,) * (weight.ndim - 1))
    if grid.axis == 0 and step.size != weight.shape[0]:
        raise ModelError(f"export: '{name}': {step.size} steps for {weight.shape[0]} channels")
    exact = as_float64(weight) / step
    integers = np.rint(exact)
    outside = (np.abs(exact - integers) > _OFF_GRID) | (integers < grid.low) | (integers > grid.high)
    if outside.any():
        raise ModelError(
            f"export: '{name}': {int(outside.sum())} of {outside.size} entries are not on the decision's grid; "
            "its integer weights must be written first"
        )
    return integers.astype(np.int8)


def _replace_weight(layer: Any, weight: _Weight) -> None:
    """While the layer runs, its `weight` is the dequantized one; the float weight is not saved."""
    layer._parameters.pop("weight")
    layer.add_sublayer("quant_weight", weight)

    def before(layer: Any, args: Any) -> None:
        layer.__dict__["weight"] = layer.quant_weight()

    def after(layer: Any, args: Any, output: Any) -> None:
        del layer.__dict__["weight"]

    layer.register_forward_pre_hook(before)
    layer.register_forward_post_hook(after)


def _fold(model: Any, folds: tuple[Fold, ...]) -> dict[str, Array]:
    """Move what folded BatchNorms still do into the biases before them; they become identities.

    Returns:
        weight's canonical name -> the factor of each channel that its BatchNorm still has, 1 but for rounding.
    """
    arrays, factors = read(model), {}
    owners = {layer.params["weight"]: layer.path for layer in layers(model) if "weight" in layer.params}
    table = dict(walk(model))
    for fold in folds:
        absent = [n for n in (fold.weight, fold.scale, fold.shift, fold.mean, fold.variance) if n not in arrays]
        if absent or fold.weight not in owners or fold.scale not in owners:
            raise ModelError(f"export: a BatchNorm is to be folded into '{fold.weight}', not found: {listed(absent)}")
        values = {name: as_float64(arrays[name]) for name in (fold.scale, fold.shift, fold.mean, fold.variance)}
        factor = values[fold.scale] / np.sqrt(values[fold.variance] + fold.eps)
        if (factor <= 0).any():
            raise ModelError(f"export: '{fold.scale}' is not folded: it has negative scales")
        bias = 0.0 if fold.bias is None else as_float64(arrays[fold.bias])
        _set_bias(table[owners[fold.weight]], (bias - values[fold.mean]) * factor + values[fold.shift])
        _become_identity(model, table[owners[fold.scale]])
        factors[fold.weight] = factor
    return factors


def _set_bias(layer: Any, bias: Array) -> None:
    parameter = layer.create_parameter([len(bias)], is_bias=True)
    parameter.set_value(bias.astype(np.float32))
    layer.__dict__.pop("bias", None)
    layer._parameters["bias"] = parameter


def _become_identity(model: Any, layer: Any) -> None:
    for _, parent in list(walk(model)):
        for name, child in parent._sub_layers.items():
            if child is layer:
                parent._sub_layers[name] = paddle.nn.Identity()
