"""Each workaround of the Paddle backend: that it works, and that Paddle still needs it.

A test named `..._is_still_needed` fails when a release of Paddle makes its workaround superfluous.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimbridge.parity import tolerance

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is an optional extra")

from slimbridge.errors import BackendError  # noqa: E402
from slimbridge_paddle import _compat, capture  # noqa: E402

PRECISE = tolerance("operation_float64").value

nn = paddle.nn


def imported(module: str, tmp_path: Path) -> str:
    """What a fresh process prints when it imports a module where no ccache is to be found."""
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("PYTHONWARNINGS", None)
    command = [sys.executable, "-W", "always::UserWarning", "-c", f"import {module}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_the_quiet_import_is_still_needed(tmp_path: Path) -> None:
    assert "ccache" in imported("paddle", tmp_path)


def test_the_import_is_quiet(tmp_path: Path) -> None:
    printed = imported("slimbridge_paddle", tmp_path)
    assert "ccache" not in printed
    assert "Warning" not in printed


def test_the_fast_path_is_for_amd_only_and_never_overrides(monkeypatch: Any, tmp_path: Path) -> None:
    for vendor, expected in (("AuthenticAMD", True), ("GenuineIntel", False)):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {vendor}\n")
        assert _compat.is_amd(tmp_path / "cpuinfo") is expected
    assert not _compat.is_amd(tmp_path / "absent")
    for name in ("MKL_DEBUG_CPU_TYPE", "GLOG_minloglevel"):
        monkeypatch.delenv(name, raising=False)
    _compat.prepare_environment(amd=False)
    assert "MKL_DEBUG_CPU_TYPE" not in os.environ and os.environ["GLOG_minloglevel"] == "2"  # noqa: SIM112
    _compat.prepare_environment(amd=True)
    assert os.environ["MKL_DEBUG_CPU_TYPE"] == "5"
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "4")
    _compat.prepare_environment(amd=True)
    assert os.environ["MKL_DEBUG_CPU_TYPE"] == "4"


def test_other_releases_are_refused(monkeypatch: Any) -> None:
    _compat.check_version()
    monkeypatch.setattr(paddle, "__version__", "3.4.0")
    with pytest.raises(BackendError, match=r"PaddlePaddle 3.4.0 is installed; the paddle backend needs 3.3.x"):
        _compat.check_version()


def magnitudes(dtype: str) -> Any:
    """Halves, their neighbours and whole numbers over all exponents, both signs, enough for vectorised kernels."""
    halves = np.concatenate([np.arange(0, 200) + 0.5, 2.0 ** np.arange(-60, 60), 2.0 ** np.arange(1, 60) + 0.5])
    values = halves.astype(dtype)
    near = [values, np.nextafter(values, np.inf, dtype=dtype), np.nextafter(values, -np.inf, dtype=dtype)]
    return np.concatenate([*near, *(-part for part in near), np.array([0.0, 1e30], dtype)]).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_is_half_to_even(dtype: str) -> None:
    x = magnitudes(dtype)
    assert np.array_equal(_compat.round_half_even(paddle.to_tensor(x)).numpy(), np.round(x))
    assert np.array_equal(_compat.half_even_from_floor(paddle.to_tensor(x)).numpy(), np.round(x))


def test_avoiding_equality_is_still_needed() -> None:
    assert bool((paddle.to_tensor(np.array(0.5)) == np.nextafter(0.5, 1)).numpy())


def updated(optimizer: Any, param: Any) -> Any:
    """The parameter after three steps on the gradient 3 p**2 with lr 0.1."""
    for _ in range(3):
        (param * param * param).sum().backward()
        optimizer.step()
        optimizer.clear_grad()
    return param.numpy()


def start() -> Any:
    return paddle.create_parameter([3], "float64", default_initializer=nn.initializer.Assign(np.array([0.1, 0.5, 1.0])))


def momentum_by_hand() -> Any:
    w, v = np.array([0.1, 0.5, 1.0]), np.zeros(3)
    for _ in range(3):
        g = 3 * w * w + 0.03 * w
        v = 0.9 * v + g
        w = w - 0.1 * v
    return w


def adamw_by_hand() -> Any:
    w, m, v = np.array([0.1, 0.5, 1.0]), np.zeros(3), np.zeros(3)
    for t in range(1, 4):
        g = 3 * w * w
        w = w * (1 - 0.1 * 0.03)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return w


@pytest.mark.parametrize(
    ("ours", "native", "options", "expected"),
    [
        (_compat.Momentum, paddle.optimizer.Momentum, {"momentum": 0.9}, momentum_by_hand()),
        (_compat.AdamW, paddle.optimizer.AdamW, {}, adamw_by_hand()),
    ],
    ids=["momentum", "adamw"],
)
def test_exact_float64_optimizers_are_right_and_still_needed(
    ours: Any, native: Any, options: Any, expected: Any
) -> None:
    errors = []
    for kind in (ours, native):
        param = start()
        optimizer = kind(0.1, parameters=[param], weight_decay=0.03, **options)
        errors.append(np.abs(updated(optimizer, param) - expected).max())
    assert errors[0] < 1e-15
    assert errors[1] > 1e-11


def test_corrected_statistics_are_right_and_still_needed() -> None:
    x = np.random.default_rng(0).normal(size=(4, 2, 3, 3))
    layer = nn.BatchNorm2D(2).to(dtype="float64")
    old_mean, old_variance = layer._mean.clone(), layer._variance.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer(paddle.to_tensor(x))
    share = _compat.float32_attribute(0.9)
    biased, unbiased = x.var((0, 2, 3)), x.var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(layer._variance.numpy(), share + (1 - share) * biased, rtol=PRECISE)  # what Paddle does
    fixed = _compat.corrected_statistic(old_variance, layer._variance, 0.9, 36 / 35)
    np.testing.assert_allclose(fixed.numpy(), 0.9 + 0.1 * unbiased, rtol=PRECISE)
    fixed = _compat.corrected_statistic(old_mean, layer._mean, 0.9)
    np.testing.assert_allclose(fixed.numpy(), 0.1 * x.mean((0, 2, 3)), rtol=PRECISE)


def test_quiet_training_is_still_needed() -> None:
    layer, x = nn.BatchNorm1D(2), paddle.ones([3, 2])
    with pytest.warns(UserWarning, match="When training, we now always track"):
        layer(x)
    with warnings.catch_warnings(record=True) as caught, _compat.quiet_training():
        layer(x)
    assert not caught


class Keeps(nn.Layer):
    """Stores what it computed."""

    def forward(self, x: Any) -> Any:
        """Twice the input."""
        self.last = x * 2
        return self.last


def test_restoring_attributes_is_still_needed() -> None:
    model = Keeps()
    program = capture._direct(model, [([2], "float32")])
    assert isinstance(model.last, paddle.pir.Value) and len(program.outputs) == 1
    model = Keeps()
    capture.capture(model, [np.zeros(2, np.float32)])
    assert not hasattr(model, "last")


def test_checking_names_is_still_needed() -> None:
    model = nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        missing, unexpected = model.set_state_dict({"wieght": model.weight})  # no error
    assert missing == ["weight", "bias"] and unexpected == ["wieght"]


def test_checking_optimizer_shapes_is_still_needed() -> None:
    layer = nn.Linear(3, 2, bias_attr=False)
    optimizer = paddle.optimizer.Momentum(0.1, 0.9, [layer.weight])
    layer(paddle.ones([1, 3])).sum().backward()
    optimizer.step()
    optimizer.clear_grad(set_to_zero=False)
    layer.weight.value().get_tensor().set(np.ones((3, 1), np.float32), paddle.CPUPlace())
    layer(paddle.ones([1, 3])).sum().backward()
    before = optimizer._accumulators["velocity"][layer.weight.name].shape
    optimizer.step()  # no error
    assert (before, layer.weight.shape) == ([3, 2], [3, 1])


def test_leaving_call_stacks_out_is_still_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paddle asks for a stack at each captured operation; with the shim it gets none, and all is put back."""
    calls = []
    original = traceback.extract_stack

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(traceback, "extract_stack", counted)
    model = nn.Linear(2, 2)
    capture._translated(model, [([1, 2], "float32")])
    assert calls
    calls.clear()
    capture.capture(model, [np.zeros((1, 2), np.float32)])
    assert not calls
    assert traceback.extract_stack is counted


