"""From what a plan names to what it means: its model, its data, and every default written out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from slimbridge import zoo
from slimbridge.errors import PlanError
from slimbridge.plan import DistillStage, LossSection, ModelSection, Plan, PruneStage, QuantizeStage, SparsifyStage
from slimbridge.plan.registries import ENTRY_IMPORTANCES, IMPORTANCES, LOSSES, OBSERVERS, as_importance
from slimbridge.ports import Backend, Model
from slimbridge.prune.presets import Definition
from slimbridge.prune.sparsifier import Sparsifier
from slimbridge.quantize.quantizer import new_observer
from slimbridge.tasks import DATA_SETS, Data, load_data


def with_defaults(plan: Plan) -> Plan:
    """The plan with the defaults of its model, data, observers and losses written in.

    Raises:
        SlimbridgeError: an observer's option does not exist. Unknown names elsewhere are left to those who use them.
    """
    stages: list[Any] = []
    for stage in plan.stages:
        stages.extend(_rounds(_stage(stage), len(stages)))
    changes: dict[str, Any] = {"stages": tuple(stages)}
    if plan.model is not None:
        entry = zoo.entry(plan.model.name)
        options = {**entry.options, **plan.model.options}
        channels = plan.model.in_channels or entry.in_channels
        changes["model"] = plan.model.model_copy(update={"options": options, "in_channels": channels})
    if plan.data is not None and plan.data.name in DATA_SETS:
        options = {**_defaults(DATA_SETS[plan.data.name]), **plan.data.options}
        changes["data"] = plan.data.model_copy(update={"options": options})
    return plan.model_copy(update=changes)


def _stage(stage: Any) -> Any:
    if isinstance(stage, QuantizeStage) and stage.engine == "own" and stage.mode == "static":
        defaults = _defaults(OBSERVERS.get(stage.observer))
        new_observer(stage)  # refuses options that the observer does not have, before anything runs
        return stage.model_copy(update={"observer_options": {**defaults, **stage.observer_options}})
    if isinstance(stage, PruneStage):
        return _pruning(stage)
    if isinstance(stage, SparsifyStage) and stage.engine == "own":
        Sparsifier(stage, 0)  # likewise
        known = _defaults(ENTRY_IMPORTANCES.get(stage.importance).score)
        return stage.model_copy(update={"importance_options": {**known, **stage.importance_options}})
    if isinstance(stage, DistillStage):
        return stage.model_copy(update={"losses": tuple(_loss(loss) for loss in stage.losses)})
    return stage


def _pruning(stage: PruneStage) -> PruneStage:
    """With the definitions that the importance leaves open written out; those of a preset are its own."""
    if stage.engine == "native":
        return stage
    known = Definition.of(stage)
    changes: dict[str, Any] = {"importance_options": dict(known.options)}
    if stage.preset is None:
        entry = as_importance(IMPORTANCES.get(stage.importance))
        changes |= {
            "rated": stage.rated or entry.rated,
            "group_reduction": stage.group_reduction or entry.group_reduction,
            "count_rule": known.count_rule,
        }
    return stage.model_copy(update=changes)


def _rounds(stage: Any, before: int) -> list[Any]:
    """A stage of several steps as that many stages, each with its share of what is to go; any other as it is.

    Args:
        stage: of a plan.
        before: the number of the stage that it follows.
    """
    count = stage.steps if isinstance(stage, (PruneStage, SparsifyStage)) else 1
    if count == 1:
        return [stage]
    return [stage.model_copy(update=_round(stage, step / count, before, step == 1)) for step in range(1, count + 1)]


def _round(stage: PruneStage | SparsifyStage, part: float, before: int, first: bool) -> dict[str, Any]:
    """What is different in the round that leads to a part of the whole."""
    changes: dict[str, Any] = {"steps": 1}
    if isinstance(stage, SparsifyStage):
        sparsity = stage.sparsity * part if stage.sparsity is not None else None
        by_layer = {name: share * part for name, share in stage.layer_sparsity.items()}
        return {**changes, "sparsity": sparsity, "layer_sparsity": by_layer}
    start = {"current": before, "initial": 0}.get(str(stage.relative_to), stage.relative_to)
    changes |= {"relative_to": start, "layer_ratios": {name: r * part for name, r in stage.layer_ratios.items()}}
    if stage.pruning_ratio is not None:
        changes["pruning_ratio"] = stage.pruning_ratio * part
    if stage.target is not None:
        changes["target"] = stage.target.model_copy(update={"remove": stage.target.remove * part})
    return changes if first else {**changes, "preparation": None}


def _loss(loss: LossSection) -> LossSection:
    entry = LOSSES.get(loss.loss)
    if not entry.uses_temperature or loss.temperature is not None:
        return loss
    return loss.model_copy(update={"temperature": _defaults(entry.function)["temperature"]})


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword -> default, of the parameters that have one."""
    parameters = inspect.signature(function).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not item.empty}


def build_model(plan: Plan, backend: Backend) -> Model:
    """The plan's zoo model; PlanError when it names none."""
    if plan.model is None:
        raise PlanError([f"plan '{plan.name}': names no model; add a model section or pass a model"])
    return zoo_model(plan.model, backend)


def zoo_model(section: ModelSection, backend: Backend) -> Model:
    """The model that a section names, float32 on the CPU."""
    return zoo.build(
        section.name, backend, section.num_classes, section.in_channels, seed=section.seed, **section.options
    )


def plan_data(plan: Plan) -> Data:
    """The plan's data; PlanError when it names none."""
    if plan.data is None:
        raise PlanError([f"plan '{plan.name}': names no data; add a data section or pass data"])
    return load_data(plan.data.name, **plan.data.options)
