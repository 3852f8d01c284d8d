"""The neutral graph: reshapes, id arrays, each rule of the channel units, cost; and that removing equals zeroing."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slimbridge.conformance.surgery import sliced
from slimbridge.discovery import get_backend
from slimbridge.errors import ModelError
from slimbridge.graph import Graph, Node, Rules, Units, cost_of, cost_without, find_units
from slimbridge.graph.ids import Ledger, along, same_shape_axes, spread, thin, varies
from slimbridge.graph.reshapes import axis_map
from slimbridge.parity import relative, tolerance
from slimbridge.plan import PruneStage
from slimbridge.prune import Pruner, zeroed


class Build:
    """Writes a graph node by node; every method gives the id of the tensor it made."""

    def __init__(self, *shape: int) -> None:
        self.nodes: list[Node] = []
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.x = self.add("input", [], shape)

    def add(self, kind: str, inputs: Sequence[int], shape: tuple[int, ...], name: str = "", **rest: Any) -> int:
        return self.many(kind, inputs, [shape], name, **rest)[0]

    def many(
        self, kind: str, inputs: Sequence[int], shapes: Sequence[tuple[int, ...]], name: str = "", **rest: Any
    ) -> list[int]:
        params = rest.pop("params", {})
        made = [len(self.shapes) + index for index in range(len(shapes))]
        self.shapes.update(zip(made, shapes, strict=True))
        self.nodes.append(Node(kind, name, tuple(inputs), tuple(made), params, rest))
        return made

    def conv(self, x: int, out: int, name: str, groups: int = 1, weight: str | None = None) -> int:
        n, channels, h, w = self.shapes[x]
        weight = weight or f"{name}.weight"
        self.parameters[weight] = (out, channels // groups, 3, 3)
        return self.add("conv", [x], (n, out, h, w), name, params={"weight": weight}, groups=groups)

    def linear(self, x: int, out: int, name: str) -> int:
        self.parameters[f"{name}.weight"] = (out, self.shapes[x][-1])
        return self.add("linear", [x], (*self.shapes[x][:-1], out), name, params={"weight": f"{name}.weight"})

    def norm(self, x: int, name: str, kind: str = "batch_norm") -> int:
        self.parameters[f"{name}.weight"] = (self.shapes[x][1],)
        return self.add(kind, [x], self.shapes[x], name, params={"weight": f"{name}.weight"}, axes=(1,), groups=2)

    def constant(self, *shape: int, value: str | None = None) -> int:
        return self.add("constant", [], shape, params={} if value is None else {"value": value})

    def binary(self, a: int, b: int, op: str = "add") -> int:
        return self.add("binary", [a, b], np.broadcast_shapes(self.shapes[a], self.shapes[b]), "meet", op=op)

    def head(self, x: int) -> int:
        """Mean over space and a linear layer `fc`, so that the channels before it are free."""
        shape = self.shapes[x][:2]
        return self.linear(self.add("reduce", [x], shape, op="mean", axes=(2, 3), keepdims=False), 3, "fc")

    def graph(self, *outputs: int) -> Graph:
        return Graph(tuple(self.nodes), self.shapes, (self.x,), outputs, self.parameters)

    def units(self, *outputs: int, freeze_reshapes: bool = False) -> Units:
        return find_units(self.graph(*outputs), Rules(freeze_reshapes=freeze_reshapes))


def names(units: Units) -> list[tuple[str, ...]]:
    return [group.layers for group in units.groups()]


def sizes(units: Units) -> list[int]:
    return [group.units.size for group in units.groups()]


def reason(units: Units, layer: str) -> str | None:
    return next(units.why_frozen(producer) for producer in units.producers if producer.layer == layer)


# Reshapes


def factored(draw: Any, total: int) -> tuple[int, ...]:
    """A shape of `total` entries, ones included."""
    shape = [1] * draw(st.integers(0, 1))
    while total > 1:
        part = draw(st.sampled_from([d for d in range(2, total + 1) if total % d == 0]))
        shape += [part] + [1] * draw(st.integers(0, 1))
        total //= part
    return tuple(shape)


@st.composite
def reshapes(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    total = draw(st.sampled_from([1, 2, 6, 8, 12, 24, 36, 60]))
    return factored(draw, total), factored(draw, total)


@given(reshapes())
def test_axis_map_runs_hold_the_same_entries(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """By moving the entries: the place within a run before says the place within the run after."""
    old, new = shapes
    runs = list(axis_map(old, new))
    assert [axis for left, _ in runs for axis in left] == [axis for axis, size in enumerate(old) if size != 1]
    assert [axis for _, right in runs for axis in right] == [axis for axis, size in enumerate(new) if size != 1]
    before = np.stack(np.unravel_index(np.arange(prod(old)), old)) if old else np.zeros((0, 1), int)
    after = np.stack(np.unravel_index(np.arange(prod(new)), new)) if new else np.zeros((0, 1), int)
    for left, right in runs:
        place = np.ravel_multi_index([before[a] for a in left], [old[a] for a in left])
        moved = np.ravel_multi_index([after[a] for a in right], [new[a] for a in right])
        np.testing.assert_array_equal(place, moved)


@given(reshapes())
def test_axis_map_runs_are_the_smallest(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    old, new = shapes
    for left, right in axis_map(old, new):
        products = {prod(old[a] for a in left[:k]) for k in range(1, len(left))}
        assert not products & {prod(new[a] for a in right[:k]) for k in range(1, len(right))}


# Arrays of ids


@st.composite
def id_arrays(draw: Any) -> np.ndarray[Any, Any]:
    """Small integers, some axes broadcast (stride 0), some only equal."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple))
    inner = tuple(draw(st.sampled_from([1, size])) for size in shape)
    seed = draw(st.integers(0, 10_000))
    values = np.random.default_rng(seed).integers(0, draw(st.integers(1, 4)), inner)
    return spread(np.asarray(values, np.int64), shape)


