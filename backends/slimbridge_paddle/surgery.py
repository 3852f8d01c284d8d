"""Removing channels: parameters, buffers, layer attributes and optimizer state, resized in place.

PaddleSlim's `PruningPlan.apply` is not used: it turns float64 into float32 (optimizer state too), fails on a tensor
that two layers share, skips buffers that are not parameters, needs a static graph's operation for its masks, keeps
the old weights as saved buffers, and takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle

from slimbridge.decisions import PruneDecision
from slimbridge.errors import BackendError, ModelError, nearest
from slimbridge.ports import Array
from slimbridge_paddle.names import BATCH_NORMS, CONVS, TRANSPOSED_CONVS, Entry, entries
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
    cut = {}
    for name, axes in decision.kept.items():
        _slice(table[name], axes, optimizer)
        cut[id(table[name].tensor)] = table[name]
    for layer in model.sublayers(include_self=True):
        if any(id(tensor) in cut for tensor in layer._parameters.values()):
            refresh(layer)


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


def refresh(layer: Any) -> None:
    """Set the sizes that a layer keeps beside its parameters to what the parameters say."""
    if isinstance(layer, TRANSPOSED_CONVS):
        channels, outputs = (int(size) for size in layer.weight.shape[:2])
        layer._in_channels, layer._out_channels = channels, outputs * layer._groups
    elif isinstance(layer, CONVS):
        _refresh_conv(layer)
    elif isinstance(layer, BATCH_NORMS):
        _set(layer, int(layer._mean.shape[0]), "_num_features")
    elif isinstance(layer, paddle.nn.Linear):
        _set(layer, int(layer.weight.shape[0]), "in_features", "_in_features")
        _set(layer, int(layer.weight.shape[1]), "out_features", "_out_features")
    elif isinstance(layer, paddle.nn.LayerNorm):
        known = layer.weight if layer.weight is not None else layer.bias
        layer._normalized_shape = [int(size) for size in known.shape]
    elif isinstance(layer, paddle.nn.GroupNorm):
        known = layer.weight if layer.weight is not None else layer.bias
        _set(layer, int(known.shape[0]), "_num_channels")
    elif isinstance(layer, paddle.nn.Embedding):
        _set(layer, int(layer.weight.shape[0]), "_num_embeddings")
        _set(layer, int(layer.weight.shape[1]), "_embedding_dim")
        _set(layer, [int(size) for size in layer.weight.shape], "_size")
    elif isinstance(layer, paddle.nn.PReLU):
        _set(layer, int(layer._weight.shape[0]), "_num_parameters")


def _set(layer: Any, value: object, *attributes: str) -> None:
    """Set those of the attributes that this release's layer has."""
    for attribute in attributes:
        if hasattr(layer, attribute):
            setattr(layer, attribute, value)


def _refresh_conv(layer: Any) -> None:
    """A depthwise convolution keeps its outputs per group; any other keeps its number of groups.

    The attributes still tell what the layer was: a grouped convolution may be down to one input per group by now.
    """
    outputs, per_group = (int(size) for size in layer.weight.shape[:2])
    if layer._in_channels == layer._groups > 1:
        layer._groups = outputs // (layer._out_channels // layer._groups)
    layer._out_channels, layer._in_channels = outputs, per_group * layer._groups
    if layer._op_type in ("conv2d", "depthwise_conv2d"):  # Paddle chooses the kernel once, in the constructor
        inputs = layer._in_channels
        depthwise = inputs == layer._groups and inputs != 1 and outputs % inputs == 0
        layer._op_type = "depthwise_conv2d" if depthwise else "conv2d"
        if paddle.device.is_compiled_with_cuda():
            layer._use_cudnn = not depthwise
