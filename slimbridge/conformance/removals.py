"""Cases on removals that are written by hand: transposed convolutions, groups of a GroupNorm, attention heads."""

from __future__ import annotations

from typing import Any

from slimbridge.conformance.models import output, random
from slimbridge.conformance.suite import Bench, case, refuses, within
from slimbridge.decisions import PruneDecision
from slimbridge.parity.measure import relative
from slimbridge.ports import Model
from slimbridge.prune import zeroed
from slimbridge.zoo.parts import Part, make

TOKENS, WIDTH, HEADS = 5, 16, 4


class Attention(Part):
    """Self-attention over tokens with a layer each for queries, keys and values, or one for all three."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.head_dim = WIDTH // HEADS  # the same number, and no number of heads
        self.fused = fused
        if fused:
            self.qkv = self.nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (self.nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.project = self.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        """(N, TOKENS, WIDTH) -> the same shape."""
        nn = self.nn
        q, k, v = self._parts(x)
        weights = nn.softmax(nn.matmul(q, nn.transpose(k, (0, 1, 3, 2))) * self.head_dim**-0.5, 3)
        mixed = nn.transpose(nn.matmul(weights, v), (0, 2, 1, 3))
        return self.project(nn.reshape(mixed, (x.shape[0], TOKENS, -1)))

    def _parts(self, x: Any) -> tuple[Any, ...]:
        nn, shape = self.nn, (x.shape[0], TOKENS, self.num_heads, -1)
        if not self.fused:
            cut = (nn.reshape(layer(x), shape) for layer in (self.q, self.k, self.v))
            return tuple(nn.transpose(part, (0, 2, 1, 3)) for part in cut)
        parts = nn.reshape(self.qkv(x), (*shape[:2], 3, *shape[2:]))
        split = nn.split(nn.transpose(parts, (2, 0, 3, 1, 4)), [1, 1, 1], 0)
        return tuple(nn.reshape(part, (x.shape[0], self.num_heads, TOKENS, -1)) for part in split)


def filled(bench: Bench, model: Model) -> Model:
    """The model placed, with normal weights that are equal on every backend."""
    model = bench.backend.place(model, bench.device)
    shapes = {name: array.shape for name, array in bench.backend.read(model).items()}
    values = {name: random(*shape, seed=index) for index, (name, shape) in enumerate(sorted(shapes.items()))}
    return bench.backend.write(model, values)


def removal(bench: Bench, model: Model, kept: dict[str, dict[int, tuple[int, ...]]], **more: Any) -> PruneDecision:
    """A decision that keeps these entries."""
    sizes = {name: array.shape for name, array in bench.backend.read(model).items() if name in kept}
    return PruneDecision(importance="l1", pruning_ratio=0.5, groups=(), kept=kept, sizes=sizes, **more)


def equals_zeroing(bench: Bench, what: str, model: Model, decision: PruneDecision, x: Any) -> None:
    """Fail unless the pruned model gives what the whole one gives with the removed entries at 0."""
    backend = bench.backend
    silent = backend.write(backend.clone(model), zeroed(backend.read(model), decision))
    pruned = backend.remove_channels(backend.clone(model), decision)
    within(what, relative(output(bench, pruned, x), output(bench, silent, x)), "removal")


@case("surgery: a transposed convolution loses inputs and outputs")
def transposed(bench: Bench) -> None:
    """Weights (in, out / groups, ...): inputs go on axis 0, outputs on axis 1; one group, two groups, depthwise."""
    nn = bench.backend.nn
    entries: dict[int, tuple[Any, ...]] = {
        1: ((0, 3), (1, 2, 4), (1, 2, 4)),
        2: ((0, 3), (0, 2), (0, 2, 3, 5)),
        4: ((0, 3), None, (0, 1, 6, 7)),
    }
    for groups, (inputs, rows, outputs) in entries.items():
        width = 8 if groups == 4 else 6
        layers = (nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, width, 3, stride=2, groups=groups), nn.Conv2d(width, 2, 1))
        model = filled(bench, nn.Sequential(*layers))
        axes = {0: inputs} if rows is None else {0: inputs, 1: rows}
        kept: dict[str, dict[int, tuple[int, ...]]] = {"0.weight": {0: inputs}, "0.bias": {0: inputs}, "1.weight": axes}
        kept |= {"1.bias": {0: outputs}, "2.weight": {1: outputs}}
        equals_zeroing(bench, f"groups={groups}", model, removal(bench, model, kept), random(2, 3, 4, 4))


@case("surgery: a GroupNorm loses whole groups")
def group_norm(bench: Bench) -> None:
    """Its number of groups shrinks as its channels do; a part of a group is refused."""
    nn = bench.backend.nn
    model = filled(bench, nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 2, 1)))

    def keeping(stays: tuple[int, ...]) -> PruneDecision:
        vectors = {name: {0: stays} for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
        return removal(bench, model, {**vectors, "3.weight": {1: stays}})

    equals_zeroing(bench, "two of four groups", model, keeping((0, 1, 6, 7)), random(2, 3, 4, 4))
    part = keeping((0, 1, 2, 6, 7))
    refuses("a part of a group", lambda: bench.backend.remove_channels(bench.backend.clone(model), part))


@case("surgery: attention loses whole heads, and knows their number")
def heads(bench: Bench) -> None:
    """Queries, keys and values in three layers and in one; a layer without such a number is refused."""
    backend = bench.backend
    for fused in (False, True):
        part = make(backend.nn, Attention, fused)
        model = filled(bench, backend.nn.Sequential(part))
        size = WIDTH // HEADS
        rows = tuple(head * size + i for head in (1, 3) for i in range(size))
        if fused:
            cut = tuple(block * WIDTH + row for block in range(3) for row in rows)
            kept = {"0.qkv.weight": {0: cut}, "0.qkv.bias": {0: cut}}
        else:
            kept = {f"0.{layer}.{role}": {0: rows} for layer in "qkv" for role in ("weight", "bias")}
        decision = removal(bench, model, {**kept, "0.project.weight": {1: rows}}, heads={"0": (HEADS, 2)})
        equals_zeroing(bench, "one layer" if fused else "three layers", model, decision, random(2, TOKENS, WIDTH))
    wrong = decision.model_copy(update={"heads": {"0": (HEADS + 1, 2)}})
    refuses("a number that no attribute holds", lambda: backend.remove_channels(backend.clone(model), wrong))
