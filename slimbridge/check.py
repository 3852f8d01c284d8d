"""Checks a plan without running it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimbridge.discovery import find_backend
from slimbridge.errors import BackendError, PlanError
from slimbridge.plan import Plan, load_plan
from slimbridge.ports import Backend
from slimbridge.rehearse import Rehearsal
from slimbridge.resolve import build_model, plan_data, with_defaults


def check(source: str | Path | Mapping[str, Any] | Plan, backend: str | None = None) -> list[str]:
    """The mistakes of a plan, one line each; an empty list when there is none.

    Keys, values and names are checked all at once; what needs a model - layers, feature maps, the fit of the data -
    once those are right.

    Args:
        source: a shipped plan's name, a path, a mapping or a plan.
        backend: used to build the model and resolve layer names; None takes the plan's, or the first installed.
    """
    try:
        plan = load_plan(source)
        side = find_backend(None, backend or plan.backend)
    except PlanError as error:
        return list(error.findings)
    except BackendError as error:
        return [f"backend: {error}"]
    return _findings(plan, side)


def _findings(plan: Plan, side: Backend) -> list[str]:
    rehearsal = Rehearsal(side, plan)
    devices = side.capabilities().devices
    if plan.device not in devices:
        rehearsal.findings.append(f"device: '{plan.device}' is not there; {side.name} has {', '.join(devices)}")
    rehearsal.attempt("plan", lambda: with_defaults(plan))
    data = rehearsal.attempt("data", lambda: plan_data(plan)) if plan.data else None
    model = rehearsal.attempt("model", lambda: build_model(plan, side)) if plan.model else None
    if model is not None and data is not None:
        rehearsal.run(model, data, task_loss=True)
    return rehearsal.findings
