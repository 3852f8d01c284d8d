"""Quantizers of other toolkits: torchao's PT2E flow calibrates and decides on a copy, and its decision is read back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from slimbridge.decisions import Fold, QuantizeDecision, QuantParams, Site, Skipped
from slimbridge.errors import FAILURES, BackendError, ModelError, first_line, listed, nearest
from slimbridge.graph import Graph
from slimbridge.ports import Array, QuantRequest
from slimbridge_torch import pt2e
from slimbridge_torch.names import canonical, copied, find_modules, kind_of, to_array
from slimbridge_torch.trace import silent, trace

Tensor = Any

_PT2E = "torchao.pt2e"
_WEIGHTS = (-128, 127)
_ULPS = 4
"""How many float32 numbers around torchao's step are tried for one that gives its integers by a true division."""

_HALF = 1e-4
"""How far from a half float32 rounding puts a weight, in steps, at magnitudes up to 128."""


def quantizers() -> tuple[str, ...]:
    """The quantizers whose toolkit is installed; nothing is imported for it."""
    return (_PT2E,) if find_spec("torchao") else ()


def native_quantize(model: nn.Module, request: QuantRequest, batches: Sequence[tuple[Tensor, ...]]) -> QuantizeDecision:
    """Let torchao calibrate and decide, with X86InductorQuantizer's default static configuration.

    BatchNorms are folded first as a `Fold` says, so that the decision's weights are the very ones that torchao rounds.
    Besides the inputs of convolutions and linear layers it quantizes one input of a residual addition and what goes
    through pools; these become sites where they are all that is read of a layer's output.

    Args:
        model: float32, on the CPU; left as it is.
        request: what is asked of the toolkit.
        batches: example tensors, one tuple for each batch.

    Raises:
        BackendError, ModelError: see `slimbridge.ports.Backend.native_quantize`.
    """
    options = _checked(request)
    find_modules(model, request.ignored, "quantize")
    if not batches:
        raise ModelError(f"quantize: {_PT2E} needs at least one batch to calibrate on")
    graph = trace(model, batches[0])
    clone = copied(model).eval()
    folds = _fold(clone, graph)
    weights = {name: to_array(tensor) for name, tensor in canonical(clone).items()}
    try:
        with silent(), torch.no_grad():
            turns = _split(clone, batches[0])
            converted = _converted(clone, request, options, batches, turns)
    except FAILURES as error:
        raise ModelError(f"quantize: {_PT2E} failed: {type(error).__name__}: {first_line(error)}") from error
    return _Reader(model, graph, folds, turns, converted, weights).decision(request)


def _checked(request: QuantRequest) -> dict[str, Any]:
    if request.quantizer != _PT2E:
        hint = nearest(request.quantizer, (_PT2E,))
        raise BackendError(
            f"quantize: unknown quantizer '{request.quantizer}'{hint}; torch has: {listed(quantizers())}"
        )
    if not quantizers():
        raise BackendError(
            f"quantize: '{_PT2E}' needs torchao, which is not installed: pip install 'slimbridge[torchao]'"
        )
    if (request.weight_bits, request.activation_bits) != (8, 8):
        found = f"{request.weight_bits} and {request.activation_bits}"
        raise BackendError(f"quantize: {_PT2E} has 8 bits for weights and activations, found {found}")
    with silent():
        known = inspect.signature(_x86().get_default_x86_inductor_quantization_config).parameters
    allowed = [name for name in known if name not in ("is_qat", "is_dynamic")]
    for name in request.options:
        if name not in allowed:
            hint = nearest(name, allowed)
            raise BackendError(f"quantize: {_PT2E} has no option '{name}'{hint}; allowed: {listed(allowed)}")
    return dict(request.options)


def _x86() -> Any:
    return import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")


@dataclass(frozen=True)
class _Folded:
    """A fold, and the path of its BatchNorm."""

    fold: Fold
    norm: str


def _fold(model: nn.Module, graph: Graph) -> dict[str, _Folded]:
    """Fold BatchNorms into the layers before them, in place; layer path -> fold, in the order of the graph."""
    tensors = canonical(model)
    found: dict[str, _Folded] = {}
    for layer, norm in _pairs(graph):
        fold = Fold(
            weight=layer.params["weight"],
            bias=layer.params.get("bias"),
            scale=norm.params["weight"],
            shift=norm.params["bias"],
            mean=norm.params["running_mean"],
            variance=norm.params["running_var"],
            eps=float(norm.attrs["eps"]),
        )
        _apply(fold, tensors)
        found[layer.name] = _Folded(fold, norm.name)
    return found


