"""ResNet-18 and -50 (He et al. 2016) with torchvision's names, and their variants for small images."""

from __future__ import annotations

from typing import Any

from slimbridge.zoo.parts import Part, make


class BasicBlock(Part):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: Any) -> None:
        super().__init__()
        nn = self.nn
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Any) -> Any:
        """(N, inputs, H, W) -> (N, width, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


class Bottleneck(Part):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the 3x3 has the stride (as torchvision and paddle.vision)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: Any) -> None:
        super().__init__()
        nn = self.nn
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x: Any) -> Any:
        """(N, inputs, H, W) -> (N, 4 * width, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + shortcut)


BlockClass = type[BasicBlock] | type[Bottleneck]


class ResNet(Part):
    """Stem, four stages that double the width and halve the size, pool, linear layer.

    `small` puts a 3x3 convolution of stride 1 in the stem's place and leaves the max-pool out.
    """

    def __init__(
        self,
        block: BlockClass,
        depths: tuple[int, int, int, int],
        num_classes: int,
        in_channels: int,
        width: int,
        small: bool,
    ) -> None:
        super().__init__()
        nn = self.nn
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        inputs = width
        for index, depth in enumerate(depths):
            setattr(self, f"layer{index + 1}", _stage(nn, block, inputs, width << index, depth, 1 if index == 0 else 2))
            inputs = block.expansion * (width << index)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Any) -> Any:
        """(N, in_channels, H, W) -> (N, num_classes) logits."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for index in range(1, 5):
            x = getattr(self, f"layer{index}")(x)
        return self.fc(self.nn.flatten(self.avgpool(x), 1))


def _stage(nn: Any, block: BlockClass, inputs: int, width: int, depth: int, stride: int) -> Any:
    outputs = block.expansion * width
    downsample = None
    if stride != 1 or inputs != outputs:
        convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        downsample = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
    first = make(nn, block, inputs, width, stride, downsample)
    return nn.Sequential(first, *(make(nn, block, outputs, width, 1, None) for _ in range(depth - 1)))


def resnet18(nn: Any, num_classes: int, in_channels: int, width: int) -> Any:
    """The paper's network; `width` is the first convolution's channels, 64 in the paper."""
    return make(nn, ResNet, BasicBlock, (2, 2, 2, 2), num_classes, in_channels, width, small=False)


def resnet50(nn: Any, num_classes: int, in_channels: int, width: int) -> Any:
    """The paper's network; `width` is the first convolution's channels, 64 in the paper."""
    return make(nn, ResNet, Bottleneck, (3, 4, 6, 3), num_classes, in_channels, width, small=False)


def resnet18_small(nn: Any, num_classes: int, in_channels: int, width: int) -> Any:
    """ResNet-18 for small images: reduces each side 8 times, not 32."""
    return make(nn, ResNet, BasicBlock, (2, 2, 2, 2), num_classes, in_channels, width, small=True)


def resnet50_small(nn: Any, num_classes: int, in_channels: int, width: int) -> Any:
    """ResNet-50 for small images: reduces each side 8 times, not 32."""
    return make(nn, ResNet, Bottleneck, (3, 4, 6, 3), num_classes, in_channels, width, small=True)
