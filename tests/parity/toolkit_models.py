"""Models that toolkits and our own code both cut, each traced once, and the two ways to ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import paddle
from paddle.vision import models as vision

from slimbridge import zoo
from slimbridge.decisions import PruneDecision
from slimbridge.discovery import get_backend
from slimbridge.graph import Graph, Units, find_units
from slimbridge.plan import PruneStage, SparsifyStage
from slimbridge.ports import Array, Backend, Model, NativeRequest
from slimbridge.prune.evidence import Evidence
from slimbridge.prune.native import native_masks
from slimbridge.prune.pruner import Pruner
from slimbridge.prune.sparsifier import Sparsifier

Kept = Mapping[str, tuple[int, ...]]
Masks = Mapping[str, Array]


@dataclass(frozen=True)
class Net:
    """A model with its graph, traced once."""

    backend: Backend
    model: Model
    image: Array
    graph: Graph
    units: Units
    weights: Mapping[str, Array]

    @classmethod
    def of(cls, backend: Backend, model: Model, side: int) -> Net:
        image = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
        graph = backend.trace(model, [image])
        return cls(backend, model, image, graph, find_units(graph), backend.read(model))

    def theirs(self, pruner: str, ratio: float, **options: Any) -> Kept:
        """Weight -> output channels that stay, of the weights that lose any."""
        return self.backend.native(self.model, NativeRequest(pruner, ratio, options=options), [self.image]).kept

    def decision(self, **stage: Any) -> PruneDecision:
        return Pruner(PruneStage(**stage)).decide(self.graph, self.weights)

    def ours(self, **stage: Any) -> Kept:
        """The same of our decision; depthwise convolutions, which follow the layer before them, are among them."""
        layers = {node.params["weight"] for node in self.graph.layer_nodes()}
        kept = self.decision(**stage).kept
        return {name: axes[0] for name, axes in kept.items() if name in layers and 0 in axes}


def random_model(backend: Backend, name: str, **options: Any) -> Model:
    """A model of the zoo with weights that are no start values, so that BatchNorm's matter and no two are equal."""
    model = zoo.build(name, backend, 10, seed=1, width=8, **options)
    random = np.random.default_rng(5)
    arrays = {key: random.standard_normal(array.shape) for key, array in backend.read(model).items()}
    positive = {key: np.abs(array) for key, array in arrays.items() if key.endswith("running_var")}
    return backend.write(model, {**arrays, **positive})


@cache
def of_the_zoo(backend: str, name: str) -> Net:
    side = get_backend(backend)
    return Net.of(side, random_model(side, name), 8 if name.endswith("_small") else 32)


@cache
def of_paddle_vision(name: str) -> Net:
    side = get_backend("paddle")
    side.seed(0)
    scale = {"scale": 0.25} if name.startswith("mobilenet") else {}
    return Net.of(side, getattr(vision, name)(num_classes=4, **scale), 32)


class Joined(paddle.nn.Layer):
    """Two convolutions whose channels a concat joins, one behind it, and a head of one of two kinds."""

    def __init__(self, mean: bool = False) -> None:
        super().__init__()
        self.left, self.right = paddle.nn.Conv2D(3, 6, 3), paddle.nn.Conv2D(3, 4, 3)
        self.behind = paddle.nn.Conv2D(10, 8, 3)
        self.fc = paddle.nn.Linear(8, 4)
        self.mean = mean

    def forward(self, x: Any) -> Any:
        x = self.behind(paddle.concat([self.left(x), self.right(x)], 1))
        x = x.mean([2, 3]) if self.mean else paddle.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(x)


def native_stage(pruner: str, ratio: float = 0.5, **stage: Any) -> PruneStage:
    options = stage.pop("options", {})
    return PruneStage(engine="native", native={"pruner": pruner, "options": options}, pruning_ratio=ratio, **stage)


def prune(net: Net, stage: PruneStage) -> tuple[Model, PruneDecision]:
    return Pruner(stage).prune(net.backend, net.model, [net.image])


def native_mask(net: Net, pruner: str, sparsity: float, **options: Any) -> Masks:
    stage = SparsifyStage(engine="native", native={"pruner": pruner, "options": options}, sparsity=sparsity)
    decision = native_masks(stage, net.backend, net.model, [net.image])
    assert decision.importance == pruner and decision.sparsity == sparsity and not decision.skipped
    return {name: mask.array() for name, mask in decision.masks.items()}


def own_mask(net: Net, **stage: Any) -> Masks:
    decision = Sparsifier(SparsifyStage(**stage), 0).decide(
        net.backend.layers(net.model), net.graph, net.weights, Evidence()
    )
    return {name: mask.array() for name, mask in decision.masks.items()}


def same_masks(found: Masks, expected: Masks) -> bool:
    return set(found) == set(expected) and all(np.array_equal(found[name], expected[name]) for name in expected)
