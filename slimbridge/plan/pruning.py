"""The stages that prune: removal of channels, and masks over single weights."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimbridge.plan.base import EntryImportanceName, ImportanceName, Options, Positive, Section, TrainSection

Share = Annotated[float, Field(gt=0, lt=1)]
Patterns = Annotated[tuple[str, ...], Field(strict=False)]


class TargetSection(Section):
    """What pruning must save, in place of a ratio: the one ratio that reaches it is searched for.

    Attributes:
        of: parameters, macs, or latency (median of one sample's forward pass).
        runtime: that latency is measured in: eager, the framework as it is.
        remove: share of it to remove, 0..1, against the model before the stage (with steps, as the run began).
    """

    of: Literal["parameters", "macs", "latency"]
    runtime: Literal["eager"] = "eager"
    remove: Share


class SensitivitySection(Section):
    """Gives each channel group a ratio of its own, from what the metric loses when that group alone is pruned.

    Attributes:
        ratios: those that are tried, ascending.
        max_loss: each group gets the largest ratio that loses no more than this share of the metric, interpolated;
            None searches the loss that reaches the stage's target.
        samples: test samples that the metric is taken over; None takes all.
    """

    ratios: Annotated[tuple[Share, ...], Field(strict=False, min_length=1)] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    max_loss: Annotated[float, Field(ge=0, lt=1)] | None = None
    samples: Positive | None = None

    @model_validator(mode="after")
    def _ascending(self) -> SensitivitySection:
        if any(a >= b for a, b in pairwise(self.ratios)):
            raise ValueError("ratios must be ascending")
        return self


class PreparationSection(Section):
    """Training before channels are removed that makes some of them unimportant.

    Attributes:
        method: soft (zero the least important filters before each epoch and let them grow again), group_lasso,
            bn_slimming (L1 on BatchNorm scales), or growing (an L2 penalty that grows on the channels that will go).
        strength: factor of the penalty; not used by soft.
        train: how to train.
    """

    method: Literal["soft", "group_lasso", "bn_slimming", "growing"]
    strength: Annotated[float, Field(gt=0, le=1000)] = 0.0001
    train: TrainSection


class NativeSection(Section):
    """Another toolkit's pruner, for `engine: native`.

    Attributes:
        pruner: its name, "<toolkit>.<pruner>"; `slimbridge backends` lists those of each framework.
        options: its own options, by its own names.
    """

    pruner: str
    options: Options = {}


class PruneStage(Section):
    """Remove output channels of convolutions and linear layers, the least important first, in each channel group.

    Attributes:
        kind: "prune".
        engine: own, or native: another toolkit chooses, and its choice is checked; it takes pruning_ratio, layer_ratios
            and ignored_layers.
        native: which one.
        preset: takes rated, group_reduction, normalisation and count_rule, and what an importance means, from another
            toolkit: paddleslim or torch_pruning; what the plan writes itself wins.
        granularity: channels, or heads: whole attention heads, and nothing else.
        importance: criterion, a registered name.
        importance_options: options of the criterion.
        rated: which coupled parameters count: producers (weights that make the channels), coupled (also normalisations
            and the weights that read them), norms (BatchNorm scales); None is the criterion's own.
        group_reduction: over the rated parameters of a channel: master (the one that is defined first, alone), mean,
            sum or max; None is the criterion's own.
        normalisation: of the importances of a group: none, mean (divided by it), max, sum, standard (to 0..1),
            gaussian (mean 0, deviation 1) or lamp; None is mean where groups compete with each other, else none.
        selection: local (each group by itself), global (all groups together), or isomorphic (groups of equal shape
            together).
        pruning_ratio: share of the channels to remove.
        layer_ratios: layer path or pattern (fnmatch) -> share, in place of pruning_ratio; alone: only those layers.
        target: what must be saved, in place of pruning_ratio.
        sensitivity: ratios from sensitivity curves, in place of pruning_ratio.
        count_rule: how many of n go: round (min(n - 1, round(n * ratio)), half to even) or ceil_kept (ratio's share of
            n stays, rounded down); None is the preset's, else round.
        round_to: the number of channels that stay in a group is made a multiple of this, upwards (layers of unlike
            width that share a group, by a join that is added to others, may still end with other numbers).
        min_channels: that stay in each group.
        max_ratio: most that a group may lose, where groups compete; None sets no limit.
        layer_norm: keep the channels that a LayerNorm normalises, or prune them: removal is then not zeroing.
        steps: 1, or the number of rounds of pruning and finetuning that lead to the ratio; they run, and are counted,
            as that many stages.
        relative_to: the ratio counts channels as the stage finds them (current), as the run began (initial), or as they
            were after the stage of that number (0 is the baseline).
        ignored_layers: layer paths or patterns (fnmatch) whose output channels stay.
        ignored_kinds: kinds of layers whose output channels stay: conv, linear, grouped, transposed.
        calibration_batches, calibration_batch_size: training data for importances that need gradients or activations.
        preparation: training before the removal that makes channels unimportant.
        finetune: training right after the removal.
    """

    kind: Literal["prune"] = "prune"
    engine: Literal["own", "native"] = "own"
    native: NativeSection | None = None
    preset: Literal["paddleslim", "torch_pruning"] | None = None
    granularity: Literal["channels", "heads"] = "channels"
    importance: ImportanceName = "l1_norm"
    importance_options: Options = {}
    rated: Literal["producers", "coupled", "norms"] | None = None
    group_reduction: Literal["master", "mean", "sum", "max"] | None = None
    normalisation: Literal["none", "mean", "max", "sum", "standard", "gaussian", "lamp"] | None = None
    selection: Literal["local", "global", "isomorphic"] = "local"
    pruning_ratio: Share | None = None
    layer_ratios: dict[str, Annotated[float, Field(ge=0, lt=1)]] = {}
    target: TargetSection | None = None
    sensitivity: SensitivitySection | None = None
    count_rule: Literal["round", "ceil_kept"] | None = None
    round_to: Positive = 1
    min_channels: Positive = 1
    max_ratio: Share | None = None
    layer_norm: Literal["keep", "prune"] = "keep"
    steps: Annotated[int, Field(ge=1, le=30)] = 1
    relative_to: Literal["current", "initial"] | Annotated[int, Field(ge=0)] = "current"
    ignored_layers: Patterns = ()
    ignored_kinds: Annotated[tuple[Literal["conv", "linear", "grouped", "transposed"], ...], Field(strict=False)] = ()
    calibration_batches: Positive = 8
    calibration_batch_size: Positive = 32
    preparation: PreparationSection | None = None
    finetune: TrainSection | None = None

    @model_validator(mode="after")
    def _amount(self) -> PruneStage:
        given = [name for name in ("pruning_ratio", "target") if getattr(self, name) is not None]
        if len(given) == 2:
            raise ValueError("pruning_ratio and target exclude each other")
        if self.sensitivity is not None:
            _check_sensitivity(self)
        elif not given and not self.layer_ratios:
            raise ValueError("says not how much: pruning_ratio, layer_ratios, target or sensitivity is needed")
        if (self.engine == "native") != (self.native is not None):
            raise ValueError("engine native and the section 'native' need each other")
        if self.engine == "native" and (self.target or self.sensitivity or self.steps > 1 or self.preparation):
            raise ValueError("engine native takes pruning_ratio and layer_ratios; no target, sensitivity, steps")
        if self.engine == "native":
            _refuse_own_words(self, _OWN_WORDS)
        if self.steps > 1 and self.finetune is None:
            raise ValueError("steps need 'finetune', the training after each of them")
        measured = self.sensitivity is not None or (self.target is not None and self.target.of == "latency")
        if measured and self.preparation is not None and self.preparation.method in ("soft", "growing"):
            raise ValueError("preparation soft and growing know beforehand what goes: no sensitivity or latency target")
        return self


_OWN_WORDS = (
    *("preset", "granularity", "importance", "importance_options", "rated", "group_reduction", "normalisation"),
    *("selection", "count_rule", "round_to", "min_channels", "max_ratio", "layer_norm", "relative_to", "ignored_kinds"),
)


def _refuse_own_words(stage: Section, words: tuple[str, ...]) -> None:
    """What our own choosing knows would have no effect on a toolkit's; ValueError names it."""
    fields = type(stage).model_fields
    given = [word for word in words if getattr(stage, word) != fields[word].default]
    if given:
        raise ValueError(f"engine native chooses by itself: {', '.join(given)} would do nothing; see native.options")


def _check_sensitivity(stage: PruneStage) -> None:
    if stage.pruning_ratio is not None or stage.layer_ratios:
        raise ValueError("sensitivity chooses the ratios: leave pruning_ratio and layer_ratios out")
    assert stage.sensitivity is not None
    if (stage.sensitivity.max_loss is None) == (stage.target is None):
        raise ValueError("sensitivity needs one of the two: max_loss, or the stage's target")
    if stage.target is not None and stage.target.of == "latency":
        raise ValueError("sensitivity reaches a target of parameters or macs; latency is reached by one ratio only")
    if stage.steps > 1 or stage.selection != "local":
        raise ValueError("sensitivity gives each group a ratio: selection must be local, and steps 1")


class GmpSection(Section):
    """Gradual magnitude pruning: sparsity grows with the third power of time while the model trains.

    Attributes:
        convention: paddleslim (0 before the ramp, which is counted in whole stairs) or torch_ao (initial_sparsity
            from the start on); both follow s0 + (s1 - s0) (1 - (1 - t) ** 3).
        initial_sparsity: at the start of the ramp.
        start_epoch, end_epoch: between which sparsity grows; None ends with the training.
        frequency: training steps between two changes of the masks.
        train: the training in which all this happens.
    """

    convention: Literal["paddleslim", "torch_ao"] = "torch_ao"
    initial_sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.0
    start_epoch: Annotated[float, Field(ge=0)] = 0.0
    end_epoch: Annotated[float, Field(gt=0)] | None = None
    frequency: Positive = 10
    train: TrainSection

    @model_validator(mode="after")
    def _order(self) -> GmpSection:
        end = self.train.epochs if self.end_epoch is None else self.end_epoch
        if not self.start_epoch < end <= self.train.epochs:
            raise ValueError(f"must hold: start_epoch < end_epoch <= epochs; found {self.start_epoch}, {end}")
        return self


class SparsifyStage(Section):
    """Zero single entries of weights by masks that stay in force in all training that follows.

    Attributes:
        kind: "sparsify".
        engine: own, or native: another toolkit chooses, and its choice is checked.
        native: which one.
        importance: criterion for single entries, a registered name.
        importance_options: options of the criterion.
        pattern: unstructured, block (of `block` entries), n_m (`n_m[0]` of `n_m[1]` neighbours along the inputs stay),
            or filters (whole output channels, masked but not removed).
        block: rows (outputs) and columns (inputs times kernel) of a block.
        n_m: entries that stay, of how many.
        sparsity: share of zeros; n_m has it from its numbers.
        layer_sparsity: layer path or pattern (fnmatch) -> share, in place of sparsity; alone: only those layers.
        selection: local (each layer by itself) or global (all layers together).
        steps: 1, or the number of rounds of masking and finetuning that lead to the sparsity.
        gmp: gradual magnitude pruning while training, in place of one cut.
        ignored_layers: layer paths or patterns (fnmatch) that stay dense.
        ignored_kinds: kinds of layers that stay dense: conv, linear, grouped, transposed.
        calibration_batches, calibration_batch_size: training data for importances that need gradients.
        finetune: training right after, under the masks.
    """

    kind: Literal["sparsify"] = "sparsify"
    engine: Literal["own", "native"] = "own"
    native: NativeSection | None = None
    importance: EntryImportanceName = "magnitude"
    importance_options: Options = {}
    pattern: Literal["unstructured", "block", "n_m", "filters"] = "unstructured"
    block: Annotated[tuple[Positive, Positive], Field(strict=False)] = (4, 4)
    n_m: Annotated[tuple[Positive, Positive], Field(strict=False)] = (2, 4)
    sparsity: Share | None = None
    layer_sparsity: dict[str, Annotated[float, Field(ge=0, lt=1)]] = {}
    selection: Literal["local", "global"] = "local"
    steps: Annotated[int, Field(ge=1, le=30)] = 1
    gmp: GmpSection | None = None
    ignored_layers: Patterns = ()
    ignored_kinds: Annotated[tuple[Literal["conv", "linear", "grouped", "transposed"], ...], Field(strict=False)] = ()
    calibration_batches: Positive = 8
    calibration_batch_size: Positive = 32
    finetune: TrainSection | None = None

    @model_validator(mode="after")
    def _amount(self) -> SparsifyStage:
        if self.pattern == "n_m":
            if self.n_m[0] >= self.n_m[1]:
                raise ValueError(f"n_m: fewer must stay than there are, found {self.n_m[0]} of {self.n_m[1]}")
            if self.sparsity is not None or self.layer_sparsity or self.steps > 1 or self.gmp or self.engine != "own":
                raise ValueError("pattern n_m has its sparsity from n_m: no sparsity, steps, gmp or native engine")
        elif self.sparsity is None and not self.layer_sparsity:
            raise ValueError("says not how much: sparsity or layer_sparsity is needed")
        if (self.engine == "native") != (self.native is not None):
            raise ValueError("engine native and the section 'native' need each other")
        if self.engine == "native":
            _refuse_own_words(
                self, ("importance", "importance_options", "pattern", "selection", "gmp", "ignored_kinds")
            )
        if self.steps > 1 and (self.finetune is None or self.gmp or self.engine == "native"):
            raise ValueError("steps need 'finetune', and neither gmp nor engine native")
        if self.gmp and (self.sparsity is None or self.layer_sparsity or self.importance != "magnitude"):
            raise ValueError("gmp needs 'sparsity' alone, and importance magnitude")
        if self.gmp and self.sparsity is not None and self.gmp.initial_sparsity > self.sparsity:
            raise ValueError(f"gmp.initial_sparsity {self.gmp.initial_sparsity} is above sparsity {self.sparsity}")
        return self
