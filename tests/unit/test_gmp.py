"""Gradual magnitude pruning: sparsity by step against both toolkits, the callback, resuming; what a step holds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.ao.pruning import WeightNormSparsifier
from torch.ao.pruning.scheduler.cubic_scheduler import CubicSL

from slimbridge.distill import hard_labels
from slimbridge.errors import ModelError
from slimbridge.parity import differing
from slimbridge.plan.pruning import SparsifyStage
from slimbridge.ports import Array, Backend, Loss, Model
from slimbridge.prune.gmp import GmpSchedule, cubic, paddleslim_sparsity, torch_ao_sparsity
from slimbridge.prune.sparsifier import Sparsifier, masked
from slimbridge.tasks import Split
from slimbridge.train import Training, train

RNG = np.random.default_rng(6)
DATA = Split(RNG.standard_normal((24, 3, 4, 4)).astype(np.float32), RNG.integers(0, 4, 24))
X = DATA.inputs[:1]


# Sparsity by step


def test_the_cubic_of_the_paper() -> None:
    assert [cubic(0.2, 0.8, done) for done in (0.0, 1.0)] == [0.2, 0.8]
    assert cubic(0.0, 0.8, 0.5) == 0.8 + (0.0 - 0.8) * 0.5**3


@pytest.mark.parametrize(("start", "pause", "count", "initial"), [(0, 1, 20, 0.0), (7, 1, 13, 0.25), (3, 5, 4, 0.1)])
def test_the_numbers_of_torch_ao(start: int, pause: int, count: int, initial: float) -> None:
    """CubicSL's own numbers at the steps where the masks change; its scheduler makes its first step itself."""
    sparsifier = WeightNormSparsifier(sparsity_level=0.9)
    sparsifier.prepare(torch.nn.Sequential(torch.nn.Linear(8, 8)), [{"tensor_fqn": "0.weight"}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = CubicSL(sparsifier, initial, start, pause, count, initially_zero=True)
        levels = []
        for _ in range(start + pause * count + 5):
            levels.append(theirs.get_last_sl()[0])
            theirs.step()
    end = start + pause * count
    ours = [torch_ao_sparsity(step, initial, 0.9, start, end, pause) for step in range(len(levels))]
    changes = [step for step in range(len(levels)) if step < start or step >= end or (step - start) % pause == 0]
    assert [ours[step] for step in changes] == [levels[step] for step in changes]
    stair = [ours[max(s for s in changes if s <= step)] for step in range(len(levels))]
    assert ours == stair


def paddleslim_levels(stable: int, pruning: int, tunning: int, stairs: int, initial: float, final: float) -> Any:
    """`GMPUnstructuredPruner.step`, run on an object that has its schedule and no model."""
    from paddleslim.dygraph.prune.unstructured_pruner import GMPUnstructuredPruner

    pruner = GMPUnstructuredPruner.__new__(GMPUnstructuredPruner)
    pruner.stable_iterations, pruner.pruning_iterations, pruner.tunning_iterations = stable, pruning, tunning
    pruner.pruning_steps, pruner.initial_ratio, pruner.target_ratio = stairs, initial, final
    pruner.ratio, pruner.cur_iteration, pruner._need_prune_once = 0.0, 0, False
    pruner.update_threshold = pruner._update_masks = lambda: None
    pruner._prepare_training_hyper_parameters()
    levels = []
    for _ in range(stable + pruning + tunning + 5):
        pruner.step()
        levels.append(pruner.ratio)
    return levels


@pytest.mark.parametrize("stable", [0, 10, 13])
@pytest.mark.parametrize(("pruning", "stairs"), [(40, 4), (43, 4), (60, 1), (60, 5)])
@pytest.mark.parametrize("initial", [0.0, 0.15])
def test_the_numbers_of_paddleslim(stable: int, pruning: int, stairs: int, initial: float) -> None:
    theirs = paddleslim_levels(stable, pruning, 20, stairs, initial, 0.75)
    ours = [paddleslim_sparsity(step, initial, 0.75, stable, pruning, stairs) for step in range(len(theirs))]
    # ((i / n) - 1) ** 3 + 1 there and 1 - (1 - i / n) ** 3 here differ in the last bit: zeros of 10,000 weights
    assert [round(10_000 * level) for level in ours] == [round(10_000 * level) for level in theirs]
    assert ours[-1] == theirs[-1] == 0.75


@given(st.integers(0, 30), st.integers(1, 60), st.integers(1, 20), st.floats(0, 0.4), st.floats(0.5, 0.99))
def test_sparsity_never_falls(start: int, length: int, every: int, initial: float, final: float) -> None:
    stairs = max(length // every, 1)
    for levels in (
        [torch_ao_sparsity(step, initial, final, start, start + length, every) for step in range(100)],
        [paddleslim_sparsity(step, initial, final, start, length, stairs) for step in range(100)],
    ):
        assert all(a <= b for a, b in pairwise(levels))
        assert levels[-1] == final
    first = 0.0 if start else cubic(initial, final, 0.0)
    assert torch_ao_sparsity(0, initial, final, start, start + length, every) == first


# The callback in a training


class FakeOptimizer:
    def __init__(self) -> None:
        self.held: list[Mapping[str, Array]] = []

    def hold_zeros(self, masks: Mapping[str, Array]) -> None:
        self.held.append(dict(masks))


def model_of(backend: Backend) -> Model:
    nn = backend.nn
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1), nn.Linear(16, 4))
    rng = np.random.default_rng(9)
    arrays = {name: rng.standard_normal(array.shape).astype(np.float32) for name, array in backend.read(model).items()}
    return backend.write(model, {name: np.abs(a) + 0.5 if "var" in name else a for name, a in arrays.items()})


def stage(**gmp: Any) -> SparsifyStage:
    train_section = {"epochs": 4, "batch_size": 8, "learning_rate": 0.01, "optimizer": {"kind": gmp.pop("kind", "sgd")}}
    more = {key: gmp.pop(key) for key in ("selection", "pattern", "block") if key in gmp}
    section = {"frequency": 2, "train": train_section, **gmp}
    return SparsifyStage.model_validate({"sparsity": 0.75, "gmp": section, **more})


def schedule(backend: Backend, model: Model, made: SparsifyStage, held: Any = None) -> GmpSchedule:
    graph = backend.trace(model, [X])
    return GmpSchedule(backend, Sparsifier(made, 0), backend.layers(model), graph, held or {})


def zeros(backend: Backend, model: Model) -> dict[str, int]:
    return {name: int((array == 0).sum()) for name, array in backend.read(model).items() if array.ndim > 1}


@pytest.mark.parametrize("convention", ["torch_ao", "paddleslim"])
def test_weights_are_zeroed_when_due(torch_backend: Backend, convention: str) -> None:
    model, optimizer = model_of(torch_backend), FakeOptimizer()
    made = stage(convention=convention, start_epoch=1.0, end_epoch=3.0, initial_sparsity=0.25)
    gmp = schedule(torch_backend, model, made)
    counts = []
    for step in range(12):
        gmp(model, optimizer, step, 3)  # type: ignore[arg-type]
        counts.append(sum(zeros(torch_backend, model).values()))
    # start 3, end 9, a change each 2 steps; 108 and 64 weights
    ramp = [round(108 * s) + round(64 * s) for s in (cubic(0.25, 0.75, done) for done in (0, 1 / 3, 2 / 3))]
    stairs = [amount for amount in ramp for _ in range(2)]
    shift = 3 if convention == "torch_ao" else 2  # PaddleSlim counts whole stairs before the ramp too
    assert counts == [*[0] * shift, *stairs, *[81 + 48] * (12 - 6 - shift)]
    assert len(optimizer.held) == 5
    assert optimizer.held[0] == {}
    for name in ("0.weight", "4.weight"):
        assert np.array_equal(optimizer.held[-1][name], torch_backend.read(model)[name] != 0)


def test_sparsity_that_would_fall_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gmp\.initial_sparsity 0\.8 is above sparsity 0\.75"):
        stage(initial_sparsity=0.8)


def test_masks_of_earlier_stages_stay(torch_backend: Backend) -> None:
    model, optimizer = model_of(torch_backend), FakeOptimizer()
    weights = torch_backend.read(model)
    old = {"0.weight": np.abs(weights["0.weight"]) < np.quantile(np.abs(weights["0.weight"]), 0.9)}  # the largest go
    torch_backend.write(model, masked(weights, old))
    gmp = schedule(torch_backend, model, stage(), old)
    for step in (0, 6, 11):
        gmp(model, optimizer, step, 3)  # type: ignore[arg-type]
        assert not (optimizer.held[-1]["0.weight"] & ~old["0.weight"]).any()
    assert zeros(torch_backend, model)["0.weight"] == round(108 * gmp.level(11, 3))
    final = gmp.final_decision(model).masks["0.weight"].array()
    assert (~final).sum() == 81
    assert not (final & ~old["0.weight"]).any()


def training_of(backend: Backend, model: Model, gmp: GmpSchedule, path: Path | None = None) -> Training:
    def objective(inputs: tuple[Array, ...], targets: Array) -> Loss:
        native = backend.tensor(model, targets)
        return lambda result: {"loss": hard_labels(backend.ops, result.output, native)}

    return Training(gmp.section.train, DATA, objective, 5, "01-test", checkpoint=path, before_step=gmp)


class KilledError(Exception):
    """Stands for a process that ends in the middle of a step."""


CASES: list[dict[str, Any]] = [
    {"kind": "adamw"},
    {"convention": "paddleslim", "initial_sparsity": 0.2, "selection": "global", "frequency": 3},
    {"pattern": "block", "block": (2, 2), "start_epoch": 0.5, "end_epoch": 2.5},
]


@pytest.mark.parametrize("case", CASES, ids=["adamw", "paddleslim", "blocks"])
@pytest.mark.parametrize("last", [4, 8])
def test_a_killed_training_resumes_to_the_same_bits(
    backend: Backend, tmp_path: Path, case: dict[str, Any], last: int
) -> None:
    def run(path: Path | None, until: int | None = None) -> tuple[Model, Any]:
        model = model_of(backend)
        gmp = schedule(backend, model, stage(**case))
        training = training_of(backend, model, gmp, path)
        if until is None:
            train(backend, model, training)
            return backend.read(model), gmp.final_decision(model)

        def dies(*arguments: Any) -> None:
            if arguments[2] == until:
                raise KilledError
            gmp(*arguments)

        with pytest.raises(KilledError):
            train(backend, model, replace(training, before_step=dies))
        return None, None

    whole, decision = run(None)
    run(tmp_path / "c", last)
    again, same = run(tmp_path / "c")
    assert differing(again, whole) == 0
    assert same.digest() == decision.digest()
    done = run(tmp_path / "c")
    assert differing(done[0], whole) == 0, "a training that is done only decides"
    assert done[1].digest() == decision.digest()
    for name, mask in decision.masks.items():
        zero = whole[name] == 0
        assert (zero & ~mask.array()).sum() == zero.sum(), "what was zero stays"
        if case.get("end_epoch"):
            assert np.array_equal(zero, ~mask.array()), "the ramp ended before the training"


# What the loop hands on


def test_the_loop_calls_before_each_step_and_holds_masks(backend: Backend, tmp_path: Path) -> None:
    model = model_of(backend)
    gmp = schedule(backend, model, stage(kind="adam"))
    calls: list[tuple[int, int]] = []

    def note(given: Model, optimizer: Any, step: int, steps: int) -> None:
        assert given is model
        assert callable(optimizer.hold_zeros)
        if step == 7 and len(calls) == 7:
            raise KilledError
        calls.append((step, steps))

    masks = {"4.weight": np.abs(backend.read(model)["4.weight"]) > 0.5}
    backend.write(model, masked(backend.read(model), masks))
    training = replace(training_of(backend, model, gmp, tmp_path / "c"), before_step=note, masks=masks)
    with pytest.raises(KilledError):
        train(backend, model, training)
    train(backend, model, training)
    assert calls == [(step, 3) for step in [*range(7), *range(6, 12)]]
    found = backend.read(model)["4.weight"]
    assert np.array_equal(found != 0, masks["4.weight"])
    with pytest.raises(ModelError, match=r"hold_zeros"):
        train(backend, model, replace(training, masks={"nothing": masks["4.weight"]}))
