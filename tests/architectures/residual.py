"""Nets of residual blocks: ResNeXt, Wide ResNet, RegNet, EfficientNet, ConvNeXt."""

from __future__ import annotations

from typing import Any

from tests.architectures.parts import Part, SqueezeExcite, conv_bn, conv_bn_act, gap, make, seeded


class GroupedBottleneck(Part):
    """1x1, (grouped) 3x3, optional squeeze-excitation, 1x1, and a shortcut."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int, groups: int, squeezed: int = 0) -> None:
        super().__init__()
        nn = self.nn
        self.a = conv_bn_act(nn, inputs, inner)
        self.b = conv_bn_act(nn, inner, inner, 3, stride=stride, groups=groups)
        self.se = make(nn, SqueezeExcite, inner, squeezed, nn.ReLU, nn.Sigmoid) if squeezed else nn.Identity()
        self.c = conv_bn(nn, inner, outputs)
        same = stride == 1 and inputs == outputs
        self.proj = nn.Identity() if same else conv_bn(nn, inputs, outputs, stride=stride)

    def forward(self, x: Any) -> Any:
        return self.nn.relu(self.proj(x) + self.c(self.se(self.b(self.a(x)))))


class Staged(Part):
    """A stem, stages of bottlenecks (inner, outputs, depth), a linear layer."""

    def __init__(
        self, stages: tuple[tuple[int, int, int], ...], groups: int, squeeze: bool = False, classes: int = 10
    ) -> None:
        super().__init__()
        nn = self.nn
        self.stem = nn.Sequential(conv_bn_act(nn, 3, 16, 3, stride=2), nn.MaxPool2d(3, 2, 1))
        inputs, blocks = 16, []
        for index, (inner, outputs, depth) in enumerate(stages):
            for block in range(depth):
                stride = 2 if index and block == 0 else 1
                squeezed = max(4, inputs // 4) if squeeze else 0
                blocks.append(make(nn, GroupedBottleneck, inputs, inner, outputs, stride, groups, squeezed))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Any) -> Any:
        return self.fc(gap(self.nn, self.blocks(self.stem(x))))


def resnext(nn: Any) -> Any:
    """Grouped bottlenecks (Xie et al. 2017, arXiv 1611.05431)."""
    return make(nn, Staged, ((16, 32, 2), (32, 64, 2)), 4)


def wide_resnet(nn: Any) -> Any:
    """Bottlenecks as wide inside as outside (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""
    return make(nn, Staged, ((32, 32, 2), (64, 64, 2)), 1)


def regnet_x(nn: Any) -> Any:
    """Grouped bottlenecks of ratio 1 (Radosavovic et al. 2020, arXiv 2003.13678)."""
    return make(nn, Staged, ((24, 24, 1), (32, 32, 2), (48, 48, 1)), 8)


def regnet_y(nn: Any) -> Any:
    """RegNet with squeeze-excitation between the 3x3 and the last 1x1."""
    return make(nn, Staged, ((24, 24, 1), (32, 32, 2), (48, 48, 1)), 8, True)


class MBConv(Part):
    """Expansion, depthwise, squeeze-excitation, projection, shortcut where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        nn = self.nn
        hidden = inputs * expansion
        self.expand = conv_bn_act(nn, inputs, hidden, act=nn.SiLU) if expansion > 1 else nn.Identity()
        self.depthwise = conv_bn_act(nn, hidden, hidden, kernel, nn.SiLU, stride=stride, groups=hidden)
        self.se = make(nn, SqueezeExcite, hidden, max(2, inputs // 4), nn.SiLU, nn.Sigmoid)
        self.project = conv_bn(nn, hidden, outputs)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Any) -> Any:
        y = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.shortcut else y


class EfficientNet(Part):
    """MBConv blocks between a stem and a wide 1x1 (Tan and Le 2019, arXiv 1905.11946)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        nn = self.nn
        sizes = ((8, 8, 3, 1, 1), (8, 12, 3, 2, 4), (12, 12, 3, 1, 4), (12, 16, 5, 2, 4), (16, 16, 5, 1, 4))
        self.stem = conv_bn_act(nn, 3, 8, 3, nn.SiLU, stride=2)
        self.blocks = nn.Sequential(*(make(nn, MBConv, *size) for size in sizes))
        self.head = conv_bn_act(nn, 16, 64, act=nn.SiLU)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(64, classes))

    def forward(self, x: Any) -> Any:
        return self.classifier(gap(self.nn, self.head(self.blocks(self.stem(x)))))


class ChannelNorm(Part):
    """LayerNorm over the channels of (N, C, H, W), by way of channels-last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = self.nn.LayerNorm(channels)

    def forward(self, x: Any) -> Any:
        nn = self.nn
        return nn.transpose(self.norm(nn.transpose(x, (0, 2, 3, 1))), (0, 3, 1, 2))


class ConvNeXtBlock(Part):
    """Depthwise 7x7, then LayerNorm and two linear layers channels-last, a learned scale, a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        nn = self.nn
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.parameter(seeded("gamma", (width,)))

    def forward(self, x: Any) -> Any:
        nn = self.nn
        y = nn.transpose(self.dwconv(x), (0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        return x + nn.transpose(y, (0, 3, 1, 2))


class ConvNeXt(Part):
    """Patches, stages of blocks, down-sampling between them (Liu et al. 2022, arXiv 2201.03545)."""

    def __init__(self, widths: tuple[int, ...] = (12, 24), depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        nn = self.nn
        layers = [nn.Conv2d(3, widths[0], 4, stride=4), make(nn, ChannelNorm, widths[0])]
        for index, width in enumerate(widths):
            if index:
                layers += [make(nn, ChannelNorm, widths[index - 1]), nn.Conv2d(widths[index - 1], width, 2, stride=2)]
            layers += [make(nn, ConvNeXtBlock, width) for _ in range(depth)]
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Any) -> Any:
        return self.head(self.norm(gap(self.nn, self.features(x))))
