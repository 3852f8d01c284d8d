"""LeNet as paddle.vision has it: two convolutions, three linear layers with nothing between them."""

from __future__ import annotations

from typing import Any

from slimbridge.errors import ModelError
from slimbridge.zoo.parts import Part, make

SMALLEST = 12
"""Side of the smallest image that leaves one pixel to the linear layers."""


class LeNet(Part):
    """LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling; square images of one fixed side."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        nn = self.nn
        # Halved by a pool, cut by 4 by the 5x5 kernel, halved again.
        side = (image_size // 2 - 4) // 2
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, 3, stride=1, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(6, 16, 5, stride=1, padding=0),
            nn.ReLU(),
            nn.MaxPool2d(2, 2),
        )
        self.fc = nn.Sequential(
            nn.Linear(16 * side * side, 120),
            nn.Linear(120, 84),
            nn.Linear(84, num_classes),
        )

    def forward(self, x: Any) -> Any:
        """(N, in_channels, image_size, image_size) -> (N, num_classes) logits."""
        return self.fc(self.nn.flatten(self.features(x), 1))


def lenet(nn: Any, num_classes: int, in_channels: int, image_size: int) -> Any:
    """Build it on the layers of `nn`; ModelError for an image that is too small."""
    if image_size < SMALLEST:
        raise ModelError(f"zoo model 'lenet': image_size must be at least {SMALLEST}, found {image_size}")
    return make(nn, LeNet, num_classes, in_channels, image_size)
