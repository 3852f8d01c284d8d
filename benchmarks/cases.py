"""The cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.harness import BenchmarkError, Case, Competitor, Series, require
from benchmarks.resnet50 import FREE_GROUPS, Setting
from benchmarks.toolkits import PaddleSlim, TorchPruning
from slimbridge.errors import listed, nearest
from slimbridge.graph import find_units

OURS = "slimbridge"
COMMON = ("slimbridge", "numpy", "scipy")
TORCH = (*COMMON, "torch", "torch-pruning")
PADDLE = (*COMMON, "paddlepaddle", "paddleslim")

_L1_OURS = "mean magnitude, averaged over a group's producing layers"
_L1_TP = "graph + step; averages over every coupled layer, next convolutions and BN included"
_L1_SLIM = (
    "constructor + prune_vars, logging off; magnitude of the group's first layer; counts without the backup copies of "
    "the old weights that it leaves in the model"
)


def _series(setting: Setting, distributions: tuple[str, ...], *competitors: Competitor) -> Series:
    return Series(competitors, distributions, setting.backend.capabilities().threads)


def _prune_torch() -> Series:
    setting = Setting("torch")
    other = TorchPruning(setting.backend.tensor(setting.model, setting.example))
    return _series(
        setting,
        TORCH,
        Competitor(OURS, setting.copy, setting.prune, setting.check_ours, _L1_OURS),
        Competitor("Torch-Pruning", setting.copy, other.prune, setting.check_pruned, _L1_TP),
    )


def _prune_paddle() -> Series:
    setting = Setting("paddle")
    other = PaddleSlim()

    def check(model: Any) -> Mapping[str, int]:
        return setting.check_pruned(other.without_backups(model))

    return _series(
        setting,
        PADDLE,
        Competitor(OURS, setting.copy, setting.prune, setting.check_ours, _L1_OURS),
        Competitor("PaddleSlim", setting.copy, other.prune, check, _L1_SLIM),
    )


def _our_groups(setting: Setting) -> Callable[[Any], int]:
    return lambda model: len(find_units(setting.backend.trace(model, [setting.example])).groups())


def _check_groups(found: int) -> Mapping[str, int]:
    require(found == FREE_GROUPS, f"{found} channel groups found, ResNet-50 has {FREE_GROUPS}")
    return {"channel groups": found}


def _trace_torch() -> Series:
    setting = Setting("torch")
    other = TorchPruning(setting.backend.tensor(setting.model, setting.example))
    return _series(
        setting,
        TORCH,
        Competitor(OURS, setting.copy, _our_groups(setting), _check_groups, "trace + find_units"),
        Competitor("Torch-Pruning", setting.copy, other.groups, _check_groups, "build_dependency + get_all_groups"),
    )


def _trace_paddle() -> Series:
    setting = Setting("paddle")
    other = PaddleSlim()
    return _series(
        setting,
        PADDLE,
        Competitor(OURS, setting.copy, _our_groups(setting), _check_groups, "trace + find_units"),
        Competitor("PaddleSlim", setting.copy, other.groups, _check_groups, "DygraphPruningCollections, logging off"),
    )


_CASES = (
    Case(
        "prune_resnet50",
        "Trace ResNet-50 at 224 px, choose half of the channels of every group by L1 magnitude, and remove them. "
        "Definitions of the criterion differ (see the notes), so the channels chosen differ.",
        {"torch": _prune_torch, "paddle": _prune_paddle},
    ),
    Case(
        "trace_resnet50",
        "Trace ResNet-50 at 224 px and find its channel groups.",
        {"torch": _trace_torch, "paddle": _trace_paddle},
    ),
)


def cases() -> dict[str, Case]:
    """All cases by name, in the order they run."""
    return {item.name: item for item in _CASES}


def case(name: str) -> Case:
    """The case of that name; BenchmarkError names the nearest and all others."""
    known = cases()
    if name not in known:
        raise BenchmarkError(f"case '{name}' is unknown{nearest(name, known)}; known: {listed(known)}")
    return known[name]


def series_of(name: str, framework: str) -> Series:
    """Build one series of a case in this process; BenchmarkError when the case has none for the framework."""
    builders = case(name).series
    if framework not in builders:
        raise BenchmarkError(f"case '{name}' has no series for '{framework}'; it has: {listed(builders)}")
    return builders[framework]()
