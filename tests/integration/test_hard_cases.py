"""Small wirings on both frameworks: which channels must go, which must stay, and that removing equals zeroing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from slimbridge.decisions import PruneDecision
from slimbridge.parity import relative, tolerance
from slimbridge.plan import PruneStage
from slimbridge.ports import Array, Backend, Model, tensors_in
from slimbridge.prune import Pruner, zeroed
from tests.architectures import wirings
from tests.architectures.parts import Part, make, seeded, with_weights
from tests.architectures.wirings import Net

SIZE = 4
LAST = "an output of the model"
Kept = Mapping[str, Mapping[int, tuple[int, ...]]]


def outputs(backend: Backend, model: Model, inputs: list[Array]) -> list[Array]:
    return [backend.ops.numpy(tensor) for tensor in tensors_in(backend.forward(model, inputs).output)]


def noise(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nothing(_: Any) -> Mapping[str, Any]:
    return {}


def second_head(nn: Any) -> Mapping[str, Any]:
    return {"last": nn.Linear(8, 5)}


@dataclass(frozen=True)
class Case:
    """A wiring and what pruning half of it must do.

    Attributes:
        wire: (nn, net, *inputs) -> output.
        more: further layers of the net.
        groups: layers of each channel group, in order.
        stays: layer -> part of the reason why it stays.
        kept: further conditions on the entries that stay.
        inputs: shapes.
    """

    wire: Callable[..., Any]
    more: Callable[[Any], Mapping[str, Any]] = nothing
    groups: tuple[tuple[str, ...], ...] = ()
    stays: Mapping[str, str] = field(default_factory=dict)
    kept: Callable[[Kept], bool] = lambda kept: True
    inputs: tuple[tuple[int, ...], ...] = ((2, 3, SIZE, SIZE),)


def shifted(entries: tuple[int, ...], by: int) -> tuple[int, ...]:
    return tuple(entry + by for entry in entries)


def second_kept(name: str, axis: int, source: str, offset: int) -> Callable[[Kept], bool]:
    """Both copies of the source's channels leave that axis: at 0 and at the offset."""
    return lambda kept: kept[name][axis] == kept[source][0] + shifted(kept[source][0], offset)


def joined_kept(name: str, axis: int) -> Callable[[Kept], bool]:
    """The axis keeps what `a` keeps, then what `b` keeps."""
    return lambda kept: kept[name][axis] == kept["a.weight"][0] + shifted(kept["b.weight"][0], 8)


