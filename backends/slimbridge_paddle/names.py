"""Canonical names and layouts of a Paddle model's parameters and buffers.

Paddle's `_mean` and `_variance` of a batch normalisation are `running_mean` and `running_var`; the weight of
`nn.Linear`, stored (in, out), is (out, in). A tensor that several layers share has one name, the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from slimbridge.errors import ModelError, listed, nearest
from slimbridge.ports import Array, Layer
from slimbridge_paddle.tensors import assign, copied, dtype_name

BATCH_NORMS: tuple[Any, ...] = (paddle.nn.layer.norm._BatchNormBase, paddle.nn.BatchNorm)
CONVS: tuple[Any, ...] = (paddle.nn.layer.conv._ConvNd,)
TRANSPOSED_CONVS: tuple[Any, ...] = (paddle.nn.Conv1DTranspose, paddle.nn.Conv2DTranspose, paddle.nn.Conv3DTranspose)
_STATISTICS = {"_mean": "running_mean", "_variance": "running_var"}
_KINDS: tuple[tuple[tuple[Any, ...], str], ...] = (
    (TRANSPOSED_CONVS, "conv_transpose"),
    (CONVS, "conv"),
    ((paddle.nn.Linear,), "linear"),
    (BATCH_NORMS, "batch_norm"),
    ((paddle.nn.LayerNorm,), "layer_norm"),
    ((paddle.nn.GroupNorm,), "group_norm"),
)


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer.

    Attributes:
        name: canonical name.
        role: its last part, e.g. "running_mean".
        path: the path of the layer that owns it.
        tensor: the native tensor.
        transposed: the canonical layout is the transpose of the stored one.
        owner, attribute: the layer that owns it, and its name there.
    """

    name: str
    role: str
    path: str
    tensor: Any
    transposed: bool
    owner: Any
    attribute: str

    @property
    def where(self) -> tuple[Any, str, bool]:
        """Owner, attribute, and is it transposed? A copied model finds its own tensor there."""
        return self.owner, self.attribute, self.transposed

    @property
    def inserted(self) -> bool:
        """Is it kept by a fake quantization, and no part of the model itself?"""
        return self.attribute in inserted(self.owner)

    @property
    def shape(self) -> tuple[int, ...]:
        """Canonical shape."""
        stored = tuple(int(size) for size in self.tensor.shape)
        return stored[::-1] if self.transposed else stored

    @property
    def trainable(self) -> bool:
        """Does an optimizer step it?"""
        return not self.tensor.stop_gradient

    @property
    def is_parameter(self) -> bool:
        """Is it none of the buffers? (Paddle counts running statistics among the parameters.)"""
        return isinstance(self.tensor, paddle.base.framework.EagerParamBase) and self.role not in _STATISTICS.values()

    def canonical(self, stored: Array) -> Array:
        """The stored layout -> the canonical one (and back: the conversion is its own inverse)."""
        return np.ascontiguousarray(stored.T) if self.transposed else stored

    def read(self) -> Array:
        """A copy in canonical layout."""
        return self.canonical(copied(self.tensor))


def inserted(layer: Any) -> frozenset[str]:
    """The attributes of a layer that hold what its fake quantizations keep; their wrapper of its forward knows them."""
    return frozenset(getattr(layer.__dict__.get("forward"), "registered", ()))


