"""Cases on traces: what the neutral graph must say."""

from __future__ import annotations

import numpy as np

from slimbridge.conformance.models import image, topology
from slimbridge.conformance.suite import Bench, case, require
from slimbridge.conformance.topologies import SIZE, TOPOLOGIES, WIDTH
from slimbridge.graph import cost_of, find_units

# Multiply-accumulates by hand: places * outputs * inputs per group * kernel area, then the linear layer.
_PLACES = SIZE * SIZE
_MACS: dict[str, int] = {
    "chain": _PLACES * WIDTH * 27 + _PLACES // 4 * 2 * WIDTH * WIDTH * 9 + 2 * WIDTH * 5,
    "depthwise": _PLACES * (WIDTH * 27 + WIDTH * 9 + 2 * WIDTH * WIDTH + 4 * WIDTH * 9) + 4 * WIDTH * 5,
    "transposed": _PLACES * WIDTH * (27 + 2 * WIDTH * 4)
    + 4 * _PLACES * (2 * WIDTH * WIDTH // 2 * 9 + WIDTH * 9 + WIDTH * WIDTH)
    + WIDTH * 5,
    "shared layer": _PLACES * (WIDTH * 27 + 2 * WIDTH * WIDTH * 9) + WIDTH * 5,
}
# Layers whose outputs are coupled, by hand; in graph order.
_GROUPS: dict[str, list[tuple[str, ...]]] = {
    "chain": [("body.0",), ("body.3",)],
    "residual": [("body.stem.0", "body.first.0"), ("body.second.0", "body.shortcut")],
    "concat": [("body.right",), ("body.left.0",), ("body.last",)],
    "depthwise": [("body.0.0",), ("body.5",)],
    "shared layer": [("body.stem.0", "body.conv")],
    "transposed": [("body.0.0",), ("body.2",), ("body.5",), ("body.8",)],
    "group norm": [("body.0",), ("body.3",)],
    "gates": [("body.stem.0", "body.excite"), ("body.squeeze",)],
}


@case("trace: nothing unknown, nodes in order, all parameters there")
def complete(bench: Bench) -> None:
    """Every topology."""
    for item in TOPOLOGIES:
        model = topology(bench, item.name)
        graph = bench.backend.trace(model, [image(1)])
        require(not graph.unknown_ops(), f"{item.name}: unknown {graph.unknown_ops()}")
        shapes = {name: tuple(array.shape) for name, array in bench.backend.read(model).items()}
        require(dict(graph.parameters) == shapes, f"{item.name}: parameters differ from read")
        made: set[int] = set()
        for node in graph.nodes:
            require(set(node.inputs) <= made, f"{item.name}: '{node.kind}' in '{node.name}' reads what nobody made")
            made.update(node.outputs)
        require(set(graph.outputs) <= made, f"{item.name}: an output that nobody made")
        used = {name for node in graph.nodes for name in node.params.values()}
        require(used == set(shapes), f"{item.name}: unused parameters {sorted(set(shapes) - used)}")


@case("trace: multiply-accumulates as counted by hand")
def macs(bench: Bench) -> None:
    """Pooled, depthwise and shared layers, at batch 1 and 2."""
    for name, expected in _MACS.items():
        for batch in (1, 2):
            found = cost_of(bench.backend.trace(topology(bench, name), [image(batch)])).macs
            require(found == expected, f"{name}, batch {batch}: {found} MACs, expected {expected}")


@case("trace: channel groups as derived by hand")
def groups(bench: Bench) -> None:
    """Which layers must lose channels together."""
    for name, expected in _GROUPS.items():
        units = find_units(bench.backend.trace(topology(bench, name), [image(1)]))
        found = sorted(tuple(sorted(group.layers)) for group in units.groups() if group.units.size > 1)
        require(found == sorted(tuple(sorted(g)) for g in expected), f"{name}: groups {found}, expected {expected}")


@case("trace: a transposed convolution says so")
def transposed(bench: Bench) -> None:
    """Its attributes, and its weight in the layout (in, out / groups, height, width)."""
    graph = bench.backend.trace(topology(bench, "transposed"), [image(1)])
    found = [(dict(node.attrs), graph.parameters[node.params["weight"]]) for node in graph.layer_nodes()[1:3]]
    shared = {"transposed": True, "dilation": (1, 1)}
    expected = [
        ({**shared, "groups": 1, "stride": (2, 2), "padding": (0, 0)}, (WIDTH, 2 * WIDTH, 2, 2)),
        ({**shared, "groups": 2, "stride": (1, 1), "padding": (1, 1)}, (2 * WIDTH, WIDTH // 2, 3, 3)),
    ]
    require(found == expected, f"found {found}, expected {expected}")
    kinds = {layer.path: layer.kind for layer in bench.backend.layers(topology(bench, "transposed"))}
    require(kinds["body.2"] == "conv_transpose", f"the layer's kind is '{kinds['body.2']}'")


@case("trace: the model is left as it was")
def untouched(bench: Bench) -> None:
    """Weights, and training goes on."""
    model = topology(bench, "concat")
    before = bench.backend.read(model)
    bench.backend.trace(model, [image(1)])
    after = bench.backend.read(model)
    same = all(np.array_equal(before[name], after[name]) for name in before)
    require(same and before.keys() == after.keys(), "a trace changed weights or statistics")
