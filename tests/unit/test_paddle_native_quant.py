"""Paddle's post-training quantization as an engine: its grids, against Paddle's own conversion, and its refusals."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is an optional extra")
pytest.importorskip("paddleslim", reason="PaddleSlim is an optional extra")

import slimbridge_paddle  # noqa: E402
from slimbridge.decisions import QuantParams  # noqa: E402
from slimbridge.errors import BackendError, ModelError  # noqa: E402
from slimbridge.ports import QuantRequest  # noqa: E402
from slimbridge.quantize.grid import to_integers  # noqa: E402
from slimbridge_paddle import _compat, native_quant  # noqa: E402

nn = paddle.nn
BACKEND = slimbridge_paddle.create()
RNG = np.random.default_rng(0)
BATCHES = [[RNG.normal(size=(4, 3, 6, 6)).astype(np.float32) * scale] for scale in (1.0, 2.0, 0.5)]
CLASSES = {"absmax": "Absmax", "hist": "Hist", "mse": "MSE", "avg": "AVG", "emd": "EMD"}


class Small(nn.Layer):
    """Convolution, BatchNorm, depthwise convolution, linear layer, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2D(3, 8, 3)
        self.bn = nn.BatchNorm2D(8)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2D(8, 8, 3, groups=8, bias_attr=False))
        self.fc = nn.Linear(8, 5)
        self.idle = nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        return self.fc(self.body(self.bn(self.stem(x))).mean([2, 3]))


def small() -> Any:
    paddle.seed(3)
    return Small()


def converted(model: Any, observer: str, bits: int = 8) -> dict[str, Any]:
    """Paddle's own way: path -> converted layer."""
    with _compat.paddleslim_observers() as observers:
        config = paddle.quantization.QuantConfig(activation=None, weight=None)
        config.add_type_config(
            [nn.Conv2D, nn.Linear],
            activation=getattr(observers, f"{CLASSES[observer]}Observer")(quant_bits=bits),
            weight=observers.AbsMaxChannelWiseWeightObserver(quant_bits=bits),
        )
        ptq = paddle.quantization.PTQ(config)
        quantized = ptq.quantize(model)
        for batch in BATCHES:
            quantized(paddle.to_tensor(batch[0]))
        done = ptq.convert(quantized)
    return {path: layer for path, layer in done.named_sublayers() if getattr(layer, "converted", False)}


@pytest.mark.parametrize(("observer", "bits"), [*((name, 8) for name in CLASSES), ("absmax", 4)])
def test_thresholds_and_integers_are_those_that_paddle_converts_to(observer: str, bits: int) -> None:
    model = small()
    weights = BACKEND.read(model)
    request = QuantRequest("paddle.ptq", bits, bits, options={"observer": observer})
    decision = BACKEND.native_quantize(model, request, BATCHES)
    model.eval()
    del model.idle  # Paddle cannot convert a layer that never ran
    oracle = converted(model, observer, bits)
    assert decision.observer == f"paddle.ptq:{observer}" and not decision.folds and decision.mode == "static"
    assert set(decision.activations) == set(oracle) == {"stem", "body.1", "fc"}
    assert set(decision.weights) == {f"{path}.weight" for path in oracle}
    limit = 2 ** (bits - 1) - 1
    for path, layer in oracle.items():
        held = layer.weight.numpy()
        grid = decision.weights[f"{path}.weight"]
        assert (grid.axis, grid.low, grid.high) == (0, -limit - 1, limit)
        assert np.array_equal(to_integers(weights[f"{path}.weight"], grid), held.T if held.ndim == 2 else held)
        threshold = float(np.asarray(layer.activation_quanter._quanter._scales.numpy()).reshape(()))
        step = float(np.float32(threshold / limit))
        assert decision.activations[path] == QuantParams(step=(step,), low=-limit - 1, high=limit)


def test_the_model_is_left_as_it_was_and_nothing_is_printed(capfd: Any) -> None:
    model = small()
    before = BACKEND.read(model)
    decision = BACKEND.native_quantize(model, QuantRequest("paddle.ptq", ignored=("stem",)), BATCHES)
    after = BACKEND.read(model)
    assert model.training and list(before) == list(after)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert set(decision.activations) == {"body.1", "fc"}
    assert {item.layer: item.reason for item in decision.skipped} == {
        "stem": "ignored_layers names it",
        "idle": "the calibration batches did not run it",
    }
    assert capfd.readouterr() == ("", "")


