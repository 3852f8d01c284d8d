"""Removing channels: parameters, buffers, layer attributes and optimizer state, resized in place.

PaddleSlim's `PruningPlan.apply` is not used: it turns float64 into float32 (optimizer state too), fails on a tensor
that two layers share, skips buffers that are not parameters, needs a static graph's operation for its masks, keeps
the old weights as saved buffers, and takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import paddle

from slimbridge.decisions import PruneDecision
from slimbridge.errors import BackendError, ModelError, listed, nearest
from slimbridge.ports import Array
from slimbridge_paddle.names import BATCH_NORMS, CONVS, TRANSPOSED_CONVS, Entry, entries, find_layers, walk
from slimbridge_paddle.tensors import assign, copied
from slimbridge_paddle.train import PaddleOptimizer


def remove_channels(model: Any, decision: PruneDecision, optimizer: object | None) -> None:
    """Slice what `decision.kept` names.

    Raises:
        ModelError: a name, a size or an index does not fit the model; the model is then unchanged.
        BackendError: the optimizer is not one of this backend.
    """
    if optimizer is not None and not isinstance(optimizer, PaddleOptimizer):
        raise BackendError(f"remove_channels: the optimizer is a {type(optimizer).__name__}, not Paddle's")
    table = {entry.name: entry for entry in entries(model)}
    for name, axes in decision.kept.items():
        if name not in table:
            raise ModelError(f"remove_channels: the model has no parameter '{name}'{nearest(name, table)}")
        _check(table[name], axes, decision.sizes.get(name))
    changes = [*_new_sizes(model, {id(table[name].tensor): table[name] for name in decision.kept}, decision)]
    changes.extend(_new_heads(model, decision.heads))
    for name, axes in decision.kept.items():
        _slice(table[name], axes, optimizer)
    for layer, attributes in changes:
        layer.__dict__.update(attributes)


def _new_sizes(
    model: Any, cut: Mapping[int, Entry], decision: PruneDecision
) -> Iterator[tuple[Any, dict[str, object]]]:
    """Each layer that loses channels, with its new attributes."""
    done: set[int] = set()
    for path, layer in walk(model):
        if id(layer) in done or not any(id(tensor) in cut for tensor in layer._parameters.values()):
            continue
        done.add(id(layer))
        shapes = {}
        for attribute, tensor in layer._parameters.items():
            if tensor is not None:
                entry = cut.get(id(tensor))
                kept = {} if entry is None else decision.kept[entry.name]
                flipped = entry is not None and entry.transposed
                shapes[attribute] = tuple(
                    len(kept.get(1 - axis if flipped else axis, range(int(size))))
                    for axis, size in enumerate(tensor.shape)
                )
        yield layer, {name: value for name, value in _attributes(layer, shapes, path).items() if hasattr(layer, name)}


def _new_heads(model: Any, heads: Mapping[str, tuple[int, int]]) -> Iterator[tuple[Any, dict[str, object]]]:
    """Each layer that loses attention heads, with the attributes that hold their number."""
    for path, layer in find_layers(model, tuple(heads), "remove_channels").items():
        before, after = heads[path]
        numbers = {name: value for name, value in layer.__dict__.items() if type(value) is int}
        counts = {name: value for name, value in numbers.items() if "head" in name.lower() and not _is_size(name)}
        if before not in counts.values():
            raise ModelError(
                f"remove_channels: layer '{path}' has no attribute for its {before} attention heads; "
                f"an integer named after heads (num_heads, n_heads, ...) is needed, found {listed(counts)}"
            )
        yield layer, {name: after for name, value in counts.items() if value == before}


def _is_size(name: str) -> bool:
    """Does the name speak of a head's size, and not of how many there are?"""
    return any(word in name.lower() for word in ("dim", "size", "channels", "width", "per_head", "d_head", "head_d"))