def _pairs(graph: Graph) -> Iterator[tuple[Any, Any]]:
    """Layers and the BatchNorms that alone read them, where both run once and the BatchNorm has all its parameters."""
    read = [tensor for node in graph.nodes for tensor in node.inputs] + list(graph.outputs)
    runs = [name for node in graph.nodes for name in set(node.params.values())]
    makers = {node.outputs[0]: node for node in graph.layer_nodes() if not node.attrs.get("transposed")}
    for norm in graph.nodes:
        layer = makers.get(norm.inputs[0]) if norm.kind == "batch_norm" else None
        if layer is None or len(norm.params) != 4 or read.count(norm.inputs[0]) != 1:
            continue
        if all(runs.count(name) == 1 for node in (layer, norm) for name in node.params.values()):
            yield layer, norm


def _apply(fold: Fold, tensors: Mapping[str, Tensor]) -> None:
    """In float64, rounded once; the BatchNorm keeps a bias only (Jacob et al. 2018, equation 14)."""
    with torch.no_grad():
        weight, scale, shift, mean, variance = (
            tensors[name] for name in (fold.weight, fold.scale, fold.shift, fold.mean, fold.variance)
        )
        factor = scale.double() / torch.sqrt(variance.double() + fold.eps)
        bias = tensors[fold.bias].double() if fold.bias else 0.0
        shift.copy_(shift.double() + (bias - mean.double()) * factor)
        weight.copy_(weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1)))
        scale.fill_(1)
        mean.zero_()
        variance.fill_(1 - fold.eps)
        if fold.bias:
            tensors[fold.bias].zero_()


class _Turns(nn.Module):
    """Twins of one module, sharing its tensors; each call of a pass goes to the next one.

    X86InductorQuantizer takes the calls of one module for one operation, and fails on it.
    """

    def __init__(self, module: nn.Module, count: int) -> None:
        super().__init__()
        self.turns = nn.ModuleList(copy.copy(module) for _ in range(count))
        self._next = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The next twin's output."""
        turn, self._next = self._next, (self._next + 1) % len(self.turns)
        return self.turns[turn](*args, **kwargs)


def _split(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, tuple[str, int | None]]:
    """Put `_Turns` in the place of leaves that run several times; path in the copy -> path in the model, and call."""
    leaves = {path: module for path, module in model.named_modules() if path and not list(module.children())}
    counts = dict.fromkeys(leaves, 0)

    def count(path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            counts[path] += 1

        return hook

    handles = [module.register_forward_pre_hook(count(path)) for path, module in leaves.items()]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    turns: dict[str, tuple[str, int | None]] = {path: (path, None) for path in leaves}
    twins = {module: _Turns(module, counts[path]) for path, module in leaves.items() if counts[path] > 1}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = twins.get(child, child)
    for path, module in leaves.items():
        turns |= {f"{path}.turns.{i}": (path, i) for i in range(counts[path]) if module in twins}
    return turns


def _converted(
    model: nn.Module,
    request: QuantRequest,
    options: Mapping[str, Any],
    batches: Sequence[tuple[Tensor, ...]],
    turns: Mapping[str, tuple[str, int | None]],
) -> Any:
    flow, x86 = import_module("torchao.quantization.pt2e.quantize_pt2e"), _x86()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(**options))
    for path in request.ignored:
        for name in (name for name, (own, _) in turns.items() if own == path):
            quantizer.set_module_name_qconfig(name, None)
    prepared = flow.prepare_pt2e(pt2e.exported(model, batches[0]).module(), quantizer)
    for batch in batches:
        prepared(*batch)
    return flow.convert_pt2e(prepared)


