"""Small wirings of a few layers, each hard in one way: what its channels meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.architectures.parts import Part


class Net(Part):
    """Two convolutions of 3 -> 8 channels, a linear layer 8 -> 5, and more layers of the case; wired by a function."""

    def __init__(self, wire: Callable[..., Any], more: Callable[[Any], Mapping[str, Any]]) -> None:
        super().__init__()
        nn = self.nn
        self.wire = wire
        self.a, self.b = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))
        self.fc = nn.Linear(8, 5)
        for name, layer in more(nn).items():
            setattr(self, name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.wire(self.nn, self, *inputs)

    def head(self, x: Any) -> Any:
        return self.fc(self.nn.mean(x, (2, 3)))


def twice_joined(nn: Any, net: Any, x: Any) -> Any:
    y = nn.relu(net.a(x))
    return net.head(net.c(nn.concat([y, y], 1)))


def into_an_output_too(nn: Any, net: Any, x: Any) -> Any:
    y = net.a(x)
    return y, net.head(nn.relu(net.b(x)) + nn.relu(net.c(y)))


def channels_last_mean(nn: Any, net: Any, x: Any) -> Any:
    return net.fc(nn.mean(nn.transpose(nn.relu(net.a(x)), (0, 2, 3, 1)), (1, 2)))


def depthwise_behind_join(nn: Any, net: Any, x: Any) -> Any:
    return net.head(net.c(nn.relu(net.depthwise(nn.concat([net.a(x), net.b(x)], 1)))))


def one_map(nn: Any, net: Any, x: Any) -> Any:
    y = nn.relu(net.a(x))
    return net.head(y * nn.sigmoid(net.c(y)))


def through_one_channel(nn: Any, net: Any, x: Any) -> Any:
    return net.head(net.d(nn.relu(net.c(nn.relu(net.a(x))))))


def own_parameters(nn: Any, net: Any, x: Any) -> Any:
    return net.head((net.a(x) * net.scale + net.table) * net.place * net.factor)


def with_spare(nn: Any, net: Any, x: Any) -> Any:
    return net.head(net.a(x))


def two_in_three_out(nn: Any, net: Any, x: Any, z: Any) -> Any:
    y = net.a(x)
    gate = nn.reshape(nn.sigmoid(net.c(z)), (x.shape[0], -1, 1, 1))
    return {"scores": net.head(y * gate), "maps": [net.d(y), net.d(net.b(x))]}


def siamese(nn: Any, net: Any, x: Any, z: Any) -> Any:
    return net.head(nn.relu(net.c(net.a(x))) - nn.relu(net.c(net.b(z))))


def strided(nn: Any, net: Any, x: Any) -> Any:
    y = nn.relu(net.a(x))
    return net.head(nn.relu(net.c(y) + net.pool(y)))


def own_halves(nn: Any, net: Any, x: Any) -> Any:
    y = nn.concat([net.a(x), net.b(x)], 1)
    left, right = nn.split(y, [y.shape[1] // 2] * 2, 1)
    return net.head(net.c(right) - net.d(left))


def halved_stem(nn: Any, net: Any, x: Any) -> Any:
    y = nn.relu(net.c(net.a(x)))
    left, right = nn.split(y, [y.shape[1] // 2] * 2, 1)
    return net.head(left * nn.sigmoid(right))


def pixel_shuffle(nn: Any, net: Any, x: Any) -> Any:
    y = net.c(nn.relu(net.a(x)))
    n, c, h, w = y.shape
    y = nn.transpose(nn.reshape(y, (n, c // 4, 2, 2, h, w)), (0, 1, 4, 2, 5, 3))
    return net.head(nn.reshape(y, (n, c // 4, 2 * h, 2 * w)))


def squeeze_excite(nn: Any, net: Any, x: Any) -> Any:
    y = nn.relu(net.a(x))
    gate = nn.sigmoid(net.d(nn.relu(net.c(nn.mean(y, (2, 3))))))
    return net.head(y * nn.reshape(gate, (y.shape[0], y.shape[1], 1, 1)))


def only_an_output(nn: Any, net: Any, x: Any) -> Any:
    return net.head(net.a(x)), nn.sigmoid(net.b(x))


def beside_the_input(nn: Any, net: Any, x: Any) -> Any:
    return net.head(net.c(nn.concat([net.a(x), x], 1)))


def padded_shortcut(nn: Any, net: Any, x: Any) -> Any:
    y = net.a(x)
    return net.last(nn.mean(nn.pad(y, [(0, 8), (0, 0), (0, 0)]) + net.c(y), (2, 3)))


def centred(nn: Any, net: Any, x: Any) -> Any:
    y = net.a(x)
    return net.head(net.b(x)) + net.last(nn.mean(y - nn.mean(y, 1, keepdims=True), (2, 3)))


def softmax_of_channels(nn: Any, net: Any, x: Any) -> Any:
    return net.head(net.b(x)) + net.last(nn.mean(nn.softmax(net.a(x), 1), (2, 3)))


def gram(nn: Any, net: Any, x: Any) -> Any:
    rows = nn.flatten(net.a(x), 2)
    return net.last(nn.flatten(nn.matmul(rows, nn.transpose(rows, (0, 2, 1))), 1)) + net.head(net.b(x))


def group_normalised(nn: Any, net: Any, x: Any) -> Any:
    return net.head(net.d(nn.relu(net.norm(net.c(x)))))


def layer_normalised(nn: Any, net: Any, x: Any) -> Any:
    y = net.norm(nn.transpose(net.a(x), (0, 2, 3, 1)))
    return net.head(net.b(x)) + net.last(nn.mean(y, (1, 2)))


def upsampled(nn: Any, net: Any, x: Any) -> Any:
    return net.head(nn.upsample(net.up(nn.relu(net.a(x))), 2) + net.d(net.b(nn.upsample(x, 4))))


def one_scale(nn: Any, net: Any, x: Any) -> Any:
    return net.head(nn.relu(net.a(x) * net.scale)), net.other(nn.mean(net.scale - net.b(x), (2, 3)))


def across_a_join(nn: Any, net: Any, x: Any) -> Any:
    return net.head(net.c(net.norm(nn.concat([net.a(x), net.d(x)], 1))))


def group_normalised_sum(nn: Any, net: Any, x: Any) -> Any:
    return net.head(net.norm(net.a(x)) + net.b(x))


def every_second(nn: Any, net: Any, x: Any) -> Any:
    return net.head(net.b(x)) + net.last(nn.mean(net.a(x)[:, ::2], (2, 3)))


def attention_over_places(nn: Any, net: Any, x: Any) -> Any:
    q, k, v = (nn.flatten(y, 2) for y in (net.a(x), net.b(x), net.c(x)))
    weights = nn.softmax(nn.matmul(nn.transpose(q, (0, 2, 1)), k) * 0.3, -1)
    return net.fc(nn.mean(nn.matmul(weights, nn.transpose(v, (0, 2, 1))), 1))


def single_channel_output(nn: Any, net: Any, x: Any) -> Any:
    return net.c(nn.relu(net.a(x)))
