"""One compression plan - pruning, quantization, distillation - on PaddlePaddle and on PyTorch.

    load_plan(source)              a shipped plan's name, a path or a mapping -> Plan
    zoo.build(name, backend=...)   a model, or take your own nn.Module / nn.Layer
    compress(model, plan, ...)     run the plan -> Result (model, report, folder)
    restore(model, run_dir)        a fresh model and a run's folder -> the compressed model
    compare_runs(a, b, ...)        the parity of two runs -> Comparison
    export(run_dir, forms)         int8 files that run elsewhere, each checked
    bench(run_dir, ...)            their times in every runtime that is installed -> Deployment
    run_study(plan, vary, ...)     many runs of a plan with some of its values varied -> Study

Nothing is imported before it is used; a framework only when a model of it is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from slimbridge import zoo
    from slimbridge.deployment import bench
    from slimbridge.discovery import backend_of, get_backend
    from slimbridge.errors import SlimbridgeError
    from slimbridge.exports import export
    from slimbridge.plan import Plan, load_plan, shipped_plans
    from slimbridge.runner import Result, compare_runs, compress, restore
    from slimbridge.study import run_study
    from slimbridge.tasks import Data, Split, load_data

_HOMES = {
    "Data": "slimbridge.tasks",
    "Plan": "slimbridge.plan",
    "Result": "slimbridge.runner",
    "SlimbridgeError": "slimbridge.errors",
    "Split": "slimbridge.tasks",
    "backend_of": "slimbridge.discovery",
    "bench": "slimbridge.deployment",
    "compare_runs": "slimbridge.runner",
    "compress": "slimbridge.runner",
    "export": "slimbridge.exports",
    "get_backend": "slimbridge.discovery",
    "load_data": "slimbridge.tasks",
    "load_plan": "slimbridge.plan",
    "restore": "slimbridge.runner",
    "run_study": "slimbridge.study",
    "shipped_plans": "slimbridge.plan",
}

__all__ = [
    "Data",
    "Plan",
    "Result",
    "SlimbridgeError",
    "Split",
    "__version__",
    "backend_of",
    "bench",
    "compare_runs",
    "compress",
    "export",
    "get_backend",
    "load_data",
    "load_plan",
    "restore",
    "run_study",
    "shipped_plans",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name == "zoo":
        return import_module("slimbridge.zoo")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'slimbridge' has no attribute '{name}'")


def __dir__() -> list[str]:
    return list(__all__)
