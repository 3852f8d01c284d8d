"""What the PyTorch tracer follows channels through, proved by a removal, and what it says of a pass that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slimbridge.errors import ModelError
from slimbridge.graph import find_units
from slimbridge.plan import PruneStage
from slimbridge.prune import Pruner
from slimbridge_torch import create

BACKEND = create()
IMAGE = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)


class Net(nn.Module):
    """conv -> whatever `between` does to 8 channels -> conv."""

    def __init__(self, between: Callable[[Any], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.between = between

    def forward(self, x: Any) -> Any:
        return self.b(self.between(torch.relu(self.a(x))))


def halved(model: nn.Module, example: np.ndarray[Any, Any] = IMAGE) -> Any:
    """The model without half its channels; `prune` proves that it gives what zeroed channels give."""
    return Pruner(PruneStage(pruning_ratio=0.5)).prune(BACKEND, model, [example])[0]


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_instance_norms_lose_channels(rank: int, batch: int, tracked: bool) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    norm = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[rank - 1]
    model: Any = nn.Sequential(conv(3, 8, 1), norm(8, affine=True, track_running_stats=tracked), conv(8, 4, 1))
    nn.init.uniform_(model[1].weight)
    nn.init.uniform_(model[1].bias)
    example = np.random.default_rng(1).standard_normal((batch, 3, *(4,) * rank)).astype(np.float32)
    pruned = halved(model, example)
    assert pruned[1].num_features == pruned[0].out_channels == pruned[1].weight.numel() == 4
    assert not tracked or pruned[1].running_var.numel() == 4


def test_an_instance_norm_meets_its_vectors_after_the_norm() -> None:
    graph = BACKEND.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True)), [IMAGE])
    norm, *binaries = [node for node in graph.nodes if node.kind in ("batch_norm", "binary")]
    assert norm.params == {}
    assert [node.attrs["op"] for node in binaries] == ["mul", "add"]
    assert not graph.unknown_ops()


def test_a_norm_whose_scale_is_not_a_plain_parameter_is_unknown() -> None:
    def between(y: Any) -> Any:
        return torch.nn.functional.batch_norm(y, None, None, y.mean((0, 2, 3)), training=True)

    assert BACKEND.trace(Net(between), [IMAGE]).unknown_ops() == ("native_batch_norm in ''",)


FOLLOWED: dict[str, Callable[[Any], Any]] = {
    "flip": lambda y: y.flip((2, 3)),
    "zeros_like": lambda y: torch.where(y > 0.1, y, torch.zeros_like(y)),
    "ones_like": lambda y: y + torch.ones_like(y),
    "full_like": lambda y: y * torch.full_like(y, 2.0),
    "std": lambda y: y - y.std((2, 3), keepdim=True),
    "var_mean": lambda y: y * torch.var_mean(y, (2, 3), keepdim=True)[0],
    "norm": lambda y: nn.functional.normalize(y, dim=2),
}
REFUSED: dict[str, Callable[[Any], Any]] = {
    "flip": lambda y: y.flip(1),
    "flip of the last axis": lambda y: y.permute(0, 2, 3, 1).flip(-1).permute(0, 3, 1, 2),
    "std": lambda y: y - y.std(1, keepdim=True),
    "norm": lambda y: nn.functional.normalize(y, dim=1),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_channels_are_followed_through(name: str) -> None:
    assert halved(Net(FOLLOWED[name])).a.out_channels == 4


@pytest.mark.parametrize("name", REFUSED)
def test_channels_are_frozen_by(name: str) -> None:
    assert find_units(BACKEND.trace(Net(REFUSED[name]), [IMAGE])).groups() == ()


def test_a_literal_that_is_written_into_has_channels_of_its_own() -> None:
    def between(y: Any) -> Any:
        held = torch.zeros_like(y)
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
    model = Net(torch.relu)
    for call in (BACKEND.trace, BACKEND.forward):
        with pytest.raises(ModelError, match=r"a list with one array for each argument of forward.*found ndarray"):
            call(model, IMAGE)
    with pytest.raises(ModelError, match=r"input 0 has the shape \(0, 3, 6, 6\)"):
        BACKEND.trace(model, [IMAGE[:0]])
