"""Native tensors: reading, writing in place, and where a model lives."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from slimbridge.errors import ModelError
from slimbridge.ports import Array, Device, DType

_FLOATS = {paddle.float32: "float32", paddle.float64: "float64", paddle.float16: "float16"}


def dtype_name(tensor: Any) -> str:
    """NumPy's name of the tensor's dtype.

    Raises:
        ModelError: NumPy has no such type.
    """
    name = str(tensor.dtype).removeprefix("paddle.")
    if name.startswith(("bfloat", "float8")):
        raise ModelError(
            f"dtype: the model holds a {name} tensor; float32 and float64 are supported (model.to(dtype='float32'))"
        )
    return name


def is_float(tensor: Any) -> bool:
    """Is it a floating tensor?"""
    return tensor.dtype in _FLOATS


def check_list(inputs: object) -> None:
    """Raise ModelError where an array is given in place of a list of them."""
    if not isinstance(inputs, (list, tuple)):
        found = type(inputs).__name__
        raise ModelError(f"input: a list with one array for each argument of forward is needed, found {found}")


def place_of(tensor: Any) -> Any:
    """The tensor's place in the form that `set` takes."""
    place = tensor.place
    return paddle.CUDAPlace(place.gpu_device_id()) if place.is_gpu_place() else paddle.CPUPlace()


def assign(tensor: Any, array: Array, place: Any = None) -> None:
    """Replace the contents of a tensor, with the array's shape and dtype.

    The object stays, so that tied weights and the references of an optimizer stay true.
    """
    # np.ascontiguousarray would make one axis of none.
    tensor.value().get_tensor().set(np.asarray(array, order="C"), place_of(tensor) if place is None else place)


def replace_data(tensor: Any, other: Any) -> None:
    """Let a tensor hold the data of another, on the device and unnoticed by a backward pass that is still to come.

    Only for tensors that no gradient reads, such as running statistics in train mode.
    """
    tensor.value().get_tensor()._share_data_with(other.value().get_tensor())


def copied(tensor: Any) -> Array:
    """The tensor's values as an array of its own."""
    dtype_name(tensor)  # Paddle gives the bits of a bfloat16 tensor as whole numbers
    return np.array(tensor.numpy())


def all_tensors(model: Any) -> list[Any]:
    """Every parameter and buffer of the model once, those that are not saved included."""
    found = {id(tensor): tensor for tensor in model.parameters()}
    found.update((id(tensor), tensor) for tensor in model.buffers() if tensor is not None)
    return list(found.values())


def model_dtype(model: Any) -> str:
    """Name of the dtype of the model's first floating tensor, "float32" if it has none."""
    names = [(dtype_name(tensor), is_float(tensor)) for tensor in all_tensors(model)]
    return next((name for name, floating in names if floating), "float32")


def model_place(model: Any) -> Any:
    """Where the model's first tensor lives; the CPU if it has none."""
    return next((place_of(tensor) for tensor in all_tensors(model)), paddle.CPUPlace())


def native(array: Any, dtype: str, place: Any) -> Any:
    """A tensor on `place`: floating arrays take `dtype`, integers become int64, tensors stay as they are."""
    if isinstance(array, paddle.Tensor):
        return array
    values = np.asarray(array)
    kind = dtype if values.dtype.kind == "f" else "int64" if values.dtype.kind in "iu" else values.dtype.name
    return paddle.to_tensor(np.ascontiguousarray(values.astype(kind)).reshape(values.shape), place=place)


def devices() -> tuple[Device, ...]:
    """The devices present now."""
    with_gpu = paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    return ("cpu", "gpu") if with_gpu else ("cpu",)


def move(model: Any, device: Device, dtype: DType) -> None:
    """Move every parameter and buffer, keeping the objects; floating ones take `dtype`, gradients are dropped."""
    place = paddle.CUDAPlace(0) if device == "gpu" else paddle.CPUPlace()
    for tensor in all_tensors(model):
        values = copied(tensor)
        tensor.clear_gradient(set_to_zero=False)
        assign(tensor, values.astype(dtype) if is_float(tensor) else values, place)
    for layer in model.sublayers(include_self=True):
        layer._dtype = dtype
