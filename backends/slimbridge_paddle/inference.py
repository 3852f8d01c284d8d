"""Paddle Inference programs: in float32, and in int8 made from a `QuantizeDecision`; both run by oneDNN.

The int8 program holds `quantize_linear` and `dequantize_linear` around the inputs of its layers and int8 weights, in
the representation that Paddle had before 3.0: Paddle Inference's oneDNN passes turn that, and nothing newer, into int8
kernels. Other ways to run such a program are wrong on Paddle 3.3 (`paddle.jit.load` quantizes where it should
dequantize), so it is loaded here only.

How the runtime differs from the simulation:

* an integer may be -128 where the decision says -127;
* behind a ReLU it takes unsigned integers over the same range, so a signed grid becomes twice as fine there; an
  unsigned grid is exact there, but twice as coarse elsewhere (behind a ReLU6 that is no module, or a sigmoid);
* it takes the step of each channel of a weight from that channel's largest entry. Where that is not the largest
  integer (learned steps, one step for all channels), weights move by up to half a step of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from slimbridge.decisions import QuantizeDecision
from slimbridge.errors import FAILURES, BackendError, ModelError, RunError, listed
from slimbridge.ports import Array, tensors_in
from slimbridge_paddle import qdq
from slimbridge_paddle._compat import quiet_descriptors
from slimbridge_paddle.qdq import INT8

FORMS = ("paddle_float", INT8)


def specs(inputs: Sequence[Array], free: bool) -> list[Any]:
    """What a saved program is told of its inputs.

    Args:
        inputs: floating ones become float32, whole numbers int64.
        free: leave the size of the first axis open.
    """
    made = []
    for index, array in enumerate(map(_converted, inputs)):
        shape = [None, *array.shape[1:]] if free and array.ndim else list(array.shape)
        made.append(paddle.static.InputSpec(shape, array.dtype.name, name=f"input_{index}"))
    return made


def _converted(array: Any) -> Array:
    values = np.asarray(array)
    kind = {"f": "float32", "i": "int64", "u": "int64"}.get(values.dtype.kind, values.dtype.name)
    return np.ascontiguousarray(values.astype(kind)).reshape(values.shape)


def _cause(error: Exception) -> str:
    """The line that says what went wrong; Paddle's translation of a forward puts source lines before and after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.split(":")[0].endswith("Error")]
    return (telling or lines[-1:] or [type(error).__name__])[0]


_flat = paddle.jit.not_to_static(tensors_in)  # its source is not to be translated with the model's


class _Caller(paddle.nn.Layer):
    """Calls the model, whatever its forward calls its arguments."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, inputs: Sequence[Any]) -> Any:  # one list: Paddle refuses *inputs
        return _flat(self.model(*inputs))  # Paddle would sort a dict's


def _complete_norms(model: Any) -> None:
    """Give BatchNorms without scale and shift those that change nothing: oneDNN's kernel crashes without them."""
    for layer in model.sublayers(include_self=True):
        if isinstance(layer, paddle.nn.layer.norm._BatchNormBase):
            for name, value in (("weight", 1.0), ("bias", 0.0)):
                if getattr(layer, name) is None:
                    start = paddle.nn.initializer.Constant(value)
                    setattr(layer, name, layer.create_parameter([layer._num_features], default_initializer=start))


def save(model: Any, target: Path, inputs: list[Any], old: bool = False) -> None:
    """`paddle.jit.save`; Paddle is in dynamic mode afterwards.

    Args:
        model: it is in eval mode.
        target: file name without suffix.
        inputs: what `specs` gave.
        old: in the representation that Paddle had before 3.0.

    Raises:
        ModelError: Paddle cannot make a program of the model.
    """
    _complete_norms(model)
    caller = _Caller(model)  # before the guard, which leaves the dynamic mode
    try:
        with quiet_descriptors(), paddle.pir_utils.OldIrGuard() if old else nullcontext():
            paddle.jit.save(caller, str(target), input_spec=[inputs])
    except (*FAILURES, NameError, SyntaxError) as error:
        raise ModelError(f"export: Paddle cannot save this {type(model).__name__}: {_cause(error)}") from error
    finally:
        paddle.disable_static()


def export(model: Any, inputs: Sequence[Array], folder: Path, form: str, decision: QuantizeDecision | None) -> None:
    """Write model.pdmodel and model.pdiparams; `model` is a copy in eval mode and float32, and is used up.

    Raises:
        BackendError: the decision cannot be expressed.
        ModelError: Paddle cannot make a program of the model, or the decision is not applied to it.
    """
    left = qdq.quantize(model, qdq.check(decision)) if form == INT8 else tuple
    try:
        save(model, folder / "model", specs(inputs, free=True), old=True)
    except ModelError:
        save(model, folder / "model", specs(inputs, free=False), old=True)
    if left():
        raise ModelError(f"export: no pass reaches {listed(left())}, which the decision puts on a grid")
    (folder / "model.pdiparams.info").unlink(missing_ok=True)


def load(folder: Path, form: str, threads: int) -> Callable[[Sequence[Array]], list[Array]]:
    """A function that runs what `export` wrote, through oneDNN.

    Raises:
        BackendError: it is none of the forms here.
        RunError: there is no such program in the folder.
        ModelError: Paddle Inference cannot load it; in the function, cannot run it.
    """
    if form not in FORMS:
        raise BackendError(f"load: Paddle Inference does not run '{form}'; it runs {listed(FORMS)}")
    program, weights = folder / "model.pdmodel", folder / "model.pdiparams"
    if not program.is_file() or not weights.is_file():
        raise RunError(f"{folder}: there is no model.pdmodel with model.pdiparams")
    config = paddle.inference.Config(str(program), str(weights))
    config.disable_gpu()
    config.enable_mkldnn()
    config.set_cpu_math_library_num_threads(threads)
    config.disable_glog_info()
    if form == INT8:
        config.enable_mkldnn_int8()
    try:
        with quiet_descriptors():
            predictor = paddle.inference.create_predictor(config)
    except FAILURES as error:
        raise ModelError(f"load: Paddle Inference cannot load {program}: {_cause(error)}") from error
    return lambda inputs: _run(predictor, inputs)


def _run(predictor: Any, inputs: Sequence[Array]) -> list[Array]:
    given = {f"input_{index}": array for index, array in enumerate(inputs)}
    absent = [name for name in predictor.get_input_names() if name not in given]
    if absent:
        raise ModelError(f"input: {len(given)} arrays were given, the exported model also needs {listed(absent)}")
    try:
        for name in predictor.get_input_names():
            predictor.get_input_handle(name).copy_from_cpu(_converted(given[name]))
        predictor.run()
        return [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]
    except FAILURES as error:
        raise ModelError(f"input: the exported model cannot run on it: {_cause(error)}") from error
