"""Paddle's post-training quantization with PaddleSlim's observers as an engine: it calibrates, and its grids are read.

Paddle does not fold BatchNorm. Its `convert` rounds half to even and clips to the lowest integer too, so that is what
the grids say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import paddle

from slimbridge.decisions import QuantizeDecision, QuantParams, Skipped
from slimbridge.errors import FAILURES, BackendError, ModelError, first_line, listed
from slimbridge.ports import Array, QuantRequest, as_float64
from slimbridge_paddle import _compat, run
from slimbridge_paddle.names import find_layers, layers, walk
from slimbridge_paddle.quant import remove_quant
from slimbridge_paddle.tensors import copied, model_place, move

QUANTIZERS = ("paddle.ptq",)
_OBSERVERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "absmax": ("AbsmaxObserver", ()),
    "hist": ("HistObserver", ("bins_count", "percent")),
    "mse": ("MSEObserver", ()),
    "avg": ("AVGObserver", ()),
    "emd": ("EMDObserver", ()),
}
"""Name -> PaddleSlim's class, and the options that are passed on to it."""

_LSQ = "PaddleSlim 2.6.0 fails on Paddle 3.3 and starts its steps wrongly; LSQ is part of slimbridge's own training"
_BROKEN: Mapping[str, str] = {
    "kl": "PaddleSlim 2.6.0 chooses poor thresholds: five times the error of absmax, in minutes",
    **dict.fromkeys(("lsq", "lsq_plus", "lsqplus", "pact"), _LSQ),
    **dict.fromkeys(("sign", "symmetric"), "Paddle 3.3 ignores the zero point: other than symmetric grids are wrong"),
}


def quantizers() -> tuple[str, ...]:
    """The names of the quantizers, none where PaddleSlim is not installed; it is not imported."""
    return QUANTIZERS if find_spec("paddleslim") is not None else ()


def decide(model: Any, request: QuantRequest, batches: Sequence[Sequence[Array]]) -> QuantizeDecision:
    """Let Paddle calibrate `model`, a copy that is used up, and read its thresholds.

    Conv2D and Linear layers are quantized: weights per output channel by largest magnitude, inputs per tensor, both
    symmetric. Options: `observer` ("absmax", the default, "hist", "mse", "avg", "emd") and, for hist, `bins_count`
    and `percent`. mse and emd judge each batch by itself and keep the threshold of the last one that did better than
    all before, as PaddleSlim has it.

    Args:
        model: it computes in float32.
        request: what is asked for.
        batches: inputs of the model; at least one batch.

    Raises:
        BackendError, ModelError: see `slimbridge.ports.Backend.native_quantize`.
    """
    observer = _checked(request)
    if not batches:
        raise ModelError("native: at least one calibration batch is needed")
    find_layers(model, request.ignored, "native")
    remove_quant(model)
    model.eval()
    move(model, "gpu" if model_place(model).is_gpu_place() else "cpu", "float32")
    names = {layer.path: layer.params["weight"] for layer in layers(model) if "weight" in layer.params}
    chosen, skipped = _chosen(model, request.ignored)
    found = _calibrated(model, request, observer, chosen, batches)
    ran = {path: pair for path, pair in found.items() if pair is not None}
    if not ran:
        raise ModelError(f"native: Paddle quantized 0 of {len(names)} layers; it takes plain Conv2D and Linear layers")
    idle = [Skipped(layer=path, reason="the calibration batches did not run it") for path in found if path not in ran]
    _check_finite(ran)
    return QuantizeDecision(
        observer=f"paddle.ptq:{observer}",
        weights={names[path]: _grid(pair[1], request.weight_bits, 0) for path, pair in ran.items()},
        activations={path: _grid(pair[0], request.activation_bits, None) for path, pair in ran.items()},
        skipped=(*skipped, *idle),
    )


def _calibrated(
    model: Any, request: QuantRequest, observer: str, paths: Sequence[str], batches: Sequence[Sequence[Array]]
) -> dict[str, tuple[Array, Array] | None]:
    """Path -> thresholds of its input and its weight, None for a layer that did not run."""
    options = {key: value for key, value in request.options.items() if key != "observer"}
    with _toolkit(observer) as observers:
        activation = getattr(observers, _OBSERVERS[observer][0])(quant_bits=request.activation_bits, **options)
        weight = observers.AbsMaxChannelWiseWeightObserver(quant_bits=request.weight_bits)
        quantized = _observed(model, paths, activation, weight)
        for batch in batches:
            run.forward(quantized, batch, ())
        return {path: _thresholds(layer) for path, layer in walk(quantized) if path in paths}