@given(id_arrays(), st.data())
def test_along_and_varies_equal_the_full_array(ids: np.ndarray[Any, Any], data: Any) -> None:
    axis = data.draw(st.integers(0, ids.ndim - 1))
    full = np.array(ids)
    rows = np.moveaxis(full, axis, 0).reshape(full.shape[axis], -1)
    found = along(ids, axis)
    if (rows == rows[:, :1]).all():
        np.testing.assert_array_equal(found, rows[:, 0])
    else:
        assert found is None
    assert varies(ids, axis) == bool((rows != rows[:1]).any())


@given(id_arrays())
def test_thin_loses_nothing(ids: np.ndarray[Any, Any]) -> None:
    np.testing.assert_array_equal(np.broadcast_to(thin(ids), ids.shape), ids)
    assert thin(ids).size <= ids.size


def test_ids_follow_a_change_of_space() -> None:
    ids = spread(np.arange(3).reshape(1, 3, 1, 1), (2, 3, 4, 4))
    moved = same_shape_axes(ids, 1, (2, 3, 2, 1))
    assert moved is not None
    np.testing.assert_array_equal(moved[1, :, 1, 0], [0, 1, 2])
    assert same_shape_axes(spread(np.arange(4), (2, 3, 4)), 1, (2, 3, 2)) is None


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_components_equal_a_plain_search(count: int, pairs: list[tuple[int, int]]) -> None:
    """Against merging of sets; numbered by first appearance."""
    ledger = Ledger()
    ledger.issue(count)
    sets = [{index} for index in range(count)]
    for a, b in [(a % count, b % count) for a, b in pairs]:
        ledger.unite(np.array([a]), np.array([b]))
        if sets[a] is not sets[b]:
            merged = sets[a] | sets[b]
            for member in merged:
                sets[member] = merged
    labels = ledger.components()
    expected = list(dict.fromkeys(min(one) for one in sets))
    np.testing.assert_array_equal(labels, [expected.index(min(one)) for one in sets])


# The rules, one by one


def test_a_chain_is_free_layer_by_layer_and_its_output_stays() -> None:
    b = Build(1, 3, 4, 4)
    x = b.norm(b.conv(b.x, 4, "a"), "n")
    units = b.units(b.head(b.conv(x, 6, "b")))
    assert names(units) == [("a",), ("b",)]
    assert sizes(units) == [4, 6]
    assert reason(units, "fc") == "its channels are an output of the model"
    removed = set(units.groups()[0].units[[1, 2]].tolist())
    assert units.kept(removed) == {"a.weight": {0: (0, 3)}, "b.weight": {1: (0, 3)}, "n.weight": {0: (0, 3)}}


def test_an_unknown_operation_freezes_what_it_touches_and_is_named() -> None:
    b = Build(1, 3, 4, 4)
    x = b.add("unknown", [b.conv(b.x, 4, "a")], (1, 4, 4, 4), "odd", op="aten::fft")
    graph = b.graph(b.head(b.conv(b.conv(x, 4, "b"), 4, "c")))
    units = find_units(graph)
    assert names(units) == [("b",), ("c",)]
    assert reason(units, "a") == "the tracer does not know 'aten::fft' in layer 'odd'"
    assert graph.unknown_ops() == ("aten::fft in 'odd'",)


