"""Under a preset our importances are the toolkit's own: Torch-Pruning 1.6.1 and PaddleSlim 2.6.0."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from paddleslim.dygraph import FPGMFilterPruner, L1NormFilterPruner, L2NormFilterPruner

from slimbridge import zoo
from slimbridge.graph import ChannelGroup, Graph, UnitProducer, Units, find_units
from slimbridge.parity import relative, tolerance
from slimbridge.plan import PruneStage
from slimbridge.ports import Array, Backend, Model
from slimbridge.prune.evidence import Evidence
from slimbridge.prune.presets import Definition
from slimbridge.prune.rate import rate_groups
from slimbridge.prune.select import Amount, choose

X = np.random.default_rng(0).standard_normal((2, 3, 8, 8))
NAMES = ("resnet18_small", "mobilenet_v2_small")


class Case:
    """A model of the zoo with weights that are no start values, and its graph, units and random gradients."""

    def __init__(self, backend: Backend, name: str) -> None:
        model = backend.place(zoo.build(name, backend, 10, seed=1, width=8), "cpu", "float64")
        random = np.random.default_rng(5)
        arrays = {key: random.standard_normal(array.shape) for key, array in backend.read(model).items()}
        positive = {key: np.abs(array) for key, array in arrays.items() if key.endswith("running_var")}
        self.model: Model = backend.write(model, {**arrays, **positive})
        self.graph: Graph = backend.trace(model, [X])
        self.weights = backend.read(model)
        self.units: Units = find_units(self.graph)
        self.groups: tuple[ChannelGroup, ...] = self.units.groups()
        self.gradients = {key: random.standard_normal(array.shape) for key, array in self.weights.items()}
        self.squares = {key: np.square(array) for key, array in self.gradients.items()}

    def ours(self, **stage: Any) -> tuple[Array, ...]:
        definition = Definition.of(PruneStage(pruning_ratio=0.5, **stage))
        evidence = Evidence(self.gradients, self.squares)
        return rate_groups(self.graph, self.units, self.groups, self.weights, definition, evidence)


@pytest.fixture(scope="module", params=NAMES)
def case(request: Any, torch_backend: Backend) -> Case:
    return Case(torch_backend, request.param)


def theirs(case: Case, importance: Any, gradients: dict[str, Array]) -> list[Array]:
    """Torch-Pruning's importance of each group, by the channels of the group's first layer."""
    for name, parameter in case.model.named_parameters():
        parameter.grad = torch.from_numpy(gradients[name].copy())
    dependencies = tp.DependencyGraph().build_dependency(case.model, torch.from_numpy(X))
    modules = dict(case.model.named_modules())
    found = []
    for group in case.groups:
        root = modules[group.layers[0]]
        prune = tp.prune_linear_out_channels if isinstance(root, torch.nn.Linear) else tp.prune_conv_out_channels
        channels = list(range(root.weight.shape[0]))
        found.append(importance(dependencies.get_pruning_group(root, prune, idxs=channels)).double().numpy())
    return found


TAYLOR: Callable[[Case], dict[str, Array]] = lambda case: case.gradients  # noqa: E731
HESSIAN: Callable[[Case], dict[str, Array]] = lambda case: case.squares  # noqa: E731


@pytest.mark.parametrize(
    ("stage", "importance", "gradients"),
    [
        ({"importance": "l1_norm"}, tp.importance.GroupMagnitudeImportance(p=1), TAYLOR),
        ({"importance": "l2_norm"}, tp.importance.GroupMagnitudeImportance(p=2), TAYLOR),
        (
            {"importance": "magnitude", "importance_options": {"p": 3}},
            tp.importance.GroupMagnitudeImportance(p=3),
            TAYLOR,
        ),
        ({"importance": "fpgm"}, tp.importance.FPGMImportance(), TAYLOR),
        ({"importance": "bn_scale"}, tp.importance.BNScaleImportance(), TAYLOR),
        ({"importance": "lamp"}, tp.importance.LAMPImportance(), TAYLOR),
        ({"importance": "taylor"}, tp.importance.GroupTaylorImportance(), TAYLOR),
        ({"importance": "fisher"}, tp.importance.GroupHessianImportance(), HESSIAN),
        (
            {"importance": "magnitude", "normalisation": "none"},
            tp.importance.GroupMagnitudeImportance(normalizer=None),
            TAYLOR,
        ),
        (
            {"importance": "magnitude", "normalisation": "none", "group_reduction": "sum"},
            tp.importance.GroupMagnitudeImportance(group_reduction="sum", normalizer=None),
            TAYLOR,
        ),
        (
            {"importance": "magnitude", "group_reduction": "max", "normalisation": "max"},
            tp.importance.GroupMagnitudeImportance(group_reduction="max", normalizer="max"),
            TAYLOR,
        ),
        (
            {"importance": "magnitude", "group_reduction": "master", "normalisation": "sum"},
            tp.importance.GroupMagnitudeImportance(group_reduction="first", normalizer="sum"),
            TAYLOR,
        ),
        (
            {"importance": "l1_norm", "normalisation": "standard"},
            tp.importance.GroupMagnitudeImportance(p=1, normalizer="standarization"),
            TAYLOR,
        ),
        (
            {"importance": "l1_norm", "normalisation": "gaussian"},
            tp.importance.GroupMagnitudeImportance(p=1, normalizer="gaussian"),
            TAYLOR,
        ),
    ],
    ids=lambda item: "-".join(str(value) for value in item.values()) if isinstance(item, dict) else "",
)
def test_torch_prunings_importances(
    case: Case, stage: dict[str, Any], importance: Any, gradients: Callable[[Case], dict[str, Array]]
) -> None:
    differences = stage["importance"] == "lamp" or stage.get("normalisation") in ("standard", "gaussian")
    same = tolerance("toolkit_float32" if differences else "operation").value
    found = case.ours(preset="torch_pruning", **stage)
    expected = theirs(case, importance, gradients(case))
    assert len(found) == len(expected) > 5
    for group, own, other in zip(case.groups, found, expected, strict=True):
        root = group.producers[0]
        by_channel = own[[group.units.tolist().index(unit) for unit in root.units.tolist()]]
        assert relative(by_channel, other) <= same, group.layers


# PaddleSlim


def first_defined(case: Case, group: ChannelGroup) -> UnitProducer:
    """PaddleSlim's master of a group."""
    order = list(case.graph.parameters)
    return min(group.producers, key=lambda producer: order.index(producer.weight))