def walk(layer: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, layer) in order of definition; a shared layer comes under each of its paths."""
    yield path, layer
    for name, child in layer._sub_layers.items():
        if child is not None:
            yield from walk(child, f"{path}.{name}" if path else name)


def every_name(model: Any) -> dict[str, Entry]:
    """Every name that the state dict knows -> its entry, canonical or not: tied tensors come several times."""
    found = {}
    for path, layer in walk(model):
        for attribute, tensor in _own(layer):
            entry = _entry(path, layer, attribute, tensor)
            found[entry.name] = entry
    return found


def entries(model: Any) -> tuple[Entry, ...]:
    """All parameters and saved buffers in order of definition, each tensor once, under its first name."""
    found: dict[int, Entry] = {}
    for entry in every_name(model).values():
        found.setdefault(id(entry.tensor), entry)
    return tuple(found.values())


def _own(layer: Any) -> list[tuple[str, Any]]:
    skipped = layer._non_persistable_buffer_names_set
    buffers = [(name, tensor) for name, tensor in layer._buffers.items() if name not in skipped]
    return [(name, tensor) for name, tensor in [*layer._parameters.items(), *buffers] if tensor is not None]


def _entry(path: str, layer: Any, attribute: str, tensor: Any) -> Entry:
    role = _STATISTICS.get(attribute, attribute) if isinstance(layer, BATCH_NORMS) else attribute
    transposed = isinstance(layer, paddle.nn.Linear) and attribute == "weight" and len(tensor.shape) == 2
    return Entry(f"{path}.{role}" if path else role, role, path, tensor, transposed, layer, attribute)


def layers(model: Any) -> tuple[Layer, ...]:
    """The layers that hold parameters or saved buffers of their own."""
    names = {id(entry.tensor): entry for entry in entries(model)}
    found = []
    for path, layer in model.named_sublayers(include_self=True):
        own = [(name, tensor) for name, tensor in _own(layer) if name not in inserted(layer)]
        roles = {_entry(path, layer, name, tensor).role: names[id(tensor)].name for name, tensor in own}
        if roles:
            found.append(Layer(path, _kind(layer), roles))
    return tuple(found)


def _kind(layer: Any) -> str:
    return next((kind for types, kind in _KINDS if isinstance(layer, types)), "unknown")


def find_layers(model: Any, paths: Sequence[str], purpose: str) -> dict[str, Any]:
    """Path -> layer.

    Raises:
        ModelError: the model has no layer of that path.
    """
    table = dict(walk(model))
    for path in paths:
        if path not in table:
            raise ModelError(f"{purpose}: the model has no layer '{path}'{nearest(path, table)}")
    return {path: table[path] for path in paths}


def read(model: Any) -> dict[str, Array]:
    """Copies of all parameters and saved buffers, canonical."""
    return {entry.name: entry.read() for entry in entries(model)}


def write(model: Any, arrays: Mapping[str, Array], partial: bool) -> None:
    """Set them in place, keeping each tensor's dtype; nothing is changed when anything does not fit.

    A tied tensor may come under any of its names.

    Raises:
        ModelError: a name is unknown or, unless `partial`, missing; a shape or a type does not fit; one tensor is
            given two values.
    """
    known = every_name(model)
    chosen: dict[int, tuple[Entry, Array]] = {}
    for name, array in arrays.items():
        if name not in known:
            raise ModelError(f"write: the model has no parameter or buffer '{name}'{nearest(name, known)}")
        value = _checked(known[name], np.asarray(array))
        first, other = chosen.setdefault(id(known[name].tensor), (known[name], value))
        if not np.array_equal(first.canonical(other), known[name].canonical(value), equal_nan=value.dtype.kind == "f"):
            raise ModelError(f"write: '{first.name}' and '{name}' are one tied tensor with different values")
    missing = [entry.name for entry in entries(model) if id(entry.tensor) not in chosen]
    if missing and not partial:
        raise ModelError(f"write: {len(missing)} parameters are missing: {listed(missing, 4)}")
    ready = [(entry, entry.canonical(value.astype(dtype_name(entry.tensor)))) for entry, value in chosen.values()]
    for entry, stored in ready:
        assign(entry.tensor, stored)


def _checked(entry: Entry, value: Array) -> Array:
    if value.shape != entry.shape:
        raise ModelError(f"write: '{entry.name}' has shape {entry.shape}, the array has {value.shape}")
    if value.dtype.kind not in "fiub":
        raise ModelError(f"write: '{entry.name}': dtype {value.dtype} given, a real number type is needed")
    return value
