"""VGG-11 and -16 (Simonyan and Zisserman 2015) with paddle.vision's names, and VGG-11 for small images."""

from __future__ import annotations

from typing import Any

from slimbridge.zoo.parts import Part, make

WIDTH = 64
"""Channels of the first convolution in the paper."""
FACTORS = (1, 2, 4, 8, 8)
"""Channels of each stage over the width."""
DEPTHS = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3)}
"""Convolutions of each stage: columns A and D of the paper's table 1."""
POOLED = {False: (0, 1, 2, 3, 4), True: (1, 2, 3)}
"""Stages that end with a pool, for large images and for small ones."""


class VGG(Part):
    """Stages of 3x3 convolutions and max-pools, three linear layers.

    `small` normalises after each convolution, pools three times only and has one linear layer behind a mean over
    space, as the nets for CIFAR of Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 4.1.
    """

    def __init__(
        self, depth: int, num_classes: int, in_channels: int, width: int, dropout: float = 0.0, small: bool = False
    ) -> None:
        super().__init__()
        nn = self.nn
        layers: list[Any] = []
        inputs = in_channels
        for stage, (factor, convolutions) in enumerate(zip(FACTORS, DEPTHS[depth], strict=True)):
            for _ in range(convolutions):
                outputs = factor * width
                layers += _convolution(nn, inputs, outputs, small)
                inputs = outputs
            if stage in POOLED[small]:
                layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1 if small else (7, 7))
        head = (nn.Linear(inputs, num_classes),) if small else _head(nn, inputs, width, num_classes, dropout)
        self.classifier = nn.Sequential(*head)

    def forward(self, x: Any) -> Any:
        """(N, in_channels, H, W) -> (N, num_classes) logits."""
        return self.classifier(self.nn.flatten(self.avgpool(self.features(x)), 1))


def _convolution(nn: Any, inputs: int, outputs: int, small: bool) -> tuple[Any, ...]:
    if small:
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()


def _head(nn: Any, inputs: int, width: int, num_classes: int, dropout: float) -> tuple[Any, ...]:
    """Three linear layers over the seven pixels a side that are left of 224; 4,096 hidden features at width 64."""
    hidden = 64 * width
    return (
        *(nn.Linear(inputs * 49, hidden), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout)),
        nn.Linear(hidden, num_classes),
    )


def vgg11(nn: Any, num_classes: int, in_channels: int, width: int, dropout: float) -> Any:
    """The paper's column A; `width` is the first convolution's channels, 64 in the paper."""
    return make(nn, VGG, 11, num_classes, in_channels, width, dropout)


def vgg16(nn: Any, num_classes: int, in_channels: int, width: int, dropout: float) -> Any:
    """The paper's column D; `width` is the first convolution's channels, 64 in the paper."""
    return make(nn, VGG, 16, num_classes, in_channels, width, dropout)


def vgg11_small(nn: Any, num_classes: int, in_channels: int, width: int) -> Any:
    """VGG-11 for small images: reduces each side 8 times, not 32."""
    return make(nn, VGG, 11, num_classes, in_channels, width, small=True)