def test_two_unknown_operations_do_not_share_a_frozen_unit_with_others() -> None:
    """What an unknown operation gives is frozen too: an addition with it must stay."""
    b = Build(1, 3, 4, 4)
    x = b.add("unknown", [b.x], (1, 4, 4, 4), "odd", op="odd")
    units = b.units(b.head(b.binary(x, b.conv(b.x, 4, "a"))))
    assert names(units) == []
    assert "tracer does not know 'odd'" in str(reason(units, "a"))


def test_a_constant_of_the_same_size_freezes() -> None:
    b = Build(1, 3, 4, 4)
    units = b.units(b.head(b.binary(b.conv(b.x, 4, "a"), b.constant(1, 4, 1, 1))))
    assert names(units) == []
    assert reason(units, "a") == "it meets a constant of its own size"


def test_a_scalar_and_a_constant_over_space_do_not_freeze() -> None:
    for shape in ((), (1,), (1, 1, 1, 1)):
        b = Build(1, 3, 4, 4)
        assert names(b.units(b.head(b.binary(b.constant(*shape), b.conv(b.x, 4, "a"), "mul")))) == [("a",)]
    b = Build(1, 3, 4, 4)
    assert names(b.units(b.head(b.binary(b.conv(b.x, 4, "a"), b.constant(4, 4))))) == [("a",)]


def test_a_map_of_one_channel_does_not_unite_the_many() -> None:
    b = Build(1, 3, 4, 4)
    many, one = b.conv(b.x, 4, "many"), b.conv(b.x, 1, "one")
    units = b.units(b.head(b.binary(one, many, "mul")))
    assert names(units) == [("many",)]
    assert sizes(units) == [4]
    assert "one map is broadcast over many channels" in str(reason(units, "one"))


def test_a_gate_for_each_channel_unites_with_its_channel() -> None:
    b = Build(1, 3, 4, 4)
    x = b.conv(b.x, 4, "a")
    gate = b.conv(b.add("reduce", [x], (1, 4, 1, 1), op="mean", axes=(2, 3), keepdims=True), 4, "gate")
    units = b.units(b.head(b.binary(x, gate, "mul")))
    assert names(units) == [("a", "gate")]
    assert sizes(units) == [4]


def test_an_addition_unites_position_by_position() -> None:
    b = Build(1, 3, 4, 4)
    units = b.units(b.head(b.binary(b.conv(b.x, 4, "a"), b.conv(b.x, 4, "b"))))
    first, second, _ = units.producers
    np.testing.assert_array_equal(first.units, second.units)
    assert sizes(units) == [4]


def test_an_equal_split_ties_the_blocks_and_an_unequal_one_freezes() -> None:
    b = Build(1, 3, 4, 4)
    left, right = b.many("split", [b.conv(b.x, 6, "a")], [(1, 3, 4, 4)] * 2, "cut", axis=1, sizes=(3, 3))
    units = b.units(b.head(left), b.conv(right, 2, "other"))
    assert sizes(units)[0] == 3
    np.testing.assert_array_equal(units.producers[0].units[:3], units.producers[0].units[3:])
    b = Build(1, 3, 4, 4)
    left, _ = b.many("split", [b.conv(b.x, 6, "a")], [(1, 2, 4, 4), (1, 4, 4, 4)], "cut", axis=1, sizes=(2, 4))
    units = b.units(b.head(left))
    assert names(units) == []
    assert "cut at written places by 'split' in layer 'cut'" in str(reason(units, "a"))


def test_an_equal_split_freezes_when_the_widths_are_written() -> None:
    b = Build(1, 3, 4, 4)
    left, _ = b.many("split", [b.conv(b.x, 6, "a")], [(1, 3, 4, 4)] * 2, "cut", axis=1, sizes=(3, 3))
    out = b.head(left)
    assert sizes(b.units(out)) == [3]
    assert names(b.units(out, freeze_reshapes=True)) == []


def test_a_split_over_space_does_nothing_to_channels() -> None:
    b = Build(1, 3, 4, 4)
    top, _ = b.many("split", [b.conv(b.x, 6, "a")], [(1, 6, 1, 4), (1, 6, 3, 4)], "cut", axis=2, sizes=(1, 3))
    assert sizes(b.units(b.head(top))) == [6]


