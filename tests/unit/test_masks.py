"""Masks: importances of entries, patterns, the sparsifier with its refusals, masks through a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimbridge.decisions import GroupChoice, Mask, MaskDecision, PruneDecision
from slimbridge.errors import ModelError, RunError, SlimbridgeError
from slimbridge.graph import Graph, Node
from slimbridge.parity import relative, tolerance
from slimbridge.plan.pruning import SparsifyStage
from slimbridge.plan.registries import ENTRY_IMPORTANCES, Rows
from slimbridge.ports import Array, Backend, Layer
from slimbridge.prune.candidates import find_candidates
from slimbridge.prune.evidence import Evidence
from slimbridge.prune.patterns import lowest, mask_of, masks_of
from slimbridge.prune.sparsifier import Sparsifier, masked, masks_in_force, notes

RNG = np.random.default_rng(11)
LAYERS = (
    Layer("a", "conv", {"weight": "a.weight", "bias": "a.bias"}),
    Layer("n", "batch_norm", {"weight": "n.weight"}),
    Layer("b", "conv", {"weight": "b.weight"}),
    Layer("fc", "linear", {"weight": "fc.weight"}),
)
WEIGHTS: dict[str, Array] = {
    "a.weight": RNG.standard_normal((8, 3, 3, 3)).astype(np.float32),
    "a.bias": RNG.standard_normal(8).astype(np.float32),
    "n.weight": RNG.standard_normal(8).astype(np.float32),
    "b.weight": RNG.standard_normal((6, 8, 1, 1)).astype(np.float32),
    "fc.weight": RNG.standard_normal((4, 24)).astype(np.float32),
}


def decide(graph: Graph | None = None, evidence: Any = None, layers: Any = LAYERS, **stage: Any) -> MaskDecision:
    made = SparsifyStage(**{"sparsity": None if "layer_sparsity" in stage else 0.5, **stage})
    return Sparsifier(made, 0).decide(layers, graph, WEIGHTS, evidence or Evidence())


def arrays(decision: MaskDecision) -> dict[str, Array]:
    return {name: mask.array() for name, mask in decision.masks.items()}


# Importances of entries


def scores(name: str, weight: Array, **rest: Any) -> Array:
    options = {key: rest.pop(key) for key in ("p",) if key in rest}
    found = ENTRY_IMPORTANCES.get(name).score(Rows("w", "weight", "conv", "out", weight, **rest), **options)
    assert found.dtype == np.float64
    assert found.shape == weight.shape
    return np.asarray(found)


def test_importances_by_formula() -> None:
    w, g, h = (RNG.standard_normal((3, 2, 2, 2)).astype(np.float32) for _ in range(3))
    expected = {"magnitude": [], "taylor": [], "fisher": [], "lamp": []}  # type: dict[str, list[float]]
    flat = [float(value) for value in w.ravel()]
    for value, slope, curve in zip(flat, g.ravel().tolist(), (h**2).ravel().tolist(), strict=True):
        expected["magnitude"].append(abs(value))
        expected["taylor"].append(abs(value * slope))
        expected["fisher"].append(value * value * curve / 2)
        expected["lamp"].append(value * value / sum(other * other for other in flat if abs(other) >= abs(value)))
    expected["snip"] = expected["taylor"]
    for name, values in expected.items():
        found = scores(name, w, gradient=g, squared_gradient=h**2)
        assert relative(found.ravel(), np.array(values)) <= tolerance("statistics_float64").value, name
    assert np.array_equal(scores("magnitude", w, p=2.0), np.abs(w.astype(np.float64)) ** 2)


def test_lamp_of_equal_and_of_zero_weights() -> None:
    assert scores("lamp", np.array([[2.0, 2.0]])).tolist() == [[0.5, 1.0]], "the later of equal ones counts as larger"
    assert scores("lamp", np.zeros((2, 2))).tolist() == [[0, 0], [0, 0]]


@given(st.integers(0, 2**20), st.integers(1, 40))
def test_lamp_keeps_the_order_of_magnitudes(seed: int, n: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((n, 3))
    order = np.argsort(np.abs(weight).ravel())
    assert (np.diff(scores("lamp", weight).ravel()[order]) >= 0).all()
    assert scores("lamp", weight).max() == 1.0


def test_random_depends_on_seed_and_name_only() -> None:
    first, again = (scores("random", weight, seed=1) for weight in (np.zeros((4, 5)), np.ones((4, 5))))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, scores("random", np.zeros((4, 5)), seed=2))
    other = ENTRY_IMPORTANCES.get("random").score(Rows("v", "weight", "conv", "out", np.zeros((4, 5)), seed=1))
    assert not np.array_equal(first, other)


# Patterns


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.data())
def test_lowest_is_the_start_of_a_stable_sort(values: list[int], data: Any) -> None:
    count = data.draw(st.integers(0, len(values)))
    found = lowest(np.array(values, np.float64), count)
    assert np.flatnonzero(found).tolist() == sorted(np.argsort(values, kind="stable")[:count].tolist())


SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3))
SHARES = st.floats(0, 1)


def drawn(shape: tuple[int, ...], seed: int) -> Array:
    """Scores with ties."""
    return np.random.default_rng(seed).integers(0, 30, shape).astype(np.float64)


@given(SHAPES, SHARES, st.integers(0, 99))
def test_unstructured(shape: tuple[int, ...], share: float, seed: int) -> None:
    values = drawn(shape, seed)
    mask = mask_of(values, "unstructured", share)
    assert (~mask).sum() == round(values.size * share)
    assert values[mask].min(initial=99) >= values[~mask].max(initial=0)


@given(SHAPES, SHARES, st.integers(0, 99))
def test_filters(shape: tuple[int, ...], share: float, seed: int) -> None:
    values = drawn(shape, seed)
    rows = mask_of(values, "filters", share).reshape(shape[0], -1)
    assert (rows.all(1) | ~rows.any(1)).all()
    gone = ~rows.any(1)
    assert gone.sum() == round(shape[0] * share)
    sums = values.reshape(shape[0], -1).sum(1)
    assert sums[~gone].min(initial=9999) >= sums[gone].max(initial=0)


@given(SHAPES, SHARES, st.integers(0, 99), st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_blocks(shape: tuple[int, ...], share: float, seed: int, block: tuple[int, int]) -> None:
    values = drawn(shape, seed)
    mask = mask_of(values, "block", share, block)
    rows, matrix = mask.reshape(shape[0], -1), values.reshape(shape[0], -1)
    kept, gone = [], []
    for top in range(0, rows.shape[0], block[0]):
        for left in range(0, rows.shape[1], block[1]):
            cut = (slice(top, top + block[0]), slice(left, left + block[1]))
            assert rows[cut].all() or not rows[cut].any()
            (kept if rows[cut].all() else gone).append(matrix[cut].sum() / matrix[cut].size)
    assert len(gone) == round((len(kept) + len(gone)) * share)
    assert min(kept, default=99) >= max(gone, default=0)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(2, 6), st.integers(0, 99), st.data())
def test_n_of_m(out: int, groups: int, kernel: int, m: int, seed: int, data: Any) -> None:
    n = data.draw(st.integers(1, m - 1))
    values = drawn((out, groups * m, kernel), seed)
    mask = mask_of(values, "n_m", 0.0, n_m=(n, m))
    for o in range(out):
        for k in range(kernel):
            for start in range(0, groups * m, m):
                part, stays = values[o, start : start + m, k], mask[o, start : start + m, k]
                assert stays.sum() == n
                assert part[stays].min() >= part[~stays].max()
                assert np.flatnonzero(~stays).tolist() == sorted(np.argsort(part, kind="stable")[: m - n].tolist())


@given(st.lists(SHAPES, min_size=1, max_size=4), SHARES, st.integers(0, 99))
def test_layers_compete(shapes: list[tuple[int, ...]], share: float, seed: int) -> None:
    values = [drawn(shape, seed + index) for index, shape in enumerate(shapes)]
    masks = masks_of(values, "unstructured", share)
    flat, stays = np.concatenate([v.ravel() for v in values]), np.concatenate([m.ravel() for m in masks])
    assert np.array_equal(stays, mask_of(flat[None], "unstructured", share)[0])
    filters = masks_of(values, "filters", share)
    assert sum(int((~m.reshape(len(m), -1).any(1)).sum()) for m in filters) == round(sum(map(len, values)) * share)


@given(SHAPES, st.floats(0, 1), st.floats(0, 1), st.sampled_from(["unstructured", "filters", "block"]))
def test_what_is_held_stays_and_counts(shape: tuple[int, ...], first: float, second: float, pattern: Any) -> None:
    low, high = sorted((first, second))
    old = mask_of(drawn(shape, 1), pattern, low, (2, 2))
    new = mask_of(drawn(shape, 2), pattern, high, (2, 2), held=old)
    assert not (new & ~old).any()
    assert (~new).sum() >= (~old).sum()
    if pattern == "unstructured":
        assert (~new).sum() == round(new.size * high)
    n_m = mask_of(np.ones((2, 4)), "n_m", 0, held=np.array([[True, False, True, False], [True] * 4]))
    assert n_m.tolist() == [[True, False, True, False], [False, False, True, True]]


def test_a_ragged_block_is_rated_by_its_mean() -> None:
    values = np.array([[1.0, 1.0, 1.5]])
    assert mask_of(values, "block", 0.5, (1, 2)).tolist() == [[False, False, True]]


# The sparsifier


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_local_and_global(share: float) -> None:
    local, wide = (arrays(decide(sparsity=share, selection=selection)) for selection in ("local", "global"))
    assert list(local) == list(wide) == ["a.weight", "b.weight", "fc.weight"]
    assert {name: int((~mask).sum()) for name, mask in local.items()} == {
        name: round(WEIGHTS[name].size * share) for name in local
    }
    total = sum(WEIGHTS[name].size for name in wide)
    assert sum(int((~mask).sum()) for mask in wide.values()) == round(total * share)
    threshold = max(np.abs(WEIGHTS[name][~mask]).max() for name, mask in wide.items() if not mask.all())
    assert all(np.abs(WEIGHTS[name][mask]).min() >= threshold for name, mask in wide.items() if mask.any())


@pytest.mark.parametrize(
    ("stage", "pattern", "zeros"),
    [
        ({"pattern": "block", "block": (2, 4)}, "block 2x4", 0.5),
        ({"pattern": "filters"}, "filters", 0.5),
        ({"pattern": "n_m", "sparsity": None, "n_m": (1, 4)}, "1:4", 0.75),
        ({}, "unstructured", 0.5),
    ],
)
def test_the_decision_says_what_was_asked(stage: dict[str, Any], pattern: str, zeros: float) -> None:
    decision = decide(**stage)
    assert (decision.pattern, decision.sparsity, decision.importance) == (pattern, zeros, "magnitude")
    if pattern == "1:4":
        assert [(item.layer, item.reason) for item in decision.skipped] == [
            ("a", "its 3 inputs (of a group) are no multiple of 4")
        ]
        assert sorted(decision.masks) == ["b.weight", "fc.weight"]
    for mask in arrays(decision).values():
        assert (~mask).mean() == zeros or pattern.startswith("block")


def test_shares_of_single_layers() -> None:
    decision = decide(layer_sparsity={"*": 0.25, "b": 0.5})
    counts = {name: (~mask).mean() for name, mask in arrays(decision).items()}
    assert (counts["b.weight"], counts["fc.weight"]) == (0.5, 0.25), "of several patterns the last counts"
    total = sum(WEIGHTS[name].size for name in decision.masks)
    assert decision.sparsity == (0.25 * (total - 48) + 0.5 * 48) / total
    decision = decide(layer_sparsity={"b": 0.5})
    assert [item.reason for item in decision.skipped] == ["layer_sparsity does not name it"] * 2
    assert list(decision.masks) == ["b.weight"]
    decision = decide(layer_sparsity={"b": 0.0}, sparsity=0.5, selection="global")
    assert decision.masks["b.weight"].array().all()
    assert (~arrays(decision)["fc.weight"]).any()


def test_rounds_lead_to_the_sparsity() -> None:
    half, sparsifier = (
        Sparsifier(SparsifyStage(sparsity=0.5 * part, layer_sparsity={"fc": 0.75 * part}), 0) for part in (0.5, 1.0)
    )
    first = arrays(half.decide(LAYERS, None, WEIGHTS, Evidence()))
    grown = {**WEIGHTS, "b.weight": WEIGHTS["b.weight"][::-1]}
    second = arrays(sparsifier.decide(LAYERS, None, grown, Evidence(), held=first))
    for name, share in (("a.weight", 0.5), ("b.weight", 0.5), ("fc.weight", 0.75)):
        assert (~first[name]).sum() == round(first[name].size * share / 2)
        assert (~second[name]).sum() == round(first[name].size * share)
        assert not (second[name] & ~first[name]).any()
    given = sparsifier.masks(LAYERS, None, WEIGHTS, Evidence(), sparsity=0.25)
    assert np.array_equal(given["b.weight"], first["b.weight"])


def test_layers_that_stay_dense() -> None:
    decision = decide(ignored_layers=("a",), ignored_kinds=("linear",))
    assert list(decision.masks) == ["b.weight"]
    assert {item.layer: item.reason for item in decision.skipped} == {
        "a": "ignored_layers names it",
        "fc": "ignored_kinds names 'linear'",
    }
    graph = graph_of("b.weight", 2)
    decision = decide(graph, ignored_kinds=("grouped",))
    assert [item.reason for item in decision.skipped] == ["ignored_kinds names 'grouped'"]


def graph_of(weight: str, groups: int) -> Graph:
    node = Node("conv", "x", (0,), (1,), {"weight": weight}, {"groups": groups})
    return Graph((Node("input", "", (), (0,)), node), {0: (1,), 1: (1,)}, (0,), (1,), {})


def test_a_tied_weight_appears_once() -> None:
    layers = (*LAYERS, Layer("head", "linear", {"weight": "fc.weight"}))
    assert list(decide(layers=layers).masks).count("fc.weight") == 1
    decision = decide(layers=layers, ignored_layers=("head",))
    assert "fc.weight" not in decision.masks
    assert [item.layer for item in decision.skipped] == ["fc", "head"]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution(groups: int) -> None:
    """(in, out / groups, ...): its filters and inputs lie along other axes, and start anew in each group."""
    layers = (Layer("up", "conv_transpose", {"weight": "up"}),)
    weight = RNG.standard_normal((8, 3, 2, 2))
    (candidate,) = find_candidates(layers, graph_of("up", groups))
    rows = candidate.rows(weight)
    for out in range(3 * groups):
        group, place = divmod(out, 3)
        assert np.array_equal(rows[out], weight[group * 8 // groups : (group + 1) * 8 // groups, place])
    assert np.array_equal(candidate.canonical(rows > 0, weight.shape), weight > 0)
    stage = SparsifyStage(pattern="filters", sparsity=1 / 3)
    with pytest.raises(ModelError, match=r"'up' \(its channels are an output of the model\)"):
        Sparsifier(stage, 0).decide(layers, graph_of("up", groups), {"up": weight}, Evidence())
    inside = replace(graph_of("up", groups), outputs=())
    decision = Sparsifier(stage, 0).decide(layers, inside, {"up": weight}, Evidence())
    least = np.argsort(np.abs(rows).sum((1, 2, 3)))[:groups]
    mask = candidate.rows(arrays(decision)["up"])
    assert set(np.flatnonzero(~mask.any((1, 2, 3)))) == set(least)
    with pytest.raises(ModelError, match=r"'up' \(its groups are not known without a trace\)"):
        Sparsifier(stage, 0).decide(layers, None, {"up": weight}, Evidence())


def refusals() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"ignored_layers": ("bb",)}, r"ignored_layers: 'bb' matches none of the 3 convolution and linear layers \(did"
    yield {"layer_sparsity": {"fd": 0.5}}, r"layer_sparsity: 'fd' matches none .*did you mean 'fc'.*they are: a, b, fc"
    yield {"sparsity": 0.001}, r"^0 of 3 layers changed: pattern unstructured, .*; 0 of their 360 weights"
    yield {"ignored_layers": ("*",)}, r"no layer may be masked; layers found: 3: 'a' \(ignored_layers names it\)"
    yield {"importance": "taylor"}, r"importance 'taylor' needs gradients; 'a.weight' has none"
    yield {"importance": "fisher"}, r"importance 'fisher' needs squared_gradients; 'a.weight' has none"
    yield {"ignored_kinds": ("grouped",)}, r"'grouped' needs a model that can be traced"


@pytest.mark.parametrize(("stage", "message"), list(refusals()))
def test_refusals(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        decide(**stage)


def test_weights_and_importances_that_are_not_finite(monkeypatch: Any) -> None:
    monkeypatch.setitem(WEIGHTS, "b.weight", np.full((6, 8, 1, 1), np.inf, np.float32))
    with pytest.raises(ModelError, match=r"layer 'b': 48 of 48 entries of its weight not finite"):
        decide()
    monkeypatch.undo()
    bad = {name: np.full(array.shape, np.nan) for name, array in WEIGHTS.items()}
    with pytest.raises(ModelError, match=r"importance 'taylor' of layer 'a': found NaN"):
        decide(evidence=Evidence(bad), importance="taylor")


def test_an_unknown_option() -> None:
    with pytest.raises(SlimbridgeError, match=r"'magnitude' has no option 'pp' \(did you mean 'p'\?\); allowed: p"):
        decide(importance_options={"pp": 1})
    with pytest.raises(SlimbridgeError, match=r"p must be above 0, found 0"):
        decide(importance_options={"p": 0})


def test_nothing_new_is_refused() -> None:
    first = decide()
    with pytest.raises(ModelError, match=r"0 of 3 layers changed.*; 180 of their 360 weights are masked, as before"):
        Sparsifier(SparsifyStage(sparsity=0.4), 0).decide(LAYERS, None, WEIGHTS, Evidence(), held=arrays(first))


def test_gradients_reach_the_importance(backend: Backend) -> None:
    """On a real model of either framework: masks of equal weights and gradients are those of NumPy."""
    nn = backend.nn
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(1), nn.Linear(16, 5))
    weights = backend.read(model)
    grads = {name: RNG.standard_normal(array.shape) for name, array in weights.items()}
    layers, graph = backend.layers(model), backend.trace(model, [np.zeros((1, 3, 4, 4), np.float32)])
    stage = SparsifyStage(importance="taylor", sparsity=0.3)
    found = arrays(Sparsifier(stage, 0).decide(layers, graph, weights, Evidence(grads)))
    assert sorted(found) == ["0.weight", "2.weight"]
    for name, mask in found.items():
        values = np.abs(weights[name].astype(np.float64) * grads[name])
        assert np.array_equal(~mask, values < np.sort(values.ravel())[round(values.size * 0.3)])
    backend.write(model, masked(weights, found))
    assert all((backend.read(model)[name][~mask] == 0).all() for name, mask in found.items())


# Masks through a run


def test_masked_keeps_type_and_the_rest() -> None:
    mask = {"fc.weight": WEIGHTS["fc.weight"] > 0}
    found = masked(WEIGHTS, mask)
    assert found["fc.weight"].dtype == np.float32
    assert np.array_equal(found["fc.weight"], np.maximum(WEIGHTS["fc.weight"], 0))
    assert found["a.weight"] is WEIGHTS["a.weight"]
    with pytest.raises(ModelError, match=r"'fc.weigth': the model has no such parameter \(did you mean 'fc.weight'"):
        masked(WEIGHTS, {"fc.weigth": mask["fc.weight"]})
    with pytest.raises(ModelError, match=r"it has shape \(4, 24\), the parameter \(6, 8, 1, 1\)"):
        masked(WEIGHTS, {"b.weight": mask["fc.weight"]})


def mask_decision(**masks: Array) -> MaskDecision:
    made = {name: Mask.of(mask) for name, mask in masks.items()}
    return MaskDecision(importance="magnitude", pattern="unstructured", sparsity=0.5, masks=made)


def test_masks_join_and_follow_removed_channels() -> None:
    first, second = RNG.random((4, 6)) > 0.5, RNG.random((4, 6)) > 0.5
    kept = {"w": {0: (0, 2, 3), 1: (1, 4)}, "other": {0: (1,)}}
    prune = PruneDecision(
        importance="l1_norm",
        pruning_ratio=0.5,
        groups=(GroupChoice(layers=("x",), channels=4, removed=(1,)),),
        kept=kept,
        sizes={"w": (4, 6), "other": (2,)},
    )
    after = RNG.random((3, 2)) > 0.5
    full = mask_decision(w=np.ones((4, 6), bool), v=np.ones(3, bool))
    found = masks_in_force([full, mask_decision(w=first), mask_decision(w=second), prune, mask_decision(w=after)])
    assert list(found) == ["w"], "a mask that zeroes nothing is none"
    assert np.array_equal(found["w"], (first & second)[[0, 2, 3]][:, [1, 4]] & after)
    with pytest.raises(RunError, match=r"'w' is masked with shape \(3, 2\), then has \(4, 6\)"):
        masks_in_force([mask_decision(w=after), mask_decision(w=first)])
    with pytest.raises(RunError, match=r"'w' is masked with shape \(3, 2\), then has \(4, 6\)"):
        masks_in_force([mask_decision(w=after), prune])


def test_notes() -> None:
    mask = np.ones((4, 24), bool)
    mask[0, :12] = False
    lines = notes(mask_decision(**{"fc.weight": mask, "b.weight": np.ones((6, 8, 1, 1), bool)}), WEIGHTS)
    assert lines[0] == "zeros: 12 of 144 weights (8.3 %) in 1 layers"
    assert len(lines) == 2
    assert "zeros alone save nothing" in lines[1]
    lines = notes(mask_decision(**{"fc.weight": np.zeros((4, 24), bool)}), WEIGHTS)
    assert lines[1] == "no weight is left in: fc.weight"
