"""What cases share: a model of the zoo, the example, our pruning, and the checks of what a pruner gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from benchmarks.harness import require
from slimbridge.decisions import PruneDecision
from slimbridge.discovery import get_backend
from slimbridge.graph import cost_of, count_parameters
from slimbridge.parity.measure import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.plan import PruneStage
from slimbridge.ports import Array, Backend, Model, tensors_in
from slimbridge.prune import Pruner, zeroed
from slimbridge.zoo import build

RATIO = 0.5
CLASSES = 1000
SHAPE = (1, 3, 224, 224)


@dataclass(frozen=True)
class Setting:
    """A network of the zoo, with equal weights on either framework, and a stage that prunes it."""

    framework: str
    network: str
    stage: PruneStage

    @cached_property
    def backend(self) -> Backend:
        """Ours."""
        return get_backend(self.framework)

    @cached_property
    def model(self) -> Model:
        """Never changed; each run takes a copy."""
        return build(self.network, self.backend, num_classes=CLASSES, seed=0)

    @cached_property
    def weights(self) -> Mapping[str, Array]:
        """All arrays of `model`."""
        return self.backend.read(self.model)

    @property
    def weights_bytes(self) -> int:
        """Memory of the model's arrays."""
        return sum(array.nbytes for array in self.weights.values())

    @cached_property
    def example(self) -> Array:
        """One image of noise."""
        return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)

    def copy(self) -> Model:
        """A fresh model."""
        return self.backend.clone(self.model)

    def output(self, model: Model) -> Array:
        """Logits of the example."""
        return self.backend.ops.numpy(tensors_in(self.backend.forward(model, [self.example]).output)[0])

    def prune(self, model: Model) -> tuple[Model, PruneDecision]:
        """Trace, decide, apply in place."""
        pruner = Pruner(self.stage)
        decision = pruner.decide(self.backend.trace(model, [self.example]), self.backend.read(model))
        return pruner.apply(self.backend, model, decision), decision

    def prune_and_prove(self, model: Model) -> tuple[Model, PruneDecision]:
        """The whole step as a run of a plan does it: on a copy, with the proof that removing equals zeroing."""
        return Pruner(self.stage).prune(self.backend, model, [self.example])

    @cached_property
    def ours(self) -> Mapping[str, Array]:
        """All arrays of the model that we pruned."""
        return self.backend.read(self.prune(self.copy())[0])

    def check_ours(self, result: tuple[Model, PruneDecision]) -> Mapping[str, int]:
        """As `check_pruned`, and removing gives the outputs of zeroing."""
        model, decision = result
        facts = self.check_pruned(model)
        silent = self.backend.write(self.copy(), zeroed(self.weights, decision))
        figure, allowed = relative(self.output(model), self.output(silent)), tolerance("removal").value
        require(figure <= allowed, f"removing differs from zeroing by {figure:.2g}, allowed {allowed:.2g}")
        return facts

    def check_pruned(self, model: Model) -> Mapping[str, int]:
        """It runs, gives finite logits that are not all 0, and is smaller; parameters and MACs by our counter."""
        logits = self.output(model)
        require(logits.shape == (SHAPE[0], CLASSES), f"the pruned model gives shape {logits.shape}")
        require(bool(np.isfinite(logits).all() and logits.any()), "the pruned model gives no finite, non-zero logits")
        before = {name: array.shape for name, array in self.weights.items()}
        after = {name: array.shape for name, array in self.backend.read(model).items() if name in before}
        require(after.keys() == before.keys(), f"{len(before) - len(after)} parameters are gone")
        whole, parameters = count_parameters(before), count_parameters(after)
        require(parameters < whole, f"the pruned model has {parameters} parameters, {whole} before")
        macs = cost_of(self.backend.trace(model, [self.example])).macs
        return {"parameters after": parameters, "MACs after": macs}

    def like_ours(self, model: Model) -> Mapping[str, int]:
        """How many arrays of the pruned model are, bit for bit, those of the model that we pruned."""
        found = self.backend.read(model)
        return {"arrays as ours": sum(np.array_equal(array, found[name]) for name, array in self.ours.items())}
