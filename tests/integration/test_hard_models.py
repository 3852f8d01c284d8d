"""Models whose channels are easy to get wrong: the pruned one is right, or there is an error; never a wrong model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from slimbridge.errors import ModelError
from slimbridge.parity import relative, tolerance
from slimbridge.plan import PruneStage
from slimbridge.ports import Backend, tensors_in
from slimbridge.prune import Pruner, zeroed
from slimbridge.zoo import initial_weights
from slimbridge.zoo.parts import Part, make

SIZE = 4
IMAGE = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)
PAIR = np.random.default_rng(1).standard_normal((3, 3, SIZE, SIZE)).astype(np.float32)


class Free(Part):
    """Two convolutions and a linear layer, wired by a function."""

    def __init__(self, wire: Callable[..., Any], features: int) -> None:
        super().__init__()
        self.wire = wire
        self.a = self.nn.Conv2d(3, 8, 3, padding=1)
        self.b = self.nn.Conv2d(3, 8, 3, padding=1)
        self.fc = self.nn.Linear(features, 5)

    def forward(self, x: Any) -> Any:
        return self.fc(self.wire(self.nn, self.a(x), self.b(x)))


def gap(nn: Any, x: Any) -> Any:
    return nn.mean(x, (2, 3))


def stacked(nn: Any, a: Any, b: Any) -> Any:
    columns = [nn.reshape(gap(nn, x), (x.shape[0], x.shape[1], 1)) for x in (a, b)]
    return nn.flatten(nn.concat(columns, 2), 1)


def beside(nn: Any, a: Any, b: Any) -> Any:
    return nn.flatten(nn.concat([a, b], 2), 1)


def written_shuffle(nn: Any, a: Any, b: Any) -> Any:
    n, _, h, w = a.shape
    x = nn.transpose(nn.reshape(a, (n, -1, 4, h, w)), (0, 2, 1, 3, 4))
    return gap(nn, nn.reshape(x, (n, -1, h, w)))


def written_halves(nn: Any, a: Any, b: Any) -> Any:
    left, right = nn.split(a, [4, 4], 1)
    return gap(nn, nn.concat([right, left], 1))


def scaled_by_width(nn: Any, a: Any, b: Any) -> Any:
    return gap(nn, nn.relu(a)) * (8.0 / a.shape[1])


def other_for_narrow(nn: Any, a: Any, b: Any) -> Any:
    return gap(nn, nn.relu(a) if a.shape[1] >= 8 else a)


WIRES: dict[str, tuple[Callable[..., Any], int]] = {
    "stacked": (stacked, 16),
    "beside": (beside, 8 * 2 * SIZE * SIZE),
    "written shuffle": (written_shuffle, 8),
    "written halves": (written_halves, 8),
    "scaled by width": (scaled_by_width, 8),
    "other for narrow": (other_for_narrow, 8),
}
HELD = {"scaled by width", "other for narrow"}
"""No channel of `a` can go: what is computed from it depends on its width."""


def output(backend: Backend, model: Any, x: np.ndarray) -> np.ndarray:
    return backend.ops.numpy(tensors_in(backend.forward(model, [x]).output)[0])


@pytest.mark.parametrize("name", WIRES)
def test_right_or_refused(backend: Backend, name: str) -> None:
    wire, features = WIRES[name]
    model = make(backend.nn, Free, wire, features)
    shapes = {key: array.shape for key, array in backend.read(model).items()}
    model = backend.write(model, initial_weights(shapes, 4))
    pruner = Pruner(PruneStage(pruning_ratio=0.5))
    try:
        pruned, decision = pruner.prune(backend, model, [IMAGE])
    except ModelError:
        if not name.startswith("written"):
            raise
        return
    if name in HELD:
        assert {item.layer: item.reason for item in decision.skipped}["a"].startswith("the pruned model is wrong with")
    silent = backend.write(backend.clone(model), zeroed(backend.read(model), decision))
    assert relative(output(backend, pruned, PAIR), output(backend, silent, PAIR)) <= tolerance("removal").value


class Hidden(Part):
    """Depends on its width, beside outputs so large that a norm over all would not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.nn.Conv2d(3, 8, 3, padding=1)
        self.fc = self.nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        h = self.a(x)
        logits = self.fc(gap(self.nn, self.nn.relu(h)) * (8.0 / h.shape[1]))
        return self.nn.concat([logits, logits * 0.0 - 1e9], 1)


class Auxiliary(Part):
    """A second head that runs in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.nn.Conv2d(3, 8, 3, padding=1)
        self.fc = self.nn.Linear(8, 5)
        self.aux = self.nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        h = gap(self.nn, self.a(x))
        return (self.fc(h), self.aux(h)) if self.training else self.fc(h)


@pytest.mark.parametrize(("part", "message"), [(Hidden, "differs"), (Auxiliary, "does not run in train mode")])
def test_what_one_pass_would_not_show(backend: Backend, part: type[Part], message: str) -> None:
    model = make(backend.nn, part)
    shapes = {key: array.shape for key, array in backend.read(model).items()}
    model = backend.write(model, initial_weights(shapes, 4))
    for image in (PAIR, np.zeros_like(PAIR)):
        with pytest.raises(ModelError, match=message):
            Pruner(PruneStage(pruning_ratio=0.5)).prune(backend, model, [image])


class Odd(Part):
    """Random in eval mode, with entries that are minus infinity and an output that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.nn.Conv2d(3, 8, 3, padding=1)
        self.drop = self.nn.Dropout(0.5)
        self.fc = self.nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        self.drop.train()
        logits = self.fc(gap(self.nn, self.a(self.drop(x))))
        return self.nn.concat([logits, logits * 0.0 - float("inf")], 1) if not self.training else logits


def test_random_and_infinite_outputs_are_no_fault(backend: Backend) -> None:
    model = make(backend.nn, Odd)
    pruned, _ = Pruner(PruneStage(pruning_ratio=0.5)).prune(backend, model, [PAIR])
    assert backend.read(pruned)["a.weight"].shape[0] == 4
