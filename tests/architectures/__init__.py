"""Published architectures, true in their wiring and small in width and depth, written once for every framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from slimbridge import zoo
from slimbridge.ports import Array, Backend, Model
from tests.architectures import classic, dense_prediction, inception, residual, transformers
from tests.architectures.parts import Part, make, with_weights

__all__ = ["ARCHITECTURES", "ZOO", "build", "image"]


def _of(part: type[Part], *args: Any) -> Callable[[Any], Any]:
    return lambda nn: make(nn, part, *args)


ARCHITECTURES: dict[str, tuple[Callable[[Any], Any], int]] = {
    # builder from a backend's layers, side of the image
    "alexnet": (_of(classic.AlexNet), 64),
    "squeezenet": (_of(classic.SqueezeNet), 48),
    "densenet": (_of(classic.DenseNet), 32),
    "shufflenet_v2": (_of(classic.ShuffleNetV2), 32),
    "googlenet": (_of(inception.GoogLeNet), 32),
    "inception_v3": (_of(inception.InceptionV3), 32),
    "resnext": (residual.resnext, 32),
    "wide_resnet": (residual.wide_resnet, 32),
    "regnet_x": (residual.regnet_x, 32),
    "regnet_y": (residual.regnet_y, 32),
    "efficientnet": (_of(residual.EfficientNet), 32),
    "convnext": (_of(residual.ConvNeXt), 32),
    "vit": (transformers.vit, 32),
    "vit_fused": (transformers.vit_fused, 32),
    "swin": (_of(transformers.Swin), 32),
    "unet": (dense_prediction.unet, 32),
    "unet_group_norm": (dense_prediction.unet_group_norm, 32),
    "detector": (_of(dense_prediction.Detector), 64),
    "deeplab": (_of(dense_prediction.DeepLab), 32),
}
ZOO: dict[str, tuple[str, int, dict[str, int]]] = {
    # name in the zoo, side of the image, options
    "lenet": ("lenet", 28, {"in_channels": 3}),
    "vgg": ("vgg11_small", 16, {"width": 8}),
    "resnet": ("resnet18_small", 16, {"width": 8}),
    "resnet_bottleneck": ("resnet50_small", 8, {"width": 8}),
    "mobilenet_v1": ("mobilenet_v1_small", 16, {"width": 8}),
    "mobilenet_v2": ("mobilenet_v2_small", 8, {"width": 8}),
    "mobilenet_v3": ("mobilenet_v3_small", 32, {"width": 16}),
}


def build(name: str, backend: Backend) -> Model:
    """One of `ARCHITECTURES` or `ZOO` with weights that are equal on every backend."""
    if name in ZOO:
        entry, _, options = ZOO[name]
        return with_weights(backend, zoo.build(entry, backend, **options))
    return with_weights(backend, backend.place(ARCHITECTURES[name][0](backend.nn)))


def image(name: str, batch: int = 2, seed: int = 0) -> Array:
    """Normal noise of the architecture's size, shape (batch, 3, side, side)."""
    side = (ZOO if name in ZOO else ARCHITECTURES)[name][1]
    return np.random.default_rng(seed).standard_normal((batch, 3, side, side)).astype(np.float32)