def test_a_slice_of_channels_freezes_and_one_of_space_does_not() -> None:
    for axis, free in ((1, []), (2, [("a",)])):
        b = Build(1, 3, 4, 4)
        shape = tuple(2 if a == axis else size for a, size in enumerate((1, 4, 4, 4)))
        x = b.add("slice", [b.conv(b.x, 4, "a")], shape, axis=axis, start=0, stop=4, step=2)
        assert names(b.units(b.head(x))) == free


def test_blocks_of_a_reshape_shrink_alike() -> None:
    """A channel shuffle: 6 channels as 2 blocks of 3, swapped, and back."""
    b = Build(1, 3, 4, 4)
    x = b.add("reshape", [b.conv(b.x, 6, "a")], (1, 2, 3, 4, 4))
    x = b.add("transpose", [x], (1, 3, 2, 4, 4), perm=(0, 2, 1, 3, 4))
    x = b.conv(b.add("reshape", [x], (1, 6, 4, 4)), 2, "b")
    out = b.head(x)
    units = b.units(out)
    assert sizes(units) == [3, 2]
    np.testing.assert_array_equal(units.producers[0].units[:3], units.producers[0].units[3:])
    # The second layer reads them interleaved.
    order = units.producers[0].units.reshape(2, 3).T.ravel()
    np.testing.assert_array_equal(units.touched["b.weight", 1], order)
    assert names(b.units(out, freeze_reshapes=True)) == [("b",)]


def test_flattening_gives_each_channel_its_places() -> None:
    b = Build(1, 3, 2, 2)
    units = b.units(b.linear(b.add("reshape", [b.conv(b.x, 3, "a")], (1, 12)), 2, "fc"))
    np.testing.assert_array_equal(units.touched["fc.weight", 1], np.repeat(units.producers[0].units, 4))
    removed = {int(units.producers[0].units[1])}
    assert units.kept(removed)["fc.weight"] == {1: (0, 1, 2, 3, 8, 9, 10, 11)}


def test_a_reshape_that_mixes_channels_with_space_freezes() -> None:
    b = Build(1, 3, 2, 3)
    x = b.add("reshape", [b.conv(b.x, 4, "a")], (1, 3, 4, 2))
    units = b.units(b.conv(x, 2, "b"))
    assert names(units) == []
    assert reason(units, "a") is not None


def test_padding_space_is_free_and_padding_channels_meets_a_constant() -> None:
    b = Build(1, 3, 4, 4)
    x = b.add("pad", [b.conv(b.x, 4, "a")], (1, 4, 6, 6), pads=((0, 0), (0, 0), (1, 1), (1, 1)))
    assert sizes(b.units(b.head(x))) == [4]
    b = Build(1, 3, 4, 4)
    x = b.add("pad", [b.conv(b.x, 2, "a")], (1, 5, 4, 4), pads=((0, 0), (1, 2), (0, 0), (0, 0)))
    units = b.units(b.head(b.binary(x, b.conv(b.x, 5, "wide"))))
    # Channels 1 and 2 of the wide layer meet the narrow one's; the others meet padding.
    assert names(units) == [("a", "wide")]
    assert sizes(units) == [2]
    wide = next(producer for producer in units.producers if producer.layer == "wide")
    assert [int(unit) in units.frozen for unit in wide.units] == [True, False, False, True, True]


def test_a_reduction_or_softmax_over_channels_freezes_over_space_it_does_not() -> None:
    for axes, free in (((1,), []), ((2,), [("a",)])):
        b = Build(1, 3, 4, 4)
        shape = tuple(1 if a in axes else size for a, size in enumerate((1, 4, 4, 4)))
        x = b.add("reduce", [b.conv(b.x, 4, "a")], shape, "red", op="max", axes=axes, keepdims=True)
        assert names(b.units(b.head(x))) == free
    for axis, free in ((1, []), (3, [("a",)])):
        b = Build(1, 3, 4, 4)
        x = b.add("softmax", [b.conv(b.x, 4, "a")], (1, 4, 4, 4), axis=axis)
        assert names(b.units(b.head(x))) == free


def test_a_layer_norm_over_channels_freezes_unless_told() -> None:
    b = Build(1, 5, 6)
    x = b.add("layer_norm", [b.linear(b.x, 4, "a")], (1, 5, 4), "n", params={"weight": "n.weight"}, axes=(2,))
    b.parameters["n.weight"] = (4,)
    graph = b.graph(b.linear(x, 2, "fc"))
    held = find_units(graph)
    assert names(held) == []
    assert "'layer_norm' in layer 'n'" in str(reason(held, "a"))
    free = find_units(graph, Rules(layer_norms=True))
    assert names(free) == [("a",)]
    unit = int(free.groups()[0].units[1])
    assert unit in free.inexact
    assert free.kept({unit})["n.weight"] == {0: (0, 2, 3)}


