"""Histograms, and the observers that search them, against loops written from their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slimbridge.decisions import QuantParams
from slimbridge.parity import tolerance
from slimbridge.plan.registries import OBSERVERS, Scheme
from slimbridge.ports import HISTOGRAM_BINS, Array, Histogram
from slimbridge.quantize.grid import grid_of, to_integers, to_reals
from slimbridge.quantize.histogram import bin_width, edges, magnitudes, merge, statistics_of
from slimbridge.quantize.histogram_observers import STRIDE, quantized_moments, squared_error

SIZES = st.floats(2.0**-60, 2.0**20, width=32)
FLOATS = st.one_of(st.just(0.0), SIZES, SIZES.map(lambda value: -value))
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=2, max_side=12), elements=FLOATS)
RNG = np.random.default_rng(11)
NORMAL = RNG.standard_normal((16, 2000)).astype(np.float32)
DATA = {
    "normal": NORMAL,
    "laplace": RNG.laplace(size=(16, 2000)).astype(np.float32),
    "relu": np.maximum(NORMAL, 0),
    "shifted": NORMAL + 2,
    "outlier": np.where(np.arange(32000).reshape(16, 2000) == 777, np.float32(60), NORMAL),
}
EXACT = tolerance("operation_float64").value


def histogram(values: Array) -> Histogram:
    found = statistics_of(values, histogram=True).histogram
    assert found is not None
    return found


def limits(name: str, values: Array, scheme: Scheme, **options: float) -> tuple[float, float]:
    observer = OBSERVERS.get(name)(**options)
    observer.update(statistics_of(values, observer.needs_histogram))
    return observer.limits(scheme)


# Statistics


def test_statistics_of_a_batch() -> None:
    found = statistics_of(np.array([[1.0, -4.0], [2.0, 0.5]]))
    assert (found.min, found.max, found.absmax, found.mean_absmax, found.histogram) == (-4, 2, 4, 3, None)
    assert statistics_of(np.float32(-2)).mean_absmax == 2
    assert np.isnan(statistics_of(np.array([[1.0, np.nan]]), histogram=True).min)
    assert statistics_of(np.array([[1.0, np.inf]]), histogram=True).histogram is None


@pytest.mark.parametrize(
    ("absmax", "exponent"),
    [(1.0, 0), (1.5, 1), (2.0, 1), (2.0001, 2), (0.5, -1), (0.51, 0), (0.0, -126), (1e-45, -126), (3e38, 128)],
)
def test_the_exponent_is_the_smallest_that_holds_all(absmax: float, exponent: int) -> None:
    assert histogram(np.array([0.0, -absmax])).exponent == exponent


def test_bins_by_hand() -> None:
    found = histogram(np.array([0.0, 1 / 4096, -1 / 4096, -1 / 5000, 1.0, -1.0, 1.0]))
    assert {int(i): int(found.counts[i]) for i in np.flatnonzero(found.counts)} == {
        **{0: 1, 4095: 2, 4096: 1, 4097: 1},
        8191: 2,
    }
    assert found.counts.shape == (HISTOGRAM_BINS,)
    assert found.counts.dtype == np.int64
    assert np.flatnonzero(magnitudes(found)).tolist() == [0, 1, 4095]


@given(ARRAYS)
def test_bins_hold_what_is_between_their_edges(values: Array) -> None:
    found = histogram(values)
    expected, ends = np.zeros(HISTOGRAM_BINS, np.int64), edges(found)
    for value in values.ravel().astype(np.float64):
        expected[min(np.searchsorted(ends, value, side="right") - 1, HISTOGRAM_BINS - 1)] += 1
    np.testing.assert_array_equal(found.counts, expected)
    assert magnitudes(found).sum() == values.size


@given(ARRAYS, ARRAYS)
def test_merging_is_counting_together(a: Array, b: Array) -> None:
    first, second = histogram(a), histogram(b)
    smaller, values = min((first, a), (second, b), key=lambda pair: pair[0].exponent)
    assume(first.exponent == second.exponent or not (values == 2.0**smaller.exponent).any())
    both = histogram(np.concatenate([a.ravel(), b.ravel()]))
    for merged in (merge(first, second), merge(second, first)):
        assert merged.exponent == both.exponent
        np.testing.assert_array_equal(merged.counts, both.counts)


# Losses


@pytest.mark.parametrize(
    "grid",
    [
        QuantParams(step=(3 / 8 / 4096, 3 / 4096, 1.5 / 4096), low=-128, high=127, axis=0),
        QuantParams(step=(3 / 4096, 6 / 4096), zero_point=(100, 3), low=0, high=255, axis=0),
        QuantParams(step=(6 / 4096, 45 / 4096), low=-7, high=7, axis=0),
    ],
)
def test_losses_are_exact_for_entries_spread_over_their_bins(grid: QuantParams) -> None:
    """Against points on a mesh that all borders of the grid's cells lie on, h wide: between two, q is constant, so the
    mean of (x - q)**2 is the middle's plus h**2 / 12."""
    counts = np.zeros(HISTOGRAM_BINS, np.int64)
    counts[3800:4600] = np.random.default_rng(3).integers(0, 50, 800)
    found = Histogram(0, counts)
    parts = 16
    h = bin_width(found) / parts
    x = (edges(found)[3800:4600, None] + (np.arange(parts) + 0.5) * h).ravel()
    weights = np.repeat(counts[3800:4600], parts) / (counts.sum() * parts)
    errors, (means, deviations) = squared_error(found, grid), quantized_moments(found, grid)
    zeros = np.broadcast_to(grid.zero_point, len(grid.step))
    for i, (step, zero) in enumerate(zip(grid.step, zeros, strict=True)):
        q = (np.clip(np.rint(x / step) + zero, grid.low, grid.high) - zero) * step
        np.testing.assert_allclose(
            errors[i], weights @ (x - q) ** 2 + h**2 / 12, rtol=tolerance("gradient_float64").value
        )
        np.testing.assert_allclose(means[i], weights @ q, rtol=tolerance("gradient_float64").value)
        spread = np.sqrt(weights @ q**2 - (weights @ q) ** 2)
        np.testing.assert_allclose(deviations[i], spread, rtol=tolerance("gradient_float64").value)


