"""Published architectures on both frameworks: what is pruned, that it is right, and that both decide alike."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from slimbridge.decisions import PruneDecision
from slimbridge.discovery import get_backend
from slimbridge.graph import Graph
from slimbridge.parity import relative, tolerance
from slimbridge.plan import PruneStage
from slimbridge.ports import Array, Backend, Model, OptimizerSettings, Pass, tensors_in
from slimbridge.prune import Pruner, zeroed
from slimbridge.weights import load_weights, save_weights
from tests.architectures import ARCHITECTURES, ZOO, build, image

BACKENDS = ("torch", "paddle")
LAST = "its channels are an output of the model"
NORM = "is not zeroing them"


class Found(NamedTuple):
    """Layers of an architecture: in channel groups, depthwise (following a group), left alone by reason; groups."""

    groups: int
    pruned: int
    depthwise: int
    outputs: int = 1
    normalised: int = 0


FOUND = {
    "lenet": Found(4, 4, 0),
    "vgg": Found(8, 8, 0),
    "resnet": Found(12, 20, 0),
    "resnet_bottleneck": Found(37, 53, 0),
    "mobilenet_v1": Found(14, 14, 13),
    "mobilenet_v2": Found(23, 35, 17),
    "mobilenet_v3": Found(27, 42, 11),
    "alexnet": Found(7, 7, 0),
    "squeezenet": Found(13, 13, 0),
    "densenet": Found(17, 17, 0),
    "shufflenet_v2": Found(10, 16, 8),
    "googlenet": Found(29, 29, 0, outputs=2),
    "inception_v3": Found(23, 23, 0),
    "resnext": Found(11, 15, 0),
    "wide_resnet": Found(11, 15, 0),
    "regnet_x": Found(12, 16, 0),
    "regnet_y": Found(16, 24, 0),
    "efficientnet": Found(13, 21, 5),
    # What a LayerNorm normalises stays: the channels of the whole residual stream.
    "convnext": Found(4, 4, 0, normalised=10),
    "vit": Found(6, 8, 0, normalised=5),
    "vit_fused": Found(4, 4, 0, normalised=5),
    "swin": Found(6, 6, 0, normalised=8),
    "unet": Found(12, 12, 0),
    "unet_group_norm": Found(12, 12, 0),
    "detector": Found(10, 17, 0, outputs=2),
    "deeplab": Found(14, 17, 0),
}
UNEQUAL: dict[tuple[str, str], str] = {}
"""Architecture and importance whose decisions differ between the frameworks, and why."""
ATTENTION = ("vit", "vit_fused", "swin")


class Result(NamedTuple):
    """A model and what became of it."""

    backend: Backend
    model: Model
    pruned: Model
    decision: PruneDecision


@cache
def whole(name: str, framework: str) -> tuple[Model, Graph]:
    backend = get_backend(framework)
    model = build(name, backend)
    return model, backend.trace(model, [image(name)])


@cache
def result(name: str, framework: str) -> Result:
    return pruned_by(name, framework, PruneStage(pruning_ratio=0.5))


def pruned_by(name: str, framework: str, stage: PruneStage) -> Result:
    backend, (model, _) = get_backend(framework), whole(name, framework)
    pruned, decision = Pruner(stage).prune(backend, model, [image(name)])[:2]
    return Result(backend, model, pruned, decision)


def outputs(backend: Backend, model: Model, x: Array) -> list[Array]:
    return [backend.ops.numpy(tensor) for tensor in tensors_in(backend.forward(model, [x]).output)]


def each(**more: Any) -> Any:
    """Every architecture on every framework."""
    return pytest.mark.parametrize(("name", "framework"), [(n, f) for n in FOUND for f in BACKENDS], **more)


def test_every_architecture_is_expected() -> None:
    assert set(FOUND) == {*ARCHITECTURES, *ZOO}


@each()
def test_half_goes_and_nothing_is_left_out_silently(name: str, framework: str) -> None:
    _, graph = whole(name, framework)
    decision, expected = result(name, framework).decision, FOUND[name]
    assert graph.unknown_ops() == ()
    layers = {node.params["weight"]: node.name for node in graph.layer_nodes()}
    grouped = {layer for group in decision.groups for layer in group.layers}
    following = {path for weight, path in layers.items() if path not in grouped and 0 in decision.kept.get(weight, {})}
    reasons = {item.layer: item.reason for item in decision.skipped}
    found = (grouped, following, reasons.keys())
    assert set().union(*found) == set(layers.values())
    assert sum(map(len, found)) == len(layers)
    kinds = [sum(text in reason for reason in reasons.values()) for text in (LAST, NORM)]
    assert Found(len(decision.groups), len(grouped), len(following), *kinds) == expected
    assert sum(kinds) == len(reasons)
    for group in decision.groups:
        # Of units that are equally wide; layers of unequal width keep one channel each.
        assert len(group.removed) == min(group.channels - 1, round(group.channels / 2))


@each()
def test_the_pruned_model_trains(name: str, framework: str) -> None:
    backend, _, pruned, _ = result(name, framework)
    model = backend.clone(pruned)
    before = backend.read(model)

    def loss(run: Pass) -> dict[str, Any]:
        return {str(i): backend.ops.mean(tensor * tensor) for i, tensor in enumerate(tensors_in(run.output))}

    optimizer = backend.make_optimizer(model, OptimizerSettings("sgd"))
    optimizer.set_lr(1e-4)
    terms = backend.train_step(model, optimizer, [image(name)], loss)
    after = backend.read(model)
    assert np.isfinite(list(terms.values())).all()
    assert {key: array.shape for key, array in after.items()} == {key: array.shape for key, array in before.items()}
    assert any(not np.array_equal(before[key], array) for key, array in after.items() if key.endswith("weight"))


@pytest.mark.parametrize("ratio", [0.3, 0.7])
@each()
def test_removing_equals_zeroing(name: str, framework: str, ratio: float) -> None:
    backend, model, pruned, decision = pruned_by(name, framework, PruneStage(pruning_ratio=ratio))
    assert decision.exact
    silent = backend.write(backend.clone(model), zeroed(backend.read(model), decision))
    x = image(name, batch=3, seed=1)
    for found, expected in zip(outputs(backend, pruned, x), outputs(backend, silent, x), strict=True):
        assert relative(found, expected) <= tolerance("removal").value


@pytest.mark.parametrize("importance", ["l1_norm", "group_norm"])
@pytest.mark.parametrize("name", FOUND)
def test_both_frameworks_decide_alike(name: str, importance: str) -> None:
    if importance == "l1_norm":
        decisions = [result(name, framework).decision for framework in BACKENDS]
    else:
        stage = PruneStage(pruning_ratio=0.5, importance=importance)
        decisions = [pruned_by(name, framework, stage).decision for framework in BACKENDS]
    equal = decisions[0].digest() == decisions[1].digest()
    assert equal is ((name, importance) not in UNEQUAL)


@each()
def test_a_pruned_model_is_cloned_saved_and_restored(name: str, framework: str, tmp_path: Path) -> None:
    backend, _, pruned, decision = result(name, framework)
    x = image(name, seed=2)
    expected = outputs(backend, pruned, x)
    save_weights(tmp_path / "pruned.safetensors", backend.read(pruned))
    fresh = backend.remove_channels(build(name, backend), decision)
    fresh = backend.write(fresh, {key: np.zeros_like(array) for key, array in backend.read(fresh).items()})
    fresh = backend.write(fresh, load_weights(tmp_path / "pruned.safetensors"))
    for copy in (backend.clone(pruned), fresh):
        assert all(np.array_equal(a, b) for a, b in zip(outputs(backend, copy, x), expected, strict=True))


@pytest.mark.parametrize("framework", BACKENDS)
@pytest.mark.parametrize("name", ATTENTION)
def test_whole_heads_go(name: str, framework: str) -> None:
    stage = PruneStage(pruning_ratio=0.5, granularity="heads")
    backend, model, pruned, decision = pruned_by(name, framework, stage)
    assert set(decision.heads.values()) == {(4, 2)}
    attentions = {layer.rpartition(".")[0] for layer in decision.heads}
    assert len(attentions) == {"swin": 3}.get(name, 2)
    silent = backend.write(backend.clone(model), zeroed(backend.read(model), decision))
    x = image(name, seed=1)
    assert relative(outputs(backend, pruned, x)[0], outputs(backend, silent, x)[0]) <= tolerance("removal").value


def normalise_kept_only(model: Any, decision: PruneDecision) -> None:
    """Let each LayerNorm of a PyTorch model take its statistics from the channels that stay, and give 0 elsewhere."""
    import torch

    def forward_of(layer: Any, kept: Any) -> Any:
        def forward(x: Any) -> Any:
            out = torch.zeros_like(x)
            arguments = ((len(kept),), layer.weight[kept], layer.bias[kept], layer.eps)
            out[..., kept] = torch.nn.functional.layer_norm(x[..., kept], *arguments)
            return out

        return forward

    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.LayerNorm):
            layer.forward = forward_of(layer, torch.tensor(decision.kept[f"{path}.weight"][0]))


@pytest.mark.parametrize("name", ["convnext", *ATTENTION])
def test_normalised_channels_go_on_demand(name: str) -> None:
    """All layers but the last lose channels; that is zeroing them and leaving them out of the statistics."""
    stage = PruneStage(pruning_ratio=0.5, layer_norm="prune")
    torch_side, paddle_side = (pruned_by(name, framework, stage) for framework in BACKENDS)
    backend, model, pruned, decision = torch_side
    assert not decision.exact
    assert [item.reason for item in decision.skipped] == [LAST]
    assert decision.digest() == paddle_side.decision.digest()
    silent = backend.write(backend.clone(model), zeroed(backend.read(model), decision))
    normalise_kept_only(silent, decision)
    x = image(name, batch=2, seed=1)
    found = outputs(backend, pruned, x)[0]
    assert relative(found, outputs(backend, silent, x)[0]) <= tolerance("removal").value
    assert relative(outputs(paddle_side.backend, paddle_side.pruned, x)[0], found) <= tolerance("forward").value
