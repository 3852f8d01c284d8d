"""Nets of a few channels, written once for both frameworks, and images that they learn at once."""

from __future__ import annotations

from typing import Any

import numpy as np

import slimbridge as sb
from slimbridge.discovery import get_backend
from slimbridge.ports import Array, Backend, Model, tensors_in
from slimbridge.report.records import LatencyRecord
from slimbridge.tasks import Data, Split
from tests.architectures.parts import Part, make, with_weights

SIZE = 8
TRAIN: dict[str, Any] = {"epochs": 1, "batch_size": 32, "learning_rate": 0.02}


class Plain(Part):
    """Two convolutions with BatchNorm, a pool, a linear layer."""

    def __init__(self, a: int = 12, b: int = 10) -> None:
        super().__init__()
        nn = self.nn
        self.a, self.na = nn.Conv2d(1, a, 3, padding=1), nn.BatchNorm2d(a)
        self.b, self.nb = nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b)
        self.act, self.pool, self.last = nn.ReLU(), nn.MaxPool2d(4, 4), nn.Linear(b * 4, 2)

    def forward(self, x: Any) -> Any:
        x = self.act(self.na(self.a(x)))
        return self.last(self.nn.flatten(self.pool(self.act(self.nb(self.b(x)))), 1))


class NoNorm(Part):
    """Two convolutions and a linear layer, nothing that normalises."""

    def __init__(self) -> None:
        super().__init__()
        nn = self.nn
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.act, self.pool, self.last = nn.ReLU(), nn.MaxPool2d(4, 4), nn.Linear(6 * 4, 2)

    def forward(self, x: Any) -> Any:
        return self.last(self.nn.flatten(self.pool(self.act(self.b(self.act(self.a(x))))), 1))


class UpAndGroups(Part):
    """A GroupNorm of 4 groups, a convolution down, a transposed one up."""

    def __init__(self) -> None:
        super().__init__()
        nn = self.nn
        self.a, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.down, self.up = nn.Conv2d(8, 6, 2, stride=2), nn.ConvTranspose2d(6, 8, 2, stride=2)
        self.act, self.pool, self.last = nn.ReLU(), nn.MaxPool2d(4, 4), nn.Linear(8 * 4, 2)

    def forward(self, x: Any) -> Any:
        x = self.down(self.act(self.norm(self.a(x))))
        return self.last(self.nn.flatten(self.pool(self.act(self.up(self.act(x)))), 1))


class Attention(Part):
    """Four heads of four over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        nn = self.nn
        self.heads, self.head_dim = 4, 4
        self.embed = nn.Linear(SIZE, 16)
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))
        self.norm, self.last = nn.LayerNorm(16), nn.Linear(16, 2)

    def forward(self, x: Any) -> Any:
        nn = self.nn
        x = self.embed(nn.reshape(x, (-1, SIZE, SIZE)))

        def split(y: Any) -> Any:
            return nn.transpose(nn.reshape(y, (-1, SIZE, self.heads, self.head_dim)), (0, 2, 1, 3))

        q, k, v = (split(layer(x)) for layer in (self.q, self.k, self.v))
        weights = nn.softmax(nn.matmul(q, nn.transpose(k, (0, 1, 3, 2))) * self.head_dim**-0.5, -1)
        joined = nn.reshape(nn.transpose(nn.matmul(weights, v), (0, 2, 1, 3)), (-1, SIZE, self.heads * self.head_dim))
        return self.last(nn.mean(self.norm(x + self.proj(joined)), (1,)))


def net(backend: Backend, part: type[Part] = Plain, *widths: int) -> Model:
    """The net with weights that are equal on every backend."""
    return with_weights(backend, make(backend.nn, part, *widths))


def other(backend: Backend) -> Backend:
    """The other framework."""
    return get_backend("paddle" if backend.name == "torch" else "torch")


def striped(count: int = 96) -> Split:
    """Images with horizontal or vertical stripes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count)
    rows = np.tile((np.arange(SIZE) % 2)[:, None], (1, SIZE)).astype(np.float32)
    images = np.where(labels[:, None, None] == 0, rows, rows.T)[:, None]
    noisy = (images + 0.3 * rng.standard_normal(images.shape)).astype(np.float32)
    return Split(noisy, labels.astype(np.int64))


DATA = Data(striped(), striped(32), name="stripes")


def steady_latency(backend: Backend, model: Model, *_: Any) -> LatencyRecord:
    """In place of a measured one: a microsecond for each entry of a parameter or statistic."""
    entries = sum(array.size for array in backend.read(model).values())
    return LatencyRecord(median_ms=entries / 1000, spread_ms=0, runs=1, batch=1, threads=1, how="counted")


def outputs(model: Model) -> Array:
    """On eight images."""
    side = sb.backend_of(model)
    return side.ops.numpy(tensors_in(side.forward(model, [DATA.test.inputs[:8]]).output)[0])
