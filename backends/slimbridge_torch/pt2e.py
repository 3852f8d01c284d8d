"""Int8 programs in the form of PyTorch 2 export quantization (PT2E), which `torch.compile` runs with int8 kernels.

A program of `torch.export` holds int8 weights and, at the decision's sites, pairs of quantize and dequantize
operations; Inductor recognises them around convolutions, linear layers and additions (PyTorch 2.13,
torch/_inductor/fx_passes/quantization.py, x86 only; elsewhere the program computes in float).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

# Registers quantized_decomposed's operations.
import torch.ao.quantization.fx._decomposed  # isort: skip

from slimbridge.decisions import QuantizeDecision, QuantParams, Site
from slimbridge.errors import FAILURES, BackendError, ModelError, first_line
from slimbridge.ports import Array, FakeQuant, Ops, tensors_in
from slimbridge_torch.names import canonical
from slimbridge_torch.trace import silent

Tensor = Any

FLOAT, PT2E = FORMS = ("compile_float", "pt2e")
_FILE = "program.pt2"
LAYERS = tuple(getattr(torch.ops.aten, name) for name in ("conv1d", "conv2d", "conv3d", "linear"))
_OFF_GRID = 1e-3
"""How far a weight may be from its grid, in steps: float32 rounding is far below, another weight far above."""


def export(model: nn.Module, inputs: Sequence[Tensor], folder: Path) -> None:
    """Write program.pt2.

    Args:
        model: with the pairs and the int8 weights in it, or in float.
        inputs: examples; the first axis stays free where the model allows it.
        folder: it exists.

    Raises:
        ModelError: torch.export failed.
    """
    try:
        program = exported(model, inputs)
        tidy(program)
        torch.export.save(program, folder / _FILE)
    except FAILURES as error:
        raise ModelError(f"export: torch.export failed: {type(error).__name__}: {first_line(error)}") from error


def exported(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """A program of `torch.export`, whose first axes are free where the model allows it."""
    free = doubled(inputs)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} if x.ndim else None for x in free)
    try:
        return torch.export.export(model, free, dynamic_shapes=shapes, strict=False)
    except FAILURES:
        return torch.export.export(model, tuple(inputs), strict=False)


def doubled(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Examples of two samples where they have one: torch.export takes an axis of size 1 for a fixed one."""
    if all(x.ndim and x.shape[0] == 1 for x in inputs):
        return tuple(torch.cat([x, x]) for x in inputs)
    return tuple(inputs)


def quants(decision: QuantizeDecision | None) -> dict[Site, FakeQuant]:
    """The pairs of quantize and dequantize operations of a decision's sites.

    Halves are rounded to even at run time, whatever the decision says.

    Raises:
        BackendError: the decision has grids that the form has no operation for.
    """
    if decision is None or decision.mode != "static":
        found = "none" if decision is None else f"mode '{decision.mode}'"
        raise BackendError(f"export: '{PT2E}' takes a static quantization, found {found}")
    for name, grid in decision.weights.items():
        _check_weight(name, grid)
    return {Site.parse(key): Rounded(key, grid) for key, grid in decision.activations.items()}


def _check_weight(name: str, grid: QuantParams) -> None:
    if grid.group is not None:
        raise BackendError(f"export: '{PT2E}' has one step for a channel, '{name}' has one for {grid.group} entries")
    if grid.low < -128 or grid.high > 127 or any(grid.zero_point):  # the kernels leave zero points of weights out
        found = f"{grid.low}..{grid.high}" + (" and a zero point that is not 0" if any(grid.zero_point) else "")
        raise BackendError(f"export: '{PT2E}' has symmetric int8 weights, '{name}' has {found}")


def put_integers(model: nn.Module, weights: Mapping[str, QuantParams]) -> None:
    """Put int8 weights, and what makes reals of them, in the place of real weights on their grids.

    Raises:
        ModelError: a weight is not on its grid, or no layer has it.
    """
    tensors = canonical(model)
    for name, grid in weights.items():
        weight = tensors.get(name)
        holders = [m for m in model.modules() if weight is not None and m._parameters.get("weight") is weight]
        if weight is None or not holders:
            raise ModelError(f"export: no layer of the model has the weight '{name}'")
        axis = grid.axis or 0
        channels = weight.shape[axis]
        if len(grid.step) not in (1, channels):
            raise ModelError(f"export: the weight '{name}' has {channels} channels, its grid {len(grid.step)} steps")
        steps = torch.tensor(grid.step, dtype=torch.float32).expand(channels).clone()
        integers = _integers(name, weight.detach().float(), steps, grid)
        for holder in holders:
            holder.weight = nn.Parameter(integers, requires_grad=False)
            parametrize.register_parametrization(holder, "weight", _Reals(steps, axis), unsafe=True)


def _integers(name: str, weight: Tensor, steps: Tensor, grid: QuantParams) -> Tensor:
    scaled = weight / steps.reshape([-1 if i == (grid.axis or 0) else 1 for i in range(weight.ndim)])
    integers = scaled.round()
    if float((scaled - integers).abs().max()) > _OFF_GRID or integers.min() < grid.low or integers.max() > grid.high:
        raise ModelError(f"export: the weight '{name}' is not on its grid; the decision must be applied first")
    return integers.to(torch.int8)


