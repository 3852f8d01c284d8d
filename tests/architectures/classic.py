"""AlexNet, SqueezeNet, DenseNet, ShuffleNetV2: narrow and shallow, their wiring as published."""

from __future__ import annotations

from typing import Any

from tests.architectures.parts import Part, conv_bn, conv_bn_act, gap, make


class AlexNet(Part):
    """Five convolutions, three linear layers behind a flatten (Krizhevsky 2014, arXiv 1404.5997)."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        nn = self.nn
        self.features = nn.Sequential(
            *(nn.Conv2d(3, width, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(width, 3 * width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(3 * width, 4 * width, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(4 * width, 2 * width, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU()),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            *(nn.Dropout(0.5), nn.Linear(2 * width * 4, 4 * width), nn.ReLU()),
            *(nn.Dropout(0.5), nn.Linear(4 * width, 4 * width), nn.ReLU()),
            nn.Linear(4 * width, classes),
        )

    def forward(self, x: Any) -> Any:
        return self.classifier(self.nn.flatten(self.avgpool(self.features(x)), 1))


class Fire(Part):
    """A squeeze layer that feeds two expand layers, joined."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        nn = self.nn
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Any) -> Any:
        nn = self.nn
        x = nn.relu(self.squeeze(x))
        return nn.concat([nn.relu(self.expand1x1(x)), nn.relu(self.expand3x3(x))], 1)


class SqueezeNet(Part):
    """SqueezeNet 1.1, whose classifier is a convolution (Iandola et al. 2016, arXiv 1602.07360)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        nn = self.nn
        fires = [make(nn, Fire, *sizes) for sizes in ((16, 4, 8), (16, 4, 8), (16, 8, 16), (32, 8, 16))]
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(fires[0], fires[1], nn.MaxPool2d(3, 2), fires[2], fires[3]),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(32, classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x: Any) -> Any:
        return self.nn.flatten(self.classifier(self.features(x)), 1)


class DenseLayer(Part):
    """Normalisation before each of two convolutions; the input is joined to the result."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        nn = self.nn
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Any) -> Any:
        nn = self.nn
        new = self.conv2(nn.relu(self.norm2(self.conv1(nn.relu(self.norm1(x))))))
        return nn.concat([x, new], 1)


class DenseNet(Part):
    """Dense blocks with transitions that halve channels and size (Huang et al. 2017, arXiv 1608.06993)."""

    def __init__(self, growth: int = 8, blocks: tuple[int, ...] = (2, 3, 2), classes: int = 10) -> None:
        super().__init__()
        nn = self.nn
        channels = 2 * growth
        layers = [*conv_bn_act(nn, 3, channels, 7, stride=2), nn.MaxPool2d(3, 2, 1)]
        for index, depth in enumerate(blocks):
            for _ in range(depth):
                layers.append(make(nn, DenseLayer, channels, growth))
                channels += growth
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
            if index + 1 < len(blocks):
                layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2, 2)]
                channels //= 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Any) -> Any:
        return self.classifier(gap(self.nn, self.features(x)))


class ShuffleUnit(Part):
    """Half of the channels pass (or, at stride 2, both branches take all), join and shuffle in two groups."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        nn = self.nn
        self.stride = stride
        half = outputs // 2
        taken = inputs if stride == 2 else inputs // 2
        if stride == 2:
            first = conv_bn(nn, inputs, inputs, 3, stride=2, groups=inputs)
            self.branch1 = nn.Sequential(first, conv_bn_act(nn, inputs, half))
        self.branch2 = nn.Sequential(
            conv_bn_act(nn, taken, half),
            conv_bn(nn, half, half, 3, stride=stride, groups=half),
            conv_bn_act(nn, half, half),
        )

    def forward(self, x: Any) -> Any:
        nn = self.nn
        if self.stride == 2:
            pair = [self.branch1(x), self.branch2(x)]
        else:
            left, right = nn.split(x, [x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], 1)
            pair = [left, self.branch2(right)]
        x = nn.concat(pair, 1)
        n, c, h, w = x.shape
        x = nn.transpose(nn.reshape(x, (n, 2, c // 2, h, w)), (0, 2, 1, 3, 4))
        return nn.reshape(x, (n, c, h, w))


class ShuffleNetV2(Part):
    """Split, join and shuffle (Ma et al. 2018, arXiv 1807.11164)."""

    def __init__(self, widths: tuple[int, ...] = (16, 32), classes: int = 10) -> None:
        super().__init__()
        nn = self.nn
        units, inputs = [], 8
        self.conv1 = conv_bn_act(nn, 3, inputs, 3, stride=2)
        for width in widths:
            units += [make(nn, ShuffleUnit, inputs, width, 2)]
            units += [make(nn, ShuffleUnit, width, width, 1) for _ in range(2)]
            inputs = width
        self.stages = nn.Sequential(*units)
        self.conv5 = conv_bn_act(nn, inputs, 2 * inputs)
        self.fc = nn.Linear(2 * inputs, classes)

    def forward(self, x: Any) -> Any:
        return self.fc(gap(self.nn, self.conv5(self.stages(self.conv1(x)))))
