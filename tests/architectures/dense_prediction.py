"""Nets whose output is a map: UNet, a detector on a feature pyramid, segmentation with ASPP."""

from __future__ import annotations

from typing import Any

from tests.architectures.parts import Part, conv_bn, conv_bn_act, make


def _double(nn: Any, inputs: int, outputs: int, norm: Any) -> Any:
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), norm(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(Part):
    """Contraction, expansion by transposed convolutions, skips (Ronneberger et al. 2015, arXiv 1505.04597)."""

    def __init__(self, norm: str, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        nn = self.nn
        layer = nn.BatchNorm2d if norm == "batch" else lambda channels: nn.GroupNorm(4, channels)
        self.down1 = _double(nn, 3, width, layer)
        self.down2 = _double(nn, width, 2 * width, layer)
        self.bottom = _double(nn, 2 * width, 4 * width, layer)
        self.pool = nn.MaxPool2d(2, 2)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.conv2 = _double(nn, 4 * width, 2 * width, layer)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.conv1 = _double(nn, 2 * width, width, layer)
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, x: Any) -> Any:
        nn = self.nn
        first = self.down1(x)
        second = self.down2(self.pool(first))
        x = self.up2(self.bottom(self.pool(second)))
        x = self.conv2(nn.concat([second, x], 1))
        x = self.conv1(nn.concat([first, self.up1(x)], 1))
        return self.out(x)


def unet(nn: Any) -> Any:
    """With BatchNorm."""
    return make(nn, UNet, "batch")


def unet_group_norm(nn: Any) -> Any:
    """With GroupNorm of four groups."""
    return make(nn, UNet, "group")


class Block(Part):
    """Two 3x3 convolutions and a shortcut by a 1x1."""

    def __init__(self, inputs: int, outputs: int, stride: int = 2, dilation: int = 1) -> None:
        super().__init__()
        nn = self.nn
        self.a = conv_bn_act(nn, inputs, outputs, 3, stride=stride)
        self.b = conv_bn(nn, outputs, outputs, 3, padding=dilation, dilation=dilation)
        self.shortcut = conv_bn(nn, inputs, outputs, stride=stride)

    def forward(self, x: Any) -> Any:
        return self.nn.relu(self.b(self.a(x)) + self.shortcut(x))


class Detector(Part):
    """Feature pyramid with heads that all levels share (Lin et al. 2017, arXiv 1612.03144 and 1708.02002)."""

    def __init__(self, width: int = 12, classes: int = 4, anchors: int = 2) -> None:
        super().__init__()
        nn = self.nn
        self.stem = conv_bn_act(nn, 3, 8, 3, stride=2)
        self.stages = nn.ModuleList([make(nn, Block, 8 << i, 16 << i) for i in range(3)])
        self.lateral = nn.ModuleList([nn.Conv2d(16 << i, width, 1) for i in range(3)])
        self.smooth = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(3)])
        self.tower = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.classify = nn.Conv2d(width, anchors * classes, 3, padding=1)
        self.box = nn.Conv2d(width, anchors * 4, 3, padding=1)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        levels = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            levels.append(lateral(x))
        for index in (1, 0):
            levels[index] = levels[index] + self.nn.upsample(levels[index + 1], 2)
        result = {}
        for index, level in enumerate(levels):
            shared = self.tower(self.smooth[index](level))
            result[f"classes{index}"], result[f"boxes{index}"] = self.classify(shared), self.box(shared)
        return result


class ASPP(Part):
    """Parallel convolutions of several dilations, and the global mean spread over the map, joined."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        nn = self.nn
        self.point = conv_bn_act(nn, inputs, width)
        self.wide = nn.ModuleList([conv_bn_act(nn, inputs, width, 3, padding=d, dilation=d) for d in (2, 4)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn_act(nn, inputs, width))
        self.project = nn.Sequential(conv_bn_act(nn, 4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Any) -> Any:
        nn = self.nn
        everywhere = nn.upsample(self.pool(x), x.shape[2])
        return self.project(nn.concat([self.point(x), self.wide[0](x), self.wide[1](x), everywhere], 1))


class DeepLab(Part):
    """Dilated backbone, ASPP, and a decoder that joins early features (Chen et al. 2018, arXiv 1802.02611)."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        nn = self.nn
        self.stem = conv_bn_act(nn, 3, 8, 3, stride=2)
        self.early = make(nn, Block, 8, 16)
        self.late = nn.Sequential(make(nn, Block, 16, 24), make(nn, Block, 24, 32, 1, 2))
        self.aspp = make(nn, ASPP, 32, 12)
        self.low = conv_bn_act(nn, 16, 6)
        self.decoder = nn.Sequential(conv_bn_act(nn, 18, 12, 3), nn.Conv2d(12, classes, 1))

    def forward(self, x: Any) -> Any:
        nn = self.nn
        early = self.early(self.stem(x))
        late = nn.upsample(self.aspp(self.late(early)), 2)
        return nn.upsample(self.decoder(nn.concat([self.low(early), late], 1)), 4)
