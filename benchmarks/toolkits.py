"""The other toolkits, called as their documentation says; each is imported in its framework's process only."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from benchmarks.harness import BenchmarkError
from benchmarks.resnet50 import RATIO, SHAPE


def toolkit(name: str, distribution: str) -> Any:
    """Import a module; BenchmarkError says what to install."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"'{error.name}' is not installed: pip install '{distribution}'") from error


class TorchPruning:
    """Torch-Pruning: L1 magnitude, each group by itself, the output layer left alone."""

    def __init__(self, example: Any) -> None:
        self.module = toolkit("torch_pruning", "slimbridge[bench]")
        self.example = example

    def prune(self, model: Any) -> Any:
        """Build the dependency graph and take one step, in place."""
        pruner = self.module.pruner.MagnitudePruner(
            model,
            self.example,
            importance=self.module.importance.MagnitudeImportance(p=1),
            global_pruning=False,
            pruning_ratio=RATIO,
            ignored_layers=[model.fc],
        )
        pruner.step()
        return model

    def groups(self, model: Any) -> int:
        """Build the dependency graph and enumerate its groups."""
        graph = self.module.DependencyGraph().build_dependency(model, example_inputs=self.example)
        return sum(1 for _ in graph.get_all_groups(ignored_layers=[model.fc]))


class PaddleSlim:
    """PaddleSlim's L1NormFilterPruner, every group that it finds at the same ratio."""

    def __init__(self) -> None:
        # 2.6.0 was written for an older Paddle. On 3.3 its tracing needs a name that was made public since, and the
        # old intermediate representation; it leaves the process in static mode. The three are put right here.
        self.paddle = toolkit("paddle", "slimbridge[paddle]")
        base = self.paddle.base.dygraph.base
        if not hasattr(base, "_to_static_mode_guard_"):
            base._to_static_mode_guard_ = base.to_static_mode_guard
        self.pruning = toolkit("paddleslim.dygraph.prune", "slimbridge[paddle]")
        tracing = toolkit("paddleslim.core.dygraph", "slimbridge[paddle]")
        tracing._dy2prog = self._guarded(tracing._dy2prog)
        self.collections = toolkit("paddleslim.dygraph.prune.var_group", "slimbridge[paddle]").DygraphPruningCollections

    def _guarded(self, trace: Any) -> Any:
        def guarded(*arguments: Any, **keywords: Any) -> Any:
            try:
                with self.paddle.pir_utils.OldIrGuard():
                    return trace(*arguments, **keywords)
            finally:
                self.paddle.disable_static()

        return guarded

    def prune(self, model: Any) -> Any:
        """Trace, choose and remove, in place."""
        pruner = self.pruning.L1NormFilterPruner(model, [list(SHAPE)])
        pruner.prune_vars({item.master_name: RATIO for item in pruner.collections}, 0)
        return model

    def groups(self, model: Any) -> int:
        """Trace and collect the groups."""
        return sum(1 for _ in self.collections(model, [list(SHAPE)]))

    @staticmethod
    def without_backups(model: Any) -> Any:
        """The pruned model without the copies of the old weights that it keeps as buffers."""
        for layer in model.sublayers(include_self=True):
            for name in [name for name in layer._buffers if name.endswith("_backup")]:
                del layer._buffers[name]
        return model
