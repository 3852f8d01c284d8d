"""ViT, with separate and with fused projections, and Swin."""

from __future__ import annotations

from typing import Any

from tests.architectures.parts import Part, make, seeded


class Attention(Part):
    """Self-attention with a linear layer each for queries, keys and values (Vaswani et al. 2017, equation 1)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        nn = self.nn
        self.num_heads = heads
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Any) -> Any:
        nn = self.nn
        n, tokens = x.shape[0], x.shape[1]
        parts = (nn.reshape(layer(x), (n, tokens, self.num_heads, -1)) for layer in (self.q, self.k, self.v))
        q, k, v = (nn.transpose(part, (0, 2, 1, 3)) for part in parts)
        weights = nn.softmax(nn.matmul(q, nn.transpose(k, (0, 1, 3, 2))) * self.scale, -1)
        mixed = nn.transpose(nn.matmul(weights, v), (0, 2, 1, 3))
        return self.proj(nn.reshape(mixed, (n, tokens, -1)))


class FusedAttention(Part):
    """The same with one linear layer for all three, and an optional learned bias for each pair of tokens."""

    def __init__(self, dim: int, heads: int, tokens: int = 0) -> None:
        super().__init__()
        nn = self.nn
        self.num_heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = nn.parameter(seeded("bias", (1, heads, tokens, tokens))) if tokens else None

    def forward(self, x: Any) -> Any:
        nn = self.nn
        n, tokens = x.shape[0], x.shape[1]
        qkv = nn.transpose(nn.reshape(self.qkv(x), (n, tokens, 3, self.num_heads, -1)), (2, 0, 3, 1, 4))
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = nn.matmul(q, nn.transpose(k, (0, 1, 3, 2))) * self.scale
        weights = nn.softmax(scores if self.bias is None else scores + self.bias, -1)
        mixed = nn.transpose(nn.matmul(weights, v), (0, 2, 1, 3))
        return self.proj(nn.reshape(mixed, (n, tokens, -1)))


class Encoder(Part):
    """Attention and a two-layer perceptron, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, dim: int, attention: Any) -> None:
        super().__init__()
        nn = self.nn
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Any) -> Any:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class ViT(Part):
    """Patches, a class token, a position embedding, encoders (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

    def __init__(self, attention: type[Part], dim: int = 24, heads: int = 4, depth: int = 2, image: int = 32) -> None:
        super().__init__()
        nn = self.nn
        tokens = (image // 8) ** 2
        self.patch_embed = nn.Conv2d(3, dim, 8, stride=8)
        self.cls_token = nn.parameter(seeded("cls", (1, 1, dim)))
        self.pos_embed = nn.parameter(seeded("pos", (1, tokens + 1, dim)))
        self.blocks = nn.Sequential(*(make(nn, Encoder, dim, make(nn, attention, dim, heads)) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Any) -> Any:
        nn = self.nn
        x = nn.transpose(nn.flatten(self.patch_embed(x), 2), (0, 2, 1))
        token = nn.concat([self.cls_token] * x.shape[0], 0)
        x = self.blocks(nn.concat([token, x], 1) + self.pos_embed)
        return self.head(self.norm(x)[:, 0])


def vit(nn: Any) -> Any:
    """With separate projections."""
    return make(nn, ViT, Attention)


def vit_fused(nn: Any) -> Any:
    """With one projection for queries, keys and values."""
    return make(nn, ViT, FusedAttention)


def rolled(nn: Any, x: Any, shift: int) -> Any:
    """Axes 1 and 2 rotated so that entry `shift` comes first."""
    for axis in (1, 2):
        head, tail = nn.split(x, [shift, x.shape[axis] - shift], axis)
        x = nn.concat([tail, head], axis)
    return x


class SwinBlock(Part):
    """An encoder over windows of a (N, H, W, C) map; the shifted one rotates the map and back."""

    def __init__(self, dim: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        attention = make(self.nn, FusedAttention, dim, heads, window * window)
        self.encoder = make(self.nn, Encoder, dim, attention)

    def forward(self, x: Any) -> Any:
        nn, w = self.nn, self.window
        encoder = self.encoder
        y = encoder.norm1(x)
        n, height, width, c = y.shape
        y = rolled(nn, y, self.shift) if self.shift else y
        y = nn.transpose(nn.reshape(y, (n, height // w, w, width // w, w, c)), (0, 1, 3, 2, 4, 5))
        y = encoder.attn(nn.reshape(y, (-1, w * w, c)))
        y = nn.transpose(nn.reshape(y, (n, height // w, width // w, w, w, c)), (0, 1, 3, 2, 4, 5))
        y = nn.reshape(y, (n, height, width, c))
        x = x + (rolled(nn, y, height - self.shift) if self.shift else y)
        return x + encoder.fc2(encoder.act(encoder.fc1(encoder.norm2(x))))


class PatchMerging(Part):
    """Four neighbours joined along the channels, normalised, and projected to twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = self.nn.LayerNorm(4 * dim)
        self.reduction = self.nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Any) -> Any:
        places = ((0, 0), (1, 0), (0, 1), (1, 1))
        x = self.nn.concat([x[:, i::2, j::2, :] for i, j in places], 3)
        return self.reduction(self.norm(x))


class Swin(Part):
    """Two stages of plain and shifted windows (Liu et al. 2021, arXiv 2103.14030)."""

    def __init__(self, dim: int = 16, heads: int = 4, window: int = 4) -> None:
        super().__init__()
        nn = self.nn
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.patch_norm = nn.LayerNorm(dim)
        self.stages = nn.Sequential(
            make(nn, SwinBlock, dim, heads, window, 0),
            make(nn, SwinBlock, dim, heads, window, window // 2),
            make(nn, PatchMerging, dim),
            make(nn, SwinBlock, 2 * dim, heads, window, 0),
        )
        self.norm = nn.LayerNorm(2 * dim)
        self.head = nn.Linear(2 * dim, 10)

    def forward(self, x: Any) -> Any:
        x = self.nn.transpose(self.patch_embed(x), (0, 2, 3, 1))
        x = self.norm(self.stages(self.patch_norm(x)))
        return self.head(self.nn.mean(x, (1, 2)))