def test_a_group_norm_loses_whole_groups() -> None:
    b = Build(1, 3, 4, 4)
    x = b.add("group_norm", [b.conv(b.x, 6, "a")], (1, 6, 4, 4), "n", params={"weight": "n.weight"}, groups=3)
    b.parameters["n.weight"] = (6,)
    units = find_units(b.graph(b.head(x)))
    assert sizes(units) == [3]
    first = int(units.groups()[0].units[0])
    assert units.kept({first})["n.weight"] == {0: (2, 3, 4, 5)}
    assert not units.inexact


def test_a_group_norm_of_one_group_freezes() -> None:
    b = Build(1, 3, 4, 4)
    x = b.add("group_norm", [b.conv(b.x, 6, "a")], (1, 6, 4, 4), "n", groups=1)
    units = find_units(b.graph(b.head(x)))
    assert names(units) == []
    assert "'group_norm' in layer 'n'" in str(reason(units, "a"))


def test_a_product_of_activations_unites_what_it_sums_over() -> None:
    b = Build(1, 4, 6)
    q, k, v = (b.linear(b.x, 5, name) for name in "qkv")
    scores = b.add("matmul", [q, b.add("transpose", [k], (1, 5, 4), perm=(0, 2, 1))], (1, 4, 4), "scores")
    scores = b.add("softmax", [scores], (1, 4, 4), axis=2)
    graph = b.graph(b.linear(b.add("matmul", [scores, v], (1, 4, 5), "mix"), 2, "fc"))
    assert names(find_units(graph)) == [("q", "k"), ("v",)]
    held = find_units(graph, Rules(freeze_attention=True))
    assert names(held) == []
    assert "two activations are multiplied by 'matmul' in layer 'scores'" in str(reason(held, "q"))


def attention(b: Build, heads: int, size: int, fused: bool) -> int:
    """Softmax attention over 4 tokens of 6 channels, q, k, v separate or from one layer; gives the output's id."""
    width = heads * size
    if fused:
        cut = b.add("reshape", [b.linear(b.x, 3 * width, "qkv")], (1, 4, 3, heads, size), "attn")
        cut = b.add("transpose", [cut], (3, 1, heads, 4, size), perm=(2, 0, 3, 1, 4))
        pieces = b.many("split", [cut], [(1, 1, heads, 4, size)] * 3, axis=0, sizes=(1, 1, 1))
        q, k, v = (b.add("reshape", [piece], (1, heads, 4, size), "attn") for piece in pieces)
    else:
        cut_up = [b.add("reshape", [b.linear(b.x, width, name)], (1, 4, heads, size), "attn") for name in "qkv"]
        q, k, v = (b.add("transpose", [piece], (1, heads, 4, size), perm=(0, 2, 1, 3)) for piece in cut_up)
    scores = b.add("matmul", [q, b.add("transpose", [k], (1, heads, size, 4), perm=(0, 1, 3, 2))], (1, heads, 4, 4))
    mixed = b.add("matmul", [b.add("softmax", [scores], (1, heads, 4, 4), axis=3), v], (1, heads, 4, size))
    mixed = b.add("transpose", [mixed], (1, 4, heads, size), perm=(0, 2, 1, 3))
    return b.linear(b.add("reshape", [mixed], (1, 4, width), "attn"), 2, "out")


@pytest.mark.parametrize("fused", [False, True])
def test_whole_attention_heads(fused: bool) -> None:
    b = Build(1, 4, 6)
    units = find_units(b.graph(attention(b, heads=3, size=2, fused=fused)), Rules(heads=True))
    assert sizes(units) == [3]
    assert list(units.heads) == ["attn"]
    kept = units.kept({int(units.heads["attn"][1])})
    assert kept["out.weight"] == {1: (0, 1, 4, 5)}
    if fused:
        assert kept["qkv.weight"] == {0: tuple(i + 6 * j for j in range(3) for i in (0, 1, 4, 5))}
    else:
        assert all(kept[f"{name}.weight"] == {0: (0, 1, 4, 5)} for name in "qkv")


def test_positions_within_heads_shrink_alike() -> None:
    b = Build(1, 4, 6)
    units = find_units(b.graph(attention(b, heads=3, size=2, fused=False)))
    assert names(units) == [("q", "k"), ("v",)]
    assert sizes(units) == [2, 2]
    assert units.kept({int(units.groups()[1].units[0])})["out.weight"] == {1: (1, 3, 5)}