def test_a_shared_layer_is_left_alone() -> None:
    model = small()
    model.body.append(model.body[1])
    decision = BACKEND.native_quantize(model, QuantRequest("paddle.ptq"), [[np.ones((1, 3, 8, 8), np.float32)]])
    assert set(decision.activations) == {"stem", "fc"}
    assert {item.layer for item in decision.skipped} == {"body.1", "idle"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observer": "kl"}, r"'kl' is not offered: PaddleSlim 2.6.0 chooses poor thresholds"),
        ({"observer": "lsq"}, r"'lsq' is not offered: PaddleSlim 2.6.0 fails on Paddle 3.3"),
        ({"symmetric": False}, r"'symmetric' is not offered: Paddle 3.3 ignores the zero point"),
        ({"observer": "median"}, r"unknown observer 'median'; allowed: absmax, hist, mse, avg, emd"),
        ({"percent": 0.9}, r"observer 'absmax' has no option percent; allowed: observer$"),
        ({"observer": "hist", "bits": 3}, r"'hist' has no option bits; allowed: observer, bins_count, percent"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        BACKEND.native_quantize(small(), QuantRequest("paddle.ptq", options=options), BATCHES)


def test_the_options_of_hist_count() -> None:
    found = [
        BACKEND.native_quantize(small(), QuantRequest("paddle.ptq", options={"observer": "hist", **options}), BATCHES)
        for options in ({}, {"percent": 0.9})
    ]
    assert found[1].activations["stem"].step < found[0].activations["stem"].step


def test_numpy_2_unknown_quantizers_and_bits(monkeypatch: Any) -> None:
    with pytest.raises(BackendError, match=r"unknown quantizer 'paddle.qat'; allowed: paddle.ptq"):
        BACKEND.native_quantize(small(), QuantRequest("paddle.qat"), BATCHES)
    with pytest.raises(BackendError, match=r"takes 2 to 8 bits, found 16"):
        BACKEND.native_quantize(small(), QuantRequest("paddle.ptq", activation_bits=16), BATCHES)
    monkeypatch.setattr(np, "__version__", "2.1.0")
    with pytest.raises(BackendError, match=r"'hist' of PaddleSlim 2.6.0 needs NumPy 1, found 2.1.0"):
        BACKEND.native_quantize(small(), QuantRequest("paddle.ptq", options={"observer": "hist"}), BATCHES)


def test_nothing_quantized_no_batch_and_a_model_that_fails() -> None:
    with pytest.raises(ModelError, match=r"Paddle quantized 0 of 1 layers; it takes plain Conv2D and Linear layers"):
        BACKEND.native_quantize(nn.Sequential(nn.Conv1D(3, 4, 1)), QuantRequest("paddle.ptq"), [[np.ones((1, 3, 4))]])
    with pytest.raises(ModelError, match="at least one calibration batch is needed"):
        BACKEND.native_quantize(small(), QuantRequest("paddle.ptq"), [])
    with pytest.raises(ModelError, match=r"Paddle's calibration with 'absmax' failed: .*channel"):
        BACKEND.native_quantize(small(), QuantRequest("paddle.ptq"), [[np.ones((1, 2, 6, 6))]])
    with pytest.raises(ModelError, match="the model has no layer 'steem'"):
        BACKEND.native_quantize(small(), QuantRequest("paddle.ptq", ignored=("steem",)), BATCHES)


def test_without_paddleslim(monkeypatch: Any) -> None:
    assert BACKEND.capabilities().native_quantizers == ("paddle.ptq",)
    monkeypatch.setattr(native_quant, "find_spec", lambda name: None)
    assert BACKEND.capabilities().native_quantizers == ()

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'", name="paddleslim")

    monkeypatch.setattr(_compat, "import_module", missing)
    with pytest.raises(BackendError, match=r"'paddleslim' is not installed: pip install 'slimbridge\[paddle\]'"):
        BACKEND.native_quantize(small(), QuantRequest("paddle.ptq"), BATCHES)


def test_leaving_asymmetric_observers_out_is_still_needed() -> None:
    """Paddle's quanter gives the same integers whatever its zero point is."""
    linear = import_module("paddle.nn.quant.format")
    x = paddle.to_tensor(np.linspace(-1, 1, 8, dtype=np.float32))
    found = [linear.LinearQuanter(1.0, zero_point=zero)(x).numpy() for zero in (0.0, 20.0)]
    assert np.array_equal(*found)
