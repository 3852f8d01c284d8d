"""Small nets, one for each way in which channels can be coupled; built on any backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slimbridge.ports import Backend, Model
from slimbridge.zoo.parts import Part, make
from slimbridge.zoo.weights import initial_weights

WIDTH = 8
SIZE = 6
CLASSES = 5


class Net(Part):
    """A body and its head: mean over space, or flattening, and a linear layer."""

    def __init__(self, body: Any, width: int, head: str = "mean") -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.fc = self.nn.Linear(width, CLASSES)

    def forward(self, x: Any) -> Any:
        """(N, 3, SIZE, SIZE) -> (N, CLASSES)."""
        x = self.body(x)
        return self.fc(self.nn.mean(x, (2, 3)) if self.head == "mean" else self.nn.flatten(x, 1))


class Residual(Part):
    """A block with an identity shortcut, and one with a convolution on the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        nn = self.nn
        self.stem = conv_bn(nn, 3, WIDTH)
        self.first = conv_bn(nn, WIDTH, WIDTH)
        self.second = conv_bn(nn, WIDTH, 2 * WIDTH)
        self.shortcut = nn.Conv2d(WIDTH, 2 * WIDTH, 1)

    def forward(self, x: Any) -> Any:
        """Two residual additions."""
        x = self.nn.relu(self.stem(x))
        x = self.nn.relu(x + self.first(x))
        return self.nn.relu(self.second(x) + self.shortcut(x))


class Concat(Part):
    """Two branches of unequal width, joined; one of them is used twice; then depthwise."""

    def __init__(self) -> None:
        super().__init__()
        nn = self.nn
        self.left = conv_bn(nn, 3, WIDTH)
        self.right = nn.Conv2d(3, WIDTH // 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2 * WIDTH)
        self.depthwise = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1, groups=2 * WIDTH)
        self.last = nn.Conv2d(2 * WIDTH, WIDTH, 1)

    def forward(self, x: Any) -> Any:
        """Concatenation along channels, right branch on both sides of the left one."""
        right = self.right(x)
        x = self.nn.concat([right, self.left(x), right], 1)
        return self.last(self.nn.relu(self.depthwise(self.norm(x))))


class Shuffle(Part):
    """Grouped convolution, channel shuffle, grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        nn = self.nn
        self.stem = conv_bn(nn, 3, WIDTH)
        self.first = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(2 * WIDTH)
        self.second = nn.Conv2d(2 * WIDTH, WIDTH, 1, groups=4)

    def forward(self, x: Any) -> Any:
        """Blocks of channels interleaved by reshape, transpose, reshape."""
        x = self.norm(self.first(self.nn.relu(self.stem(x))))
        n, c, h, w = x.shape
        x = self.nn.reshape(x, (n, 2, c // 2, h, w))
        x = self.nn.reshape(self.nn.transpose(x, (0, 2, 1, 3, 4)), (n, c, h, w))
        return self.second(self.nn.relu(x))


class Shared(Part):
    """One convolution that runs twice, with a normalisation of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        nn = self.nn
        self.stem = conv_bn(nn, 3, WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(WIDTH)
        self.norm2 = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Any) -> Any:
        """The same weights at two depths: inputs and outputs are one set of channels."""
        x = self.nn.relu(self.stem(x))
        x = self.nn.relu(self.norm1(self.conv(x)))
        return self.nn.relu(self.norm2(self.conv(x)))


class Halves(Part):
    """Channels split in two equal halves; one is worked on, and both are joined again."""

    def __init__(self) -> None:
        super().__init__()
        nn = self.nn
        self.stem = conv_bn(nn, 3, 2 * WIDTH)
        self.branch = conv_bn(nn, WIDTH, WIDTH)
        self.last = nn.Conv2d(2 * WIDTH, WIDTH, 1)

    def forward(self, x: Any) -> Any:
        """Split by a computed size, so that the halves follow the width."""
        x = self.nn.relu(self.stem(x))
        half = x.shape[1] // 2
        left, right = self.nn.split(x, [half, half], 1)
        return self.nn.relu(self.last(self.nn.concat([left, self.branch(right)], 1)))


