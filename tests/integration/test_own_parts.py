"""A user's own model, data, loss and metric, on either framework."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slimbridge as sb
from slimbridge.runner import Result

TRAIN = {"epochs": 2, "batch_size": 32, "learning_rate": 0.05}
PLAN = {
    "stages": [
        {"kind": "prune", "pruning_ratio": 0.5, "finetune": TRAIN},
        {"kind": "quantize", "calibration_batches": 2},
    ]
}


def torch_parts() -> tuple[Any, Any, Any]:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 64, 2)
    )
    x, y = striped()
    loader = DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=32)
    return model, loader, torch.nn.functional.cross_entropy


def paddle_parts() -> tuple[Any, Any, Any]:
    import paddle
    from paddle.io import DataLoader, TensorDataset

    model = paddle.nn.Sequential(
        paddle.nn.Conv2D(1, 8, 3, padding=1), paddle.nn.ReLU(), paddle.nn.Flatten(), paddle.nn.Linear(8 * 64, 2)
    )
    x, y = striped()
    loader = DataLoader(TensorDataset([paddle.to_tensor(x), paddle.to_tensor(y)]), batch_size=32)
    return model, loader, paddle.nn.functional.cross_entropy


def striped(count: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Images with horizontal or vertical stripes: a task that a small net learns at once."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count)
    rows = np.tile((np.arange(8) % 2)[:, None], (1, 8)).astype(np.float32)
    images = np.where(labels[:, None, None] == 0, rows, rows.T)[:, None]
    return (images + 0.1 * rng.standard_normal(images.shape)).astype(np.float32), labels.astype(np.int64)


@pytest.fixture(params=["torch", "paddle"])
def parts(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    return torch_parts() if request.param == "torch" else paddle_parts()


def test_native_loader_loss_and_metric(parts: tuple[Any, Any, Any], tmp_path: Path) -> None:
    model, loader, loss = parts
    calls = []

    def metric(outputs: np.ndarray, targets: np.ndarray) -> float:
        calls.append(outputs.shape)
        return float((outputs.argmax(1) == targets).mean())

    side = sb.backend_of(model)
    before = side.read(model)
    result = sb.compress(model, PLAN, data=(loader, loader), loss=loss, metric=metric)
    assert all(np.array_equal(array, before[name]) for name, array in side.read(model).items()), "the model was changed"
    assert result.report.stages[-1].metric > 0.95
    assert set(calls) == {(96, 2)}
    assert side.read(result.model)["0.weight"].shape[0] == 4
    assert_reloads(result, model, tmp_path)


def assert_reloads(result: Result, model: Any, tmp_path: Path) -> None:
    """A fresh model and the saved folder give the compressed model again."""
    folder = result.save(tmp_path / "saved")
    assert (folder / "report.html").exists()
    side, x = sb.backend_of(model), striped(8)[0]
    again = sb.restore(model, folder)
    first, second = (side.ops.numpy(side.forward(m, [x]).output) for m in (result.model, again))
    assert np.array_equal(first, second)
    with pytest.raises(sb.SlimbridgeError, match="not empty"):
        result.save(folder)


def test_arrays_as_data(parts: tuple[Any, Any, Any]) -> None:
    result = sb.compress(parts[0], PLAN, data=(striped(), striped(32)))
    assert result.report.stages[-1].metric > 0.9
    assert "accuracy" in str(result.report)


def test_saved_plan_is_the_truth(parts: tuple[Any, Any, Any]) -> None:
    """What arguments replaced is not claimed by the saved plan; every default is in it."""
    result = sb.compress(parts[0], {**PLAN, "data": {"name": "digits"}}, data=(striped(), striped(32)))
    saved = sb.load_plan(result.folder / "plan.yaml")
    assert saved.data is None
    assert saved.backend == sb.backend_of(parts[0]).name
    assert saved.stages[1].observer == "moving_average"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((iter([]), []), "only once"),
        (([], []), "no batch"),
        ((striped(), (striped()[0] * np.nan, striped()[1])), "not finite"),
        ("digits", "pair"),
    ],
)
def test_unusable_data(data: Any, message: str) -> None:
    with pytest.raises(sb.SlimbridgeError, match=message) as caught:
        sb.compress(torch_parts()[0], PLAN, data=data)
    assert len(str(caught.value).splitlines()) <= 2


def test_nan_weights_are_named(parts: tuple[Any, Any, Any]) -> None:
    side = sb.backend_of(parts[0])
    weight = side.read(parts[0])["0.weight"]
    weight[0, 0, 0, 0] = np.nan
    side.write(parts[0], {"0.weight": weight}, partial=True)
    with pytest.raises(sb.SlimbridgeError, match=r"NaN|not finite"):
        sb.compress(parts[0], PLAN, data=(striped(), striped(32)))
