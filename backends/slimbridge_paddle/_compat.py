"""Everything that works around the framework: one function or class each, with the versions and the reason.

Importing this module imports Paddle for the first time, so that its noise is silenced in one place.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from slimbridge.errors import BackendError


def is_amd(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Is the processor made by AMD? False where the system does not say."""
    return cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text(errors="replace")


def prepare_environment(amd: bool) -> None:
    """Variables that Paddle reads while it is imported; what the user has set stays.

    * GLOG_minloglevel (3.3): the C++ side logs warnings such as "PIR does not support input out tensor".
    * MKL_DEBUG_CPU_TYPE (3.3, AMD only): the bundled MKL takes a slow path on AMD processors; type 5 makes training
      about three times faster and changes outputs by less than 1e-6.
    """
    os.environ.setdefault("GLOG_minloglevel", "2")
    if amd:
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")


prepare_environment(is_amd())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # 3.3 warns "No ccache found" at every import
    import paddle
    from paddle.jit.dy2static.program_translator import graph_tracing_guard

__all__ = ["AdamW", "Momentum", "check_version", "graph_tracing_guard", "is_amd", "prepare_environment"]


def check_version() -> None:
    """Raise BackendError unless Paddle is a 3.3: the tracer and the surgery use names that Paddle keeps private."""
    version = str(paddle.__version__)
    if not version.startswith("3.3."):
        raise BackendError(f"PaddlePaddle {version} is installed; the paddle backend needs 3.3.x")


@contextmanager
def no_call_stacks() -> Iterator[None]:
    """Keep Paddle from noting the Python stack of each operation that it captures.

    3.3 calls `traceback.extract_stack` for every operation of a program, for its own error messages: 60 % of the time
    of tracing a ResNet-50. No flag turns it off (FLAGS_call_stack_level does not). Other threads that ask for a stack
    in the meantime get an empty one.
    """
    original = traceback.extract_stack
    traceback.extract_stack = lambda *args, **kwargs: traceback.StackSummary()
    try:
        yield
    finally:
        traceback.extract_stack = original


@contextmanager
def quiet_capture() -> Iterator[None]:
    """No warning that a symbolic value has no place (3.3's own attention asks it for one)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Tensor do not have 'place' interface for pir graph mode")
        yield


@contextmanager
def quiet_training() -> Iterator[None]:
    """No warning from BatchNorm (3.3 warns that it tracks statistics, whenever it trains)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="When training, we now always track global mean")
        yield


@cache
def rounds_half_even(place: str) -> bool:
    """Does paddle.round round half to even on this device? (3.3 does on the CPU; older releases round half away.)"""
    probe = paddle.to_tensor(np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], np.float32), place=_place(place))
    return bool((paddle.round(probe).numpy() == np.array([0, 2, 2, 0, -2, -2])).all())


def _place(name: str) -> Any:
    return "gpu" if "gpu" in name else "cpu"


def half_even_from_floor(x: Any) -> Any:
    """Round half to even by floor alone, right for all magnitudes: x - floor(x) is exact where it decides.

    No `==`: Paddle 3.3 calls two floating numbers equal when they differ by less than 1e-8.
    """
    low = paddle.floor(x)
    rest = x - low
    odd = low - 2 * paddle.floor(low / 2)
    up = (rest > 0.5) | ((rest >= 0.5) & (odd > 0.5))
    return low + up.astype(x.dtype)


def round_half_even(x: Any) -> Any:
    """Nearest integer, half to even, on any device; the gradient is zero."""
    return paddle.round(x) if rounds_half_even(str(x.place)) else half_even_from_floor(x)


def true_divide(x: Any, y: Any) -> Any:
    """The quotient x / y, each entry rounded as IEEE 754 says.

    3.3 on the CPU divides tensors of equal shapes by MKL's vector routine, which is one unit in the last place off in
    1 to 2 % of the entries; where it has to broadcast it divides itself.
    """
    if list(x.shape) != list(y.shape):
        return paddle.divide(x, y)
    return paddle.divide(x.unsqueeze(0), y).squeeze(0)


def float32_attribute(value: float) -> float:
    """The value that a kernel really uses (3.3: many attributes are float32 even where the tensors are float64)."""
    return float(np.float32(value))


def corrected_statistic(old: Any, new: Any, momentum: float, factor: float = 1.0) -> Any:
    """Running statistic of a batch normalisation as PyTorch defines it, from what Paddle 3.3 computed.

    Paddle averages the *biased* batch variance, with its momentum rounded to float32. The batch statistic is taken
    back out of `new`, multiplied by `factor` (n / (n - 1) makes the variance unbiased) and averaged again.

    Args:
        old: statistic before the call, shape (channels,).
        new: statistic after it, same shape.
        momentum: share of the old value that is kept.
        factor: correction of the batch statistic.

    Returns:
        A tensor in the dtype of `new`; computed in float64.
    """
    used = float32_attribute(momentum)
    before, after = old.astype("float64"), new.astype("float64")
    batch = (after - before * used) / (1.0 - used)
    return (before * momentum + batch * (factor * (1.0 - momentum))).astype(new.dtype)


class Momentum(paddle.optimizer.Momentum):
    """Momentum that is exact in float64 (3.3's kernel rounds momentum and weight decay to float32)."""

    def _append_optimize_op(self, block: Any, param_and_grad: Any) -> Any:
        param, grad = param_and_grad
        if param.dtype != paddle.float64:
            return super()._append_optimize_op(block, param_and_grad)
        velocity = self._get_accumulator(self._velocity_acc_str, param)
        with paddle.no_grad():
            grad = grad + param * self._regularization_coeff
            paddle.assign(velocity * self._momentum + grad, output=velocity)
            step = grad + velocity * self._momentum if self._use_nesterov else velocity
            paddle.assign(param - step * self.get_lr(), output=param)
        return None