class Gate(Part):
    """A gate for each channel and a map for each place: what multiplies channels, and what must not couple them."""

    def __init__(self) -> None:
        super().__init__()
        nn = self.nn
        self.stem = conv_bn(nn, 3, WIDTH)
        self.squeeze = nn.Conv2d(WIDTH, WIDTH // 2, 1)
        self.excite = nn.Conv2d(WIDTH // 2, WIDTH, 1)
        self.place = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, x: Any) -> Any:
        """Squeeze and excitation, then one map times all channels."""
        x = self.nn.relu(self.stem(x))
        x = x * self.excite(self.nn.relu(self.squeeze(self.nn.mean(x, (2, 3), keepdims=True))))
        return x * self.place(x)


class JoinedSum(Part):
    """Two branches joined, and added to a third of their whole width: layers that share a group unequally."""

    def __init__(self) -> None:
        super().__init__()
        nn = self.nn
        self.narrow = conv_bn(nn, 3, WIDTH // 4)
        self.left = conv_bn(nn, 3, WIDTH)
        self.whole = conv_bn(nn, 3, WIDTH + WIDTH // 4)
        self.last = nn.Conv2d(WIDTH + WIDTH // 4, WIDTH, 1)

    def forward(self, x: Any) -> Any:
        """Concatenation, then addition."""
        return self.nn.relu(self.last(self.nn.concat([self.narrow(x), self.left(x)], 1) + self.whole(x)))


def conv_bn(nn: Any, inputs: int, outputs: int) -> Any:
    """A 3x3 convolution without bias and its normalisation."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))


def _chain(nn: Any) -> Any:
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, 2, 0),
        nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1),
        nn.BatchNorm2d(2 * WIDTH),
        nn.ReLU6(),
    )


def _depthwise(nn: Any) -> Any:
    return nn.Sequential(
        conv_bn(nn, 3, WIDTH),
        nn.ReLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        nn.Conv2d(WIDTH, 2 * WIDTH, 1),
        nn.Conv2d(2 * WIDTH, 4 * WIDTH, 3, padding=1, groups=2 * WIDTH),
    )


def _grouped(nn: Any) -> Any:
    return nn.Sequential(
        conv_bn(nn, 3, WIDTH),
        nn.ReLU(),
        nn.Conv2d(WIDTH, 3 * WIDTH, 3, padding=1, groups=2),
        nn.BatchNorm2d(3 * WIDTH),
        nn.ReLU(),
        nn.Conv2d(3 * WIDTH, WIDTH, 1),
    )


def _transposed(nn: Any) -> Any:
    return nn.Sequential(
        conv_bn(nn, 3, WIDTH),
        nn.GELU(),
        nn.ConvTranspose2d(WIDTH, 2 * WIDTH, 2, stride=2, bias=False),
        nn.BatchNorm2d(2 * WIDTH),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(2 * WIDTH, WIDTH, 3, padding=1, groups=2),
        nn.Hardswish(),
        nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
        nn.Conv2d(WIDTH, WIDTH, 1),
    )


def _group_norm(nn: Any) -> Any:
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1),
        nn.GroupNorm(4, WIDTH),
        nn.SiLU(),
        nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1),
        nn.GroupNorm(8, 2 * WIDTH),
        nn.Sigmoid(),
        nn.Conv2d(2 * WIDTH, WIDTH, 1),
        nn.GroupNorm(1, WIDTH),
        nn.Hardsigmoid(),
    )


@dataclass(frozen=True)
class Topology:
    """A named net: `make_body` from a backend's layers, the width at the head, the head's form."""

    name: str
    make_body: Callable[[Any], Any]
    width: int
    head: str = "mean"

    def build(self, backend: Backend) -> Model:
        """The net with weights that are equal on every backend; its statistics are not the trivial ones."""
        model = make(backend.nn, Net, self.make_body(backend.nn), self.width, self.head)
        weights = initial_weights({name: array.shape for name, array in backend.read(model).items()}, 3)
        return backend.write(model, {name: _lively(name, array) for name, array in weights.items()})


def _lively(name: str, array: Any) -> Any:
    """Shift what is constant after initialisation, so that a wrongly sliced vector shows."""
    import numpy as np

    ramp = np.linspace(-0.4, 0.4, array.size, dtype=np.float32).reshape(array.shape)
    is_vector = array.ndim == 1
    return (array + ramp + (0.1 if name.endswith("bias") else 0)).astype(np.float32) if is_vector else array


TOPOLOGIES: tuple[Topology, ...] = (
    Topology("chain", _chain, 2 * WIDTH),
    Topology("flatten head", _chain, 2 * WIDTH * (SIZE // 2) ** 2, "flatten"),
    Topology("residual", lambda nn: make(nn, Residual), 2 * WIDTH),
    Topology("concat", lambda nn: make(nn, Concat), WIDTH),
    Topology("concat and sum", lambda nn: make(nn, JoinedSum), WIDTH),
    Topology("depthwise", _depthwise, 4 * WIDTH),
    Topology("grouped", _grouped, WIDTH),
    Topology("channel shuffle", lambda nn: make(nn, Shuffle), WIDTH),
    Topology("shared layer", lambda nn: make(nn, Shared), WIDTH),
    Topology("equal split", lambda nn: make(nn, Halves), WIDTH),
    Topology("transposed", _transposed, WIDTH),
    Topology("group norm", _group_norm, WIDTH),
    Topology("gates", lambda nn: make(nn, Gate), WIDTH),
)
