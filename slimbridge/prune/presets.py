"""The effective definition of a prune stage: its own words, then its preset's, then the importance's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

import numpy as np

from slimbridge.errors import SlimbridgeError, listed, nearest
from slimbridge.plan.pruning import PruneStage
from slimbridge.plan.registries import IMPORTANCES, Importance, Rows, as_importance
from slimbridge.ports import Array
from slimbridge.prune import importances as own


@dataclass(frozen=True)
class Theirs:
    """How a toolkit defines one importance.

    Attributes:
        importance: the criterion.
        rated: a word of `slimbridge.prune.coupled.RATED`.
    """

    importance: Importance
    rated: str


@dataclass(frozen=True)
class Preset:
    """The definitions of another toolkit. An importance that it does not have keeps ours.

    Attributes:
        count_rule: how many channels go.
        normalisation: of each group.
        group_reduction: over the rated parameters, a word of `slimbridge.prune.rate.REDUCTIONS`.
        importances: name -> definition.
        words: what words of the plan mean there.
    """

    count_rule: str
    normalisation: str | None = None
    group_reduction: str = "mean"
    importances: Mapping[str, Theirs] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)


def _first_power(rows: Rows) -> Array:
    return own.magnitude(rows, 1.0)


def _second_power(rows: Rows) -> Array:
    return own.magnitude(rows, 2.0)


def _distances_of_powers(rows: Rows, p: float = 2.0) -> Array:
    return np.asarray(own.distance_sums(own.powers(rows, p)))


PLAIN = Preset("round")
PADDLESLIM = Preset(
    count_rule="round",
    normalisation="none",
    group_reduction="master",
    importances={
        "l1_norm": Theirs(Importance(own.l1_norm), "producers"),
        "l2_norm": Theirs(Importance(own.l2_norm), "producers"),
        "fpgm": Theirs(Importance(own.fpgm), "producers"),
    },
)
"""PaddleSlim 2.6.0, dygraph/prune/{l1norm,l2norm,fpgm}_pruner.py: the group's first convolution decides."""
TORCH_PRUNING = Preset(
    count_rule="ceil_kept",
    normalisation="mean",
    group_reduction="tensors",
    importances={
        "l1_norm": Theirs(Importance(_first_power), "layers_and_norms"),
        "l2_norm": Theirs(Importance(_second_power), "layers_and_norms"),
        "magnitude": Theirs(Importance(own.magnitude), "layers_and_norms"),
        "lamp": Theirs(Importance(own.lamp, normalisation="lamp"), "layers_and_norms"),
        "fpgm": Theirs(Importance(_distances_of_powers), "layers"),
        "bn_scale": Theirs(Importance(own.bn_scale), "norms"),
        "taylor": Theirs(Importance(own.taylor, "gradients"), "layers_and_layer_norms"),
        "fisher": Theirs(Importance(own.fisher, "squared_gradients"), "layers_and_norms"),
    },
    words={"coupled": "layers_and_norms", "mean": "tensors", "master": "first"},
)
"""Torch-Pruning 1.6.1, pruner/importance.py with its defaults. Its Taylor importance looks for GroupNorm where its
comment says BatchNorm, and so leaves BatchNorm out; its p = 2 has no root; `fisher` is its Hessian importance."""
PRESETS: Mapping[str | None, Preset] = {None: PLAIN, "paddleslim": PADDLESLIM, "torch_pruning": TORCH_PRUNING}


@dataclass(frozen=True)
class Definition:
    """The effective definition of a stage after its preset.

    Attributes:
        importance: the criterion, with the preset's formula.
        name: of the importance, as in the plan.
        options: of the criterion.
        rated: which coupled axes count, a word of `slimbridge.prune.coupled.RATED`.
        group_reduction: a word of `slimbridge.prune.rate.REDUCTIONS`.
        normalisation: a word of the plan, or "total".
        count_rule, selection, round_to, min_channels, max_ratio: see `PruneStage`.
        seed: of importances that draw.
    """

    importance: Importance
    name: str
    options: Mapping[str, Any]
    rated: str
    group_reduction: str
    normalisation: str
    count_rule: str
    selection: str
    round_to: int
    min_channels: int
    max_ratio: float | None
    seed: int

    @classmethod
    def of(cls, stage: PruneStage, seed: int = 0) -> Definition:
        """The definition of a stage.

        Raises:
            SlimbridgeError: an option that the importance does not have, lacks or cannot take; activations are to be
                rated over other parameters than those of the layers that make them.
        """
        preset = PRESETS[stage.preset]
        theirs = preset.importances.get(stage.importance)
        importance = theirs.importance if theirs else as_importance(IMPORTANCES.get(stage.importance))
        rated = _there(preset, stage.rated) or (theirs.rated if theirs else importance.rated)
        if importance.needs == "activations" and rated != "producers":
            raise SlimbridgeError(
                f"rated: found {rated}; importance '{stage.importance}' rates what the producers give: 'producers' only"
            )
        reduction = _there(preset, stage.group_reduction)
        competing = "mean" if stage.selection in ("global", "isomorphic") else "none"
        return cls(
            importance=importance,
            name=stage.importance,
            options=checked_options(stage.importance, importance, stage.importance_options),
            rated=rated,
            group_reduction=reduction or (preset.group_reduction if theirs else importance.group_reduction),
            normalisation=stage.normalisation or importance.normalisation or preset.normalisation or competing,
            count_rule=stage.count_rule or preset.count_rule,
            selection=stage.selection,
            round_to=stage.round_to,
            min_channels=stage.min_channels,
            max_ratio=stage.max_ratio,
            seed=seed,
        )


def _there(preset: Preset, word: str | None) -> str | None:
    return None if word is None else preset.words.get(word, word)


def checked_options(name: str, importance: Importance, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, whole numbers made floats where the importance takes floats; SlimbridgeError names a wrong one."""
    known = {key: value for key, value in list(signature(importance.score).parameters.items())[1:]}
    found = {}
    for key, value in options.items():
        if key not in known:
            raise SlimbridgeError(
                f"importance_options: '{key}' is no option of importance '{name}'{nearest(key, known)}; "
                f"it has: {listed(known)}"
            )
        found[key] = _fitting(name, key, value, known[key].default)
    for key, parameter in known.items():
        if parameter.default is Parameter.empty and key not in found:
            raise SlimbridgeError(f"importance_options: importance '{name}' needs '{key}'")
    return found


def _fitting(name: str, key: str, value: Any, default: Any) -> Any:
    if default is Parameter.empty or default is None:
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise SlimbridgeError(
            f"importance_options.{key}: found {value!r}, a {type(value).__name__}; "
            f"importance '{name}' takes a {type(default).__name__}"
        )
    return value
