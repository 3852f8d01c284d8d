"""Weight files: safetensors with canonical names and layout, readable from every framework.

A quantized weight is stored as int8 under its name, with its float32 step under "<name>:step"; reading gives the
real values back, step * integer.
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
from slimbridge.quantize.grid import step_array

STEP = ":step"


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
            stored[name + STEP] = np.asarray(step_array(grid, stored[name].ndim), order="C")
    write_file(path, save(stored))


def load_weights(path: Path) -> dict[str, Array]:
    """Read a weight file as real values.

    Raises:
        RunError: the file is missing, truncated, or not a weight file.
    """
    stored = load_stored(path)
    real = {name: array for name, array in stored.items() if not name.endswith(STEP)}
    for name, array in stored.items():
        if name.endswith(STEP):
            weight = name.removesuffix(STEP)
            if weight not in real:
                raise RunError(f"{path}: '{name}' belongs to no weight of the file")
            real[weight] = real[weight].astype(np.float32) * array
    return real


def load_stored(path: Path) -> dict[str, Array]:
    """Read a weight file as it is stored, int8 weights and steps apart; errors as in `load_weights`."""
    try:
        return dict(load(path.read_bytes()))
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{path}: not a weight file (safetensors): {error}") from error
