"""Quantization-aware training in runs: what it decides is what it trained, and a kill changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimbridge as sb
from slimbridge import quantize_stage
from slimbridge.decisions import QuantizeDecision
from slimbridge.parity import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.ports import Array, Backend, Model, tensors_in
from slimbridge.quantize.qat import Qat
from slimbridge.runfolder import RunFolder
from tests.integration.quantized import Residual, plan_of, quantized
from tests.integration.small_nets import DATA, TRAIN, net, outputs
from tests.integration.test_pruning_resume import Killing, assert_same

LIKE = {**TRAIN, "learning_rate": 0.005}
WAYS: dict[str, dict[str, Any]] = {
    "moving average": {"qat": {}},
    "moving average, fold": {"qat": {"batch_norm": "fold"}, "weight_bits": 4},
    "moving average, asymmetric": {"qat": {}, "activation_scheme": "asymmetric"},
    "lsq": {"qat": {"activation_ranges": "lsq", "weight_ranges": "lsq"}, "weight_bits": 4, "activation_bits": 4},
    "lsq, fold": {
        "qat": {"activation_ranges": "lsq", "weight_ranges": "lsq", "batch_norm": "fold"},
        "weight_bits": 4,
        "weight_granularity": "tensor",
    },
    "lsq plus": {"qat": {"activation_ranges": "lsq_plus"}, "activation_scheme": "asymmetric"},
    "pact": {"qat": {"activation_ranges": "pact"}, "weight_bits": 4, "activation_bits": 4},
    "layer placement": {"qat": {}, "placement": "layer", "weight_granularity": "tensor"},
}


def stage(way: str, epochs: int = 1) -> dict[str, Any]:
    """A stage that trains."""
    found = WAYS[way]
    return {**found, "qat": {"train": {**LIKE, "epochs": epochs}, **found["qat"]}}


def on_test_data(backend: Backend, model: Model) -> Array:
    return backend.ops.numpy(tensors_in(backend.forward(model, [DATA.test.inputs]).output)[0])


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a stage had at the moment before it decided: its Qat, all values, and the model's outputs."""
    found: dict[str, Any] = {}
    whole, decide = quantize_stage.train_stage, Qat.decide

    def trained(scene: Any, name: str, settings: Any, model: Model, *more: Any, **options: Any) -> Any:
        model, epochs = whole(scene, name, settings, model, *more, **options)
        found["outputs"] = on_test_data(scene.backend, model)
        return model, epochs

    def deciding(qat: Qat, values: Any) -> Any:
        found.update(qat=qat, values=values)
        return decide(qat, values)

    monkeypatch.setattr(quantize_stage, "train_stage", trained)
    monkeypatch.setattr(Qat, "decide", deciding)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_what_was_trained_is_what_is_decided(
    backend: Backend, way: str, baselines: dict[str, Path], tmp_path: Path, before: dict[str, Any]
) -> None:
    """The model before, with its fake quantizations, and the one after on fixed grids give the same outputs."""
    plan = plan_of(baselines["residual"], **stage(way))
    folder, decision, result = quantized(backend.name, "residual", plan, tmp_path / "run")
    record = result.report.stages[1]
    assert decision.observer == f"qat {plan['stages'][0]['qat'].get('activation_ranges', 'moving_average')}"
    assert len(record.epochs) == 1
    assert record.metric_before_training is not None
    assert record.metric > 0.9
    row = "forward_quantized" if "plus" not in way else "export_runtime"
    assert relative(on_test_data(backend, result.model), before["outputs"]) <= tolerance(row).value
    names = set(backend.read(net(backend, Residual)))
    assert set(folder.weights("01-quantize")) == names, "what was trained beside the model is gone"
    model = sb.restore(net(backend, Residual), tmp_path / "run")
    assert np.array_equal(on_test_data(backend, model), folder.probe("01-quantize")[0])
    assert np.array_equal(outputs(model), outputs(result.model))


def test_statistics_move_until_they_are_frozen(
    backend: Backend, baselines: dict[str, Path], tmp_path: Path, before: dict[str, Any]
) -> None:
    """Held from the first step on they are the baseline's; never held they are others."""
    statistics, ranges = [], []
    for share in (0.0, 1.0):
        section = {"train": LIKE, "freeze_batch_norm_after": share, "freeze_ranges_after": share}
        folder, decision, _ = quantized(
            backend.name, "residual", plan_of(baselines["residual"], qat=section), tmp_path / str(share)
        )
        start = folder.weights("00-baseline")["n0.running_mean"]
        statistics.append(np.array_equal(before["values"]["n0.running_mean"], start))
        ranges.append(decision.activations)
    assert statistics == [True, False]
    _, calibrated, _ = quantized(backend.name, "residual", plan_of(baselines["residual"]), tmp_path / "ptq")
    assert ranges[0] == calibrated.activations
    assert ranges[1] != calibrated.activations


@pytest.mark.parametrize("way", ["moving average", "lsq, fold"])
def test_killed_and_resumed(backend: Backend, way: str, baselines: dict[str, Path], tmp_path: Path) -> None:
    """In each epoch, and before the decision: the weights and grids in the end are those of an unbroken run."""
    plan = plan_of(baselines["residual"], **stage(way, epochs=2))
    whole, _, _ = quantized(backend.name, "residual", plan, tmp_path / "whole")
    training = "01-quantize: training"
    for at in ((training, 1), (training, 5), ("evaluating", 0)):
        with pytest.raises(KeyboardInterrupt):
            sb.compress(
                net(backend, Residual),
                plan,
                data=DATA,
                run_dir=tmp_path / "run",
                resume=True,
                progress=AfterTraining(at) if at[0] == "evaluating" else Killing(at),
            )
    assert (tmp_path / "run/checkpoint-01-quantize.safetensors").exists()
    sb.compress(net(backend, Residual), plan, data=DATA, run_dir=tmp_path / "run", resume=True)
    assert_same(whole, RunFolder(tmp_path / "run"))


class AfterTraining(Killing):
    """Stops a run at the first piece of work after its last training."""

    def start(self, text: str, total: int) -> None:
        if any("training" in work for work in self.work):
            raise KeyboardInterrupt
        super().start(text, total)


def test_equal_starts_end_near_each_other(
    torch_backend: Backend, paddle_backend: Backend, baselines: dict[str, Path], tmp_path: Path
) -> None:
    """Both frameworks draw the same batches; after three steps the grids of weights are still close."""
    steps = []
    for side in (torch_backend, paddle_backend):
        plan = plan_of(baselines["residual"], **stage("lsq"))
        _, decision, result = quantized(side.name, "residual", plan, tmp_path / side.name)
        assert isinstance(decision, QuantizeDecision)
        steps.append(np.array(decision.weights["last.weight"].step))
        assert result.report.stages[1].metric > 0.9
    assert relative(steps[0], steps[1]) <= tolerance("forward_quantized").value


def test_a_loss_of_the_users_own(backend: Backend, baselines: dict[str, Path], tmp_path: Path) -> None:
    ops = backend.ops

    def halved(output: Any, labels: Any) -> Any:
        return 0.5 * ops.mean(-ops.sum(ops.log_softmax(output, 1) * ops.one_hot(labels, 2, output), 1))

    plan = plan_of(baselines["residual"], **stage("moving average"))
    result = sb.compress(net(backend, Residual), plan, data=DATA, run_dir=tmp_path / "run", loss=halved)
    assert list(result.report.stages[1].epochs[0].terms) == ["loss"]
