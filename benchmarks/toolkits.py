"""The other toolkits, called as their documentation says; each is imported in its framework's process only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from benchmarks.harness import BenchmarkError
from benchmarks.setting import RATIO, SHAPE


@contextmanager
def installed(extra: str) -> Iterator[None]:
    """BenchmarkError says what to install when a module is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"'{error.name}' is not installed: pip install 'slimbridge[{extra}]'") from error


class TorchPruning:
    """Torch-Pruning: each group by itself, the output layer left alone."""

    def __init__(self, example: Any) -> None:
        with installed("bench"):
            self.module = import_module("torch_pruning")
        self.example = example

    def l1(self, model: Any) -> Any:
        """Prune by L1 magnitude."""
        return self._prune(model, self.module.importance.MagnitudeImportance(p=1))

    def fpgm(self, model: Any) -> Any:
        """Prune by distance to the geometric median."""
        return self._prune(model, self.module.importance.FPGMImportance())

    def _prune(self, model: Any, importance: Any) -> Any:
        """Build the dependency graph and take one step, in place."""
        pruner = self.module.pruner.MagnitudePruner(
            model,
            self.example,
            importance=importance,
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
    """PaddleSlim's filter pruners, every group that they find at the same ratio; quiet."""

    def __init__(self) -> None:
        # The Paddle backend's own work-around: PaddleSlim 2.6.0 was written for an older Paddle.
        with installed("paddle"):
            self._toolkit = import_module("slimbridge_paddle._compat").paddleslim_pruning
            with self._toolkit():
                pass

    def l1(self, model: Any) -> Any:
        """Prune by L1 magnitude."""
        return self._prune(model, "L1NormFilterPruner")

    def fpgm(self, model: Any) -> Any:
        """Prune by distance to the geometric median."""
        return self._prune(model, "FPGMFilterPruner")

    def _prune(self, model: Any, name: str) -> Any:
        """Trace, choose and remove, in place."""
        with self._toolkit() as pruning:
            pruner = getattr(pruning, name)(model, [list(SHAPE)])
            pruner.prune_vars({item.master_name: RATIO for item in pruner.collections}, 0)
        return model

    def groups(self, model: Any) -> int:
        """Trace and collect the groups."""
        with self._toolkit() as pruning:
            return sum(1 for _ in pruning.DygraphPruningCollections(model, [list(SHAPE)]))

    @staticmethod
    def without_backups(model: Any) -> Any:
        """The pruned model without the copies of the old weights that it keeps as buffers."""
        for layer in model.sublayers(include_self=True):
            for name in [name for name in layer._buffers if name.endswith("_backup")]:
                del layer._buffers[name]
        return model
