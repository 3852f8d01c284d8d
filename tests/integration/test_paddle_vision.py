"""Every family of paddle.vision.models as it is shipped: half of the channels go, and the rest runs and trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from slimbridge.graph import Graph
from slimbridge.plan import PruneStage
from slimbridge.ports import Backend, Pass, tensors_in
from slimbridge.prune import Pruner
from slimbridge.prune.scope import ALONE

LAST = "its channels are an output of the model"
WRITTEN = "its width may be written into 'reshape' in layer '': with such channels free the model is wrong"


class Family(NamedTuple):
    """The smallest variant, its input (channels, side), and what becomes of its layers.

    found = pruned + depthwise + tied + outputs + written: layers that lose channels themselves, depthwise ones,
    members of a group of a single unit, outputs of the model, and layers before a width that the code has written in.
    """

    build: Callable[[Any], Any]
    size: tuple[int, int]
    found: int
    groups: int
    pruned: int
    depthwise: int = 0
    tied: int = 0
    outputs: int = 1
    written: int = 0


def _alexnet(models: Any) -> Any:
    """With 256 in place of 4,096 hidden features: 57 million weights would only be copied."""
    import paddle

    model = models.alexnet(num_classes=10)
    model._fc6, model._fc7, model._fc8 = (paddle.nn.Linear(*size) for size in ((9216, 256), (256, 256), (256, 10)))
    return model


def _vgg11(models: Any) -> Any:
    """With 256 in place of 4,096 hidden features, as it is with AlexNet."""
    from paddle import nn

    model = models.vgg11(num_classes=0)
    model.num_classes = 10
    hidden = (nn.Linear(25088, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 256), nn.ReLU(), nn.Dropout())
    model.classifier = nn.Sequential(*hidden, nn.Linear(256, 10))
    return model


# The side is the smallest multiple of 32 that the model takes (75 for Inception-v3, 28 for LeNet).
FAMILIES = {
    "LeNet": Family(lambda m: m.LeNet(), (1, 28), 5, 4, 4),
    "alexnet": Family(_alexnet, (3, 224), 8, 7, 7),
    "vgg11": Family(_vgg11, (3, 32), 11, 10, 10),
    "resnet18": Family(lambda m: m.resnet18(num_classes=10), (3, 32), 21, 12, 20),
    "resnext50_32x4d": Family(lambda m: m.resnext50_32x4d(num_classes=10), (3, 32), 54, 37, 53),
    "wide_resnet50_2": Family(lambda m: m.wide_resnet50_2(num_classes=10), (3, 32), 54, 37, 53),
    "mobilenet_v1": Family(lambda m: m.mobilenet_v1(scale=0.25, num_classes=10), (3, 32), 28, 14, 14, 13),
    "mobilenet_v2": Family(lambda m: m.mobilenet_v2(scale=0.25, num_classes=10), (3, 32), 53, 24, 35, 17),
    "mobilenet_v3_small": Family(lambda m: m.mobilenet_v3_small(scale=0.35, num_classes=10), (3, 32), 54, 26, 42, 11),
    "densenet121": Family(lambda m: m.densenet121(num_classes=10), (3, 32), 121, 120, 120),
    "googlenet": Family(lambda m: m.googlenet(num_classes=10), (3, 192), 64, 61, 61, outputs=3),
    # Its code reshapes to 2,048 features: the six branches (one of them forks twice) that make them stay.
    "inception_v3": Family(lambda m: m.inception_v3(num_classes=10), (3, 75), 95, 88, 88, written=6),
    # Repeated shuffles tie all channels of two of its three stages to each other.
    "shufflenet_v2_x0_25": Family(lambda m: m.shufflenet_v2_x0_25(num_classes=10), (3, 32), 57, 19, 23, 19, 14),
    "squeezenet1_1": Family(lambda m: m.squeezenet1_1(num_classes=10), (3, 32), 26, 25, 25),
}


def depthwise_in(graph: Graph) -> set[str]:
    nodes = (node for node in graph.layer_nodes() if node.attrs.get("groups", 1) > 1)
    return {node.name for node in nodes if graph.parameters[node.params["weight"]][1] == 1}


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_the_channels_go(paddle_backend: Backend, name: str) -> None:
    import paddle

    family, backend = FAMILIES[name], paddle_backend
    channels, side = family.size
    image = np.random.default_rng(0).standard_normal((2, channels, side, side)).astype(np.float32)
    paddle.seed(0)
    model = family.build(paddle.vision.models)
    graph = backend.trace(model, [image])
    pruned, decision = Pruner(PruneStage(pruning_ratio=0.5)).prune(backend, model, [image])[:2]

    layers = {node.name for node in graph.layer_nodes()}
    lose = {layer for group in decision.groups if group.removed for layer in group.layers}
    tied = {item.layer for item in decision.skipped if item.reason == ALONE} - depthwise_in(graph)
    reasons = [item.reason for item in decision.skipped]
    depthwise = depthwise_in(graph)
    assert lose | tied | depthwise | {item.layer for item in decision.skipped} == layers
    assert (len(layers), len(decision.groups), len(lose), len(depthwise), len(tied)) == family[2:7]
    assert (reasons.count(LAST), reasons.count(WRITTEN)) == (family.outputs, family.written)
    assert graph.unknown_ops() == ()

    before, after = (tensors_in(backend.forward(item, [image]).output) for item in (model, pruned))
    assert [tuple(tensor.shape) for tensor in after] == [tuple(tensor.shape) for tensor in before]

    def loss(result: Pass) -> dict[str, Any]:
        return {"mean": backend.ops.mean(tensors_in(result.output)[0] ** 2)}

    arrays = backend.read(pruned)
    for parameter, gradient in backend.gradients(pruned, [image], loss, train=True).items():
        assert gradient.shape == arrays[parameter].shape
        assert np.isfinite(gradient).all(), parameter
