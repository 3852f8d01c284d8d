"""Checkpoints: all that training needs to go on as if it had never stopped, in one file, written after each epoch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import save

from slimbridge.errors import RunError
from slimbridge.files import write_file
from slimbridge.ports import Array
from slimbridge.report.records import EpochRecord
from slimbridge.weights import load_stored

_HISTORY: TypeAdapter[tuple[EpochRecord, ...]] = TypeAdapter(tuple[EpochRecord, ...])


@dataclass(frozen=True)
class Checkpoint:
    """State after an epoch.

    Attributes:
        weights: canonical name -> array, running statistics included.
        optimizer: the optimizer's slots.
        history: the epochs that are done.
    """

    weights: Mapping[str, Array]
    optimizer: Mapping[str, Array]
    history: tuple[EpochRecord, ...]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint file, all or nothing; RunError when it cannot be written."""
    # Not ascontiguousarray, which would give a 0-d array (an optimizer's step) an axis.
    arrays = {f"w/{name}": np.asarray(array, order="C") for name, array in checkpoint.weights.items()}
    arrays.update({f"o/{name}": np.asarray(array, order="C") for name, array in checkpoint.optimizer.items()})
    history = json.dumps(_HISTORY.dump_python(checkpoint.history, mode="json"))
    arrays["history"] = np.frombuffer(history.encode(), np.uint8)
    write_file(path, save(arrays))


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint, None where there is no file; RunError when it is damaged."""
    if not path.exists():
        return None
    arrays = load_stored(path)
    try:
        history = _HISTORY.validate_json(arrays.pop("history").tobytes())
    except (KeyError, ValidationError) as error:
        raise RunError(f"{path}: not a checkpoint; delete it to train the stage from its start") from error
    weights = {name[2:]: array for name, array in arrays.items() if name.startswith("w/")}
    optimizer = {name[2:]: array for name, array in arrays.items() if name.startswith("o/")}
    return Checkpoint(weights, optimizer, history)
