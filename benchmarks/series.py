"""The series of the cases: which competitors do a job on one framework, and how each is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.harness import Competitor, Series, require
from benchmarks.setting import RATIO, Setting
from benchmarks.toolkits import PaddleSlim, TorchPruning
from slimbridge.graph import find_units
from slimbridge.plan import PruneStage

OURS = "slimbridge"
COMMON = ("slimbridge", "numpy", "scipy")
DISTRIBUTIONS = {"torch": (*COMMON, "torch", "torch-pruning"), "paddle": (*COMMON, "paddlepaddle", "paddleslim")}
L1 = PruneStage(pruning_ratio=RATIO)
FPGM = PruneStage(pruning_ratio=RATIO, importance="fpgm", preset="paddleslim")
FPGM_LIKE_TORCH_PRUNING = PruneStage(pruning_ratio=RATIO, importance="fpgm", preset="torch_pruning")
# 16 blocks with two inner widths each, the stem, and one residual stream for each of the four stages.
FREE_GROUPS = 16 * 2 + 1 + 4

_L1_OURS = "mean magnitude, averaged over a group's producing layers"
_L1_TP = "graph + step; averages over every coupled layer, next convolutions and BN included"
_BACKUPS = "counts without the backup copies of the old weights that it leaves in the model"
_L1_SLIM = f"constructor + prune_vars, logging off; magnitude of the group's first layer; {_BACKUPS}"
_PROVES_NOTHING = "proves nothing, and changes the model that it is given"

Check = Callable[[Any], Mapping[str, int]]


def _series(setting: Setting, *competitors: Competitor) -> Series:
    threads = setting.backend.capabilities().threads
    return Series(competitors, DISTRIBUTIONS[setting.framework], threads, setting.weights_bytes)


def _torch_pruning(setting: Setting) -> TorchPruning:
    return TorchPruning(setting.backend.tensor(setting.model, setting.example))


def _without_backups(check: Check) -> Check:
    return lambda model: check(PaddleSlim.without_backups(model))


def prune_torch() -> Series:
    """Ours and Torch-Pruning, in place."""
    setting = Setting("torch", "resnet50", L1)
    return _series(
        setting,
        Competitor(OURS, setting.copy, setting.prune, setting.check_ours, _L1_OURS),
        Competitor("Torch-Pruning", setting.copy, _torch_pruning(setting).l1, setting.check_pruned, _L1_TP),
    )


def prune_paddle() -> Series:
    """Ours and PaddleSlim, in place."""
    setting = Setting("paddle", "resnet50", L1)
    return _series(
        setting,
        Competitor(OURS, setting.copy, setting.prune, setting.check_ours, _L1_OURS),
        Competitor("PaddleSlim", setting.copy, PaddleSlim().l1, _without_backups(setting.check_pruned), _L1_SLIM),
    )


def _check_stage(setting: Setting) -> Check:
    def check(result: Any) -> Mapping[str, int]:
        facts = setting.check_ours(result)
        after = setting.backend.read(setting.model)
        changed = [name for name, array in setting.weights.items() if array.tobytes() != after[name].tobytes()]
        require(not changed, f"the model that was given lost {len(changed)} of its arrays")
        return facts

    return check


def _whole_step(setting: Setting) -> Competitor:
    note = "Pruner.prune, the proof included: six forward passes and one training pass"
    return Competitor(OURS, lambda: setting.model, setting.prune_and_prove, _check_stage(setting), note)


def prune_stage_torch() -> Series:
    """Our step with its proof, and Torch-Pruning."""
    setting = Setting("torch", "resnet50", L1)
    other = _torch_pruning(setting)
    note = f"{_L1_TP}; {_PROVES_NOTHING}"
    return _series(
        setting,
        _whole_step(setting),
        Competitor("Torch-Pruning", setting.copy, other.l1, setting.check_pruned, note),
    )


def prune_stage_paddle() -> Series:
    """Our step with its proof, and PaddleSlim."""
    setting = Setting("paddle", "resnet50", L1)
    note = f"{_L1_SLIM}; {_PROVES_NOTHING}"
    return _series(
        setting,
        _whole_step(setting),
        Competitor("PaddleSlim", setting.copy, PaddleSlim().l1, _without_backups(setting.check_pruned), note),
    )


def _both(*checks: Check) -> Check:
    return lambda model: {key: value for check in checks for key, value in check(model).items()}


def fpgm_torch() -> Series:
    """Ours by Torch-Pruning's definition and by PaddleSlim's, and Torch-Pruning."""
    setting = Setting("torch", "resnet18", FPGM_LIKE_TORCH_PRUNING)
    slim = Setting("torch", "resnet18", FPGM)
    other = _torch_pruning(setting)
    check = _both(setting.check_pruned, setting.like_ours)
    return _series(
        setting,
        Competitor(OURS, setting.copy, setting.prune, _fpgm_ours(setting), "preset torch_pruning; float64"),
        Competitor(
            "Torch-Pruning",
            setting.copy,
            other.fpgm,
            check,
            "graph + step; rates the layers that read the channels too; float32",
        ),
        Competitor(
            "slimbridge, preset paddleslim", slim.copy, slim.prune, slim.check_ours, "each group's first layer; float64"
        ),
    )


def fpgm_paddle() -> Series:
    """Ours by PaddleSlim's definition, and PaddleSlim."""
    setting = Setting("paddle", "resnet18", FPGM)
    check = _without_backups(_both(setting.check_pruned, setting.like_ours))
    note = f"constructor + prune_vars, logging off; float32; {_BACKUPS}"
    return _series(
        setting,
        Competitor(OURS, setting.copy, setting.prune, _fpgm_ours(setting), "preset paddleslim; float64"),
        Competitor("PaddleSlim", setting.copy, PaddleSlim().fpgm, check, note),
    )


def _fpgm_ours(setting: Setting) -> Check:
    return lambda result: {**setting.check_ours(result), **setting.like_ours(result[0])}


def _our_groups(setting: Setting) -> Callable[[Any], int]:
    return lambda model: len(find_units(setting.backend.trace(model, [setting.example])).groups())


def _check_groups(found: int) -> Mapping[str, int]:
    require(found == FREE_GROUPS, f"{found} channel groups found, ResNet-50 has {FREE_GROUPS}")
    return {"channel groups": found}


def trace_torch() -> Series:
    """Our channel groups and Torch-Pruning's."""
    setting = Setting("torch", "resnet50", L1)
    other = _torch_pruning(setting)
    return _series(
        setting,
        Competitor(OURS, setting.copy, _our_groups(setting), _check_groups, "trace + find_units"),
        Competitor("Torch-Pruning", setting.copy, other.groups, _check_groups, "build_dependency + get_all_groups"),
    )


def trace_paddle() -> Series:
    """Our channel groups and PaddleSlim's."""
    setting = Setting("paddle", "resnet50", L1)
    note = "DygraphPruningCollections, logging off"
    return _series(
        setting,
        Competitor(OURS, setting.copy, _our_groups(setting), _check_groups, "trace + find_units"),
        Competitor("PaddleSlim", setting.copy, PaddleSlim().groups, _check_groups, note),
    )
