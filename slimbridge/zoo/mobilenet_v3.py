"""MobileNetV3 small and large (Howard et al. 2019) with paddle.vision's names."""

from __future__ import annotations

from typing import Any

from slimbridge.errors import ModelError
from slimbridge.zoo.mobilenet_v2 import rounded
from slimbridge.zoo.parts import Part, make

WIDTH = 16
"""Channels of the first convolution in the paper."""
Row = tuple[int, int, int, bool, bool, int]
SMALL: tuple[Row, ...] = (
    # kernel, expanded channels, output channels, squeeze-excitation, hard-swish, stride: the paper's table 2
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)
LARGE: tuple[Row, ...] = (
    # The paper's table 1.
    (3, 16, 16, False, False, 1),
    (3, 64, 24, False, False, 2),
    (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2),
    (5, 120, 40, True, False, 1),
    (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1),
    (3, 480, 112, True, True, 1),
    (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2),
    (5, 960, 160, True, True, 1),
    (5, 960, 160, True, True, 1),
)


def _conv(nn: Any, inputs: int, outputs: int, kernel: int, stride: int, groups: int, activation: Any = None) -> Any:
    """Convolution, normalisation with the paper's constants (section 6.1.1), activation unless it is None."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=0.001, momentum=0.01),
    ]
    return nn.Sequential(*layers, *([] if activation is None else [activation()]))


class SqueezeExcitation(Part):
    """A gate for each channel, from its mean over space (Hu et al. 2018), with a piecewise linear sigmoid."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        nn = self.nn
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = nn.ReLU()
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Any) -> Any:
        """(N, channels, H, W) -> the same shape."""
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class InvertedResidual(Part):
    """Expansion, depthwise convolution, gate, linear projection, and a shortcut where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, hidden: int, kernel: int, stride: int, gate: bool, act: Any) -> None:
        super().__init__()
        nn = self.nn
        self.expand = inputs != hidden
        self.use_se = gate
        self.shortcut = stride == 1 and inputs == outputs
        if self.expand:
            self.expand_conv = _conv(nn, inputs, hidden, 1, 1, 1, act)
        self.bottleneck_conv = _conv(nn, hidden, hidden, kernel, stride, hidden, act)
        if gate:
            self.mid_se: Any = make(nn, SqueezeExcitation, hidden, rounded(hidden // 4))
        self.linear_conv = _conv(nn, hidden, outputs, 1, 1, 1)

    def forward(self, x: Any) -> Any:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        out = self.bottleneck_conv(self.expand_conv(x) if self.expand else x)
        out = self.linear_conv(self.mid_se(out) if self.use_se else out)
        return x + out if self.shortcut else out


class MobileNetV3(Part):
    """The network of the given rows; `last` is the hidden layer's size in the paper."""

    def __init__(
        self, rows: tuple[Row, ...], last: int, num_classes: int, in_channels: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        nn = self.nn
        scale = width / WIDTH
        self.conv = _conv(nn, in_channels, width, 3, 2, 1, nn.Hardswish)
        inputs, blocks = width, []
        for kernel, expanded, channels, gate, hard_swish, stride in rows:
            outputs, hidden = rounded(channels * scale), rounded(expanded * scale)
            act = nn.Hardswish if hard_swish else nn.ReLU
            blocks.append(make(nn, InvertedResidual, inputs, outputs, hidden, kernel, stride, gate, act))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.lastconv = _conv(nn, inputs, 6 * inputs, 1, 1, 1, nn.Hardswish)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        hidden = rounded(last * scale)
        self.classifier = nn.Sequential(
            nn.Linear(6 * inputs, hidden), nn.Hardswish(), nn.Dropout(dropout), nn.Linear(hidden, num_classes)
        )

    def forward(self, x: Any) -> Any:
        """(N, in_channels, H, W) -> (N, num_classes) logits."""
        x = self.avgpool(self.lastconv(self.blocks(self.conv(x))))
        return self.classifier(self.nn.flatten(x, 1))


def mobilenet_v3_small(nn: Any, num_classes: int, in_channels: int, width: int, dropout: float) -> Any:
    """The paper's small network; `width` is the first convolution's channels, 16 for multiplier 1, a multiple of 8."""
    return _built(nn, "mobilenet_v3_small", SMALL, 1024, num_classes, in_channels, width, dropout)


def mobilenet_v3_large(nn: Any, num_classes: int, in_channels: int, width: int, dropout: float) -> Any:
    """The paper's large network; `width` is the first convolution's channels, 16 for multiplier 1, a multiple of 8."""
    return _built(nn, "mobilenet_v3_large", LARGE, 1280, num_classes, in_channels, width, dropout)


def _built(nn: Any, name: str, rows: tuple[Row, ...], last: int, *args: Any) -> Any:
    width = args[2]
    if width % 8:
        raise ModelError(f"zoo model '{name}': width must be a multiple of 8, found {width}")
    return make(nn, MobileNetV3, rows, last, *args)
