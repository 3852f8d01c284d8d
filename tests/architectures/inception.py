"""GoogLeNet and Inception-v3: parallel branches of convolutions and pools, joined."""

from __future__ import annotations

from typing import Any

from tests.architectures.parts import Part, conv_bn_act, gap, make


class Inception(Part):
    """Four parallel branches: 1x1; 1x1, 3x3; 1x1, 5x5; pool, 1x1."""

    def __init__(self, inputs: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        nn = self.nn
        one, three_in, three, five_in, five, pool = widths
        self.branch1 = nn.Sequential(nn.Conv2d(inputs, one, 1), nn.ReLU())
        self.branch2 = nn.Sequential(
            nn.Conv2d(inputs, three_in, 1), nn.ReLU(), nn.Conv2d(three_in, three, 3, padding=1)
        )
        self.branch3 = nn.Sequential(nn.Conv2d(inputs, five_in, 1), nn.ReLU(), nn.Conv2d(five_in, five, 5, padding=2))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(inputs, pool, 1))

    def forward(self, x: Any) -> Any:
        branches = [self.branch1, self.branch2, self.branch3, self.branch4]
        return self.nn.relu(self.nn.concat([branch(x) for branch in branches], 1))


class GoogLeNet(Part):
    """Inception modules, with the two auxiliary heads as further outputs (Szegedy et al. 2015, arXiv 1409.4842)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        nn = self.nn
        self.stem = nn.Sequential(
            *(nn.Conv2d(3, 8, 7, stride=2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
            *(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        )
        self.inception3a = make(nn, Inception, 16, (8, 8, 12, 2, 4, 4))
        self.inception4a = make(nn, Inception, 28, (12, 8, 16, 4, 4, 8))
        self.inception4d = make(nn, Inception, 40, (12, 8, 16, 4, 4, 8))
        self.inception5b = make(nn, Inception, 40, (16, 8, 24, 4, 8, 8))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.aux1 = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(40, 8, 1), nn.ReLU(), nn.Flatten())
        self.aux1_fc = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, classes))
        self.fc = nn.Linear(56, classes)

    def forward(self, x: Any) -> Any:
        x = self.pool(self.inception3a(self.stem(x)))
        x = self.inception4a(x)
        aux = self.aux1_fc(self.aux1(x))
        x = self.inception5b(self.pool(self.inception4d(x)))
        return self.fc(gap(self.nn, x)), aux


class InceptionA(Part):
    """1x1; 1x1, 5x5; 1x1, two 3x3; average pool, 1x1."""

    def __init__(self, inputs: int, width: int, pool: int) -> None:
        super().__init__()
        nn = self.nn
        self.branch1x1 = conv_bn_act(nn, inputs, width)
        self.branch5x5 = nn.Sequential(conv_bn_act(nn, inputs, width), conv_bn_act(nn, width, width, 5))
        self.branch3x3dbl = nn.Sequential(
            conv_bn_act(nn, inputs, width), conv_bn_act(nn, width, 12, 3), conv_bn_act(nn, 12, 12, 3)
        )
        self.branch_pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_bn_act(nn, inputs, pool))
        self.outputs = 2 * width + 12 + pool

    def forward(self, x: Any) -> Any:
        branches = [self.branch1x1, self.branch5x5, self.branch3x3dbl, self.branch_pool]
        return self.nn.concat([branch(x) for branch in branches], 1)


class InceptionB(Part):
    """Halves the size: a 3x3 of stride 2; 1x1, 3x3, 3x3 of stride 2; the pooled input itself."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        nn = self.nn
        self.branch3x3 = conv_bn_act(nn, inputs, width, 3, stride=2)
        self.branch3x3dbl = nn.Sequential(
            conv_bn_act(nn, inputs, 8), conv_bn_act(nn, 8, 12, 3), conv_bn_act(nn, 12, 12, 3, stride=2)
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.outputs = width + 12 + inputs

    def forward(self, x: Any) -> Any:
        return self.nn.concat([self.branch3x3(x), self.branch3x3dbl(x), self.pool(x)], 1)


class InceptionC(Part):
    """7x7 kernels as 1x7 and 7x1."""

    def __init__(self, inputs: int, width: int, inner: int) -> None:
        super().__init__()
        nn = self.nn
        self.branch1x1 = conv_bn_act(nn, inputs, width)
        sizes = ((inputs, inner, 1), (inner, inner, (1, 7)), (inner, width, (7, 1)))
        self.branch7x7 = nn.Sequential(*(conv_bn_act(nn, *size) for size in sizes))
        self.branch_pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_bn_act(nn, inputs, width))
        self.outputs = 3 * width

    def forward(self, x: Any) -> Any:
        return self.nn.concat([self.branch1x1(x), self.branch7x7(x), self.branch_pool(x)], 1)


class InceptionE(Part):
    """Branches that fork again into 1x3 and 3x1, joined inside the branch."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        nn = self.nn
        self.branch1x1 = conv_bn_act(nn, inputs, width)
        self.branch3x3_1 = conv_bn_act(nn, inputs, width)
        self.branch3x3_2a = conv_bn_act(nn, width, width, (1, 3))
        self.branch3x3_2b = conv_bn_act(nn, width, width, (3, 1))
        self.branch_pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_bn_act(nn, inputs, width))
        self.outputs = 4 * width

    def forward(self, x: Any) -> Any:
        forked = self.branch3x3_1(x)
        forked = self.nn.concat([self.branch3x3_2a(forked), self.branch3x3_2b(forked)], 1)
        return self.nn.concat([self.branch1x1(x), forked, self.branch_pool(x)], 1)


class InceptionV3(Part):
    """Modules A, B, C and E (Szegedy et al. 2016, arXiv 1512.00567)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        nn = self.nn
        self.stem = nn.Sequential(conv_bn_act(nn, 3, 8, 3, stride=2), conv_bn_act(nn, 8, 16, 3), nn.MaxPool2d(3, 2, 1))
        self.a = make(nn, InceptionA, 16, 8, 4)
        self.b = make(nn, InceptionB, self.a.outputs, 16)
        self.c = make(nn, InceptionC, self.b.outputs, 16, 12)
        self.e = make(nn, InceptionE, self.c.outputs, 16)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(self.e.outputs, classes)

    def forward(self, x: Any) -> Any:
        return self.fc(self.dropout(gap(self.nn, self.e(self.c(self.b(self.a(self.stem(x))))))))
