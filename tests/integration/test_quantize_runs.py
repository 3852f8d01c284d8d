"""Runs that quantize after training: equal integers on both frameworks, and what each setting comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimbridge as sb
from slimbridge.decisions import QuantizeDecision
from slimbridge.discovery import get_backend
from slimbridge.parity import differing, relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.ports import Array, Backend, tensors_in
from slimbridge.runfolder import RunFolder
from slimbridge.tasks import Data
from slimbridge.weights import load_weights
from tests.integration.quantized import LITTLE, SIDES, Residual, plan_of, quantized
from tests.integration.small_nets import DATA, Plain, net, outputs
from tests.integration.test_pruning_resume import Killing

SETTINGS: dict[str, tuple[str, dict[str, Any], float]] = {
    "8/8": ("residual", {}, 1.0),
    "4/8": ("residual", {"weight_bits": 4}, 1.0),
    "4/4": ("residual", {"weight_bits": 4, "activation_bits": 4}, 0.9),
    "layer": ("residual", {"placement": "layer", "weight_granularity": "tensor"}, 1.0),
    "unfolded": ("residual", {"fold_batch_norm": False, "observer": "absmax"}, 1.0),
    "asymmetric": ("residual", {"weight_scheme": "asymmetric", "activation_scheme": "asymmetric"}, 1.0),
    "paddle's": ("residual", {"definition": "paddle"}, 1.0),
    "torch's": ("residual", {"definition": "torch", "first_layer": "8bit", "last_layer": "float"}, 1.0),
    "dynamic": ("attention", {"mode": "dynamic"}, 1.0),
    "dynamic, asymmetric": ("attention", {"mode": "dynamic", "activation_scheme": "asymmetric"}, 1.0),
    "weight only": ("residual", {"mode": "weight_only"}, 1.0),
    "weight only, 4": ("residual", {"mode": "weight_only", "weight_bits": 4}, 0.9),
    "groups": (
        "attention",
        {"mode": "weight_only", "weight_bits": 4, "weight_granularity": "group", "group_size": 4},
        0.9,
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_both_frameworks_decide_alike(name: str, baselines: dict[str, Path], tmp_path: Path) -> None:
    """Integers and weights' grids bit for bit; what the data decides to the last digits."""
    part, stage, least = SETTINGS[name]
    plan = plan_of(baselines[part], **stage)
    runs = [quantized(side, part, plan, tmp_path / side) for side in SIDES]
    (first, ours, result), (second, theirs, other) = runs
    assert differing(first.integers("01-quantize"), second.integers("01-quantize")) == 0
    assert ours.weights == theirs.weights
    assert (ours.dynamic, ours.folds, ours.skipped) == (theirs.dynamic, theirs.folds, theirs.skipped)
    assert ours.activations.keys() == theirs.activations.keys()
    for key, grid in ours.activations.items():
        step, like = grid.step[0], theirs.activations[key]
        assert abs(step - like.step[0]) / step <= tolerance("activation_step").value, key
        assert (grid.low, grid.high, grid.rounding) == (like.low, like.high, like.rounding)
    metrics = [run.report.stages[1].metric for run in (result, other)]
    assert min(metrics) >= least
    assert abs(metrics[0] - metrics[1]) <= tolerance("metric").value


