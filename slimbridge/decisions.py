"""Decisions: what an algorithm decided, frozen and serialisable, so that another framework can apply it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from slimbridge.errors import RunError


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    def digest(self) -> str:
        """SHA-256 over the canonical JSON, 64 hex digits: equal decisions have equal digests."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class Skipped(_Frozen):
    """A layer that was left alone, and why."""

    layer: str
    reason: str


class GroupChoice(_Frozen):
    """What was chosen in one channel group.

    Attributes:
        layers: the convolution and linear layers whose outputs share the group, in graph order.
        channels: units in the group before.
        removed: positions of the removed units, ascending.
    """

    layers: tuple[str, ...]
    channels: int
    removed: tuple[int, ...]


class PruneDecision(_Frozen):
    """Which channels go.

    Attributes:
        importance: the criterion's name, or the toolkit's pruner.
        pruning_ratio: share that was asked for or, with a target, that reached it; 0..1.
        groups: the choices, one for each group that was considered.
        kept: parameter or buffer -> axis -> indices that stay, ascending, canonical layout; only those that change.
        sizes: parameter or buffer -> canonical shape before, for each name in `kept`.
        heads: layer path -> attention heads before and after, for layers that lose heads.
        skipped: layers left alone, with the reason.
        exact: removing equals zeroing; False where a LayerNorm's channels were removed on demand.
    """

    kind: Literal["prune"] = "prune"
    importance: str
    pruning_ratio: float
    groups: tuple[GroupChoice, ...]
    kept: dict[str, dict[int, tuple[int, ...]]]
    sizes: dict[str, tuple[int, ...]]
    heads: dict[str, tuple[int, int]] = {}
    skipped: tuple[Skipped, ...] = ()
    exact: bool = True


class Mask(_Frozen):
    """Which entries of one parameter stay.

    Attributes:
        shape: canonical shape.
        bits: base64 of the entries as bits, 1 = stays, in C order, eight to a byte, the first in the highest bit.
    """

    shape: tuple[int, ...]
    bits: str

    @classmethod
    def of(cls, keep: NDArray[np.bool_]) -> Mask:
        """From a boolean array, True = stays."""
        packed = np.packbits(np.asarray(keep, dtype=bool).ravel())
        return cls(shape=tuple(keep.shape), bits=base64.b64encode(packed.tobytes()).decode("ascii"))

    def array(self) -> NDArray[np.bool_]:
        """The boolean array, True = stays; RunError when the bits are damaged."""
        size = int(np.prod(self.shape, dtype=np.int64))
        try:
            packed = np.frombuffer(base64.b64decode(self.bits, validate=True), np.uint8)
        except ValueError as error:
            raise RunError(f"a mask's bits are damaged: {error}") from error
        if packed.size != (size + 7) // 8:
            raise RunError(f"a mask of shape {self.shape} has {packed.size} bytes, {(size + 7) // 8} are needed")
        return np.unpackbits(packed, count=size).astype(bool).reshape(self.shape)