CASES: dict[str, Case] = {
    "joined with itself": Case(
        wirings.twice_joined,
        lambda nn: {"c": nn.Conv2d(16, 8, 1)},
        (("a",), ("c",)),
        {"fc": LAST},
        second_kept("c.weight", 1, "a.weight", 8),
    ),
    "branches of unlike needs": Case(
        wirings.into_an_output_too,
        lambda nn: {"c": nn.Conv2d(8, 8, 3, padding=1)},
        (("b", "c"),),
        {"a": LAST, "fc": LAST},
        lambda kept: "a.weight" not in kept and 1 not in kept["c.weight"],
    ),
    "mean over space, channels last": Case(
        wirings.channels_last_mean,
        nothing,
        (("a",),),
        {"fc": LAST},
        lambda kept: kept["fc.weight"][1] == kept["a.weight"][0],
    ),
    "depthwise behind a join": Case(
        wirings.depthwise_behind_join,
        lambda nn: {"depthwise": nn.Conv2d(16, 16, 3, padding=1, groups=16), "c": nn.Conv2d(16, 8, 1)},
        (("a",), ("b",), ("c",)),
        {"fc": LAST},
        lambda kept: joined_kept("depthwise.weight", 0)(kept) and joined_kept("c.weight", 1)(kept),
    ),
    "one map times all channels": Case(
        wirings.one_map, lambda nn: {"c": nn.Conv2d(8, 1, 1)}, (("a",),), {"c": "one map is broadcast", "fc": LAST}
    ),
    "through a single channel": Case(
        wirings.through_one_channel,
        lambda nn: {"c": nn.Conv2d(8, 1, 1), "d": nn.Conv2d(1, 8, 1)},
        (("a",), ("d",)),
        {"c": "can go alone", "fc": LAST},
        lambda kept: 0 not in kept["c.weight"] and 1 not in kept["d.weight"],
    ),
    "parameters outside any layer": Case(
        wirings.own_parameters,
        lambda nn: {
            "scale": nn.parameter(seeded("scale", (1, 8, 1, 1), 1.0)),
            "table": nn.parameter(seeded("table", (8, SIZE, SIZE), 1.0)),
            "place": nn.parameter(seeded("place", (SIZE, SIZE), 1.0)),
            "factor": nn.parameter(np.full((1,), 1.5)),
        },
        (("a",),),
        {"fc": LAST},
        lambda kept: (
            kept["scale"] == {1: kept["a.weight"][0]}
            and kept["table"] == {0: kept["a.weight"][0]}
            and kept.keys() == {"a.weight", "a.bias", "scale", "table", "fc.weight"}
        ),
    ),
    "a layer that never runs": Case(
        wirings.with_spare,
        lambda nn: {"spare": nn.Conv2d(8, 8, 1)},
        (("a",),),
        {"fc": LAST},
        lambda kept: not any(name.startswith(("spare", "b.")) for name in kept),
    ),
    "several inputs and a nested output": Case(
        wirings.two_in_three_out,
        lambda nn: {"c": nn.Linear(6, 8), "d": nn.Conv2d(8, 4, 1)},
        (("a", "c", "b"),),
        {"d": LAST, "fc": LAST},
        lambda kept: kept["d.weight"] == {1: kept["a.weight"][0]},
        ((2, 3, SIZE, SIZE), (2, 6)),
    ),
    "one convolution for two inputs": Case(
        wirings.siamese,
        lambda nn: {"c": nn.Conv2d(8, 8, 1)},
        (("a", "b"), ("c",)),
        {"fc": LAST},
        lambda kept: kept["a.weight"][0] == kept["b.weight"][0] == kept["c.weight"][1],
        ((2, 3, SIZE, SIZE), (2, 3, SIZE, SIZE)),
    ),
    "a shortcut over a stride": Case(
        wirings.strided,
        lambda nn: {"c": nn.Conv2d(8, 8, 3, stride=2, padding=1), "pool": nn.AvgPool2d(2, 2)},
        (("a", "c"),),
        {"fc": LAST},
    ),
    "a join split at its seam": Case(
        wirings.own_halves,
        lambda nn: {"c": nn.Conv2d(8, 8, 1), "d": nn.Conv2d(8, 8, 1)},
        (("a", "b"), ("c", "d")),
        {"fc": LAST},
        lambda kept: kept["c.weight"][1] == kept["b.weight"][0] == kept["a.weight"][0] == kept["d.weight"][1],
    ),
    "halves that gate each other": Case(
        wirings.halved_stem,
        lambda nn: {"c": nn.Conv2d(8, 16, 1)},
        (("a",), ("c",)),
        {"fc": LAST},
        lambda kept: kept["c.weight"][0] == kept["fc.weight"][1] + shifted(kept["fc.weight"][1], 8),
    ),
    # The four pieces of a channel that become places go together.
    "pixel shuffle": Case(
        wirings.pixel_shuffle,
        lambda nn: {"c": nn.Conv2d(8, 32, 1)},
        (("a",), ("c",)),
        {"fc": LAST},
        lambda kept: (
            kept["c.weight"][1] == kept["a.weight"][0]
            and kept["c.weight"][0] == tuple(4 * i + j for i in kept["fc.weight"][1] for j in range(4))
        ),
    ),
    "squeeze and excitation": Case(
        wirings.squeeze_excite,
        lambda nn: {"c": nn.Linear(8, 4), "d": nn.Linear(4, 8)},
        (("a", "d"), ("c",)),
        {"fc": LAST},
        lambda kept: (
            kept["a.weight"][0] == kept["d.weight"][0] == kept["c.weight"][1]
            and kept["d.weight"][1] == kept["c.weight"][0]
        ),
    ),
    "a layer that feeds an output alone": Case(
        wirings.only_an_output, nothing, (("a",),), {"b": LAST, "fc": LAST}, lambda kept: "b.weight" not in kept
    ),
    "joined with the input": Case(
        wirings.beside_the_input,
        lambda nn: {"c": nn.Conv2d(11, 8, 1)},
        (("a",), ("c",)),
        {"fc": LAST},
        lambda kept: kept["c.weight"][1] == (*kept["a.weight"][0], 8, 9, 10),
    ),
    "a shortcut padded with empty channels": Case(
        wirings.padded_shortcut,
        lambda nn: {"c": nn.Conv2d(8, 16, 3, padding=1), "last": nn.Linear(16, 5)},
        (("a", "c"),),
        {"last": LAST},
        lambda kept: kept["c.weight"][0] == (*kept["a.weight"][0], *range(8, 16)),
    ),
    "centred over the channels": Case(
        wirings.centred, second_head, (("b",),), {"a": "reduced", "fc": LAST, "last": LAST}
    ),
    "softmax over the channels": Case(
        wirings.softmax_of_channels, second_head, (("b",),), {"a": "softmax", "fc": LAST, "last": LAST}
    ),
    # Channels along both axes of one flattened map: all of `a` is one unit, and one unit always stays.
    "gram matrix": Case(
        wirings.gram,
        lambda nn: {"last": nn.Linear(64, 5)},
        (("b",),),
        {"a": "can go alone", "fc": LAST, "last": LAST},
        lambda kept: "a.weight" not in kept and "last.weight" not in kept,
    ),
    "whole groups of a GroupNorm": Case(
        wirings.group_normalised,
        lambda nn: {"c": nn.Conv2d(3, 16, 1), "norm": nn.GroupNorm(4, 16), "d": nn.Conv2d(16, 8, 1)},
        (("c",), ("d",)),
        {"fc": LAST},
        lambda kept: (
            len(kept["c.weight"][0]) == 8
            and all(4 * (i // 4) + j in kept["c.weight"][0] for i in kept["c.weight"][0] for j in range(4))
        ),
    ),
    "layer norm": Case(
        wirings.layer_normalised,
        lambda nn: {"norm": nn.LayerNorm(8), **second_head(nn)},
        (("b",),),
        {"a": "layer_norm", "fc": LAST, "last": LAST},
    ),
    "a GroupNorm over single channels": Case(
        wirings.group_normalised_sum,
        lambda nn: {"norm": nn.GroupNorm(8, 8)},
        (("a", "b"),),
        {"fc": LAST},
        lambda kept: kept["norm.weight"] == {0: kept["a.weight"][0]} == {0: kept["b.weight"][0]},
    ),
    # The second group has two channels of `a` and all four of `d`: both lose whole groups of six, or none.
    "a GroupNorm across a join": Case(
        wirings.across_a_join,
        lambda nn: {"norm": nn.GroupNorm(2, 12), "c": nn.Conv2d(12, 8, 1), "d": nn.Conv2d(3, 4, 1)},
        (("a", "d"), ("c",)),
        {"fc": LAST},
        lambda kept: kept["norm.weight"][0] == kept["c.weight"][1] in (tuple(range(6)), tuple(range(6, 12))),
    ),
    "one scale for two layers": Case(
        wirings.one_scale,
        lambda nn: {"scale": nn.parameter(seeded("scale", (1, 8, 1, 1), 1.0)), "other": nn.Linear(8, 5)},
        (("a", "b"),),
        {"fc": LAST, "other": LAST},
        lambda kept: kept["scale"][1] == kept["a.weight"][0] == kept["b.weight"][0] == kept["other.weight"][1],
    ),
    "every second channel": Case(
        wirings.every_second,
        lambda nn: {"last": nn.Linear(4, 5)},
        (("b",),),
        {"a": "cut at written places", "fc": LAST, "last": LAST},
    ),
    "attention over places": Case(
        wirings.attention_over_places,
        lambda nn: {"c": nn.Conv2d(3, 8, 1)},
        (("a", "b"), ("c",)),
        {"fc": LAST},
        lambda kept: kept["a.weight"][0] == kept["b.weight"][0] and kept["c.weight"][0] == kept["fc.weight"][1],
    ),
    "a single channel as output": Case(
        wirings.single_channel_output, lambda nn: {"c": nn.Conv2d(8, 1, 1)}, (("a",),), {"c": LAST}
    ),
    "transposed convolution": Case(
        wirings.upsampled,
        lambda nn: {"up": nn.ConvTranspose2d(8, 12, 2, stride=2), "d": nn.Conv2d(8, 12, 1), "fc": nn.Linear(12, 5)},
        (("a",), ("up", "d"), ("b",)),
        {"fc": LAST},
        lambda kept: kept["up.weight"][1] == kept["d.weight"][0] and kept["up.weight"][0] == kept["a.weight"][0],
    ),
}


def pruned_half(backend: Backend, case: Case) -> tuple[Model, Model, PruneDecision]:
    model = with_weights(backend, backend.place(make(backend.nn, Net, case.wire, case.more)))
    example = [noise(0, *shape) for shape in case.inputs]
    pruned, decision = Pruner(PruneStage(pruning_ratio=0.5)).prune(backend, model, example)[:2]
    return model, pruned, decision


@pytest.mark.parametrize("name", CASES)
def test_what_goes_and_what_stays(backend: Backend, name: str) -> None:
    case = CASES[name]
    model, pruned, decision = pruned_half(backend, case)
    assert {frozenset(group.layers) for group in decision.groups} == {frozenset(group) for group in case.groups}
    assert all(len(group.removed) == group.channels // 2 for group in decision.groups)
    run = {node.name for node in backend.trace(model, [noise(0, *shape) for shape in case.inputs]).layer_nodes()}
    idle = {item.layer for item in decision.skipped if item.reason == "it did not run in the trace"}
    assert idle == {layer.path for layer in backend.layers(model) if layer.kind in ("conv", "linear")} - run
    reasons = {item.layer: item.reason for item in decision.skipped if item.layer not in idle}
    assert reasons.keys() == case.stays.keys()
    assert {layer: text in reasons[layer] for layer, text in case.stays.items()} == dict.fromkeys(reasons, True)
    assert case.kept(decision.kept)
    silent = backend.write(backend.clone(model), zeroed(backend.read(model), decision))
    inputs = [noise(1, 3, *shape[1:]) for shape in case.inputs]
    for found, expected in zip(outputs(backend, pruned, inputs), outputs(backend, silent, inputs), strict=True):
        assert relative(found, expected) <= tolerance("removal").value


class Tied(Part):
    """Two layers with one weight."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        nn = self.nn
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = (
            (nn.Linear(8, 8), nn.Linear(8, 8)) if kind == "linear" else (nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
        )
        self.second.weight = self.first.weight
        self.linear = kind == "linear"
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        nn = self.nn
        x = nn.relu(self.stem(x))
        x = nn.mean(x, (2, 3)) if self.linear else x
        x = nn.relu(self.second(nn.relu(self.first(x))))
        return self.fc(x if self.linear else nn.mean(x, (2, 3)))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_tied_weights_stay_tied(backend: Backend, kind: str) -> None:
    """The one weight has the same channels on both of its axes, and so has the layer before it."""
    model = with_weights(backend, backend.place(make(backend.nn, Tied, kind)))
    example = [noise(0, 2, 3, SIZE, SIZE)]
    pruned, decision = Pruner(PruneStage(pruning_ratio=0.5)).prune(backend, model, example)[:2]
    arrays = backend.read(pruned)
    weights = [arrays[name] for name in ("first.weight", "second.weight") if name in arrays]
    assert all(weight.shape[:2] == (4, 4) and np.array_equal(weight, weights[0]) for weight in weights)
    assert arrays["first.bias"].shape == arrays["second.bias"].shape == (4,)
    assert arrays["stem.weight"].shape[0] == 4
    x = [noise(1, 3, 3, SIZE, SIZE)]
    silent = backend.write(backend.clone(model), zeroed(backend.read(model), decision))
    assert relative(outputs(backend, pruned, x)[0], outputs(backend, silent, x)[0]) <= tolerance("removal").value
    changed = backend.write(backend.clone(pruned), {"first.weight": weights[0] * 0}, partial=True)
    assert not backend.read(changed).get("second.weight", np.zeros(1)).any()
