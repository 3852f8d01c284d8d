"""MobileNet (Howard et al. 2017) with paddle.vision's names, and its variant for small images."""

from __future__ import annotations

from typing import Any

from slimbridge.zoo.parts import Part, conv_norm, make

WIDTH = 32
"""Channels of the first convolution in the paper."""
BLOCKS = (
    # path, output channels over the width, stride for large and for small images
    ("conv2_1", 2, 1, 1),
    ("conv2_2", 4, 2, 1),
    ("conv3_1", 4, 1, 1),
    ("conv3_2", 8, 2, 2),
    ("conv4_1", 8, 1, 1),
    ("conv4_2", 16, 2, 2),
    ("conv5_1", 16, 1, 1),
    ("conv5_2", 16, 1, 1),
    ("conv5_3", 16, 1, 1),
    ("conv5_4", 16, 1, 1),
    ("conv5_5", 16, 1, 1),
    ("conv5_6", 32, 2, 2),
    ("conv6", 32, 1, 1),
)


class DepthwiseSeparable(Part):
    """A depthwise 3x3 and a pointwise convolution, each normalised and rectified."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        nn = self.nn
        self._depthwise_conv = conv_norm(nn, (inputs, inputs), 3, stride, inputs, nn.ReLU)
        self._pointwise_conv = conv_norm(nn, (inputs, outputs), 1, 1, 1, nn.ReLU)

    def forward(self, x: Any) -> Any:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return self._pointwise_conv(self._depthwise_conv(x))


class MobileNetV1(Part):
    """The network; `small` keeps the stem and the second block at stride 1."""

    def __init__(self, num_classes: int, in_channels: int, width: int, small: bool) -> None:
        super().__init__()
        nn = self.nn
        self.conv1 = conv_norm(nn, (in_channels, width), 3, 1 if small else 2, 1, nn.ReLU)
        inputs = width
        for path, factor, stride, small_stride in BLOCKS:
            block = make(nn, DepthwiseSeparable, inputs, factor * width, small_stride if small else stride)
            setattr(self, path, block)
            inputs = factor * width
        self.pool2d_avg = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Any) -> Any:
        """(N, in_channels, H, W) -> (N, num_classes) logits."""
        x = self.conv1(x)
        for path, *_ in BLOCKS:
            x = getattr(self, path)(x)
        return self.fc(self.nn.flatten(self.pool2d_avg(x), 1))


def mobilenet_v1(nn: Any, num_classes: int, in_channels: int, width: int) -> Any:
    """The paper's network; `width` is the first convolution's channels, 32 for multiplier 1."""
    return make(nn, MobileNetV1, num_classes, in_channels, width, small=False)


def mobilenet_v1_small(nn: Any, num_classes: int, in_channels: int, width: int) -> Any:
    """The same for small images: reduces each side 8 times, not 32."""
    return make(nn, MobileNetV1, num_classes, in_channels, width, small=True)