def test_the_quiet_capture_is_still_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = [([1, 2, 4], "float32")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        capture._direct(Attends(), spec)
    assert not caught
    monkeypatch.setattr(capture, "quiet_capture", nullcontext)
    with pytest.warns(UserWarning, match="Tensor do not have 'place'"):
        capture._direct(Attends(), spec)


class Attends(nn.Layer):
    """Paddle's own causal attention on one head."""

    def forward(self, x: Any) -> Any:
        """The input attends to itself."""
        x = x.unsqueeze(2)
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


@contextmanager
def slim() -> Iterator[Any]:
    """PaddleSlim's pruners, quiet but with no other workaround."""
    pytest.importorskip("paddleslim", reason="PaddleSlim is an optional extra")
    with _compat.quiet_paddleslim():
        yield import_module("paddleslim.dygraph.prune")


def pruner(module: Any) -> Any:
    """A pruner of PaddleSlim, which traces its model at once."""
    return module.L1NormFilterPruner(nn.Sequential(nn.Conv2D(3, 4, 1), nn.Conv2D(4, 2, 1)), [[1, 3, 4, 4]])


def test_the_old_name_of_the_guard_is_still_needed() -> None:
    with slim() as module, _compat.old_representation(), pytest.raises(AttributeError, match="_to_static_mode_guard_"):
        pruner(module)
    assert paddle.in_dynamic_mode()


def test_the_old_representation_is_still_needed() -> None:
    with slim() as module, _compat.old_guard_name(), pytest.raises(AttributeError, match="input_arg_names"):
        pruner(module)


def test_putting_dynamic_mode_back_is_still_needed() -> None:
    try:
        with slim() as module, pytest.raises(AttributeError):
            pruner(module)
        assert not paddle.in_dynamic_mode()
    finally:
        paddle.disable_static()


def test_the_pruners_work_with_all_workarounds_and_nothing_of_them_stays() -> None:
    guard = paddle.base.dygraph.base
    tracing: Any = import_module("paddleslim.core.dygraph")
    original = tracing._dy2prog
    with _compat.paddleslim_pruning() as module:
        assert len(list(pruner(module).collections)) == 1
        assert tracing._dy2prog is not original and hasattr(guard, "_to_static_mode_guard_")
    assert tracing._dy2prog is original and not hasattr(guard, "_to_static_mode_guard_")
    assert paddle.in_dynamic_mode()


def test_the_old_product_is_still_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """PaddleSlim asks for `np.product`, which is there up to NumPy 1."""
    weight = np.arange(12.0).reshape(2, 3, 2)
    with slim() as module:
        measure = module.FPGMFilterPruner.get_distance_sum
        monkeypatch.delattr(np, "product", raising=False)
        with pytest.raises(AttributeError, match="product"):
            measure(None, weight, 0)
        with _compat.numpy_product():
            assert measure(None, weight, 0) == np.sqrt(6 * 36.0)
    assert not hasattr(np, "product")


def test_silencing_paddleslim_is_still_needed(capfd: pytest.CaptureFixture[str]) -> None:
    """Its masks are announced by a print, its traces by the log."""
    with slim() as module:
        pass
    module.UnstructuredPruner(nn.Sequential(nn.Linear(2, 2)), "ratio")
    assert "target type" in capfd.readouterr().out
    with _compat.quiet_paddleslim():
        module.UnstructuredPruner(nn.Sequential(nn.Linear(2, 2)), "ratio")
    assert capfd.readouterr().out == ""


def test_masking_without_a_forward_pass_is_still_needed() -> None:
    """PaddleSlim's own masks become boolean, which Paddle does not multiply: they are read, never applied."""
    with slim() as module:
        made = module.UnstructuredPruner(nn.Sequential(nn.Linear(8, 8)), "ratio", ratio=0.5)
        made.step()
        with pytest.raises(TypeError, match="bool"):
            made.update_params()
