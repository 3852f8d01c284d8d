"""Decisions: what an algorithm decided, frozen and serialisable, so that another framework can apply it."""

from __future__ import annotations

import base64
import hashlib
import json
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


class QuantParams(_Frozen):
    """The integer grid of one tensor: real = step * (integer - zero_point).

    Attributes:
        step: real units per integer; one number, or one for each index of `axis`.
        zero_point: the integer that stands for 0.
        low, high: smallest and largest integer used.
        axis: the channel axis of `step`, None for per tensor.
    """

    step: tuple[float, ...]
    zero_point: int = 0
    low: int
    high: int
    axis: int | None = None


class QuantizeDecision(_Frozen):
    """The grids of a model.

    Attributes:
        observer: how activation thresholds were collected.
        weights: canonical parameter name -> grid.
        activations: layer path -> grid of that layer's first input.
        skipped: layers left in float, with the reason.
    """

    kind: Literal["quantize"] = "quantize"
    observer: str
    weights: dict[str, QuantParams]
    activations: dict[str, QuantParams]
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
