"""Canonical names: which tensor of a model is called what."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from slimbridge.errors import ModelError, nearest
from slimbridge.ports import Array, Layer

Tensor = Any

_KINDS: tuple[tuple[tuple[type, ...], str], ...] = (
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
    ((nn.modules.conv._ConvTransposeNd,), "conv_transpose"),
    ((nn.Linear,), "linear"),
    ((nn.modules.batchnorm._BatchNorm,), "batch_norm"),
    ((nn.LayerNorm,), "layer_norm"),
    ((nn.GroupNorm,), "group_norm"),
)


def kind_of(module: nn.Module) -> str:
    """The graph kind of a layer, "unknown" for one that the graph has no word for."""
    return next((kind for types, kind in _KINDS if isinstance(module, types)), "unknown")


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Attribute name and tensor of a module's own parameters and saved buffers, without `num_batches_tracked`."""
    for name, tensor in module._parameters.items():
        if tensor is not None:
            yield name, tensor
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set and name != "num_batches_tracked":
            yield name, buffer


INSERTED = "_slimbridge_inserted"
"""Attribute of a module: the names of the parameters and buffers that a fake quantization added to it."""


def inserted_names(module: nn.Module) -> frozenset[str]:
    """Attribute names of what a fake quantization keeps in a module."""
    return frozenset(module.__dict__.get(INSERTED, ()))


def all_names(model: nn.Module) -> dict[str, Tensor]:
    """Every name that the state dict knows -> tensor; tied tensors and shared modules under each of their names."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in own_tensors(module):
            found[f"{path}.{name}" if path else name] = tensor
    return found


def canonical(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name -> tensor, each tensor once, under its first name."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in all_names(model).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            result[name] = tensor
    return result


class Parameters(Mapping[str, Tensor]):
    """Canonical name -> trainable or frozen parameter, as it is in the model; found when the first is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @cached_property
    def _found(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in canonical(self._model).items() if isinstance(tensor, nn.Parameter)}

    def __getitem__(self, name: str) -> Tensor:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def layers(model: nn.Module) -> tuple[Layer, ...]:
    """The modules that hold tensors of their own, in order of definition; roles are the attributes' names.

    A convolution or linear layer whose weight is computed (a parametrisation such as weight_norm) is "unknown".
    """
    names = {id(tensor): name for name, tensor in canonical(model).items()}
    found = []
    for path, module in model.named_modules():
        added = inserted_names(module)
        params = {role: names[id(tensor)] for role, tensor in own_tensors(module) if role not in added}
        kind = kind_of(module)
        if kind in ("conv", "conv_transpose", "linear") and "weight" not in params:
            kind = "unknown"
        if params:
            found.append(Layer(path, kind, params))
    return tuple(found)


def find_modules(model: nn.Module, paths: Iterator[str] | tuple[str, ...], purpose: str) -> dict[str, nn.Module]:
    """Path -> module.

    Raises:
        ModelError: a path that does not exist.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for path in paths:
        if path not in known:
            raise ModelError(f"{purpose}: the model has no layer '{path}'{nearest(path, known)}")
        found[path] = known[path]
    return found


def check_ready(model: nn.Module, purpose: str) -> None:
    """Does every parameter and buffer have a shape and data?

    Raises:
        ModelError: a lazy layer that never ran, or a tensor on the meta device; the message starts with `purpose`.
    """
    for held in (model.named_parameters(), model.named_buffers()):
        for name, tensor in held:
            if is_lazy(tensor):
                raise ModelError(f"{purpose}: '{name}' has no shape yet; run the model once first")
            if tensor.device.type == "meta":
                raise ModelError(f"{purpose}: '{name}' is on the meta device and has no data; load the weights first")


def check_full_precision(model: nn.Module) -> None:
    """ModelError for a bfloat16 tensor, which NumPy has no type for; float16 is refused where arrays are looked at."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype == torch.bfloat16:
            raise ModelError(f"the model's weights are bfloat16 ('{name}'); float32 and float64 are supported")


