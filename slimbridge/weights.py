"""Weight files: safetensors with canonical names and layout, readable from every framework.

A quantized weight is stored as int8 under its name, with its float32 steps under "<name>:step", shape (1,), (channels,)
or (channels * groups,), and its zero points, unless all are 0, under "<name>:zero_point"; reading gives the real values
back, step * (integer - zero_point).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from slimbridge.decisions import QuantizeDecision
from slimbridge.errors import RunError
from slimbridge.files import write_file
from slimbridge.ports import Array
from slimbridge.quantize import integer_weights

STEP, ZERO_POINT = ":step", ":zero_point"


def digest_of(arrays: Mapping[str, Array]) -> str:
    """SHA-256 over names, types, shapes and bytes, 64 hex digits; equal arrays have equal digests."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        sha.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def save_weights(path: Path, arrays: Mapping[str, Array], decision: QuantizeDecision | None = None) -> None:
    """Write a weight file, all or nothing.

    Args:
        path: of the .safetensors file.
        arrays: canonical name -> real values.
        decision: its weights are stored as int8 and their steps.

    Raises:
        RunError: the file cannot be written.
    """
    stored = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    if decision is not None:
        stored.update(integer_weights(decision, arrays))
        for name, grid in decision.weights.items():
            stored[name + STEP] = np.array(grid.step, np.float32)
            if any(grid.zero_point):
                stored[name + ZERO_POINT] = np.array(grid.zero_point, np.int8)
    write_file(path, save(stored))


def load_weights(path: Path) -> dict[str, Array]:
    """Read a weight file as real values.

    Raises:
        RunError: the file is missing, truncated, or not a weight file.
    """
    stored = load_stored(path)
    real = {name: array for name, array in stored.items() if not name.endswith((STEP, ZERO_POINT))}
    for name in (name for name in stored if name.endswith((STEP, ZERO_POINT))):
        weight = name.rpartition(":")[0]
        if weight not in real or weight + STEP not in stored:
            raise RunError(f"{path}: '{name}' belongs to no weight of the file")
        if name.endswith(STEP):
            zero_point = stored.get(weight + ZERO_POINT, np.zeros(1, np.int8))
            real[weight] = _real(path, weight, real[weight], stored[name], zero_point)
    return real


def _real(path: Path, name: str, integers: Array, step: Array, zero_point: Array) -> Array:
    """Step * (integer - zero_point), where each step belongs to a run of as many entries as there are for each."""
    if step.ndim != 1 or zero_point.ndim != 1 or not step.size or integers.size % step.size:
        raise RunError(f"{path}: the steps of '{name}' do not fit its shape {integers.shape}")
    if zero_point.size not in (1, step.size):
        raise RunError(f"{path}: '{name}' has {step.size} steps and {zero_point.size} zero points")
    runs = integers.reshape(step.size, -1).astype(np.float32)
    return np.asarray((runs - zero_point.astype(np.float32)[:, None]) * step[:, None]).reshape(integers.shape)


def load_stored(path: Path) -> dict[str, Array]:
    """Read a weight file as it is stored, int8 weights and steps apart; errors as in `load_weights`."""
    try:
        return dict(load(path.read_bytes()))
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path}: not a weight file (safetensors): {error}") from error