class _Reader:
    """Reads a converted program.

    Args:
        model: the user's.
        graph: its trace.
        folds: layer path -> fold.
        turns: path in the program -> path in the model, and call.
        converted: what torchao made.
        weights: canonical name -> folded weight.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        folds: Mapping[str, _Folded],
        turns: Mapping[str, tuple[str, int | None]],
        converted: Any,
        weights: Mapping[str, Array],
    ) -> None:
        self._known = torch.ops.quantized_decomposed
        plain = {path for path, module in model.named_modules() if kind_of(module) in ("conv", "linear")}
        self._layers = {node.name: node.params["weight"] for node in graph.layer_nodes() if node.name in plain}
        self._all = tuple(dict.fromkeys(node.name for node in graph.layer_nodes()))
        self._paths = {path for path, _ in model.named_modules() if path} | set(turns)
        self._folds, self._turns, self._program, self._weights = folds, turns, converted, weights
        self._grids: dict[str, QuantParams] = {}
        self._sites: dict[str, QuantParams] = {}
        self._skipped: dict[str, str] = {}

    def decision(self, request: QuantRequest) -> QuantizeDecision:
        """What torchao decided; ModelError when it quantized nothing."""
        nodes = list(self._program.graph.nodes)
        for node in nodes:
            if _is_layer(node):
                self._read_layer(node)
        for node in nodes:
            if node.target is self._known.quantize_per_tensor.default:
                self._read_tensor(node)
        for path in self._all:
            if self._layers.get(path) not in self._grids:
                asked = path in request.ignored
                self._skipped.setdefault(path, "ignored" if asked else f"{_PT2E} left it in float")
        if not self._grids:
            raise ModelError(f"quantize: {_PT2E} quantized 0 of {len(self._all)} convolution and linear layers")
        return QuantizeDecision(
            observer=_PT2E,
            weights=self._grids,
            activations=self._sites,
            folds=tuple(found.fold for found in self._folds.values()),
            skipped=tuple(Skipped(layer=path, reason=reason) for path, reason in self._skipped.items()),
        )

    def _read_layer(self, node: Any) -> None:
        path, call = self._turns.get(_path(node), ("", None))
        name = self._layers.get(path)
        data, weight = node.args[:2]
        given = data.target is self._known.dequantize_per_tensor.default
        if name is None or not given or weight.target is not self._known.dequantize_per_channel.default:
            return
        integers, steps, zeros, axis, low, high = (self._value(item) for item in weight.args[:6])
        steps = matched(self._weights[name], to_array(integers), to_array(steps), (low, high))
        if steps is None or axis != 0 or zeros.any():
            self._skipped[path] = f"{_PT2E} rounds a weight that is not the folded one"
            return
        count = len(steps)
        grid = QuantParams(step=tuple(steps.tolist()), zero_point=(0,) * count, low=low, high=high, axis=0)
        self._grids[name] = grid
        self._sites[str(Site(path, call=call))] = _grid(data)

    def _read_tensor(self, node: Any) -> None:
        """A quantized tensor that something else than a layer reads."""
        source = node.args[0]
        if all(_is_layer(reader) for reader in self._readers(source)):
            return
        path, call = self._turns.get(_path(source), (_path(source), None))
        if not self._leaves(source):
            self._skipped[path or source.name] = f"{_PT2E} quantizes a tensor that no layer returns alone"
        elif any(
            user.target is not self._known.quantize_per_tensor.default
            for user in source.users
            if user.op != "call_module"
        ):
            self._skipped[path] = f"{_PT2E} quantizes its output for some of its readers only"
        else:
            path = self._folds[path].norm if path in self._folds else path
            self._sites[str(Site(path, "output", call=call))] = _grid(node)

    def _leaves(self, source: Any) -> bool:
        """Is it the one tensor that leaves the module that made it, in the only call of that?"""
        path = _path(source)
        if path not in self._paths:
            return False
        inside = [node for node in self._program.graph.nodes if path in _stack(node)]
        return [node for node in inside if any(path not in _stack(r) for r in self._readers(node))] == [source]

    def _readers(self, node: Any) -> Iterator[Any]:
        """What reads a tensor, quantized or not; the program's check of its inputs is no reader."""
        pair = (self._known.quantize_per_tensor.default, self._known.dequantize_per_tensor.default)
        for user in (user for user in node.users if user.op != "call_module"):
            yield from self._readers(user) if user.target in pair else (user,)

    def _value(self, item: Any) -> Any:
        return getattr(self._program, item.target) if isinstance(item, torch.fx.Node) else item


def matched(weight: Array, integers: Array, steps: Array, limits: tuple[int, int]) -> Array | None:
    """Steps, float32, by which a true division gives torchao's integers; None where the weight is another one.

    torchao multiplies with a reciprocal, which rounds otherwise at halves; the largest entry of a channel is one, as
    its step is the largest magnitude divided by 127.5. Where no step suits all entries of a channel, the few that lie
    on a half within float32 rounding differ by one integer.

    Args:
        weight: shape (channels, ...).
        integers: the same shape.
        steps: torchao's, shape (channels,).
        limits: smallest and largest integer.
    """
    rows, wanted = weight.reshape(len(weight), -1), integers.reshape(len(weight), -1)
    best, fewest = steps.astype(np.float32), np.full(len(weight), rows.shape[1] + 1)
    for direction in (np.float32(0), np.float32(np.inf)):
        step = steps.astype(np.float32)
        for _ in range(_ULPS):
            wrong = (np.clip(np.rint(rows / step[:, None]), *limits) != wanted).sum(axis=1)
            best, fewest = np.where(wrong < fewest, step, best), np.minimum(wrong, fewest)
            step = np.nextafter(step, direction)
    scaled = np.clip(rows / best[:, None], *limits)
    return best if (np.abs(scaled - wanted) < 0.5 + _HALF).all() else None


def _grid(node: Any) -> QuantParams:
    """Of a quantize or dequantize operation for a whole tensor."""
    step, zero, low, high = node.args[1:5]
    return QuantParams(step=(float(np.float32(step)),), zero_point=(int(zero),), low=low, high=high)


def _is_layer(node: Any) -> bool:
    return getattr(node.target, "_overloadpacket", None) in pt2e.LAYERS


def _stack(node: Any) -> list[str]:
    """The modules that ran an operation, the innermost last; a second call has "@1" behind its path."""
    return [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]


def _path(node: Any) -> str:
    """The innermost module that ran an operation."""
    return (_stack(node) or [""])[-1]
