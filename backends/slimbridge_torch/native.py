"""Pruners of other toolkits: Torch-Pruning removes channels, torch.nn.utils.prune masks entries; on copies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune

from slimbridge.errors import FAILURES, BackendError, ModelError, first_line, listed, nearest
from slimbridge.graph import find_units
from slimbridge.ports import Array, NativeRequest, NativeResult, tensors_in
from slimbridge_torch.names import canonical, copied, find_modules, layers, to_array
from slimbridge_torch.trace import silent, trace

Tensor = Any
Masks = Callable[[Mapping[str, "_Holder"], NativeRequest], None]

_REMOVERS = {  # pruner -> its class and its importance's class, by their names in Torch-Pruning
    "torch_pruning.magnitude": ("MagnitudePruner", "GroupMagnitudeImportance"),
    "torch_pruning.bn_scale": ("BNScalePruner", "BNScaleImportance"),
    "torch_pruning.group_norm": ("GroupNormPruner", "GroupMagnitudeImportance"),
    "torch_pruning.lamp": ("MagnitudePruner", "LAMPImportance"),
    "torch_pruning.fpgm": ("MagnitudePruner", "FPGMImportance"),
    "torch_pruning.random": ("MagnitudePruner", "RandomImportance"),
}
_PRUNER_OPTIONS = ("global_pruning", "isomorphic", "iterative_steps", "max_pruning_ratio", "round_to")
_IMPORTANCE_OPTIONS = frozenset(("p", "group_reduction", "normalizer", "bias"))


def engines() -> tuple[str, ...]:
    """The pruners whose toolkit is installed; nothing is imported for it."""
    return (*(_REMOVERS if find_spec("torch_pruning") else ()), *_MASKERS)


def native(model: nn.Module, request: NativeRequest, inputs: Sequence[Tensor]) -> NativeResult:
    """Let another toolkit choose.

    Args:
        model: left as it is.
        request: what is asked of the toolkit.
        inputs: example tensors.

    Raises:
        BackendError: unknown pruner or option, or its toolkit is not installed.
        ModelError: the toolkit failed, changed nothing, or left a model that does not run.
    """
    if request.pruner not in engines():
        if request.pruner in _REMOVERS:
            raise BackendError(f"native: '{request.pruner}' needs the package torch-pruning, which is not installed")
        hint = nearest(request.pruner, engines())
        raise BackendError(f"native: unknown pruner '{request.pruner}'{hint}; torch has: {', '.join(engines())}")
    find_modules(model, (*request.ignored, *request.layer_ratios), "native")
    if request.pruner in _MASKERS:
        return _masked(model, request)
    return _removed(model, copied(model), request, inputs)


def _removed(model: nn.Module, copy: nn.Module, request: NativeRequest, inputs: Sequence[Tensor]) -> NativeResult:
    frozen = _without_choice(model, inputs)
    for parameter in copy.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # Torch-Pruning follows the gradients' graph
    copy.eval()
    alive = {module: np.arange(_outputs_of(module)) for module in copy.modules() if _outputs_of(module)}
    try:
        with silent(), torch.enable_grad():
            pruner = _pruner(copy, request, frozen, inputs)
            for _ in range(int(request.options.get("iterative_steps", 1))):
                for group in pruner.step(interactive=True):
                    for dependency, positions in group:
                        module = dependency.target.module
                        if module in alive and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                            alive[module] = np.delete(alive[module], positions)
                    group.prune()
    except FAILURES as error:
        raise ModelError(f"native: {request.pruner} failed: {type(error).__name__}: {first_line(error)}") from error
    kept = _kept(model, copy, alive, request)
    return NativeResult(kept, {}, _ran(copy, request, inputs))


def _pruner(copy: nn.Module, request: NativeRequest, frozen: Sequence[str], inputs: Sequence[Tensor]) -> Any:
    toolkit = import_module("torch_pruning")
    pruner, importance = (_named(toolkit, name) for name in _REMOVERS[request.pruner])
    own = [name for name in inspect.signature(importance.__init__).parameters if name in _IMPORTANCE_OPTIONS]
    _check_options(request, (*own, *_PRUNER_OPTIONS))
    modules = dict(copy.named_modules())
    return pruner(
        copy,
        tuple(inputs),
        importance(**{name: value for name, value in request.options.items() if name in own}),
        pruning_ratio=request.ratio,
        pruning_ratio_dict={modules[path]: ratio for path, ratio in request.layer_ratios.items()},
        ignored_layers=[modules[path] for path in (*request.ignored, *frozen)],
        # Their defaults are shared between all pruners of a process.
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        **{name: value for name, value in request.options.items() if name in _PRUNER_OPTIONS},
    )


def _named(toolkit: Any, name: str) -> Any:
    return getattr(toolkit.pruner, name, None) or getattr(toolkit.pruner.importance, name)


def _check_options(request: NativeRequest, allowed: Sequence[str]) -> None:
    for name in request.options:
        if name not in allowed:
            hint = nearest(name, allowed)
            raise BackendError(f"native: {request.pruner} has no option '{name}'{hint}; allowed: {listed(allowed)}")


def _without_choice(model: nn.Module, inputs: Sequence[Tensor]) -> list[str]:
    """Layers of which no channel may go, the last one for instance; Torch-Pruning would cut it like any other."""
    units = find_units(trace(model, inputs))
    known = dict(model.named_modules())
    layers_found = [item.layer for item in units.producers if units.why_frozen(item) is not None]
    return [path for path in dict.fromkeys(layers_found) if path in known]


def _outputs_of(module: nn.Module) -> int:
    """Output channels of a convolution or linear layer, 0 for any other."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return int(module.out_channels)
    return int(module.out_features) if isinstance(module, nn.Linear) else 0


