"""Which channel groups make a pruned model wrong, found by trying; and layers that no trace shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from slimbridge.decisions import Skipped
from slimbridge.graph import Graph
from slimbridge.ports import Layer

UNUSED = "it did not run in the trace"
MOST = 80
"""Tries in one search; each prunes a copy of the model and runs it."""


def wrong_groups(count: int, wrong_with: Callable[[Sequence[int]], str | None]) -> dict[int, str] | None:
    """Leave out as few of `count` groups as bisection finds, so that those that are left can go together.

    Args:
        count: groups are called 0..count - 1.
        wrong_with: from some groups, ascending, to what is wrong when they go; None when nothing is.

    Returns:
        group -> what was wrong with it and those that were found right before; None after `MOST` tries.
    """
    right: list[int] = []
    wrong: dict[int, str] = {}
    waiting = [list(range(count))]
    for _ in range(MOST):
        if not waiting:
            return wrong
        some = waiting.pop()
        found = wrong_with(sorted([*right, *some]))
        if found is None:
            right += some
        elif len(some) == 1:
            wrong[some[0]] = found
        else:
            half = len(some) // 2
            waiting += [some[half:], some[:half]]
    return wrong if not waiting else None


def unseen_layers(layers: Sequence[Layer], graph: Graph) -> Iterator[Skipped]:
    """Convolution and linear layers that no node of the graph is: they did not run, or their weight is computed.

    Args:
        layers: of the model.
        graph: its trace.
    """
    seen = {node.params["weight"] for node in graph.layer_nodes()}
    elsewhere = {name for node in graph.nodes for name in node.params.values()} - seen
    for layer in layers:
        matrices = [name for name in _weights(layer) if len(graph.parameters.get(name, ())) > 1]
        if not matrices or seen.intersection(matrices):
            continue
        path = layer.path.partition(".parametrizations.")[0]
        if layer.kind in ("conv", "conv_transpose", "linear") and not elsewhere.intersection(matrices):
            yield Skipped(layer=path, reason=UNUSED)
        elif layer.kind in ("conv", "conv_transpose", "linear"):
            yield Skipped(layer=path, reason="the operation that uses its weight is none that is pruned")
        elif elsewhere.intersection(matrices):
            yield Skipped(layer=path, reason="its weight is computed, or it is of a kind that is not pruned")


def _weights(layer: Layer) -> list[str]:
    """Names of its parameters that are weights, or that a weight is computed from."""
    computed: Mapping[str, str] = layer.params if ".parametrizations." in layer.path else {}
    return [name for role, name in layer.params.items() if role.startswith("weight") or role in computed]
