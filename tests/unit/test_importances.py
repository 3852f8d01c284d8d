"""Each importance against its formula in loops; what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import dist, fsum, sqrt
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from slimbridge.errors import SlimbridgeError
from slimbridge.parity import relative, tolerance
from slimbridge.plan.registries import IMPORTANCES, Importance, Rows, as_importance
from slimbridge.ports import Array
from slimbridge.prune.importances import distance_sums

RNG = np.random.default_rng(3)
EXACT = tolerance("statistics_float64").value
SHAPES = [(5, 3, 2, 2), (4, 7), (1, 1, 1, 1), (3, 2, 5), (6,)]


def entry(name: str) -> Importance:
    return as_importance(IMPORTANCES.get(name))


def rows(weight: Array, **rest: Any) -> Rows:
    return Rows(parameter="conv.weight", role="weight", kind="conv", side="out", weight=weight, **rest)


def filled(weight: Array, seed: int = 0) -> Rows:
    random = np.random.default_rng(seed)
    return rows(
        weight,
        gradient=random.standard_normal(weight.shape).astype(weight.dtype),
        squared_gradient=random.random(weight.shape).astype(weight.dtype),
        activation={"mean": random.random(len(weight)), "apoz": random.random(len(weight))},
        seed=7,
    )


def oracle(name: str, item: Rows) -> list[float]:
    """Each row by the formula, in Python's own floats."""
    weight = [[float(value) for value in row.ravel()] for row in item.weight]
    assert item.gradient is not None and item.squared_gradient is not None and item.activation is not None
    gradient = [[float(value) for value in row.ravel()] for row in item.gradient]
    curvature = [[float(value) for value in row.ravel()] for row in item.squared_gradient]
    activation = item.activation
    formulas: dict[str, Callable[[int], float]] = {
        "l1_norm": lambda i: fsum(map(abs, weight[i])) / len(weight[i]),
        "l2_norm": lambda i: sqrt(fsum(w * w for w in weight[i])),
        "fpgm": lambda i: fsum(dist(weight[i], other) for other in weight),
        "bn_scale": lambda i: fsum(map(abs, weight[i])),
        "taylor": lambda i: fsum(abs(w * g) for w, g in zip(weight[i], gradient[i], strict=True)),
        "snip": lambda i: fsum(abs(w * g) for w, g in zip(weight[i], gradient[i], strict=True)),
        "fisher": lambda i: fsum(w * w * h / 2 for w, h in zip(weight[i], curvature[i], strict=True)),
        "group_norm": lambda i: fsum(w * w for w in weight[i]),
        "magnitude": lambda i: fsum(w * w for w in weight[i]),
        "lamp": lambda i: fsum(w * w for w in weight[i]),
        "activation_mean": lambda i: float(activation["mean"][i]),
        "activation_apoz": lambda i: 1 - float(activation["apoz"][i]),
    }
    return [formulas[name](index) for index in range(len(weight))]


FORMULAS = tuple(name for name in IMPORTANCES.names() if name != "random")
OF_WEIGHTS = tuple(name for name in FORMULAS if entry(name).needs == "weights")


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_importances_in_loops(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    item = filled(RNG.standard_normal(shape).astype(dtype))
    found = entry(name).score(item)
    assert found.dtype == np.float64
    assert found.shape == shape[:1]
    assert relative(found, np.array(oracle(name, item))) <= EXACT


@pytest.mark.parametrize("p", [1, 2, 3, 0.5])
@pytest.mark.parametrize("name", ["magnitude", "lamp"])
def test_powers_of_magnitudes(name: str, p: float) -> None:
    weight = RNG.standard_normal((4, 3, 2)).astype(np.float32)
    expected = [fsum(abs(float(value)) ** p for value in row.ravel()) for row in weight]
    assert relative(entry(name).score(rows(weight), p=p), np.array(expected)) <= EXACT


@pytest.mark.parametrize("p", [0.0, -1.0, float("inf"), float("nan")])
def test_a_power_must_be_above_zero(p: float) -> None:
    with pytest.raises(SlimbridgeError, match=r"importance_options.p: found .*; allowed: a number above 0"):
        entry("magnitude").score(rows(np.ones((2, 2))), p=p)


def test_every_importance_says_what_it_is() -> None:
    for name in IMPORTANCES.names():
        assert entry(name).source
        text = entry(name).score.__doc__ or ""
        assert all(word in text for word in ("Source:", "Args:", "Returns:")), name


# What must hold for any weights

WEIGHTS = array_shapes(min_dims=1, max_dims=4, max_side=5).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-8, 8, width=16))
)