def _kept(
    model: nn.Module, copy: nn.Module, alive: Mapping[nn.Module, Array], request: NativeRequest
) -> dict[str, tuple[int, ...]]:
    names = {id(tensor): name for name, tensor in canonical(model).items()}
    pruned = dict(copy.named_modules())
    kept: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        outputs, stays = _outputs_of(module), alive.get(pruned[path])
        if stays is None or not outputs:
            continue
        if len(stays) != _outputs_of(pruned[path]):
            raise ModelError(f"native: {request.pruner} removed channels of '{path}' that cannot be told apart")
        name = names.get(id(getattr(module, "weight", None)))
        if name is not None and len(stays) < outputs:
            kept[name] = tuple(int(index) for index in stays)
    if not kept:
        raise ModelError(f"native: {request.pruner} removed no channel at ratio {request.ratio}")
    return kept


def _ran(copy: nn.Module, request: NativeRequest, inputs: Sequence[Tensor]) -> tuple[Array, ...]:
    try:
        with torch.no_grad():
            found = tensors_in(copy(*inputs))
    except FAILURES as error:
        raise ModelError(f"native: {request.pruner} left a model that does not run: {first_line(error)}") from error
    return tuple(to_array(item) for item in found if isinstance(item, torch.Tensor))


def _masked(model: nn.Module, request: NativeRequest) -> NativeResult:
    holders: dict[str, _Holder] = {}
    names: dict[str, str] = {}
    tensors = canonical(model)
    for layer in layers(model):
        if layer.kind not in ("conv", "conv_transpose", "linear") or layer.path in request.ignored:
            continue
        name = layer.params["weight"]
        if name not in names.values():
            names[layer.path] = name
            holders[layer.path] = _Holder(tensors[name], 1 if layer.kind == "conv_transpose" else 0)
    apply, allowed = _MASKERS[request.pruner]
    _check_options(request, allowed)
    try:
        apply(holders, request)
    except FAILURES as error:
        raise ModelError(f"native: {request.pruner} failed: {type(error).__name__}: {first_line(error)}") from error
    masks = {names[path]: to_array(holder.get_buffer("weight_mask")).astype(bool) for path, holder in holders.items()}
    if all(mask.all() for mask in masks.values()):
        raise ModelError(f"native: {request.pruner} masked no entry at ratio {request.ratio}")
    return NativeResult({}, masks)


class _Holder(nn.Module):
    """A copy of one weight, and its output axis."""

    def __init__(self, weight: Tensor, axis: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.axis = axis


def _each(name: str) -> Masks:
    def apply(holders: Mapping[str, _Holder], request: NativeRequest) -> None:
        for path, holder in holders.items():
            amount = float(request.layer_ratios.get(path, request.ratio))
            defaults = {"n": 2, "dim": holder.axis} if name == "ln_structured" else {}
            getattr(prune, name)(holder, "weight", amount=amount, **{**defaults, **request.options})

    return apply


def _together(holders: Mapping[str, _Holder], request: NativeRequest) -> None:
    if request.layer_ratios:
        raise BackendError(f"native: {request.pruner} takes one ratio for all layers, not one for each")
    weights = [(holder, "weight") for holder in holders.values()]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=float(request.ratio))


_MASKERS: Mapping[str, tuple[Masks, tuple[str, ...]]] = {
    "torch.l1_unstructured": (_each("l1_unstructured"), ()),
    "torch.random_unstructured": (_each("random_unstructured"), ()),
    "torch.ln_structured": (_each("ln_structured"), ("n", "dim")),
    "torch.global_unstructured": (_together, ()),
}
