"""Gradual magnitude pruning: sparsity that grows while the model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slimbridge.decisions import MaskDecision
from slimbridge.graph import Graph
from slimbridge.plan.pruning import GmpSection
from slimbridge.ports import Array, Backend, Layer, Model, Optimizer
from slimbridge.prune.evidence import Evidence
from slimbridge.prune.patterns import Bools
from slimbridge.prune.sparsifier import NO_MASKS, Sparsifier, masked


def cubic(initial: float, final: float, done: float) -> float:
    """Sparsity when the share `done` of the ramp is over: final + (initial - final) * (1 - done) ** 3.

    Source: Zhu & Gupta 2017, "To prune, or not to prune", equation 1, with done = (t - t0) / (n * delta_t), 0..1.
    Limited to initial..final, from which rounding could lead away.
    """
    return max(initial, min(final, final + (initial - final) * (1.0 - done) ** 3))


def torch_ao_sparsity(step: int, initial: float, final: float, start: int, end: int, frequency: int) -> float:
    """Sparsity at a step in the convention of torch.ao.

    0 before `start`; there `initial`, and each `frequency` steps the cubic of the share of the ramp that is over;
    `final` from `end` on.

    Source: torch 2.13, torch/ao/pruning/scheduler/cubic_scheduler.py, CubicSL with initially_zero=True, init_t =
    start and delta_t * total_t = end - start. There `delta_t` only stretches the ramp and the level changes at each
    call of step(); here it changes every `frequency` steps, as in the paper.

    Args:
        step: from 0.
        initial, final: sparsities, 0..1.
        start, end: steps between which it grows, start < end.
        frequency: steps between two changes.
    """
    if step < start:
        return 0.0
    if step >= end:
        return final
    return cubic(initial, final, (step - start) // frequency * frequency / (end - start))


def paddleslim_sparsity(
    step: int, initial: float, final: float, stable: int, pruning: int, pruning_steps: int
) -> float:
    """Sparsity at a step in the convention of PaddleSlim.

    A staircase with stairs of int(pruning / pruning_steps) steps. int(stable / pruning * pruning_steps) stairs of 0;
    then stair i of `pruning_steps` with `initial` + (`final` - `initial`) * (1 - (1 - i / pruning_steps) ** 3), the
    first at `initial`, none at `final`; then `final`, which begins after the ramp's last stair and lasts
    (the length of its "tunning" phase changes no number).

    Source: PaddleSlim 2.6.0, dygraph/prune/unstructured_pruner.py, GMPUnstructuredPruner, `ratios_stack` and `step`;
    stable = stable_iterations, pruning = pruning_iterations. PaddleSlim then zeroes what is below the k-th smallest
    magnitude, k = round(n * ratio), that is k - 1 entries; here k entries go.

    Args:
        step: from 0.
        initial, final: sparsities, 0..1.
        stable: steps before the ramp.
        pruning: steps of the ramp.
        pruning_steps: stairs of the ramp, at most `pruning`.
    """
    stair = step // int(pruning / pruning_steps) - int(float(stable) / pruning * pruning_steps)
    if stair < 0:
        return 0.0
    return cubic(initial, final, stair / pruning_steps) if stair < pruning_steps else final


class GmpSchedule:
    """A callback before each training step that raises the sparsity when it is due.

    Masks are made of the weights' magnitudes alone, zeros first, so that a resumed training finds those that were in
    force. What an earlier step zeroed is held at zero by the optimizer and therefore stays the smallest.

    Args:
        backend: of the model.
        sparsifier: of the stage, whose `gmp` and `sparsity` are set.
        layers: of the model.
        graph: of the model; see `Sparsifier.decide`.
        held: masks in force from stages before.
    """

    def __init__(
        self,
        backend: Backend,
        sparsifier: Sparsifier,
        layers: Sequence[Layer],
        graph: Graph | None = None,
        held: Mapping[str, Bools] = NO_MASKS,
    ) -> None:
        assert sparsifier.stage.gmp is not None
        assert sparsifier.stage.sparsity is not None
        self.section: GmpSection = sparsifier.stage.gmp
        self.final: float = sparsifier.stage.sparsity
        self.backend, self.sparsifier, self.layers, self.graph, self.held = backend, sparsifier, layers, graph, held
        self._level: float | None = None

    def level(self, step: int, steps_per_epoch: int) -> float:
        """Sparsity that is due at a step (from 0 over the whole training)."""
        section = self.section
        last = section.train.epochs if section.end_epoch is None else section.end_epoch
        start = round(section.start_epoch * steps_per_epoch)
        end = max(round(last * steps_per_epoch), start + 1)
        if section.convention == "torch_ao":
            return torch_ao_sparsity(step, section.initial_sparsity, self.final, start, end, section.frequency)
        stairs = max((end - start) // section.frequency, 1)
        return paddleslim_sparsity(step, section.initial_sparsity, self.final, start, end - start, stairs)

    def __call__(self, model: Model, optimizer: Optimizer, step: int, steps_per_epoch: int) -> None:
        """Zero what is due and have it held, whenever the due sparsity has changed and at the first call."""
        due = self.level(step, steps_per_epoch)
        if due == self._level:
            return
        weights = self.backend.read(model)
        masks = self.sparsifier.masks(self.layers, self.graph, weights, Evidence(), due, self.held)
        zero = {name: mask for name, mask in masks.items() if not mask.all()}
        self._write(model, weights, zero)
        optimizer.hold_zeros({**self.held, **zero})
        self._level = due

    def final_decision(self, model: Model) -> MaskDecision:
        """The masks at the full sparsity, from the trained weights; the caller zeroes what they add.

        Raises:
            ModelError: see `Sparsifier.decide`.
        """
        weights = self.backend.read(model)
        return self.sparsifier.decide(self.layers, self.graph, weights, Evidence(), held=self.held)

    def _write(self, model: Model, weights: Mapping[str, Array], masks: Mapping[str, Bools]) -> None:
        if masks:
            zeroed = masked({name: weights[name] for name in masks}, masks)
            self.backend.write(model, zeroed, partial=True)