def slices(b: Build, x: int, *spans: tuple[int, int]) -> list[int]:
    n, _, h, w = b.shapes[x]
    return [
        b.add("slice", [x], (n, stop - start, h, w), axis=1, start=start, stop=stop, step=1) for start, stop in spans
    ]


def test_slices_that_part_the_channels_equally_are_a_split() -> None:
    b = Build(1, 3, 4, 4)
    left, right = slices(b, b.conv(b.x, 6, "a"), (0, 3), (3, 6))
    units = b.units(b.head(b.binary(b.conv(left, 4, "b"), b.conv(right, 4, "c"))))
    assert names(units) == [("a",), ("b", "c")]
    kept = units.kept({int(units.groups()[0].units[1])})
    assert kept == {"a.weight": {0: (0, 2, 3, 5)}, "b.weight": {1: (0, 2)}, "c.weight": {1: (0, 2)}}


@pytest.mark.parametrize("spans", [((0, 2), (2, 6)), ((0, 3), (2, 5)), ((0, 3),), ((3, 6),)])
def test_other_slices_freeze(spans: tuple[tuple[int, int], ...]) -> None:
    b = Build(1, 3, 4, 4)
    pieces = [b.conv(piece, 4, f"b{i}") for i, piece in enumerate(slices(b, b.conv(b.x, 6, "a"), *spans))]
    units = b.units(*(b.head(piece) for piece in pieces))
    assert "cut at written places by 'slice'" in str(reason(units, "a"))


def test_channel_attention_is_frozen() -> None:
    """q and k are multiplied over the tokens: their channels stay as two axes of the product."""
    b = Build(1, 4, 6)
    q, k = b.linear(b.x, 5, "q"), b.linear(b.x, 5, "k")
    x = b.add("matmul", [b.add("transpose", [q], (1, 5, 4), perm=(0, 2, 1)), k], (1, 5, 5), "scores")
    units = b.units(b.linear(x, 2, "fc"))
    assert sizes(units) in ([], [1])


@pytest.mark.parametrize(("groups", "kept_in", "kept_out"), [(1, (0, 2, 3), (0, 1, 3)), (2, (0, 2), (1, 3))])
def test_a_transposed_convolution(groups: int, kept_in: tuple[int, ...], kept_out: tuple[int, ...]) -> None:
    b = Build(1, 3, 4, 4)
    b.parameters |= {"t.weight": (4, 4 // groups, 2, 2), "t.bias": (4,)}
    x = b.add(
        "conv", [b.conv(b.x, 4, "a")], (1, 4, 8, 8), "t", params={"weight": "t.weight", "bias": "t.bias"},
        groups=groups, transposed=True,
    )  # fmt: skip
    graph = b.graph(b.head(x))
    units = find_units(graph)
    assert [(p.layer, p.kind) for p in units.producers][:2] == [("a", "conv"), ("t", "transposed")]
    before, after = units.groups()[0].units, units.groups()[1].units
    removed = {int(before[1]), int(after[2 if groups == 1 else 0])}
    kept = units.kept(removed)
    assert kept["t.weight"] == {0: kept_in, 1: kept_out if groups == 1 else (1,)}
    assert kept["t.bias"] == {0: kept_out}
    assert cost_without(graph, units, removed).macs < cost_of(graph).macs


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1), (4, 4, 4)])
def test_a_parameter_outside_any_layer_goes_with_the_channels_it_meets(shape: tuple[int, ...]) -> None:
    b = Build(1, 3, 4, 4)
    b.parameters["scale"] = shape
    scale = b.constant(*shape, value="scale")
    units = b.units(b.head(b.add("binary", [b.conv(b.x, 4, "a"), scale], (1, 4, 4, 4), op="mul")))
    assert names(units) == [("a",)]
    kept = units.kept({int(units.groups()[0].units[2])})
    assert kept["scale"] == {shape.index(4): (0, 1, 3)}


def test_a_quotient_by_a_parameter_freezes() -> None:
    """Zeroed, the parameter would make 0 / 0."""
    b = Build(1, 3, 4, 4)
    b.parameters["scale"] = (4, 1, 1)
    scale = b.constant(4, 1, 1, value="scale")
    units = b.units(b.head(b.add("binary", [b.conv(b.x, 4, "a"), scale], (1, 4, 4, 4), op="div")))
    assert names(units) == []


