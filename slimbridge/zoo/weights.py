"""Initial weights drawn in NumPy, so that every framework starts from the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimbridge.errors import ModelError
from slimbridge.tasks.order import generator

Array = NDArray[Any]


def initial_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    """Float32 arrays for canonical names, each from its own stream of (seed, name): order does not matter.

    * convolutions: normal, standard deviation sqrt(2 / fan), fan = kernel area * outputs (He et al. 2015, eq. 14);
      filters that read one channel, as depthwise ones do, have fan = kernel area (eq. 10), since counting all outputs
      there would shrink the signal to nothing before the running statistics are learnt;
    * linear weights, and all biases but normalisation's: uniform in +-1 / sqrt(fan_in);
    * normalisation: weight 1, bias 0, running mean 0, running variance 1.

    Args:
        shapes: canonical parameter or buffer name -> canonical shape.
        seed: of the whole model.

    Raises:
        ModelError: a name whose role no rule above knows.
    """
    return {name: _initial(name, shape, shapes, seed).astype(np.float32) for name, shape in shapes.items()}


def _initial(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], seed: int) -> Array:
    layer, _, role = name.rpartition(".")
    weight = shapes.get(f"{layer}.weight", ())
    if role in ("running_mean", "running_var"):
        return np.full(shape, float(role == "running_var"))
    if role not in ("weight", "bias") or not weight:
        raise ModelError(f"initial weights: no rule for '{name}' of shape {shape}; known: weight, bias, running_*")
    if len(weight) == 1:
        return np.full(shape, float(role == "weight"))
    random = generator(seed, "initial weights", name)
    if role == "weight" and len(shape) == 4:
        fan = int(np.prod(shape[2:])) * (1 if shape[1] == 1 else shape[0])
        return random.standard_normal(shape) * float(np.sqrt(2.0 / fan))
    bound = 1.0 / float(np.sqrt(np.prod(weight[1:])))
    return random.uniform(-bound, bound, shape)