def copied(model: nn.Module) -> nn.Module:
    """An independent copy of a model.

    Raises:
        ModelError: a part of the model cannot be copied, or has no data yet.
    """
    check_ready(model, "clone")
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"clone: the model cannot be copied: {_uncopied(model, error)}") from error


def _uncopied(model: nn.Module, error: Exception) -> str:
    """Why a deep copy failed, in one line."""
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                return (
                    f"'{name}' of layer '{path}' is a computed tensor that carries its gradient's history "
                    f"(torch.nn.utils.weight_norm keeps one; torch.nn.utils.parametrizations.weight_norm does not)"
                )
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def to_array(tensor: Tensor) -> Array:
    """A copy on the host; floating types that NumPy lacks (bfloat16, the 8-bit ones) become float32, exactly."""
    held = tensor.detach().cpu()
    if held.is_floating_point() and held.dtype not in _NUMPY_FLOATS:
        held = held.float()
    return np.array(held.numpy())


_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)


def to_tensor(array: Array, what: str) -> Tensor:
    """A tensor of its own memory, of the array's shape and type, on the host.

    Raises:
        ModelError: torch has no such type; the message starts with `what`.
    """
    array = np.asarray(array, order="C")  # np.ascontiguousarray would make a vector of a 0-d array
    if array.dtype.kind not in "biufc":
        raise ModelError(f"{what}: dtype {array.dtype} is not allowed; bool, integer and floating arrays are")
    try:
        return torch.tensor(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise ModelError(f"{what}: torch has no type for dtype {array.dtype}") from error


def read(model: nn.Module) -> dict[str, Array]:
    """Copies of all canonical tensors; see `to_array` for types that NumPy lacks.

    Raises:
        ModelError: a tensor has no data; see `check_ready`.
    """
    check_ready(model, "read")
    return {name: to_array(tensor) for name, tensor in canonical(model).items()}


def write(model: nn.Module, arrays: dict[str, Array], partial: bool) -> None:
    """Set tensors in place; nothing is changed when anything is wrong.

    A tied tensor may come under any of its names.

    Raises:
        ModelError: names that are unknown, missing, of another shape or type, or that give one tensor two values;
            a tensor that cannot be written to.
    """
    check_ready(model, "write")
    known = all_names(model)
    values: dict[str, Tensor] = {}
    chosen: dict[int, tuple[str, Array]] = {}
    for name, array in arrays.items():
        if name not in known:
            raise ModelError(f"write: the model has no parameter or buffer '{name}'{nearest(name, known)}")
        tensor = known[name]
        if tuple(tensor.shape) != array.shape:
            raise ModelError(f"write: '{name}' has shape {tuple(tensor.shape)}, the array has {array.shape}")
        values[name] = to_tensor(array, f"write: '{name}'")
        _check_writable(name, tensor, values[name])
        first, other = chosen.setdefault(id(tensor), (name, array))
        if other is not array and not np.array_equal(other, array, equal_nan=array.dtype.kind == "f"):
            raise ModelError(f"write: '{first}' and '{name}' are one tied tensor but were given different values")
    missing = [name for name, tensor in canonical(model).items() if id(tensor) not in chosen]
    if missing and not partial:
        raise ModelError(f"write: {len(missing)} of the model's tensors were not given, '{missing[0]}' first")
    with torch.no_grad():
        for name, value in values.items():
            known[name].copy_(value)


def _check_writable(name: str, tensor: Tensor, value: Tensor) -> None:
    if value.is_complex() and not tensor.is_complex():
        raise ModelError(f"write: '{name}' is real, the array is complex")
    if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ModelError(f"write: '{name}' is an expanded tensor, whose entries share memory; clone it in the model")
    if tensor.is_inference():
        raise ModelError(f"write: '{name}' was made in inference mode, which forbids changes; clone it in the model")