def test_cost_without_units_is_the_cost_of_the_smaller_model() -> None:
    backend = get_backend("torch")
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(), nn.Linear(8 * 16, 3),
    )  # fmt: skip
    image = np.zeros((2, 3, 10, 10), np.float32)
    graph = backend.trace(net, [image])
    units = find_units(graph)
    removed = {int(group.units[0]) for group in units.groups()}
    decision = Pruner(PruneStage(pruning_ratio=0.5)).decide(graph, backend.read(net))
    kept = units.kept(removed)
    by_hand = decision.model_copy(
        update={"kept": kept, "sizes": {name: tuple(graph.parameters[name]) for name in kept}}
    )
    smaller = cost_of(backend.trace(backend.remove_channels(net, by_hand), [image]))
    expected = cost_without(graph, units, removed)
    assert (expected.macs, expected.parameters) == (smaller.macs, smaller.parameters)


def test_concat_of_a_tensor_with_itself() -> None:
    b = Build(1, 3, 4, 4)
    x = b.conv(b.x, 3, "a")
    x = b.norm(b.add("concat", [x, x], (1, 6, 4, 4), axis=1), "n")
    units = b.units(b.head(x))
    assert sizes(units) == [3]
    removed = {int(units.producers[0].units[1])}
    assert units.kept(removed) == {
        "a.weight": {0: (0, 2)},
        "fc.weight": {1: (0, 2, 3, 5)},
        "n.weight": {0: (0, 2, 3, 5)},
    }


def test_concat_with_the_input_keeps_the_inputs_channels() -> None:
    b = Build(1, 3, 4, 4)
    x = b.add("concat", [b.x, b.conv(b.x, 2, "a")], (1, 5, 4, 4), axis=1)
    units = b.units(b.head(b.conv(x, 2, "b")))
    removed = {int(units.producers[0].units[0])}
    assert units.kept(removed) == {"a.weight": {0: (1,)}, "b.weight": {1: (0, 1, 2, 4)}}


def test_groups_of_a_convolution_shrink_alike() -> None:
    b = Build(1, 3, 4, 4)
    units = b.units(b.head(b.conv(b.conv(b.x, 4, "a"), 6, "g", groups=2)))
    assert names(units) == [("a",), ("g",)]
    assert sizes(units) == [2, 3]
    removed = {int(units.producers[0].units[0]), int(units.producers[1].units[2])}
    kept = units.kept(removed)
    assert kept["a.weight"] == {0: (1, 3)}
    assert kept["g.weight"] == {0: (0, 1, 3, 4), 1: (1,)}


def test_a_depthwise_layer_with_a_multiplier_carries_its_channels() -> None:
    b = Build(1, 3, 4, 4)
    units = b.units(b.head(b.conv(b.conv(b.x, 3, "a"), 6, "d", groups=3)))
    assert names(units) == [("a",)]
    assert "d" not in [producer.layer for producer in units.producers]
    removed = {int(units.producers[0].units[1])}
    kept = units.kept(removed)
    assert kept == {"a.weight": {0: (0, 2)}, "d.weight": {0: (0, 1, 4, 5)}, "fc.weight": {1: (0, 1, 4, 5)}}


def test_shared_weights_unite_inputs_and_outputs() -> None:
    b = Build(1, 3, 4, 4)
    x = b.conv(b.conv(b.conv(b.x, 4, "a"), 4, "s"), 4, "s")
    units = b.units(b.head(x))
    assert names(units) == [("a", "s")]
    assert sizes(units) == [4]
    assert len(units.producers) == 3, "each weight once"


def test_a_parameter_used_outside_its_layer_cannot_shrink() -> None:
    b = Build(1, 3, 4, 4)
    x = b.conv(b.x, 4, "a")
    b.constant(4, 3, 3, 3, value="a.weight")
    units = b.units(b.head(x))
    assert names(units) == []
    assert reason(units, "a") == "its parameter 'a.weight' is also used outside the layer"


def test_a_linear_layer_over_places_freezes_what_it_reads() -> None:
    b = Build(1, 3, 4, 5)
    x = b.add("transpose", [b.conv(b.x, 4, "a")], (1, 4, 5, 4), perm=(0, 2, 3, 1))
    assert names(b.units(b.linear(x, 2, "fc"))) == [("a",)]
    b = Build(1, 3, 4, 5)
    x = b.linear(b.conv(b.x, 4, "a"), 2, "fc")
    units = b.units(x)
    assert names(units) == []
    assert reason(units, "a") is not None


def test_pooling_and_resizing_keep_channels() -> None:
    b = Build(1, 3, 4, 4)
    x = b.add("pool", [b.conv(b.x, 4, "a")], (1, 4, 2, 2), op="max")
    x = b.add("resize", [x], (1, 4, 8, 8))
    assert sizes(b.units(b.head(x))) == [4]