def test_every_verdict_of_a_comparison(baselines: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(baselines["residual"])
    for side in SIDES:
        quantized(side, "residual", plan, tmp_path / side)
    for reference, other in (SIDES, SIDES[::-1]):
        found = sb.compare_runs(
            tmp_path / reference, tmp_path / other, model=net(get_backend(other), Residual), data=DATA
        )
        verdicts = {verdict.claim: verdict for verdict in found.verdicts if verdict.stage == "01-quantize"}
        assert len(verdicts) == 6
        assert all(verdict.passed for verdict in verdicts.values()), found.verdicts
        assert verdicts["int8 weights, from equal weights"].figure == 0


def test_a_run_is_restored(backend: Backend, baselines: dict[str, Path], tmp_path: Path) -> None:
    """A fresh model gets the weights and the grids back, and gives the saved probe."""
    folder, decision, result = quantized(backend.name, "residual", plan_of(baselines["residual"]), tmp_path / "run")
    model = sb.restore(net(backend, Residual), tmp_path / "run")
    assert np.array_equal(outputs(model), outputs(result.model))
    whole = backend.ops.numpy(tensors_in(backend.forward(model, [DATA.test.inputs]).output)[0])
    assert np.array_equal(whole, folder.probe("01-quantize")[0])
    assert set(decision.activations) == {
        "stem",
        "act:output#0",
        "act:output#1",
        "n2:output",
        "act:output#2",
        "pool:output",
    }


def by_numpy(image: Array, weights: dict[str, Array], decision: QuantizeDecision) -> Array:
    """The residual net on grids, in float64, one operation after the other."""

    def grid(x: Array, key: str) -> Array:
        found = decision.activations[key]
        step = np.float64(np.float32(found.step[0]))
        return np.asarray(np.clip(np.rint(x / step), found.low, found.high) * step)

    def conv(x: Array, layer: str, norm: str) -> Array:
        kernel, side = weights[f"{layer}.weight"].astype(np.float64), x.shape[-1]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        windows = np.stack([padded[:, i : i + side, j : j + side] for i in range(3) for j in range(3)], 1)
        y = np.einsum("oct,cthw->ohw", kernel.reshape(*kernel.shape[:2], 9), windows)
        return np.asarray(y + weights[f"{norm}.bias"].astype(np.float64)[:, None, None])

    x = grid(np.maximum(conv(grid(image, "stem"), "stem", "n0"), 0), "act:output#0")
    y = grid(np.maximum(conv(x, "a", "n1"), 0), "act:output#1")
    y = grid(np.maximum(grid(conv(y, "b", "n2"), "n2:output") + x, 0), "act:output#2")
    y = grid(y.reshape(8, 2, 4, 2, 4).mean((2, 4)), "pool:output")
    return np.asarray(weights["last.weight"].astype(np.float64) @ y.ravel() + weights["last.bias"])


def test_the_model_equals_numpy(backend: Backend, baselines: dict[str, Path], tmp_path: Path) -> None:
    """The folded norms are biases; each tensor with a grid is on it."""
    folder, decision, _ = quantized(backend.name, "residual", plan_of(baselines["residual"]), tmp_path / "run")
    weights, probe = folder.weights("01-quantize"), folder.probe("01-quantize")[0]
    expected = np.stack([by_numpy(image.astype(np.float64), weights, decision) for image in DATA.test.inputs])
    assert relative(probe, expected) <= tolerance("forward_quantized").value
    assert not weights["b.bias"].any()
    file = tmp_path / "run/01-quantize/weights.safetensors"
    assert differing(load_weights(file), weights) == 0


def test_after_pruning_and_masks(backend: Backend, tmp_path: Path) -> None:
    """Zeros of masks are zeros on the grid; the ignored layer is named."""
    stages = [
        {"kind": "prune", "pruning_ratio": 0.25},
        {"kind": "sparsify", "sparsity": 0.5},
        {"kind": "quantize", **LITTLE, "ignored_layers": ["last"]},
    ]
    result = sb.compress(net(backend, Plain), {"stages": stages}, data=DATA, run_dir=tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    masked, integers = folder.weights("02-sparsify"), folder.integers("03-quantize")
    assert set(integers) == {"a.weight", "b.weight"}
    for name, array in integers.items():
        assert not array[masked[name] == 0].any()
        assert (masked[name] == 0).any()
    assert any("left alone: last: ignored_layers names it" in note for note in result.report.stages[3].notes)
    model = sb.restore(net(backend, Plain), tmp_path / "run")
    assert np.array_equal(outputs(model), outputs(result.model))


def test_a_killed_run_calibrates_again(backend: Backend, baselines: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(baselines["residual"])
    for at in (("01-quantize: calibrating", 0), ("01-quantize: calibrating", 2)):
        with pytest.raises(KeyboardInterrupt):
            sb.compress(
                *(net(backend, Residual), plan), data=DATA, run_dir=tmp_path / "run", resume=True, progress=Killing(at)
            )
    sb.compress(net(backend, Residual), plan, data=DATA, run_dir=tmp_path / "run", resume=True)
    whole, _, _ = quantized(backend.name, "residual", plan, tmp_path / "whole")
    broken = RunFolder(tmp_path / "run")
    assert broken.digest() == whole.digest()


@pytest.mark.parametrize(("side", "quantizer"), [("torch", "torchao.pt2e"), ("paddle", "paddle.ptq")])
def test_another_toolkits_quantizer(side: str, quantizer: str, baselines: dict[str, Path], tmp_path: Path) -> None:
    """It decides, the model computes on its grids, and the run is restored like any other."""
    backend = get_backend(side)
    plan = plan_of(baselines["residual"], engine="native", native={"quantizer": quantizer}, ignored_layers=["last"])
    folder, decision, result = quantized(side, "residual", plan, tmp_path / "run")
    assert {name.partition(".")[0] for name in decision.weights} == {"stem", "a", "b"}
    assert result.report.stages[1].metric == 1
    assert f"decided by {quantizer}, applied by slimbridge" in result.report.stages[1].notes
    model = sb.restore(net(backend, Residual), tmp_path / "run")
    assert np.array_equal(outputs(model), outputs(result.model))
    assert all(array.dtype == np.int8 for array in folder.integers("01-quantize").values())


def test_a_model_in_float64(backend: Backend, tmp_path: Path) -> None:
    """It computes in float64, on grids of float32's steps."""
    model = backend.place(net(backend, Residual), "cpu", "float64")
    plan = {"stages": [{"kind": "quantize", **LITTLE}]}
    result = sb.compress(model, plan, data=DATA, run_dir=tmp_path / "run")
    assert {array.dtype.name for array in backend.read(result.model).values()} == {"float64"}
    fresh = backend.place(net(backend, Residual), "cpu", "float64")
    assert np.array_equal(outputs(sb.restore(fresh, tmp_path / "run")), outputs(result.model))


def test_a_loader_with_fewer_batches_than_asked_for(backend: Backend, tmp_path: Path) -> None:
    batches = [(DATA.train.inputs[:16], DATA.train.targets[:16]), (DATA.train.inputs[16:32], DATA.train.targets[16:32])]
    data = Data(batches, DATA.test)
    plan = {"stages": [{"kind": "quantize", "calibration_batches": 5}]}
    result = sb.compress(net(backend, Residual), plan, data=data, run_dir=tmp_path / "run")
    assert ", 2 calibration batches" in result.report.stages[1].notes[0]
