"""One compression plan - pruning, quantization, distillation - on PaddlePaddle and on PyTorch.

Nothing is imported before it is used; a framework only when a model of it is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from slimbridge import zoo
    from slimbridge.discovery import backend_of, get_backend
    from slimbridge.errors import SlimbridgeError
    from slimbridge.plan import Plan, load_plan, shipped_plans
    from slimbridge.runner import Result, compress, restore
    from slimbridge.tasks import Data, Split, load_data

_HOMES = {
    "Data": "slimbridge.tasks",
    "Plan": "slimbridge.plan",
    "Result": "slimbridge.runner",
    "SlimbridgeError": "slimbridge.errors",
    "Split": "slimbridge.tasks",
    "backend_of": "slimbridge.discovery",
    "compress": "slimbridge.runner",
    "get_backend": "slimbridge.discovery",
    "load_data": "slimbridge.tasks",
    "load_plan": "slimbridge.plan",
    "restore": "slimbridge.runner",
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
    "compress",
    "get_backend",
    "load_data",
    "load_plan",
    "restore",
    "shipped_plans",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name == "zoo":
        return import_module("slimbridge.zoo")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'slimbridge' has no attribute '{name}'")
