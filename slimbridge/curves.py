"""Sensitivity curves: what the metric is when one channel group alone is pruned, at several ratios."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class GroupCurve(_Frozen):
    """The curve of one channel group.

    Attributes:
        layers: the convolution and linear layers whose outputs share the group, in graph order.
        channels: units in the group.
        points: pruning ratio, 0..1 -> the metric with that share of this group's channels gone, all others there.
    """

    layers: tuple[str, ...]
    channels: int
    points: dict[float, float]


class Sensitivity(_Frozen):
    """The curves of a model.

    Attributes:
        importance: the criterion that ordered the channels.
        metric: of the unpruned model.
        samples: test samples that the metric was taken over.
        weights_digest: of the model that was measured.
        definition: digest of what else the curves depend on: the criterion's options, how many of n channels a ratio
            means, the metric.
        curves: one for each group, in graph order.
    """

    importance: str
    metric: float
    samples: int
    weights_digest: str
    definition: str
    curves: tuple[GroupCurve, ...]
