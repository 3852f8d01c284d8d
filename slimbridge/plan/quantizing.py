"""The quantize stage of a plan."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimbridge.plan.base import ObserverName, Options, Positive, Section, TrainSection

Bits = Annotated[int, Field(ge=2, le=8)]
Share = Annotated[float, Field(ge=0, le=1)]
Scheme = Literal["symmetric", "asymmetric"]
EndLayer = Literal["same", "8bit", "float"]


class QatSection(Section):
    """Quantization-aware training: the model learns under fake quantization, straight through it.

    Attributes:
        train: how to train, on the task's own loss.
        activation_ranges: "moving_average" of each batch's extremes, or learned with the weights: "lsq", "lsq_plus"
            (an offset too, for asymmetric activations), "pact" (the threshold).
        weight_ranges: "absmax" of the weights as they are at each step, or learned: "lsq".
        rate: share of the old value that a moving average keeps.
        batch_norm: "keep" quantizes the convolution's own weight; "fold" its weight times the scale of the BatchNorm
            behind it, as it will be deployed. With a step for each channel both give the same integers.
        freeze_batch_norm_after: share of the training after which BatchNorm statistics stay as they are; 1 is never.
        freeze_ranges_after: share of the training after which all ranges stay as they are; 1 is never.
    """

    train: TrainSection
    activation_ranges: Literal["moving_average", "lsq", "lsq_plus", "pact"] = "moving_average"
    weight_ranges: Literal["absmax", "lsq"] = "absmax"
    rate: Annotated[float, Field(ge=0, lt=1)] = 0.9
    batch_norm: Literal["keep", "fold"] = "keep"
    freeze_batch_norm_after: Share = 0.5
    freeze_ranges_after: Share = 0.75


class NativeQuantizeSection(Section):
    """Another toolkit's quantizer, for `engine: native`.

    Attributes:
        quantizer: "<toolkit>.<quantizer>" as `slimbridge backends` lists them.
        options: the toolkit's own, by its own names.
    """

    quantizer: str
    options: Options = {}


class QuantizeStage(Section):
    """Put convolutions and linear layers, and what lies between them, on integer grids.

    Attributes:
        kind: "quantize".
        mode: "static" (steps of activations fixed by calibration or training), "dynamic" (linear layers, steps of
            their inputs at run time) or "weight_only".
        engine: "own" or "native".
        native: whose quantizer, for `engine: native`.
        definition: whose conventions of step, rounding and clipping: "own", or the frameworks': "paddle", "torch".
        weight_bits, activation_bits: word length, 2 to 8. Exported files compute with 8.
        weight_scheme, activation_scheme: "symmetric" (0 in the middle; activations that are never negative take the
            unsigned half) or "asymmetric" (from the smallest to the largest value).
        weight_granularity: a step for each output "channel", one for the "tensor", or one for each "group".
        group_size: weights that share a step, for granularity "group".
        placement: "layer" (inputs of convolutions and linear layers) or "full" (also residual adds, products, pools,
            concatenations and activations in between, as a deployment engine computes them).
        fold_batch_norm: put each BatchNorm into the weights before it first, as every deployment does.
        ignored_layers: layer paths or patterns (fnmatch) that stay in float.
        first_layer, last_layer: "same" as the others, "8bit" or "float".
        observer: how activation ranges are found over the calibration batches, a registered name.
        observer_options: options of the observer.
        calibration_batches, calibration_batch_size: taken from the training data.
        qat: train under fake quantization; None is post-training quantization.
    """

    kind: Literal["quantize"] = "quantize"
    mode: Literal["static", "dynamic", "weight_only"] = "static"
    engine: Literal["own", "native"] = "own"
    native: NativeQuantizeSection | None = None
    definition: Literal["own", "paddle", "torch"] = "own"
    weight_bits: Bits = 8
    activation_bits: Bits = 8
    weight_scheme: Scheme = "symmetric"
    activation_scheme: Scheme = "symmetric"
    weight_granularity: Literal["channel", "tensor", "group"] = "channel"
    group_size: Positive | None = None
    placement: Literal["layer", "full"] = "full"
    fold_batch_norm: bool = True
    ignored_layers: tuple[str, ...] = Field(default=(), strict=False)
    first_layer: EndLayer = "same"
    last_layer: EndLayer = "same"
    observer: ObserverName = "moving_average"
    observer_options: Options = {}
    calibration_batches: Positive = 8
    calibration_batch_size: Positive = 32
    qat: QatSection | None = None

    @model_validator(mode="after")
    def _fits(self) -> QuantizeStage:
        wrong = next((text for applies, text in _misfits(self) if applies), None)
        if wrong is not None:
            raise ValueError(wrong)
        return self


def _misfits(stage: QuantizeStage) -> tuple[tuple[bool, str], ...]:
    """What does not go together, and what to say of it."""
    grouped = stage.weight_granularity == "group"
    own = _set(stage, _OWN_ONLY)
    idle = _set(stage, _UNUSED[stage.mode])
    return (
        (bool(idle), f"mode {stage.mode} does not look at {', '.join(idle)}: leave it out"),
        ((stage.engine == "native") != (stage.native is not None), "engine native and a section 'native' go together"),
        (stage.engine == "native" and stage.mode != "static", "engine native is for mode static"),
        (stage.engine == "native" and bool(own), f"engine native decides by its own rules: leave out {', '.join(own)}"),
        (grouped != (stage.group_size is not None), "weight_granularity group and group_size go together"),
        (
            grouped and stage.qat is not None and stage.qat.weight_ranges != "absmax",
            "weight_granularity group is trained with weight_ranges absmax only",
        ),
        (
            stage.qat is not None and stage.qat.batch_norm == "fold" and not stage.fold_batch_norm,
            "qat with batch_norm fold and fold_batch_norm false contradict each other",
        ),
        (stage.qat is not None and stage.mode != "static", f"qat is for mode static, found {stage.mode}"),
        (
            stage.definition in _SYMMETRIC and "asymmetric" in (stage.weight_scheme, stage.activation_scheme),
            f"definition {stage.definition} is symmetric only: Paddle 3.3's quanter ignores the zero point",
        ),
        (
            stage.qat is not None and stage.definition != "own",
            "qat trains under definition own; the frameworks' definitions are for post-training quantization",
        ),
        (
            stage.qat is not None and stage.weight_scheme == "asymmetric",
            "qat trains symmetric weights; weight_scheme asymmetric is for post-training quantization",
        ),
        (
            stage.qat is not None
            and stage.activation_scheme == "asymmetric"
            and stage.qat.activation_ranges in ("lsq", "pact"),
            "activation_ranges lsq and pact are symmetric; allowed with activation_scheme asymmetric: "
            "moving_average, lsq_plus",
        ),
        (
            stage.qat is not None
            and stage.activation_scheme == "symmetric"
            and stage.qat.activation_ranges == "lsq_plus",
            "activation_ranges lsq_plus learns an offset: it needs activation_scheme asymmetric",
        ),
    )


def _set(stage: QuantizeStage, names: tuple[str, ...]) -> list[str]:
    """Those of the names that are not at their default."""
    fields = type(stage).model_fields
    return [name for name in names if getattr(stage, name) != fields[name].default]


_CALIBRATED = ("placement", "observer", "observer_options", "calibration_batches", "calibration_batch_size")
_UNUSED = {
    "static": (),
    "dynamic": _CALIBRATED,
    "weight_only": (*_CALIBRATED, "activation_bits", "activation_scheme"),
}
_SYMMETRIC = ("paddle",)
_OWN_ONLY = (
    "definition",
    "weight_scheme",
    "activation_scheme",
    "weight_granularity",
    "group_size",
    "placement",
    "fold_batch_norm",
    "first_layer",
    "last_layer",
    "observer",
    "observer_options",
    "qat",
)