def _check(entry: Entry, axes: Mapping[int, tuple[int, ...]], size: tuple[int, ...] | None) -> None:
    if size is None or tuple(size) != entry.shape:
        found = "no size" if size is None else f"size {tuple(size)}"
        raise ModelError(f"remove_channels: '{entry.name}': the decision has {found}, the model {entry.shape}")
    for axis, kept in axes.items():
        if not 0 <= axis < len(entry.shape):
            raise ModelError(f"remove_channels: '{entry.name}' has axes 0..{len(entry.shape) - 1}, not {axis}")
        ascending = list(kept) == sorted(set(kept))
        if not kept or not ascending or kept[0] < 0 or kept[-1] >= entry.shape[axis]:
            raise ModelError(
                f"remove_channels: '{entry.name}' axis {axis}: kept indices must be ascending in "
                f"0..{entry.shape[axis] - 1} and not empty, found {list(kept)[:8]}"
            )


def _slice(entry: Entry, axes: Mapping[int, tuple[int, ...]], optimizer: PaddleOptimizer | None) -> None:
    def cut(stored: Array) -> Array:
        for axis, kept in axes.items():
            stored = np.take(stored, kept, axis=1 - axis if entry.transposed else axis)
        return stored

    if optimizer is not None:
        optimizer.slice(entry, cut)
    entry.tensor.clear_gradient(set_to_zero=False)
    assign(entry.tensor, cut(copied(entry.tensor)))


Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def _attributes(layer: Any, shapes: Shapes, path: str) -> dict[str, object]:
    """The sizes that a layer keeps beside its parameters, when these (attribute -> stored shape) will have shapes.

    Raises:
        ModelError: channels that do not divide into the layer's groups.
    """
    first = next(iter(shapes.values()))
    weight = shapes.get("weight", first)
    if isinstance(layer, (*TRANSPOSED_CONVS, *CONVS)):
        return _conv_attributes(layer, weight, path)
    if isinstance(layer, (*BATCH_NORMS, paddle.nn.layer.norm._InstanceNormBase)):
        return {"_num_features": first[0]}
    if isinstance(layer, paddle.nn.LayerNorm):
        if len(layer._normalized_shape) > 1:
            raise ModelError(f"remove_channels: '{path}' normalises over several axes; it must keep its channels")
        return {"_normalized_shape": list(weight)}
    if isinstance(layer, paddle.nn.GroupNorm):
        groups = layer._num_groups * weight[0] / layer._num_channels
        if groups != int(groups):
            old = f"{layer._num_channels} channels in {layer._num_groups} groups"
            raise ModelError(f"remove_channels: '{path}' has {old}; {weight[0]} channels are no whole groups")
        return {"_num_channels": weight[0], "_num_groups": int(groups)}
    if isinstance(layer, paddle.nn.Embedding):
        return {"_num_embeddings": weight[0], "_embedding_dim": weight[1], "_size": list(weight)}
    return {"_num_parameters": first[0]} if isinstance(layer, paddle.nn.PReLU) else {}


def _conv_attributes(layer: Any, weight: tuple[int, ...], path: str) -> dict[str, object]:
    """A depthwise convolution keeps its outputs per group; any other keeps its number of groups.

    The attributes still tell what the layer was: a grouped convolution may be down to one input per group.
    """
    transposed, groups = isinstance(layer, TRANSPOSED_CONVS), int(layer._groups)
    if layer._in_channels == groups > 1:
        multiplier = layer._out_channels // groups
        rest = 0 if transposed else weight[0] % multiplier
        groups = weight[0] if transposed else weight[0] // multiplier
    else:
        rest = weight[0] % groups
    if rest:
        raise ModelError(
            f"remove_channels: '{path}' would have {weight[0]} {'inputs' if transposed else 'outputs'}, which do not "
            f"divide into its {layer._groups} groups"
        )
    inputs, outputs = (weight[0], weight[1] * groups) if transposed else (weight[1] * groups, weight[0])
    found: dict[str, object] = {"_in_channels": inputs, "_out_channels": outputs, "_groups": groups}
    if not transposed and layer._op_type in ("conv2d", "depthwise_conv2d"):
        # Paddle chooses the kernel once, in the constructor.
        depthwise = inputs == groups and inputs != 1 and outputs % inputs == 0
        found["_op_type"] = "depthwise_conv2d" if depthwise else "conv2d"
        if paddle.device.is_compiled_with_cuda():
            found["_use_cudnn"] = not depthwise
    return found
