"""Under a preset our pruner takes the channels that the toolkit's own pruner takes: PaddleSlim 2.6.0, Torch-Pruning 1.6.1.

Each toolkit traces, rates and cuts the model by itself (`Backend.native`); what it kept is compared with our decision
layer by layer. Where the two differ by intention a table or a test says how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import paddle
import pytest
import torch
from paddle.vision import models as vision

from slimbridge import zoo
from slimbridge.decisions import PruneDecision
from slimbridge.discovery import get_backend
from slimbridge.errors import BackendError, ModelError
from slimbridge.graph import Graph, Units, find_units
from slimbridge.plan import PruneStage
from slimbridge.ports import Array, Backend, Model, NativeRequest
from slimbridge.prune.pruner import Pruner
from slimbridge_paddle import _compat

pytestmark = pytest.mark.filterwarnings("ignore:`product` is deprecated:DeprecationWarning")
Kept = Mapping[str, tuple[int, ...]]


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
        """Weight -> output channels that stay, of the weights that lose any; a second cut of them would show."""
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


# PaddleSlim

L1, L2, FPGM = (f"paddleslim.{name}FilterPruner" for name in ("L1Norm", "L2Norm", "FPGM"))
IMPORTANCES = {L1: "l1_norm", L2: "l2_norm", FPGM: "fpgm"}

LAST_OF_MOBILENET_V2 = "its leaves: the mask that Dropout makes is read by nobody, so this counts as the last layer"
LINEAR = "prune_type 'conv': only weights with four axes lead a group"
LEFT: Mapping[str, Mapping[str, str]] = {
    "mobilenet_v2": {"features.18.0": LAST_OF_MOBILENET_V2},
    "vgg11": {"classifier.0": LINEAR, "classifier.3": LINEAR},
}
"""Model -> layers that we prune and PaddleSlim 2.6.0 leaves alone -> why it does. All other layers are compared."""


def assert_paddleslim_agrees(net: Net, name: str, pruner: str, ratio: float) -> None:
    theirs = net.theirs(pruner, ratio)
    left = LEFT.get(name, {})
    stage = {"preset": "paddleslim", "importance": IMPORTANCES[pruner], "pruning_ratio": ratio}
    assert set(net.ours(**stage)) - set(theirs) == {f"{layer}.weight" for layer in left}
    assert theirs == net.ours(**stage, ignored_layers=tuple(left))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2"])
def test_paddleslim_on_the_models_of_paddle_vision(name: str) -> None:
    assert_paddleslim_agrees(of_paddle_vision(name), name, L1, 0.4)


@pytest.mark.parametrize(("pruner", "ratio"), [(L1, 0.5), (L2, 0.4)])
@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "vgg11"])
def test_paddleslim_on_the_zoo(name: str, pruner: str, ratio: float) -> None:
    assert_paddleslim_agrees(of_the_zoo("paddle", name), name, pruner, ratio)


RESNETS = [("resnet18", L1, 0.5), ("resnet18", L2, 0.4), ("resnet18", FPGM, 0.4), ("resnet50", L1, 0.4)]


@pytest.mark.parametrize(("name", "pruner", "ratio"), RESNETS)
def test_paddleslim_where_layers_run_in_another_order_than_they_are_defined(
    name: str, pruner: str, ratio: float
) -> None:
    """The zoo's blocks run the shortcut's convolution first and define it last."""
    assert_paddleslim_agrees(of_the_zoo("paddle", name), name, pruner, ratio)


def masters(net: Net) -> dict[str, set[str]]:
    """PaddleSlim's groups: layer whose weight is rated -> layers that lose outputs with it."""
    copy = net.backend.clone(net.model)
    paths = {p.name: key.rpartition(".")[0] for key, p in copy.named_parameters() if p.ndim == 4}
    with _compat.paddleslim_pruning() as pruning:
        groups = list(pruning.L1NormFilterPruner(copy, [net.image]).collections)
    members = {paths[g.master_name]: [d for d in g.all_pruning_details() if d.axis == 0] for g in groups}
    return {master: {paths[d.name] for d in found if d.name in paths} for master, found in members.items()}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_paddleslims_master_is_the_first_of_its_group_to_be_defined(name: str) -> None:
    net = of_the_zoo("paddle", name)
    order = [layer.path for layer in net.backend.layers(net.model)]
    found = masters(net)
    assert len(found) == len(net.units.groups()) - len(LEFT.get(name, {}))
    for master, members in found.items():
        assert master == min(members, key=order.index)


def test_paddleslim_prunes_the_last_convolution_where_no_dropout_follows_it() -> None:
    side = get_backend("paddle")
    net = Net.of(side, random_model(side, "mobilenet_v2", dropout=0.0), 32)
    assert net.theirs(L1, 0.4) == net.ours(preset="paddleslim", importance="l1_norm", pruning_ratio=0.4)


class Joined(paddle.nn.Layer):  # type: ignore[misc, unused-ignore]
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


