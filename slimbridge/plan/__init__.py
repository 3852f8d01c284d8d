"""Plans: schema, loading, and the registries of what a plan may name."""

from slimbridge.plan.loading import load_plan, make_plan, plan_to_yaml, shipped_plans
from slimbridge.plan.schema import (
    BaselineSection,
    DataSection,
    DistillStage,
    FinetuneStage,
    LossSection,
    ModelSection,
    OptimizerSection,
    Plan,
    PruneStage,
    QuantizeStage,
    Stage,
    TeacherSection,
    TrainSection,
)

__all__ = [
    "BaselineSection",
    "DataSection",
    "DistillStage",
    "FinetuneStage",
    "LossSection",
    "ModelSection",
    "OptimizerSection",
    "Plan",
    "PruneStage",
    "QuantizeStage",
    "Stage",
    "TeacherSection",
    "TrainSection",
    "load_plan",
    "make_plan",
    "plan_to_yaml",
    "shipped_plans",
]