class MaskDecision(_Frozen):
    """Which entries of the weights are zero from now on; no parameter changes its shape.

    Attributes:
        importance: the criterion's name, or the toolkit's pruner.
        pattern: "unstructured", "block MxN", "N:M" or "filters".
        sparsity: share of zeros that was asked for, 0..1.
        masks: parameter -> mask, for each parameter that was considered.
        skipped: layers left alone, with the reason.
    """

    kind: Literal["mask"] = "mask"
    importance: str
    pattern: str
    sparsity: float
    masks: dict[str, Mask]
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, order=True)
class Site:
    """A tensor of a model, named by a layer that is given it or that gives it.

    As text, the key of a decision: "conv1" is the first input of each call, "conv1:output" its output,
    "block.relu:output#1" the output of its second call in a pass, "add:input.1" its second input,
    "conv1:weight" the weight.

    Attributes:
        path: module path.
        side: "input" and "output" of the layer's call, or "weight", the layer's own.
        argument: which of the tensors among the call's inputs or outputs, flattened, from 0.
        call: number of the layer's call within one forward pass, from 0; None for each.
    """

    path: str
    side: Literal["input", "output", "weight"] = "input"
    argument: int = 0
    call: int | None = None

    def __str__(self) -> str:
        """The key."""
        if self == Site(self.path):
            return self.path
        argument = f".{self.argument}" if self.argument else ""
        call = f"#{self.call}" if self.call is not None else ""
        return f"{self.path}:{self.side}{argument}{call}"

    def held(self, name: str) -> str:
        """What a layer calls a parameter or buffer of this site's fake quantization: "quant_input_step"."""
        call = f"_{self.call}" if self.call is not None else ""
        return f"quant_{self.side}{self.argument or ''}{call}_{name}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """From the key; RunError when it is none."""
        match = _SITE.fullmatch(text)
        if match is None:
            raise RunError(f"'{text}' names no tensor; allowed: '<layer>', '<layer>:output', '<layer>:input.1#0'")
        path, side, argument, call = match.groups()
        sides: dict[str | None, Literal["input", "output", "weight"]] = {"output": "output", "weight": "weight"}
        return cls(path, sides.get(side, "input"), int(argument or 0), None if call is None else int(call))


_SITE = re.compile(r"([^:#]*)(?::(input|output|weight)(?:\.(\d+))?(?:#(\d+))?)?")


class QuantParams(_Frozen):
    """The integer grid of one tensor: real = step * (integer - zero_point).

    Attributes:
        step: real units per integer; one number, or one for each index of `axis`, or one for each group.
        zero_point: the integer that stands for 0; one number, or as many as steps.
        low, high: smallest and largest integer used.
        axis: the channel axis of `step`, None for per tensor.
        group: entries of one row of `axis` 0, flattened, that share a step: steps are then ordered by row, by group.
        rounding: of halves, "even" or "away" from zero.
    """

    step: tuple[float, ...]
    zero_point: tuple[int, ...] = (0,)
    low: int
    high: int
    axis: int | None = None
    group: int | None = None
    rounding: Literal["even", "away"] = "even"


class DynamicGrid(_Frozen):
    """A grid whose step is computed from each tensor as it comes.

    Attributes:
        low, high: smallest and largest integer.
        symmetric: the step comes from the largest magnitude, else from the smallest and largest value.
    """

    low: int
    high: int
    symmetric: bool


class Fold(_Frozen):
    """A BatchNorm that went into the weights of the convolution or linear layer before it.

    Its parameters stay, as those of a BatchNorm that only adds a bias: scale 1, mean 0, variance 1 - eps.

    Attributes:
        weight, bias: canonical names of the layer's own; the bias becomes 0.
        scale, shift, mean, variance: canonical names of the BatchNorm's.
        eps: what it adds to the variance.
    """

    weight: str
    bias: str | None = None
    scale: str
    shift: str
    mean: str
    variance: str
    eps: float


class QuantizeDecision(_Frozen):
    """The grids of a model.

    Attributes:
        observer: how activation ranges were found.
        mode: "static", "dynamic" (activations' steps at run time) or "weight_only".
        weights: canonical parameter name -> grid, of the weight with its BatchNorm folded in.
        activations: key of a `Site` -> grid; empty unless static.
        dynamic: key of a `Site` -> grid; empty unless dynamic.
        folds: in the order of the graph; they come before the grids of the weights.
        skipped: layers and tensors left in float, with the reason.
    """

    kind: Literal["quantize"] = "quantize"
    observer: str
    mode: Literal["static", "dynamic", "weight_only"] = "static"
    weights: dict[str, QuantParams]
    activations: dict[str, QuantParams] = {}
    dynamic: dict[str, DynamicGrid] = {}
    folds: tuple[Fold, ...] = ()
    skipped: tuple[Skipped, ...] = ()


class LossTerm(_Frozen):
    """One term of a training loss.

    Attributes:
        loss: the registered loss's name.
        weight: factor of the term.
        temperature: softening of logits, for the losses that take it.
        student, teacher: layer paths, for losses on features.
        shape: shape of the student's feature without the batch axis.
    """

    loss: str
    weight: float
    temperature: float | None = None
    student: str | None = None
    teacher: str | None = None
    shape: tuple[int, ...] | None = None


class DistillDecision(_Frozen):
    """The resolved loss of a distillation: its terms, and the digest of the teacher's weights."""

    kind: Literal["distill"] = "distill"
    teacher: str
    teacher_digest: str
    terms: tuple[LossTerm, ...]


Decision: TypeAlias = PruneDecision | MaskDecision | QuantizeDecision | DistillDecision
_ADAPTER: TypeAdapter[Decision] = TypeAdapter(Annotated[Decision, Field(discriminator="kind")])


def decision_to_json(decision: Decision) -> str:
    """JSON text, one key a line, floats written so that they read back equal."""
    return decision.model_dump_json(indent=1)


def load_decision(path: Path) -> Decision:
    """Read a decision's file.

    Raises:
        RunError: the file is missing, truncated or not a decision.
    """
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(f"{path}: not a decision file: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
