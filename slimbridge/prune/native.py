"""What another toolkit's pruner chose, read back as a decision and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from slimbridge.decisions import GroupChoice, Mask, MaskDecision, PruneDecision, Skipped
from slimbridge.errors import ModelError, listed
from slimbridge.graph import Graph, Units
from slimbridge.parity.measure import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.plan.pruning import PruneStage, SparsifyStage
from slimbridge.ports import Array, Backend, Model, NativeRequest, NativeResult, tensors_in
from slimbridge.prune.assembly import assemble
from slimbridge.prune.scope import matching, scope_of


def native_request(stage: PruneStage, layers: Sequence[str]) -> NativeRequest:
    """What the toolkit is asked for; ModelError for a pattern that matches no layer."""
    assert stage.native is not None
    ratios = {
        layer: ratio
        for pattern, ratio in stage.layer_ratios.items()
        for layer in matching((pattern,), layers, "layer_ratios")
    }
    ignored = matching(stage.ignored_layers, layers, "ignored_layers")
    return NativeRequest(
        stage.native.pruner, stage.pruning_ratio or 0.0, ratios, tuple(sorted(ignored)), dict(stage.native.options)
    )


def native_decision(
    stage: PruneStage, backend: Backend, model: Model, example: Sequence[Array], graph: Graph, units: Units
) -> PruneDecision:
    """Let the toolkit choose on a copy, read its choice back, and compare its pruned model with ours.

    Raises:
        ModelError: it changed nothing, its choice is no set of whole units (it broke a coupling), or the model that
            it left computes something else.
    """
    request = native_request(stage, [producer.layer for producer in units.producers])
    result = backend.native(model, request, example)
    if result.masks:
        raise ModelError(f"'{request.pruner}' masks entries, it removes nothing; use kind: sparsify")
    if not result.kept:
        raise ModelError(f"'{request.pruner}' removed nothing: 0 of {len(units.producers)} layers changed")
    removed = _removed_units(units, result.kept, request.pruner)
    choices = tuple(
        GroupChoice(
            layers=group.layers,
            channels=group.units.size,
            removed=tuple(np.flatnonzero(np.isin(group.units, list(removed))).tolist()),
        )
        for group in units.groups()
    )
    skipped = scope_of(stage, units).skipped
    named = {item.layer for item in skipped}
    left = [p.layer for p in units.producers if p.weight not in result.kept and p.layer not in named]
    skipped = (*skipped, *(Skipped(layer=layer, reason=f"left by '{request.pruner}'") for layer in left))
    decision = assemble(graph, units, removed, choices, request.pruner, request.ratio, skipped)
    _compare(backend, model, example, decision, result, request.pruner)
    return decision


def _removed_units(units: Units, kept: Mapping[str, tuple[int, ...]], pruner: str) -> set[int]:
    """The units behind the output channels that went; they must be whole and free."""
    removed: set[int] = set()
    for producer in units.producers:
        if producer.weight in kept:
            gone = np.setdiff1d(np.arange(producer.units.size), kept[producer.weight])
            removed.update(producer.units[gone].tolist())
    frozen = removed.intersection(units.frozen)
    if frozen:
        layers = [p.layer for p in units.producers if frozen.intersection(p.units.tolist())]
        raise ModelError(
            f"'{pruner}' removed channels that must stay, of {listed(layers, 4)}: {units.frozen[min(frozen)]}"
        )
    for producer in units.producers:
        stays = np.flatnonzero(~np.isin(producer.units, list(removed)))
        theirs = np.asarray(kept.get(producer.weight, range(producer.units.size)))
        if not np.array_equal(stays, theirs):
            raise ModelError(
                f"'{pruner}' left layer '{producer.layer}' with {theirs.size} channels, those tied to it have "
                f"{stays.size}: the model that it made is broken"
            )
    return removed


def _compare(
    backend: Backend, model: Model, example: Sequence[Array], decision: PruneDecision, result: NativeResult, name: str
) -> None:
    """The toolkit's own pruned model must compute what ours does."""
    if result.output is None:
        return
    ours = backend.remove_channels(backend.clone(model), decision)
    outputs = [backend.ops.numpy(tensor) for tensor in tensors_in(backend.forward(ours, example).output)]
    if [array.shape for array in outputs] != [array.shape for array in result.output]:
        raise ModelError(f"'{name}' left a model whose outputs have other shapes than before")
    difference = max((relative(a, b) for a, b in zip(result.output, outputs, strict=True)), default=0.0)
    if not difference <= tolerance("forward").value:
        raise ModelError(f"'{name}' left a model that computes something else: relative difference {difference:.2g}")


def native_masks(stage: SparsifyStage, backend: Backend, model: Model, example: Sequence[Array]) -> MaskDecision:
    """Let the toolkit choose masks on a copy.

    Raises:
        ModelError: it changed nothing, or what it gave is no mask of a weight of the model.
    """
    assert stage.native is not None
    layers = [layer for layer in backend.layers(model) if layer.kind in ("conv", "conv_transpose", "linear")]
    paths = [layer.path for layer in layers]
    shares = {
        path: share
        for pattern, share in stage.layer_sparsity.items()
        for path in matching((pattern,), paths, "layer_sparsity")
    }
    ignored = matching(stage.ignored_layers, paths, "ignored_layers")
    name = stage.native.pruner
    request = NativeRequest(name, stage.sparsity or 0.0, shares, tuple(sorted(ignored)), dict(stage.native.options))
    result = backend.native(model, request, example)
    if result.kept:
        raise ModelError(f"'{name}' removes channels, it masks nothing; use kind: prune")
    masks = {weight: mask for weight, mask in result.masks.items() if not mask.all()}
    if not masks:
        raise ModelError(f"'{name}' masked nothing: 0 of {len(layers)} layers changed")
    weights = backend.read(model)
    for weight, mask in masks.items():
        if weight not in weights or weights[weight].shape != mask.shape:
            raise ModelError(f"'{name}' gave a mask of shape {mask.shape} for '{weight}', which the model has not")
    return MaskDecision(
        importance=name,
        pattern="unstructured",
        sparsity=request.ratio,
        masks={weight: Mask.of(mask) for weight, mask in masks.items()},
        skipped=tuple(
            Skipped(
                layer=layer.path, reason="ignored_layers names it" if layer.path in ignored else f"'{name}' left it"
            )
            for layer in layers
            if layer.params.get("weight") not in masks
        ),
    )
