"""Targets: which convolutions and linear layers a quantize stage takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from slimbridge.decisions import Skipped
from slimbridge.errors import ModelError, listed, nearest
from slimbridge.graph import Graph, Node
from slimbridge.plan.quantizing import QuantizeStage
from slimbridge.ports import Array, Layer

QUANTIZABLE = ("conv", "conv_transpose", "linear")
"""Kinds of layers that are counted and named; of a transposed convolution it is told that it stays in float."""
FOLDED = "its weight with the BatchNorm folded in"


@dataclass(frozen=True)
class Target:
    """One layer to be quantized: its path and its weight's canonical name."""

    path: str
    weight: str


def find_targets(
    stage: QuantizeStage, layers: Sequence[Layer], graph: Graph
) -> tuple[tuple[Target, ...], tuple[Skipped, ...]]:
    """The layers to quantize in the order in which they run, and those that stay in float, with reasons.

    Raises:
        ModelError: a pattern of ignored_layers matches nothing, or nothing is left to quantize.
    """
    found = {layer.path: layer for layer in layers if layer.kind in QUANTIZABLE and "weight" in layer.params}
    runs = {node.name: node for node in reversed(graph.layer_nodes()) if node.name in found}
    order = [*dict.fromkeys([node.name for node in graph.layer_nodes() if node.name in found] + list(found))]
    _require_matches(stage, order)
    reasons = {path: _reason(stage, found[path], runs.get(path)) for path in order}
    left = [path for path in order if reasons[path] is None]
    ends = ((0, stage.first_layer, "first_layer"), (-1, stage.last_layer, "last_layer"))
    reasons.update({left[index]: f"{name} is float" for index, word, name in ends if word == "float" and left})
    left = [path for path in order if reasons[path] is None]
    if not left:
        told = listed(sorted({reason for reason in reasons.values() if reason}))
        why = f" ({told})" if reasons else ""
        raise ModelError(f"nothing to quantize: 0 of {len(order)} convolution and linear layers are left{why}")
    targets = tuple(Target(path, found[path].params["weight"]) for path in left)
    return targets, tuple(Skipped(layer=path, reason=reason) for path, reason in reasons.items() if reason)


def require_finite(target: Target, weight: Array, what: str = "its weight") -> None:
    """ModelError when an entry is NaN or infinite."""
    bad = int(weight.size - np.isfinite(weight).sum())
    if bad:
        raise ModelError(f"layer '{target.path}': {bad} of {weight.size} entries of {what} are not finite")


def _require_matches(stage: QuantizeStage, paths: Sequence[str]) -> None:
    for pattern in stage.ignored_layers:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ModelError(
                f"ignored_layers: '{pattern}' matches none of the {len(paths)} convolution and linear layers"
                f"{nearest(pattern, paths)}; they are: {listed(paths)}"
            )


def _reason(stage: QuantizeStage, layer: Layer, node: Node | None) -> str | None:
    """Why a layer stays in float; None when it does not."""
    if any(fnmatchcase(layer.path, pattern) for pattern in stage.ignored_layers):
        return "ignored_layers names it"
    if node is None:
        return "a forward pass does not run it as a layer"
    if layer.kind == "conv_transpose" or node.attrs.get("transposed"):
        return "a transposed convolution stays in float: no runtime computes it in integers"
    if stage.mode == "dynamic" and layer.kind != "linear":
        return "mode dynamic is for linear layers"
    return None