# Searches


def error(values: Array, found: tuple[float, float], scheme: Scheme) -> float:
    grid = grid_of(*found, scheme)
    return float(np.mean((to_reals(to_integers(values, grid), grid).astype(np.float64) - values) ** 2))


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_mse_finds_the_best_of_many_ranges(kind: str, symmetric: bool, bits: int) -> None:
    """Against the error of the values themselves over 400 thresholds, or over both ends of a mesh."""
    values, scheme = DATA[kind], Scheme(bits=bits, symmetric=symmetric)
    low, high = min(0.0, float(values.min())), float(values.max())
    if symmetric:
        top = max(-low, high)
        ranges = [(-top * k / 400 if low < 0 else 0.0, top * k / 400) for k in range(1, 401)]
    else:
        ranges = [(low * a / 12, high * b / 12) for a in range(1, 13) for b in range(1, 13)]
    best = min(error(values, ends, scheme) for ends in ranges)
    assert error(values, limits("mse", values, scheme), scheme) <= best * (1 + tolerance("range_search").value)


@given(ARRAYS, st.builds(Scheme, bits=st.integers(2, 8), symmetric=st.booleans()))
def test_mse_is_no_worse_than_the_whole_range(values: Array, scheme: Scheme) -> None:
    assume(np.abs(values).max() > 0)
    whole = limits("absmax" if scheme.symmetric else "minmax", values, scheme)
    found = histogram(values)
    ours = squared_error(found, grid_of(*limits("mse", values, scheme), scheme))
    assert ours <= squared_error(found, grid_of(*whole, scheme)) * (1 + tolerance("gradient_float64").value)


def test_mse_clips_an_outlier_that_four_bits_cannot_afford() -> None:
    assert limits("mse", DATA["outlier"], Scheme(bits=4))[1] < 4
    assert limits("absmax", DATA["outlier"], Scheme(bits=4))[1] == 60


@pytest.mark.parametrize("kind", DATA)
def test_the_definition_decides_the_grid_that_is_searched(kind: str) -> None:
    """Paddle's grid has no unsigned form: twice as coarse on values that are not negative."""
    values = DATA[kind]
    paddle = Scheme(definition="paddle")
    assert error(values, limits("mse", values, paddle), paddle) <= min(
        error(values, (-k / 50 * np.abs(values).max(), k / 50 * np.abs(values).max()), paddle) for k in range(1, 51)
    ) * (1 + tolerance("range_search").value)