@pytest.mark.parametrize("name", FORMULAS)
@given(weight=WEIGHTS, seed=st.integers(0, 99))
def test_rows_in_another_order_have_the_same_values(name: str, weight: Array, seed: int) -> None:
    item = filled(weight)
    order = np.random.default_rng(seed).permutation(len(weight))
    assert item.gradient is not None and item.squared_gradient is not None and item.activation is not None
    moved = rows(
        weight[order],
        gradient=item.gradient[order],
        squared_gradient=item.squared_gradient[order],
        activation={key: values[order] for key, values in item.activation.items()},
    )
    assert relative(entry(name).score(moved), entry(name).score(item)[order]) <= EXACT


@pytest.mark.parametrize("name", OF_WEIGHTS)
@given(weight=WEIGHTS, scale=st.sampled_from([0.25, 2.0, 1024.0]))
def test_a_scaled_weight_scales_its_importance(name: str, weight: Array, scale: float) -> None:
    """By the scale, or by its square; powers of two are exact."""
    degree = 2 if name in ("group_norm", "magnitude", "lamp") else 1
    plain, scaled = (entry(name).score(rows(array)) for array in (weight, weight * np.float32(scale)))
    assert relative(scaled, plain * scale**degree) <= EXACT


@pytest.mark.parametrize("name", FORMULAS)
@given(weight=WEIGHTS)
def test_nothing_is_below_zero(name: str, weight: Array) -> None:
    assert (entry(name).score(filled(weight)) >= 0).all()


# Distances


def distances_in_loops(weight: Array) -> Array:
    values = np.asarray(weight, np.float64)
    sums = np.zeros(len(values))
    for i, j in combinations(range(len(values)), 2):
        sums[[i, j]] += np.sqrt(np.square(values[i] - values[j]).sum())
    return sums


@pytest.mark.parametrize("far", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-6])
def test_distances_of_filters_that_nearly_agree(far: float, apart: float) -> None:
    """Far from the origin and close to each other, where the squared norms all but cancel."""
    weight = (far + apart * RNG.standard_normal((40, 30))).astype(np.float32)
    assert relative(distance_sums(weight.astype(np.float64)), distances_in_loops(weight)) <= EXACT


def test_two_close_clusters() -> None:
    """The mean is far from both, so that taking it off helps nothing."""
    centres = np.repeat([[3.0], [-3.0]], 20, axis=0) * RNG.standard_normal(50)
    weight = centres + 1e-7 * RNG.standard_normal(centres.shape)
    assert relative(distance_sums(weight), distances_in_loops(weight)) <= EXACT


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 99))
def test_equal_filters_have_no_distance(count: int, size: int, seed: int) -> None:
    row = np.random.default_rng(seed).standard_normal(size)
    same = np.repeat(row[None], count, axis=0)
    same[::2] *= np.where(row == 0, -1.0, 1.0)
    assert np.array_equal(distance_sums(same), np.zeros(count))


def test_equal_filters_among_others_have_equal_values() -> None:
    weight = RNG.standard_normal((67, 129))
    weight[[3, 40, 66]] = weight[11]
    found = distance_sums(weight)
    assert len(set(found[[3, 11, 40, 66]].tolist())) == 1
    assert relative(found, distances_in_loops(weight)) <= EXACT


def test_zero_and_minus_zero_are_one_number() -> None:
    assert np.array_equal(distance_sums(np.array([[0.0, 1.0], [-0.0, 1.0]])), np.zeros(2))


# Random


def test_random_depends_on_the_seed_and_the_name() -> None:
    score = entry("random").score
    base = rows(np.ones((6, 2)), seed=1)
    again = Rows(parameter="conv.weight", role="weight", kind="conv", side="out", weight=np.zeros((6, 9)), seed=1)
    other = Rows(parameter="conv2.weight", role="weight", kind="conv", side="out", weight=np.ones((6, 2)), seed=1)
    expected = np.random.default_rng([1, crc32(b"conv.weight")]).random(6)
    assert np.array_equal(score(base), expected)
    assert np.array_equal(score(base), score(again))
    assert not np.array_equal(score(base), score(other))
    assert not np.array_equal(score(base), score(rows(np.ones((6, 2)), seed=2)))
    assert ((score(base) >= 0) & (score(base) < 1)).all()


def test_a_plain_function_of_a_weight_is_an_importance() -> None:
    largest = as_importance(lambda weight: np.abs(weight).max(axis=1))
    assert largest.score(rows(np.array([[1.0, -3.0], [2.0, 0.0]]))).tolist() == [3.0, 2.0]
    assert (largest.needs, largest.rated) == ("weights", "producers")
