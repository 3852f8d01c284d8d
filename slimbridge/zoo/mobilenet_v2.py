"""MobileNetV2 (Sandler et al. 2018) with torchvision's names, and its variant for small images."""

from __future__ import annotations

from typing import Any

from slimbridge.errors import ModelError
from slimbridge.zoo.parts import Part, conv_norm, make

WIDTH = 32
"""Channels of the first convolution in the paper."""
LAST = 1280
"""Channels before the classifier in the paper."""
STAGES = (
    # expansion, channels, blocks, stride of the first block for large and for small images
    (1, 16, 1, 1, 1),
    (6, 24, 2, 2, 1),
    (6, 32, 3, 2, 2),
    (6, 64, 4, 2, 2),
    (6, 96, 3, 1, 1),
    (6, 160, 3, 2, 2),
    (6, 320, 1, 1, 1),
)


def rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and never less than nine tenths of what was asked."""
    nearest = max(8, int(channels / 8 + 0.5) * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


class InvertedResidual(Part):
    """Expansion, depthwise convolution and linear projection, with a shortcut where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        nn = self.nn
        hidden = inputs * expansion
        layers = [] if expansion == 1 else [conv_norm(nn, (inputs, hidden), 1, 1, 1, nn.ReLU6)]
        layers += [
            conv_norm(nn, (hidden, hidden), 3, stride, hidden, nn.ReLU6),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Any) -> Any:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(Part):
    """The network; `small` keeps the stem and the second stage at stride 1 and narrows the last layer too."""

    def __init__(self, num_classes: int, in_channels: int, width: int, dropout: float, small: bool) -> None:
        super().__init__()
        nn = self.nn
        scale = width / WIDTH
        last = rounded(LAST * (scale if small else max(1.0, scale)))
        inputs = width
        features = [conv_norm(nn, (in_channels, width), 3, 1 if small else 2, 1, nn.ReLU6)]
        for expansion, channels, blocks, stride, small_stride in STAGES:
            outputs = rounded(channels * scale)
            for index in range(blocks):
                first = (small_stride if small else stride) if index == 0 else 1
                features.append(make(nn, InvertedResidual, inputs, outputs, first, expansion))
                inputs = outputs
        features.append(conv_norm(nn, (inputs, last), 1, 1, 1, nn.ReLU6))
        self.features = nn.Sequential(*features)
        self.pool2d_avg = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))

    def forward(self, x: Any) -> Any:
        """(N, in_channels, H, W) -> (N, num_classes) logits."""
        return self.classifier(self.nn.flatten(self.pool2d_avg(self.features(x)), 1))


def mobilenet_v2(nn: Any, num_classes: int, in_channels: int, width: int, dropout: float) -> Any:
    """The paper's network; `width` is the first convolution's channels, 32 for multiplier 1, a multiple of 8."""
    return _built(nn, "mobilenet_v2", num_classes, in_channels, width, dropout, small=False)


def mobilenet_v2_small(nn: Any, num_classes: int, in_channels: int, width: int, dropout: float) -> Any:
    """The same for small images: reduces each side 8 times, not 32."""
    return _built(nn, "mobilenet_v2_small", num_classes, in_channels, width, dropout, small=True)


def _built(nn: Any, name: str, num_classes: int, in_channels: int, width: int, dropout: float, small: bool) -> Any:
    if width % 8:
        raise ModelError(f"zoo model '{name}': width must be a multiple of 8, found {width}")
    return make(nn, MobileNetV2, num_classes, in_channels, width, dropout, small=small)