def divergence(counts: list[float], size: int, levels: int) -> float:
    """Bin by bin, from the definition: bin k of `size` belongs to level floor(k * levels / size)."""
    clipped = counts[:size]
    clipped[-1] += sum(counts[size:])
    sums, filled = [0.0] * levels, [0] * levels
    for k in range(size):
        sums[k * levels // size] += counts[k]
        filled[k * levels // size] += clipped[k] > 0
    spread = [sums[k * levels // size] / filled[k * levels // size] if clipped[k] else 0.0 for k in range(size)]
    total, other = sum(clipped), sum(spread)
    return sum(p / total * np.log((p / total) / (q / other)) for p, q in zip(clipped, spread, strict=True) if p > 0)


@pytest.mark.parametrize(("kind", "bits", "levels"), [("laplace", 8, 128), ("relu", 8, 255), ("normal", 4, 8)])
def test_kl_against_a_loop(kind: str, bits: int, levels: int) -> None:
    values = DATA[kind]
    found = histogram(values)
    counts = [float(count) for count in magnitudes(found)]
    counts[0] = counts[1]
    ends = [k + 1 for k, count in enumerate(counts) if count]
    wanted = [*range(levels, ends[-1], STRIDE), ends[-1]]
    sizes = sorted(
        {size for want in wanted if (size := max((end for end in ends if end <= want), default=0)) >= levels}
    )
    best = min(sizes, key=lambda size: divergence(counts, size, levels))
    threshold = min(best * bin_width(found), float(np.abs(values).max()))
    assert limits("kl", values, Scheme(bits=bits)) == (0.0 if kind == "relu" else -threshold, threshold)


def test_kl_cuts_an_asymmetric_range_on_both_sides_but_not_beyond_the_values() -> None:
    values = DATA["outlier"]
    low, high = limits("kl", values, Scheme(symmetric=False))
    assert 3 < high < 4
    assert low == max(float(values.min()), -high)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("share", [0.9, 0.99, 0.999])
def test_percentiles_are_numpys_up_to_a_bin(kind: str, share: float) -> None:
    """NumPy's lower quantile lies in the bin whose outer end, or middle, is the limit."""
    values = DATA[kind].astype(np.float64)
    width = bin_width(histogram(values))
    middle = np.quantile(np.abs(values), share, method="inverted_cdf")
    high = limits("percentile", values, Scheme(), percentile=share * 100)[1]
    assert middle <= high <= middle + width
    assert abs(limits("histogram", values, Scheme(), hist_percent=share)[1] - middle) <= width / 2
    low, high = limits("percentile", values, Scheme(symmetric=False), percentile=share * 100)
    below, above = np.quantile(values, [(1 - share) / 2, (1 + share) / 2], method="inverted_cdf")
    assert abs(low - below) <= width + _gap(values, below)
    assert abs(high - above) <= width + _gap(values, above)
    low, high = limits("histogram", values, Scheme(symmetric=False), hist_percent=share)
    below, above = np.quantile(values, [1 - share, share], method="inverted_cdf")
    assert abs(low - below) <= width / 2 + _gap(values, below)
    assert abs(high - above) <= width / 2 + _gap(values, above)


def _gap(values: Array, at: float) -> float:
    """To the next value on either side: which of two neighbours a quantile from above is, is a convention."""
    ordered = np.unique(values)
    index = int(np.searchsorted(ordered, at))
    return float(np.ptp(ordered[max(index - 1, 0) : index + 2]))


@given(ARRAYS, st.booleans(), st.floats(0.1, 100), st.floats(0.1, 100))
def test_a_higher_percentile_is_no_narrower(values: Array, symmetric: bool, a: float, b: float) -> None:
    scheme = Scheme(symmetric=symmetric)
    inner = limits("percentile", values, scheme, percentile=min(a, b))
    outer = limits("percentile", values, scheme, percentile=max(a, b))
    assert outer[0] <= inner[0] and inner[1] <= outer[1]


def test_all_percent_is_the_whole_range() -> None:
    values = DATA["shifted"]
    ends = (float(values.min()), float(values.max()))
    assert limits("percentile", values, Scheme(symmetric=False), percentile=100) == ends
    assert limits("percentile", values, Scheme(), percentile=100) == (-max(ends), max(ends))
