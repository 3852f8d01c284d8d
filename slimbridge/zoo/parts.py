"""What a model written once is made of: plain classes that become layers of whichever framework builds them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar


class Part:
    """Base of the zoo's modules: neutral in this file, a layer of a framework once `make` has joined it to one.

    Attributes:
        nn: the backend's namespace of layers; a class attribute, so that copies of a model share it.
    """

    nn: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the part's class and the name of the namespace: the joined class has no name of its own."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(self.nn, ModuleType) or isinstance(reduced, str):
            return reduced
        return (_blank, (type(self).__bases__[0], self.nn.__name__), *reduced[2:])


PartT = TypeVar("PartT", bound=Part)


_CLASSES: dict[tuple[int, type[Part]], Any] = {}


def make(nn: Any, part: type[PartT], *args: Any, **kwargs: Any) -> PartT:
    """An instance of `part` that is also an `nn.Module`; further arguments go to its constructor."""
    layer: PartT = _joined(nn, part)(*args, **kwargs)
    return layer


def _joined(nn: Any, part: type[Part]) -> Any:
    # The class keeps `nn` alive, so its id names it for good; a namespace need not be hashable.
    key = (id(nn), part)
    if key not in _CLASSES:
        # The part comes first, so that its forward goes before the framework's placeholder.
        members = {"nn": nn, "__module__": part.__module__, "__doc__": part.__doc__}
        _CLASSES[key] = type(part.__name__, (part, nn.Module), members)
    return _CLASSES[key]


def _blank(part: type[Part], nn: str) -> Any:
    """An instance without state, for unpickling; `nn` is the name of an importable module."""
    joined = _joined(import_module(nn), part)
    return joined.__new__(joined)


def conv_norm(nn: Any, channels: tuple[int, int], kernel: int, stride: int, groups: int, activation: Any) -> Any:
    """Convolution without bias, batch normalisation and activation in one Sequential (paths 0, 1, 2).

    Args:
        nn: the backend's layers.
        channels: input and output channels.
        kernel: side of the kernel, odd; the padding keeps the size at stride 1.
        stride: of the convolution, both axes.
        groups: of the convolution.
        activation: layer class, called without arguments.
    """
    layers = (
        nn.Conv2d(*channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels[1]),
        activation(),
    )
    return nn.Sequential(*layers)