def test_paddleslim_does_not_prune_what_a_concat_joins() -> None:
    net = Net.of(get_backend("paddle"), Joined(), 8)
    stage = {"preset": "paddleslim", "pruning_ratio": 0.5}
    theirs = net.theirs(L1, 0.5)
    assert set(net.ours(**stage)) - set(theirs) == {"left.weight", "right.weight"}
    assert theirs == net.ours(**stage, ignored_layers=("left", "right"))


# Torch-Pruning

ZOO = ("resnet18_small", "resnet50_small", "mobilenet_v1_small", "mobilenet_v2_small", "vgg11_small")
ENGINES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("magnitude", {"p": 1}, "l1_norm"),
    ("magnitude", {"p": 2}, "l2_norm"),
    ("fpgm", {}, "fpgm"),
    ("bn_scale", {}, "bn_scale"),
    ("lamp", {}, "lamp"),
    ("group_norm", {}, "l2_norm"),
)


@pytest.mark.parametrize(("selection", "ratio"), [("local", 0.4), ("global", 0.5)])
@pytest.mark.parametrize(("engine", "options", "importance"), ENGINES, ids=lambda item: str(item).strip("{}"))
@pytest.mark.parametrize("name", ZOO)
def test_torch_pruning(
    name: str, engine: str, options: dict[str, Any], importance: str, selection: str, ratio: float
) -> None:
    net = of_the_zoo("torch", name)
    theirs = net.theirs(f"torch_pruning.{engine}", ratio, **options, global_pruning=selection == "global")
    stage = {"preset": "torch_pruning", "importance": importance, "selection": selection, "pruning_ratio": ratio}
    assert theirs == net.ours(**stage)


@pytest.mark.parametrize("selection", ["local", "global"])
@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_torch_pruning_on_large_nets_and_through_a_flatten(name: str, selection: str) -> None:
    net = of_the_zoo("torch", name)
    theirs = net.theirs("torch_pruning.magnitude", 0.5, global_pruning=selection == "global")
    stage = {"preset": "torch_pruning", "importance": "l2_norm", "selection": selection, "pruning_ratio": 0.5}
    assert theirs == net.ours(**stage)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"isomorphic": True, "global_pruning": True}, {"selection": "isomorphic"}),
        ({"group_reduction": "sum"}, {"group_reduction": "sum"}),
        ({"group_reduction": "max", "global_pruning": True}, {"group_reduction": "max", "selection": "global"}),
        ({"group_reduction": "first"}, {"group_reduction": "master"}),
        ({"normalizer": "gaussian", "global_pruning": True}, {"normalisation": "gaussian", "selection": "global"}),
    ],
    ids=lambda item: "-".join(map(str, item.values())),
)
def test_torch_prunings_options(options: dict[str, Any], words: dict[str, Any]) -> None:
    """On a residual net; elsewhere "first" may mean the norm of a depthwise convolution, by their trace."""
    net = of_the_zoo("torch", "resnet18_small")
    theirs = net.theirs("torch_pruning.magnitude", 0.5, **options)
    assert theirs == net.ours(preset="torch_pruning", importance="l2_norm", pruning_ratio=0.5, **words)


def test_without_the_preset_the_choice_is_another() -> None:
    """So that the tests above say something."""
    net = of_the_zoo("torch", "resnet18_small")
    theirs = net.theirs("torch_pruning.magnitude", 0.5, p=1)
    assert set(theirs) == set(net.ours(importance="l1_norm", pruning_ratio=0.5))
    assert theirs != net.ours(importance="l1_norm", pruning_ratio=0.5)


def test_multiples_are_rounded_down_by_torch_pruning_and_up_by_us() -> None:
    net = of_the_zoo("torch", "resnet18_small")
    theirs = net.theirs("torch_pruning.magnitude", 0.3, round_to=4)
    stage = {"preset": "torch_pruning", "importance": "l2_norm", "pruning_ratio": 0.3}
    plain, ours = net.ours(**stage), net.ours(**stage, round_to=4)
    widths = {name: net.weights[name].shape[0] for name in theirs}
    for name, width in widths.items():
        assert len(theirs[name]) == len(plain[name]) // 4 * 4
        assert len(ours.get(name, range(width))) == -(-len(plain[name]) // 4) * 4


def test_a_group_that_would_lose_all_keeps_all_in_torch_pruning_and_one_with_us() -> None:
    """Without normalisation the narrow layers in front are the least important."""
    net = of_the_zoo("torch", "vgg11_small")
    theirs = net.theirs("torch_pruning.magnitude", 0.5, normalizer=None, global_pruning=True)
    stage = {"preset": "torch_pruning", "importance": "l2_norm", "normalisation": "none", "selection": "global"}
    ours = net.ours(**stage, pruning_ratio=0.5)
    assert "features.0.weight" not in theirs and len(ours["features.0.weight"]) == 1