class Rounded:
    """A tensor on its grid, as a pair of quantize and dequantize; a `slimbridge.ports.FakeQuant`.

    The integers are uint8, which the int8 kernels take: a signed grid and its zero point are shifted by 128. A grid
    that does not use all 256 integers is held to its own by a clip of the reals: the kernels drop narrower limits.
    """

    parameters: Mapping[str, Array] = {}
    buffers: Mapping[str, Array] = {}
    reads: Mapping[str, str] = {}

    def __init__(self, key: str, grid: QuantParams) -> None:
        if grid.axis is not None or grid.group is not None or len(grid.step) != 1:
            raise BackendError(f"export: '{PT2E}' has one step for a tensor, '{key}' has {len(grid.step)}")
        shift = 128 if grid.low < 0 else 0
        low, high, zero = grid.low + shift, grid.high + shift, grid.zero_point[0] + shift
        if low < 0 or high > 255:
            raise BackendError(f"export: '{PT2E}' has 8-bit integers, '{key}' has {grid.low}..{grid.high}")
        step = float(np.float32(grid.step[0]))
        self._limits = None if (low, high) == (0, 255) else ((low - zero) * step, (high - zero) * step)
        self._grid = (step, zero, 0, 255, torch.uint8)

    def __call__(
        self, ops: Ops, x: Tensor, state: Mapping[str, Tensor], training: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The values of the grid."""
        known = torch.ops.quantized_decomposed
        if self._limits is not None:
            x = torch.clamp(x, *self._limits)
        integers = known.quantize_per_tensor.default(x, *self._grid)
        return known.dequantize_per_tensor.default(integers, *self._grid), {}


class _Reals(nn.Module):
    """A parametrisation: from int8 weights to what they stand for."""

    def __init__(self, steps: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("steps", steps)
        self.register_buffer("zeros", torch.zeros(len(steps), dtype=torch.int64))
        self._axis = axis

    def forward(self, integers: Tensor) -> Tensor:
        """Real weights, in the shape of the integers."""
        known = torch.ops.quantized_decomposed.dequantize_per_channel.default
        return known(integers, self.steps, self.zeros, self._axis, -128, 127, torch.int8)


def tidy(program: Any) -> None:
    """Make an exported program what Inductor's patterns look for.

    A BatchNorm that only adds a bias goes into the layer before it, and a tensor that is put on the same grid several
    times is put there once.
    """
    module = program.graph_module
    for norm in [node for node in module.graph.nodes if node.target is torch.ops.aten.batch_norm.default]:
        _drop_norm(program, norm)
    _share_integers(module.graph)
    module.graph.lint()
    module.recompile()


def _drop_norm(program: Any, norm: Any) -> None:
    layer, scale, shift, mean, variance, _, _, eps, _ = norm.args
    if getattr(layer.target, "_overloadpacket", None) not in LAYERS or len(layer.users) != 1:
        return
    scale, bias, mean, variance = (_value(program, node) for node in (scale, shift, mean, variance))
    if scale is None or bias is None or mean is None or variance is None:
        return
    own = _value(program, layer.args[2]) if len(layer.args) > 2 and layer.args[2] is not None else None
    if (scale != 1).any() or mean.any() or (own is not None and own.any()):
        return
    if not torch.equal(torch.rsqrt(variance + eps), torch.ones_like(variance)):
        return
    layer.args = (*layer.args[:2], shift, *layer.args[3:])
    norm.replace_all_uses_with(layer)
    norm.graph.erase_node(norm)


def _value(program: Any, node: Any) -> Tensor | None:
    """The parameter or buffer behind an argument."""
    signature = program.graph_signature
    known = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    name = None if node is None else known.get(node.name)
    return None if name is None else program.state_dict[name]


def _share_integers(graph: Any) -> None:
    known = torch.ops.quantized_decomposed
    first: dict[tuple[Any, ...], Any] = {}
    for node in [node for node in graph.nodes if node.target is known.quantize_per_tensor.default]:
        source = node.args[0]
        if getattr(source, "target", None) is known.dequantize_per_tensor.default and source.args[1:6] == node.args[1:]:
            kept = source.args[0]
        else:
            kept = first.setdefault(node.args, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)


def load(folder: Path, form: str, threads: int) -> Callable[[Sequence[Array]], list[Array]]:
    """Compile program.pt2 for this machine; each new shape of the inputs is compiled when it first comes.

    Args:
        folder: what `export` filled.
        form: "compile_float" or "pt2e".
        threads: for one operation.

    Raises:
        BackendError: there is no C++ compiler.
        ModelError: the file is missing or damaged, or a pass fails.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise BackendError(f"'{form}' is compiled with a C++ compiler, and g++ and clang++ are not installed")
    try:
        with silent():
            module = torch.export.load(folder / _FILE).module()
    except FAILURES as error:
        raise ModelError(f"{folder / _FILE}: cannot be read: {first_line(error)}") from error
    compiled = torch.compile(module, dynamic=False)
    inductor = import_module("torch._inductor.config")  # it loads the compiler, which takes two seconds

    def run(inputs: Sequence[Array]) -> list[Array]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            # Freezing makes constants of the weights, which the int8 kernels want packed.
            with silent(), torch.no_grad(), inductor.patch(freezing=True):
                output = compiled(*(_tensor(array) for array in inputs))
        except FAILURES as error:
            raise ModelError(f"'{form}': the pass failed: {type(error).__name__}: {first_line(error)}") from error
        finally:
            torch.set_num_threads(before)
        return [item.numpy() for item in tensors_in(output)]

    return run


def _tensor(array: Array) -> Tensor:
    array = np.asarray(array)
    kind = {"f": np.float32, "i": np.int64, "u": np.int64}.get(array.dtype.kind, array.dtype)
    return torch.from_numpy(np.array(array, dtype=kind))
