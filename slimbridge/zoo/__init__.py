"""Models written once and built on either framework, with bit-equal initial weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from slimbridge.discovery import get_backend
from slimbridge.errors import ModelError, listed, nearest
from slimbridge.ports import Backend, Model
from slimbridge.zoo.lenet import lenet
from slimbridge.zoo.mobilenet_v1 import mobilenet_v1, mobilenet_v1_small
from slimbridge.zoo.mobilenet_v2 import mobilenet_v2, mobilenet_v2_small
from slimbridge.zoo.mobilenet_v3 import mobilenet_v3_large, mobilenet_v3_small
from slimbridge.zoo.resnet import resnet18, resnet18_small, resnet50, resnet50_small
from slimbridge.zoo.vgg import vgg11, vgg11_small, vgg16
from slimbridge.zoo.weights import initial_weights

__all__ = ["Entry", "build", "entry", "initial_weights", "models"]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: what `build` calls it.
        builder: (nn, num_classes, in_channels, **options) -> native model with the framework's own initial weights.
        in_channels: default input channels.
        image_size: side of the images it is meant for, pixels.
        options: option -> default; `width` is the number of channels of the first convolution.
        doc: one line on what it is.
        paper: where it comes from.
    """

    name: str
    builder: Callable[..., Model]
    in_channels: int
    image_size: int
    options: Mapping[str, float] = field(default_factory=dict)
    doc: str = ""
    paper: str = ""


_LECUN = "LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998"
_HOWARD = "Howard et al.: MobileNets: efficient convolutional neural networks for mobile vision, arXiv 1704.04861"
_SANDLER = "Sandler et al.: MobileNetV2: inverted residuals and linear bottlenecks, arXiv 1801.04381"
_HOWARD_V3 = "Howard et al.: Searching for MobileNetV3, arXiv 1905.02244"
_SIMONYAN = "Simonyan, Zisserman: Very deep convolutional networks for large-scale image recognition, arXiv 1409.1556"
_HE = "He, Zhang, Ren, Sun: Deep residual learning for image recognition, arXiv 1512.03385"
_SMALL = "for small images: 3x3 stem of stride 1, 8 times smaller at the end"

_MODELS = (
    Entry("lenet", lenet, 1, 28, {"image_size": 28}, "two convolutions, three linear layers", _LECUN),
    Entry("mobilenet_v1", mobilenet_v1, 3, 224, {"width": 32}, "depthwise separable convolutions", _HOWARD),
    Entry("mobilenet_v2", mobilenet_v2, 3, 224, {"width": 32, "dropout": 0.2}, "inverted residuals", _SANDLER),
    Entry(
        "mobilenet_v3_small",
        mobilenet_v3_small,
        3,
        224,
        {"width": 16, "dropout": 0.2},
        "inverted residuals with gates, 11 blocks",
        _HOWARD_V3,
    ),
    Entry(
        "mobilenet_v3_large",
        mobilenet_v3_large,
        3,
        224,
        {"width": 16, "dropout": 0.2},
        "inverted residuals with gates, 15 blocks",
        _HOWARD_V3,
    ),
    Entry("vgg11", vgg11, 3, 224, {"width": 64, "dropout": 0.5}, "8 convolutions, 3 linear layers", _SIMONYAN),
    Entry("vgg16", vgg16, 3, 224, {"width": 64, "dropout": 0.5}, "13 convolutions, 3 linear layers", _SIMONYAN),
    Entry("resnet18", resnet18, 3, 224, {"width": 64}, "basic residual blocks", _HE),
    Entry("resnet50", resnet50, 3, 224, {"width": 64}, "bottleneck residual blocks", _HE),
    Entry("mobilenet_v1_small", mobilenet_v1_small, 3, 8, {"width": 16}, f"mobilenet_v1 {_SMALL}", _HOWARD),
    Entry(
        "mobilenet_v2_small",
        mobilenet_v2_small,
        3,
        8,
        # Dropout draws differ between frameworks; without it their training can be compared step by step.
        {"width": 16, "dropout": 0.0},
        f"mobilenet_v2 {_SMALL}",
        _SANDLER,
    ),
    Entry("vgg11_small", vgg11_small, 3, 8, {"width": 16}, f"vgg11, normalised, one linear layer, {_SMALL}", _SIMONYAN),
    Entry("resnet18_small", resnet18_small, 3, 8, {"width": 16}, f"resnet18 {_SMALL}", _HE),
    Entry("resnet50_small", resnet50_small, 3, 8, {"width": 16}, f"resnet50 {_SMALL}", _HE),
)


def models() -> dict[str, Entry]:
    """All models by name."""
    return {item.name: item for item in _MODELS}


def entry(name: str) -> Entry:
    """The model of that name; ModelError names the nearest and all others."""
    known = models()
    if name not in known:
        raise ModelError(f"zoo model '{name}' is unknown{nearest(name, known)}; known: {listed(known)}")
    return known[name]


def build(
    name: str,
    backend: str | Backend = "torch",
    num_classes: int = 10,
    in_channels: int | None = None,
    seed: int = 0,
    **options: float,
) -> Model:
    """A model of the zoo as the backend's native model, float32 on the CPU, in the framework's default mode.

    Args:
        name: a key of `models()`.
        backend: a backend or its name.
        num_classes: outputs of the last layer, at least 1.
        in_channels: input channels, at least 1; None takes the model's default.
        seed: of the initial weights: equal seeds give bit-equal weights on every backend.
        options: the model's own, see `Entry.options`.

    Raises:
        ModelError: an unknown name or option, or a value that is not allowed.
        BackendError: the backend is unknown or not installed.
    """
    item = entry(name)
    channels = item.in_channels if in_channels is None else in_channels
    for word, value in (("num_classes", num_classes), ("in_channels", channels)):
        _check_count(name, word, value)
    settings = {**item.options, **_checked(item, options)}
    side = get_backend(backend) if isinstance(backend, str) else backend
    model = side.place(item.builder(side.nn, num_classes, channels, **settings), "cpu", "float32")
    shapes = {word: array.shape for word, array in side.read(model).items()}
    return side.write(model, initial_weights(shapes, seed))


def _checked(item: Entry, options: Mapping[str, float]) -> Mapping[str, int | float]:
    for word, value in options.items():
        if word not in item.options:
            hint = nearest(word, item.options)
            raise ModelError(
                f"zoo model '{item.name}': option '{word}' is unknown{hint}; allowed: {listed(item.options)}"
            )
        if isinstance(item.options[word], int):
            _check_count(item.name, word, value)
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ModelError(f"zoo model '{item.name}': {word} must be a number in 0 <= x < 1, found {value!r}")
    return options


def _check_count(name: str, word: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"zoo model '{name}': {word} must be an integer of at least 1, found {value!r}")