def _checked(request: QuantRequest) -> str:
    """The observer's name."""
    if request.quantizer not in QUANTIZERS:
        raise BackendError(f"native: unknown quantizer '{request.quantizer}'; allowed: {listed(quantizers())}")
    for bits in (request.weight_bits, request.activation_bits):
        if not 2 <= bits <= 8:
            raise BackendError(f"native: {request.quantizer} takes 2 to 8 bits, found {bits}")
    observer = request.options.get("observer", "absmax")
    for word in (observer, *request.options):
        if word in _BROKEN:
            raise BackendError(f"native: '{word}' is not offered: {_BROKEN[word]}")
    if observer not in _OBSERVERS:
        raise BackendError(f"native: unknown observer {observer!r}; allowed: {listed(_OBSERVERS)}")
    allowed = ("observer", *_OBSERVERS[observer][1])
    unknown = [option for option in request.options if option not in allowed]
    if unknown:
        raise BackendError(f"native: observer '{observer}' has no option {listed(unknown)}; allowed: {listed(allowed)}")
    if observer == "hist" and int(np.__version__.partition(".")[0]) >= 2:
        raise BackendError(f"native: observer 'hist' of PaddleSlim 2.6.0 needs NumPy 1, found {np.__version__}")
    return str(observer)


@contextmanager
def _toolkit(observer: str) -> Iterator[Any]:
    """PaddleSlim's module of observers; what fails inside is a ModelError."""
    try:
        with _compat.paddleslim_observers() as observers:
            yield observers
    except ModuleNotFoundError as error:
        raise BackendError(f"native: '{error.name}' is not installed: pip install 'slimbridge[paddle]'") from error
    except FAILURES as error:
        raise ModelError(f"native: Paddle's calibration with '{observer}' failed: {first_line(error)}") from error


def _chosen(model: Any, ignored: Sequence[str]) -> tuple[tuple[str, ...], tuple[Skipped, ...]]:
    """Paths of the layers to quantize, and those left alone."""
    paths: dict[int, list[str]] = {}
    for path, layer in walk(model):
        if type(layer) in (paddle.nn.Conv2D, paddle.nn.Linear):
            paths.setdefault(id(layer), []).append(path)
    chosen, skipped = [], []
    for places in paths.values():
        if any(path in ignored for path in places):
            skipped.append(Skipped(layer=places[0], reason="ignored_layers names it"))
        elif len(places) > 1:
            skipped.append(Skipped(layer=places[0], reason="Paddle would take a shared layer apart"))
        elif places[0]:
            chosen.append(places[0])
    return tuple(chosen), tuple(skipped)


def _observed(model: Any, paths: Sequence[str], activation: Any, weight: Any) -> Any:
    """The model with Paddle's observing layers in place of these."""
    table = dict(walk(model))
    config = paddle.quantization.QuantConfig(activation=None, weight=None)
    config.add_layer_config([table[path] for path in paths], activation=activation, weight=weight)
    return paddle.quantization.PTQ(config).quantize(model, inplace=True)


def _thresholds(layer: Any) -> tuple[Array, Array] | None:
    """Of the input, shape (1,), and of the weight, shape (channels,); None if the layer did not run."""
    if layer.weight_quanter.max_value() is None:  # its scales() would fail
        return None
    found = layer.activation_quanter.scales()
    threshold = copied(found) if isinstance(found, paddle.Tensor) else np.asarray(found, np.float32)
    return as_float64(threshold).reshape(1), as_float64(copied(layer.weight_quanter.scales())).reshape(-1)


def _check_finite(found: Mapping[str, tuple[Array, Array]]) -> None:
    for path, pair in found.items():
        if not all(np.isfinite(part).all() and (part >= 0).all() for part in pair):
            raise ModelError(f"native: Paddle's thresholds of layer '{path}' are not finite")


def _grid(thresholds: Array, bits: int, axis: int | None) -> QuantParams:
    limit = 2 ** (bits - 1) - 1
    steps = (thresholds / limit).astype(np.float32)
    steps = np.where(steps > 0, steps, np.float32(1))
    return QuantParams(step=tuple(steps.tolist()), low=-limit - 1, high=limit, axis=axis)
