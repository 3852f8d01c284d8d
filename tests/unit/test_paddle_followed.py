"""What the Paddle tracer follows channels through, proved by a removal, and what it says of a pass that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is an optional extra")

import slimbridge_paddle  # noqa: E402
from slimbridge.errors import ModelError  # noqa: E402
from slimbridge.graph import find_units  # noqa: E402
from slimbridge.plan import PruneStage  # noqa: E402
from slimbridge.prune import Pruner  # noqa: E402

nn = paddle.nn
F = paddle.nn.functional
BACKEND = slimbridge_paddle.create()
IMAGE = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)


class Net(nn.Layer):
    """conv -> whatever `between` does to 8 channels -> conv."""

    def __init__(self, between: Callable[[Any], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2D(3, 8, 3), nn.Conv2D(8, 4, 1)
        self.between = between

    def forward(self, x: Any) -> Any:
        return self.b(self.between(F.relu(self.a(x))))


def halved(model: Any, example: Any = IMAGE) -> Any:
    """The model without half its channels; `prune` proves that it gives what zeroed channels give."""
    return Pruner(PruneStage(pruning_ratio=0.5)).prune(BACKEND, model, [example])[0]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_instance_norms_lose_channels(rank: int) -> None:
    conv = (nn.Conv1D, nn.Conv2D, nn.Conv3D)[rank - 1]
    norm = (nn.InstanceNorm1D, nn.InstanceNorm2D, nn.InstanceNorm3D)[rank - 1]
    model = nn.Sequential(conv(3, 8, 1), norm(8), conv(8, 4, 1))
    example = np.random.default_rng(1).standard_normal((2, 3, *(4,) * rank)).astype(np.float32)
    graph = BACKEND.trace(model, [example])
    found = [dict(node.params) for node in graph.nodes if node.kind == "batch_norm"]
    assert found == [{"weight": "1.scale", "bias": "1.bias"}]
    pruned = halved(model, example)
    assert pruned[1]._num_features == 4
    assert pruned[1].scale.shape == pruned[1].bias.shape == [4]


FOLLOWED: dict[str, Callable[[Any], Any]] = {
    "flip": lambda y: y.flip([2, 3]),
    "zeros_like": lambda y: paddle.where(y > 0.1, y, paddle.zeros_like(y)),
    "ones_like": lambda y: y + paddle.ones_like(y),
    "repeat_interleave": lambda y: y.repeat_interleave(2, 2),
    "norm": lambda y: F.normalize(y, axis=2),
    "prelu": lambda y: F.prelu(y - 1, paddle.full([1], 0.25)),
    "prelu of a tensor": lambda y: F.prelu(y - 1, SLOPE),
}
SLOPE = paddle.to_tensor([0.25])
REFUSED: dict[str, Callable[[Any], Any]] = {
    "flip": lambda y: y.flip(1),
    "flip of the last axis": lambda y: y.transpose([0, 2, 3, 1]).flip(-1).transpose([0, 3, 1, 2]),
    "repeat_interleave": lambda y: y.repeat_interleave(2, 1)[:, :8],
    "norm": lambda y: F.normalize(y, axis=1),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_channels_are_followed_through(name: str) -> None:
    assert halved(Net(FOLLOWED[name])).a.weight.shape[0] == 4


@pytest.mark.parametrize("name", REFUSED)
def test_channels_are_frozen_by(name: str) -> None:
    assert find_units(BACKEND.trace(Net(REFUSED[name]), [IMAGE])).groups() == ()


def test_a_literal_that_is_written_into_has_channels_of_its_own() -> None:
    def between(y: Any) -> Any:
        held = paddle.zeros_like(y)
        held[:, 0] = 1.0
        return y + held

    assert find_units(BACKEND.trace(Net(between), [IMAGE])).groups() == ()


class OwnError(Exception):
    """No child of Python's usual errors."""


def failing(y: Any) -> Any:
    raise OwnError("a reason")


def test_an_error_of_the_users_own_is_told_in_one_line() -> None:
    with pytest.raises(ModelError, match=r"^[^\n]*OwnError: a reason$"):
        BACKEND.trace(Net(failing), [IMAGE])


def test_an_array_in_place_of_a_list_and_an_empty_batch_are_refused() -> None:
    model = Net(F.relu)
    for call in (BACKEND.trace, BACKEND.forward):
        with pytest.raises(ModelError, match=r"a list with one array for each argument of forward.*found ndarray"):
            call(model, IMAGE)
    with pytest.raises(ModelError, match=r"input 0 has the shape \(0, 3, 6, 6\)"):
        BACKEND.trace(model, [IMAGE[:0]])


def test_bfloat16_is_refused() -> None:
    model = Net(F.relu)
    arrays = BACKEND.read(model)
    model.bfloat16()
    calls: list[Callable[[], Any]] = [
        lambda: BACKEND.read(model),
        lambda: BACKEND.write(model, arrays),
        lambda: BACKEND.trace(model, [IMAGE]),
        lambda: BACKEND.forward(model, [IMAGE]),
    ]
    for call in calls:
        with pytest.raises(ModelError, match="holds a bfloat16 tensor; float32 and float64 are supported"):
            call()
    model.to(dtype="float32")
    assert BACKEND.read(model).keys() == arrays.keys()
