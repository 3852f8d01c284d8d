"""Cases on what is seen of a model: statistics of its tensors, and the calls of its modules."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from slimbridge.conformance.models import image, random, topology
from slimbridge.conformance.quantization import Scaling, twice
from slimbridge.conformance.suite import Bench, case, refuses, require, within
from slimbridge.conformance.topologies import TOPOLOGIES
from slimbridge.decisions import Site
from slimbridge.parity.measure import relative
from slimbridge.ports import HISTOGRAM_BINS, Array, Histogram, Statistics
from slimbridge.zoo.parts import Part, make


class Look(Part):
    """Takes tensors of any shape; the linear layer is there for its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = self.nn.ReLU()
        self.fc = self.nn.Linear(2, 2)

    def forward(self, x: Any) -> Any:
        """Its positive part."""
        return self.relu(x)


def counted(x: Array) -> Histogram:
    """By the definition, in float64."""
    values = x.astype(np.float64).ravel()
    absmax = float(np.abs(values).max())
    fraction, exponent = math.frexp(absmax)
    exponent = max(-126, exponent - (fraction == 0.5)) if absmax else -126
    bins = np.floor(values / 2.0**exponent * (HISTOGRAM_BINS // 2)) + HISTOGRAM_BINS // 2
    counts = np.bincount(np.minimum(bins, HISTOGRAM_BINS - 1).astype(np.int64), minlength=HISTOGRAM_BINS)
    return Histogram(exponent, counts)


def _check(what: str, found: Statistics, x: Array, samples: Array) -> None:
    """Of all entries `x`; `samples` has a row for each sample."""
    extremes = (float(found.min), float(found.max))
    require(extremes == (float(x.min()), float(x.max())), f"{what}: min and max are {extremes}")
    mean = np.abs(samples).max(1).astype(np.float64).mean()
    within(f"{what}: mean_absmax", relative(np.array(found.mean_absmax), mean), "operation")


def _check_histogram(what: str, found: Histogram | None, x: Array) -> None:
    wanted = counted(x)
    require(found is not None, f"{what}: no histogram")
    if found is not None:
        require(found.exponent == wanted.exponent, f"{what}: exponent {found.exponent}, not {wanted.exponent}")
        require(found.counts.dtype == np.int64, f"{what}: counts are {found.counts.dtype}")
        wrong = int(np.abs(found.counts - wanted.counts).sum())
        require(wrong == 0, f"{what}: {wrong} entries are counted elsewhere, {found.counts.sum()} of {x.size} in all")


@case("statistics: reduce gives the extremes of a tensor")
def reduce(bench: Bench) -> None:
    """Inputs, outputs, weights, one call or all of them; before the tensor's own fake quantization."""
    x, y = random(16, 3) - 0.3, random(16, 3, seed=1)
    model = twice(bench)
    model = bench.backend.write(model, {"fc.weight": 2 * np.eye(3, dtype=np.float32)}, partial=True)
    both = np.concatenate([x, 2 * x])
    expected = {"fc": both, "fc:input#0": x, "fc:input#1": 2 * x, "fc:output": 2 * both, "join:input.1": y}
    expected |= {"fc:weight": 2 * np.eye(3, dtype=np.float32), "join:output.1": 4 * x - y}
    sites = [Site.parse(key) for key in (*expected, "fc:input#2")]
    quants = {Site.parse("join:input.1"): Scaling(), Site("fc", "weight"): Scaling(1.0)}
    for histogram in (False, True):
        for one in (model, bench.backend.insert_quant(bench.backend.clone(model), quants)):
            found = bench.backend.reduce(one, [x, y], sites, histogram)
            require(set(found) == set(sites[:-1]), f"sites {sorted(map(str, found))}")
            inserted = one is not model
            for key, tensor in expected.items():
                if inserted and key == "join:output.1":
                    continue
                statistics = found[Site.parse(key)]
                _check(key, statistics, tensor, tensor)
                require(histogram or statistics.histogram is None, f"{key}: a histogram that nobody asked for")
                if histogram:
                    _check_histogram(key, statistics.histogram, tensor)
    refuses("an unknown layer", lambda: bench.backend.reduce(model, [x, y], [Site("fcc")]))


def _histogram_inputs() -> dict[str, Array]:
    edges = np.array([-1.0, 1.0, 1 - 2.0**-24, -(2.0**-30), 0.0, 2.0**-12, -(2.0**-12), -(2.0**-12) - 2.0**-30])
    return {
        "random": random(8, 3, 5, 5) * 3,
        "all positive": np.abs(random(8, 6)) * 1e-3,
        "all negative": -np.abs(random(8, 6)) * 1e5,
        "edges of bins": edges.astype(np.float32).reshape(2, 4),
        "a power of two": np.array([[0.25, -0.25, 0.125, 0.2]], np.float32),
        "just above one": np.array([[0.25 + 2.0**-26 * 2, -0.25, 0.125]], np.float32),
        "zeros": np.zeros((2, 3), np.float32),
        "huge": np.array([[3.4e38, -1e38, 1.0]], np.float32),
    }


@case("statistics: a histogram's bins are exact")
def histogram(bench: Bench) -> None:
    """Powers of two, edges of bins, one sign only, zeros; float32 and float64; not of what is not finite."""
    site = Site("relu")
    for dtype in ("float32", "float64"):
        model = bench.backend.place(make(bench.backend.nn, Look), bench.device, dtype)
        for name, values in _histogram_inputs().items():
            x = values.astype(dtype)
            found = bench.backend.reduce(model, [x], [site], True)[site]
            _check(f"{name}, {dtype}", found, x, x.reshape(len(x), -1))
            _check_histogram(f"{name}, {dtype}", found.histogram, x)
        for bad in (np.nan, np.inf):
            found = bench.backend.reduce(model, [np.array([[1.0, bad]], dtype)], [site], True)[site]
            require(found.histogram is None, f"{bad}: a histogram of what is not finite")
            same = math.isnan(found.max) if math.isnan(bad) else found.max == bad
            require(same, f"{bad}: the largest entry is {found.max}")


@case("trace: the calls of modules, with what went in and out")
def calls(bench: Bench) -> None:
    """Each node's tensors are those of its layer's calls; containers after what they hold; repeated layers twice."""
    for item in TOPOLOGIES:
        graph = bench.backend.trace(topology(bench, item.name), [image(1)])
        made = {value for node in graph.nodes for value in node.outputs}
        for call in graph.calls:
            require(made.issuperset((*call.inputs, *call.outputs)), f"{item.name}: '{call.path}' has unknown tensors")
        last = graph.calls[-1]
        require((last.path, last.outputs) == ("fc", graph.outputs), f"{item.name}: the last call is {last}")
        require("" not in {call.path for call in graph.calls}, f"{item.name}: the model itself is listed")
        body = [call for call in graph.calls if call.path == "body"]
        require([call.inputs for call in body] == [graph.inputs], f"{item.name}: the calls of 'body' are {body}")
        for node in graph.nodes:
            if node.kind in ("conv", "linear", "batch_norm", "group_norm"):
                ends = [(call.inputs, call.outputs) for call in graph.calls if call.path == node.name]
                require((node.inputs, node.outputs) in ends, f"{item.name}: '{node.name}' has the calls {ends}")
    found = [call.path for call in bench.backend.trace(topology(bench, "shared layer"), [image(1)]).calls]
    require(found.count("body.conv") == 2, "a layer that runs twice must have two calls")
    require(found.index("body.stem.0") < found.index("body.stem"), "a container must come after what it holds")


@case("trace: a normalisation says its eps")
def eps(bench: Bench) -> None:
    """1e-5 everywhere in the topologies."""
    graph = bench.backend.trace(topology(bench, "residual"), [image(1)])
    found = [node.attrs.get("eps") for node in graph.nodes if node.kind == "batch_norm"]
    require(bool(found) and set(found) == {1e-5}, f"eps of the normalisations are {found}")