class AdamW(paddle.optimizer.AdamW):
    """AdamW that is exact in float64 (3.3's kernel rounds the decay to float32)."""

    _weight_decay: float

    def _append_optimize_op(self, block: Any, param_and_grad: Any) -> Any:
        param = param_and_grad[0]
        if param.dtype != paddle.float64:
            return super()._append_optimize_op(block, param_and_grad)
        decay = self._weight_decay
        self._weight_decay = 0.0
        try:
            with paddle.no_grad():
                paddle.assign(param * (1.0 - self.get_lr() * decay), output=param)
            return super()._append_optimize_op(block, param_and_grad)
        finally:
            self._weight_decay = decay


@contextmanager
def paddleslim_pruning() -> Iterator[Any]:
    """The module `paddleslim.dygraph.prune`, quiet and with all that PaddleSlim 2.6.0 needs beside Paddle 3.3.

    It is imported here and nowhere else, since that takes seconds; ModuleNotFoundError where it, or something that
    it imports, is not installed.
    """
    with ExitStack() as shims:
        shims.enter_context(quiet_paddleslim())
        module = import_module("paddleslim.dygraph.prune")
        for shim in (old_guard_name, old_representation, numpy_product):
            shims.enter_context(shim())
        yield module


@contextmanager
def paddleslim_observers() -> Iterator[Any]:
    """The module `paddleslim.quant.observers`, quiet; imported here and nowhere else, as `paddleslim_pruning` is."""
    with quiet_paddleslim():
        yield import_module("paddleslim.quant.observers")


@contextmanager
def quiet_paddleslim() -> Iterator[None]:
    """No output of PaddleSlim 2.6.0: it prints, logs at INFO and WARNING, and imports what warns of its own age."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def old_guard_name() -> Iterator[None]:
    """Paddle 3 took the underscores from `_to_static_mode_guard_`, which PaddleSlim 2.6.0 still calls by that name."""
    base = paddle.base.dygraph.base
    missing = not hasattr(base, "_to_static_mode_guard_")
    if missing:
        base._to_static_mode_guard_ = base.to_static_mode_guard
    try:
        yield
    finally:
        if missing:
            del base._to_static_mode_guard_


@contextmanager
def old_representation() -> Iterator[None]:
    """PaddleSlim 2.6.0 traces with the intermediate representation that Paddle had before 3.0.

    When its trace fails it leaves the process in static mode; dynamic mode is put back.
    """
    tracing: Any = import_module("paddleslim.core.dygraph")
    original = tracing._dy2prog

    def traced(*args: Any, **kwargs: Any) -> Any:
        try:
            with paddle.pir_utils.OldIrGuard():
                return original(*args, **kwargs)
        finally:
            paddle.disable_static()

    tracing._dy2prog = traced
    try:
        yield
    finally:
        tracing._dy2prog = original


@contextmanager
def numpy_product() -> Iterator[None]:
    """NumPy 2 has no `np.product` any more; PaddleSlim 2.6.0 measures FPGM's distances with it."""
    missing = not hasattr(np, "product")
    if missing:
        np.product = np.prod  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if missing:
            del np.product  # type: ignore[attr-defined]


TO_ONNX = """
import sys
import paddle2onnx
saved, target, opset = sys.argv[1:]
paddle2onnx.export(
    saved + ".json", saved + ".pdiparams", target, opset_version=int(opset), optimize_tool="none"
)
"""
"""What a process of its own runs to write ONNX: saved program without suffix, target, opset.

paddle2onnx 2.1.0 with Paddle 3.3 ends its whole process on operations that it does not know. Its default optimizer
installs packages from the network while it runs, and is never used; the graph is not worse for it.
"""


@contextmanager
def quiet_descriptors() -> Iterator[None]:
    """Nothing reaches the terminal, from compiled code either.

    Paddle Inference 3.3 prints what its oneDNN passes did straight to the standard output; neither
    `Config.disable_glog_info` nor GLOG_minloglevel stops it. What other threads write in the meantime is lost too.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in (1, 2):
            os.dup2(sink, descriptor)
        yield
    finally:
        for descriptor, kept in zip((1, 2), saved, strict=True):
            os.dup2(kept, descriptor)
            os.close(kept)
        os.close(sink)


class ProductAsConvolution(paddle.nn.Linear):
    """A linear layer as a convolution of images of one pixel; its weight is (out, in, 1, 1).

    Paddle Inference 3.3's oneDNN passes take the steps of a linear layer's int8 weight along the wrong axis, and its
    results are off by 1 to 40 %; a convolution's are right.

    Attributes:
        on_grid: puts its input on an integer grid, behind the reshape, where the runtime looks for that.
    """

    on_grid: Callable[[Any], Any]

    def forward(self, x: Any) -> Any:
        """Shape (..., in) -> (..., out); of a saved program, only the first size may be open."""
        weight = self.weight
        outputs, inputs = int(weight.shape[0]), int(weight.shape[1])
        pixels = self.on_grid(paddle.reshape(x, [-1, inputs, 1, 1]))
        made = paddle.nn.functional.conv2d(pixels, weight, self.bias)
        return paddle.reshape(made, [*([-1] if len(x.shape) > 1 else []), *x.shape[1:-1], outputs])
