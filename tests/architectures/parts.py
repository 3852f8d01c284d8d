"""What the architectures share: blocks, and weights that are equal on every framework."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from slimbridge.errors import ModelError
from slimbridge.ports import Array, Backend, Model
from slimbridge.zoo.parts import Part, make
from slimbridge.zoo.weights import initial_weights

__all__ = ["Part", "SqueezeExcite", "conv_bn", "conv_bn_act", "gap", "make", "seeded", "with_weights"]


def conv_bn(nn: Any, inputs: int, outputs: int, kernel: Any = 1, **options: Any) -> Any:
    """A convolution without bias and its normalisation; the padding keeps the size unless it is given."""
    padding = kernel // 2 if isinstance(kernel, int) else tuple(side // 2 for side in kernel)
    options = {"padding": padding, "bias": False, **options}
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs))


def conv_bn_act(nn: Any, inputs: int, outputs: int, kernel: Any = 1, act: Any = None, **options: Any) -> Any:
    """`conv_bn` and an activation (a layer class, ReLU unless given)."""
    return nn.Sequential(conv_bn(nn, inputs, outputs, kernel, **options), (act or nn.ReLU)())


def gap(nn: Any, x: Any) -> Any:
    """Mean over space: (N, C, H, W) -> (N, C)."""
    return nn.mean(x, (2, 3))


class SqueezeExcite(Part):
    """A gate for each channel from its mean over space (Hu et al. 2018, figure 3)."""

    def __init__(self, channels: int, squeezed: int, act: Any, gate: Any) -> None:
        super().__init__()
        nn = self.nn
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.act = act()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate()

    def forward(self, x: Any) -> Any:
        return x * self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))


def seeded(name: str, shape: Sequence[int], scale: float = 0.1) -> Array:
    """Normal float32 values that depend on the name and the shape alone."""
    random = np.random.default_rng([zlib.crc32(name.encode()), *shape])
    return (random.standard_normal(tuple(shape)) * scale).astype(np.float32)


def with_weights(backend: Backend, model: Model) -> Model:
    """Equal weights on every backend, no vector constant, so that a wrongly sliced one shows in the output."""
    shapes = {name: array.shape for name, array in backend.read(model).items()}
    return backend.write(model, {name: _weight(name, shape, shapes) for name, shape in shapes.items()})


def _weight(name: str, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]]) -> Array:
    noise = seeded(name, shape)
    layer = name.rpartition(".")[0]
    known = {key: shapes[key] for key in (name, f"{layer}.weight") if key in shapes}
    try:
        start = initial_weights(known, 0)[name]
    except ModelError:  # a parameter outside any layer
        return noise * 5
    if start.ndim == 4 and start.shape[1] == 1:
        return start * np.float32(2)  # gates and smooth activations around 0 halve the signal in every block
    return start + (np.abs(noise) if name.endswith("running_var") else noise * np.float32(start.ndim == 1))
