"""Fake quantization of layer inputs, and statistics of them, through forward pre-hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
from paddle.autograd import PyLayer

from slimbridge.decisions import QuantizeDecision, QuantParams
from slimbridge.errors import ModelError
from slimbridge_paddle._compat import round_half_even
from slimbridge_paddle.names import find_layers
from slimbridge_paddle.run import hooked, mode, run
from slimbridge_paddle.tensors import dtype_name, place_of

Tensor = Any


class _Snap(PyLayer):
    """The grid value of each entry; the gradient goes through as if nothing had happened (straight-through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, params: QuantParams) -> Tensor:
        integer = paddle.clip(round_half_even(paddle.divide(x, step)) + params.zero_point, params.low, params.high)
        return (integer - params.zero_point) * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class FakeQuant:
    """Rounds a layer's first input to the grid: clip(round(x / step) + zero_point, low, high), and back.

    Half goes to even; all is computed in the input's dtype. A copied model carries its own copy.

    Args:
        params: the grid; `step` has one number, or one for each index of `axis`.
        where: what the messages start with.
    """

    def __init__(self, params: QuantParams, where: str) -> None:
        """Raise ModelError for a grid that is not usable."""
        if any(not math.isfinite(step) or step <= 0 for step in params.step):
            raise ModelError(f"{where}: each step must be positive and finite, found {min(params.step)}")
        if params.axis is None and len(params.step) != 1:
            raise ModelError(f"{where}: {len(params.step)} steps without an axis; one is allowed")
        if not params.low <= params.zero_point <= params.high:
            raise ModelError(f"{where}: zero_point {params.zero_point} is outside {params.low}..{params.high}")
        self.params = params
        self.where = where

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward pre-hook: arguments with the first tensor replaced."""
        if args:
            return (self.quantize(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self.quantize(kwargs[name])}

    def quantize(self, x: Tensor) -> Tensor:
        """The grid values of a floating tensor, any shape."""
        return _Snap.apply(x, self._step(x), self.params)

    def _step(self, x: Tensor) -> Tensor:
        # A tensor, not a number: Paddle divides by a number as a multiplication with its reciprocal.
        steps = np.array(self.params.step, dtype_name(x))
        axis = self.params.axis
        shape = [1] * len(x.shape)
        if axis is not None:
            if int(x.shape[axis]) != len(steps):
                raise ModelError(f"{self.where}: {len(steps)} steps for {int(x.shape[axis])} channels")
            shape[axis] = len(steps)
        return paddle.to_tensor(steps.reshape(shape), place=place_of(x))


def remove_quant(model: Any) -> None:
    """Take out every fake quantization."""
    for layer in model.sublayers(include_self=True):
        for key in [key for key, hook in layer._forward_pre_hooks.items() if isinstance(hook, FakeQuant)]:
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs_flag.pop(key, None)


def insert_quant(model: Any, decision: QuantizeDecision) -> None:
    """Put the decision's activation grids in place of whatever was inserted before.

    Raises:
        ModelError: a layer that does not exist, or a grid that is not usable; the model is then unchanged.
    """
    layers = find_layers(model, tuple(decision.activations), "quantize")
    hooks = {path: FakeQuant(params, f"quantize '{path}'") for path, params in decision.activations.items()}
    remove_quant(model)
    for path, hook in hooks.items():
        layers[path].register_forward_pre_hook(hook, with_kwargs=True)


def reduce_inputs(model: Any, inputs: Sequence[Any], paths: Sequence[str]) -> dict[str, dict[str, float]]:
    """Extremes of the first input of each layer over one eval pass, before any fake quantization of that layer.

    Returns:
        path -> "absmax", "min", "max"; over the runs of a layer that runs several times.
    """
    seen: dict[str, list[Tensor]] = {}

    def observe(path: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            seen.setdefault(path, []).append(paddle.stack([paddle.min(x), paddle.max(x)]))

        return hook

    layers = find_layers(model, paths, "reduce")
    handles = [
        layer.register_forward_pre_hook(observe(path), prepend=True, with_kwargs=True) for path, layer in layers.items()
    ]
    with hooked(handles), mode(model, train=False), paddle.no_grad():
        run(model, inputs, ())
    return {path: _extremes(seen[path]) for path in paths if path in seen}


def _extremes(pairs: list[Tensor]) -> dict[str, float]:
    values = paddle.stack(pairs).numpy()
    low, high = float(values[:, 0].min()), float(values[:, 1].max())
    return {"absmax": max(-low, high), "min": low, "max": high}