def paddleslim_keeps(pruner: type, weight: Array, ratio: float) -> Array:
    """The mask of `cal_mask`, which reads nothing of its pruner: 1 for the filters that stay."""
    collection = SimpleNamespace(
        master_name="w", master_axis=0, values={"w": weight}, all_pruning_details=lambda: [SimpleNamespace(axis=0)]
    )
    mask: Array = pruner.__new__(pruner).cal_mask(ratio, collection)
    return mask


@pytest.mark.filterwarnings("ignore:`product` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.75, 0.99])
@pytest.mark.parametrize(
    ("importance", "pruner"),
    [("l1_norm", L1NormFilterPruner), ("l2_norm", L2NormFilterPruner), ("fpgm", FPGMFilterPruner)],
)
def test_paddleslim_keeps_the_same_filters(case: Case, importance: str, pruner: type, ratio: float) -> None:
    definition = Definition.of(PruneStage(pruning_ratio=ratio, preset="paddleslim", importance=importance))
    values = rate_groups(case.graph, case.units, case.groups, case.weights, definition, Evidence())
    amounts = [Amount(ratio, group.units.size) for group in case.groups]
    for group, positions in zip(case.groups, choose(case.groups, values, amounts, definition), strict=True):
        master = first_defined(case, group)
        mask = paddleslim_keeps(pruner, case.weights[master.weight], ratio)
        gone = group.units[positions]
        assert np.flatnonzero(mask == 0).tolist() == np.flatnonzero(np.isin(master.units, gone)).tolist(), group.layers


@pytest.mark.filterwarnings("ignore:`product` is deprecated:DeprecationWarning")
def test_paddleslims_distances(case: Case) -> None:
    """`get_distance_sum` of each filter is the importance itself."""
    pruner = FPGMFilterPruner.__new__(FPGMFilterPruner)
    for group, values in zip(case.groups, case.ours(preset="paddleslim", importance="fpgm"), strict=True):
        weight = case.weights[first_defined(case, group).weight]
        expected = np.array([pruner.get_distance_sum(weight, index) for index in range(len(weight))])
        assert relative(values, expected) <= tolerance("operation_float64").value