def test_a_graph_without_layers_has_no_groups() -> None:
    b = Build(1, 3)
    units = b.units(b.add("elementwise", [b.x], (1, 3), op="relu"))
    assert units.groups() == ()
    with pytest.raises(ModelError, match=r"no channel of any layer may be removed; layers found: 0"):
        Pruner(PruneStage(pruning_ratio=0.5)).decide(b.graph(1), {})


def test_a_kind_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'convolution'"):
        Node("convolution", "a", (), ())


# Cost


def test_cost_by_hand() -> None:
    b = Build(2, 3, 4, 5)
    x = b.norm(b.conv(b.conv(b.x, 6, "a"), 6, "d", groups=6), "n")
    x = b.add("reshape", [x], (2, 6, 20))
    product = b.add("matmul", [x, b.add("transpose", [x], (2, 20, 6), perm=(0, 2, 1))], (2, 6, 6), "mm")
    b.parameters["n.running_mean"] = (6,)
    cost = cost_of(b.graph(b.linear(product, 7, "fc")))
    assert dict(cost.by_layer) == {"a": 20 * 6 * 27, "d": 20 * 6 * 9, "mm": 36 * 20, "fc": 6 * 7 * 6}
    assert cost.macs == sum(cost.by_layer.values())
    assert cost.parameters == 6 * 27 + 6 * 9 + 6 + 42


def test_a_layer_that_runs_twice_costs_twice() -> None:
    b = Build(1, 4, 4, 4)
    cost = cost_of(b.graph(b.conv(b.conv(b.x, 4, "s"), 4, "s")))
    assert cost.by_layer == {"s": 2 * 16 * 4 * 36}
    assert cost.parameters == 4 * 36


# Random nets


class Random(nn.Module):
    """Blocks drawn from a list: plain, residual, concat, depthwise, grouped, shuffle."""

    def __init__(self, blocks: Sequence[str], width: int) -> None:
        super().__init__()
        self.stem, self.kinds = nn.Conv2d(3, width, 3, padding=1), tuple(blocks)
        self.blocks, self.norms = nn.ModuleList(), nn.ModuleList()
        for kind in blocks:
            groups = {"depthwise": width, "grouped": 2}.get(kind, 1)
            self.blocks.append(nn.Conv2d(width, width, 3, padding=1, groups=groups))
            width *= 2 if kind == "concat" else 1
            self.norms.append(nn.BatchNorm2d(width))
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        for kind, block, norm in zip(self.kinds, self.blocks, self.norms, strict=True):
            if kind == "shuffle":
                n, c, h, w = x.shape
                x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            y = block(x)
            y = {"residual": lambda x=x, y=y: x + y, "concat": lambda x=x, y=y: torch.cat([y, x], 1)}.get(
                kind, lambda y=y: y
            )()
            x = torch.sigmoid(norm(y)) if kind == "plain" else torch.relu(norm(y))
        return self.fc(x.mean((2, 3)))


BLOCKS = st.lists(
    st.sampled_from(["plain", "residual", "concat", "depthwise", "grouped", "shuffle"]), min_size=1, max_size=5
)


@given(BLOCKS, st.sampled_from([4, 6, 8]), st.floats(0.3, 0.9), st.integers(0, 1000))
def test_removing_equals_zeroing_on_random_nets(blocks: list[str], width: int, ratio: float, seed: int) -> None:
    """In float64; every entry that stays is the old one."""
    backend = get_backend("torch")
    model = backend.place(Random(blocks, width), "cpu", "float64")
    rng = np.random.default_rng(seed)
    weights = {name: rng.standard_normal(array.shape) for name, array in backend.read(model).items()}
    weights = {name: np.abs(array) + 0.5 if name.endswith("var") else array for name, array in weights.items()}
    model = backend.write(model, weights)
    x = rng.standard_normal((2, 3, 4, 4))
    decision = Pruner(PruneStage(pruning_ratio=ratio)).decide(backend.trace(model, [x]), weights)
    pruned = backend.remove_channels(backend.clone(model), decision)
    silent = backend.write(backend.clone(model), zeroed(weights, decision))
    outputs = [backend.ops.numpy(backend.forward(side, [x]).output) for side in (pruned, silent)]
    assert relative(*outputs) <= tolerance("removal").value
    for name, array in backend.read(pruned).items():
        np.testing.assert_array_equal(array, sliced(weights[name], decision.kept.get(name, {})))
    assert cost_of(backend.trace(pruned, [x])).macs < cost_of(backend.trace(model, [x])).macs
