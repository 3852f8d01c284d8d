"""Channel removal: slices tensors in place, with the layers' attributes and the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from slimbridge.decisions import PruneDecision
from slimbridge.errors import ModelError, listed, nearest
from slimbridge_torch.names import canonical, find_modules, own_tensors
from slimbridge_torch.train import TorchOptimizer

Tensor = Any
Axes = Mapping[int, tuple[int, ...]]


def remove_channels(model: nn.Module, decision: PruneDecision, optimizer: TorchOptimizer | None) -> None:
    """Slice every tensor of `decision.kept`; parameters stay the same objects, so ties and optimizers hold.

    Raises:
        ModelError: names, sizes or indices that do not fit; the model is then unchanged.
    """
    tensors = canonical(model)
    for name, axes in decision.kept.items():
        _check(name, axes, decision, tensors)
    refreshes = _refreshes(model, {id(tensors[name]): axes for name, axes in decision.kept.items()})
    modules = find_modules(model, tuple(decision.heads), "prune")
    refreshes += [
        partial(modules[path].__dict__.update, _heads(modules[path], path, *decision.heads[path])) for path in modules
    ]
    if optimizer is not None:
        optimizer.check_covers(tensors)
    for name, axes in decision.kept.items():
        tensor = tensors[name]
        _replace(tensor, take(tensor.data, axes))
        if optimizer is not None:
            optimizer.slice_state(tensor, partial(take, axes=axes))
    for refresh in refreshes:
        refresh()


def take(tensor: Tensor, axes: Axes) -> Tensor:
    """The kept indices of each axis, contiguous."""
    for axis, indices in axes.items():
        tensor = tensor.index_select(axis, torch.from_numpy(np.asarray(indices, np.int64)).to(tensor.device))
    return tensor.contiguous()


def _replace(tensor: Tensor, data: Tensor) -> None:
    # A gradient accumulator that an earlier loss keeps alive remembers the old shape; autograd drops it only
    # when the dtype or device changes, hence the step over another dtype.
    other = torch.float32 if tensor.dtype == torch.float16 else torch.float16
    tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data
    tensor.grad = None


def _check(name: str, axes: Axes, decision: PruneDecision, tensors: Mapping[str, Tensor]) -> None:
    if name not in tensors:
        raise ModelError(f"prune: the model has no parameter or buffer '{name}'{nearest(name, tensors)}")
    shape = tuple(tensors[name].shape)
    if decision.sizes.get(name) != shape:
        raise ModelError(
            f"prune: '{name}' has shape {shape}, the decision was made for {decision.sizes.get(name, 'no size')}"
        )
    for axis, kept in axes.items():
        if not 0 <= axis < len(shape):
            raise ModelError(f"prune: '{name}' has {len(shape)} axes, the decision names axis {axis}")
        ascending = bool((np.diff(np.asarray(kept, dtype=np.int64)) > 0).all())
        if not kept or not ascending or kept[0] < 0 or kept[-1] >= shape[axis]:
            raise ModelError(
                f"prune: '{name}' axis {axis}: kept indices must be ascending, at least one, in 0..{shape[axis] - 1}"
            )


def _refreshes(model: nn.Module, kept: Mapping[int, Axes]) -> list[Callable[[], None]]:
    found: list[Callable[[], None]] = []
    for path, module in model.named_modules():
        shapes = {}
        touched = False
        for role, tensor in own_tensors(module):
            axes = kept.get(id(tensor), {})
            touched = touched or bool(axes)
            shapes[role] = tuple(len(axes[i]) if i in axes else size for i, size in enumerate(tensor.shape))
        if touched:
            values = _attributes(module, shapes, path)
            found.append(partial(module.__dict__.update, values))
    return found


def _heads(module: nn.Module, path: str, before: int, after: int) -> dict[str, int]:
    """Attribute -> value of a layer whose attention has fewer heads.

    Raises:
        ModelError: no integer attribute named after heads has the old number.
    """
    numbers = {name: value for name, value in module.__dict__.items() if type(value) is int and "head" in name.lower()}
    counts = {name: value for name, value in numbers.items() if not any(word in name.lower() for word in _OF_SIZES)}
    if before not in counts.values():
        raise ModelError(
            f"prune: layer '{path}' has no attribute for its {before} attention heads; "
            f"an integer named after heads (num_heads, n_heads, ...) is needed, found {listed(counts)}"
        )
    return {name: after for name, value in counts.items() if value == before}


_OF_SIZES = ("dim", "size", "channels", "width", "per_head", "d_head", "head_d")


def _attributes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], path: str) -> dict[str, Any]:
    """Attribute -> value of a layer whose tensors get these shapes."""
    weight = shapes.get("weight", next(iter(shapes.values())))
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _conv_attributes(module, weight, path)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return _transposed_attributes(module, weight, path)
    if isinstance(module, nn.Linear):
        return {"in_features": weight[1], "out_features": weight[0]}
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        return {"num_features": weight[0]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {"normalized_shape": weight}
    if isinstance(module, nn.GroupNorm):
        groups, rest = divmod(module.num_groups * weight[0], module.num_channels)
        if rest:
            before = f"{module.num_groups} groups of {module.num_channels // module.num_groups} channels"
            raise ModelError(f"prune: '{path}' would keep {weight[0]} channels, no whole number of its {before}")
        return {"num_channels": weight[0], "num_groups": groups}
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        first = shapes.get("weight_ih_l0", shapes.get("weight_ih"))
        return {"input_size": first[1]} if first else {}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": weight[0], "embedding_dim": weight[1]}
    return {"num_parameters": weight[0]} if isinstance(module, nn.PReLU) else {}


def _conv_attributes(module: Any, weight: tuple[int, ...], path: str) -> dict[str, Any]:
    out, per_group = weight[:2]
    groups = int(module.groups)
    if groups > 1 and per_group == 1 and groups == module.in_channels:
        multiplier = module.out_channels // groups
        if out % multiplier:
            raise ModelError(f"prune: '{path}' would keep {out} outputs, not a multiple of {multiplier} per channel")
        groups = out // multiplier
    elif out % groups:
        raise ModelError(f"prune: '{path}' would keep {out} outputs in {groups} groups")
    return {"in_channels": per_group * groups, "out_channels": out, "groups": groups}


def _transposed_attributes(module: Any, weight: tuple[int, ...], path: str) -> dict[str, Any]:
    groups = int(module.groups)
    if groups > 1 and groups == module.in_channels:
        groups = weight[0]
    elif weight[0] % groups:
        raise ModelError(f"prune: '{path}' would keep {weight[0]} inputs in {groups} groups")
    return {"in_channels": weight[0], "out_channels": weight[1] * groups, "groups": groups}
