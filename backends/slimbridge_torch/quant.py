"""Fake quantization of layer inputs, and statistics of them, through forward pre-hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from slimbridge.decisions import QuantizeDecision, QuantParams
from slimbridge.errors import ModelError
from slimbridge_torch.names import find_modules

Tensor = Any


class _Snap(torch.autograd.Function):
    """The grid value of each entry; the gradient goes through as if nothing had happened (straight-through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor | float, params: QuantParams) -> Tensor:
        integer = torch.clamp(torch.round(x / step) + params.zero_point, params.low, params.high)
        return (integer - params.zero_point) * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class FakeQuant:
    """Rounds a layer's first input to the grid: clip(round(x / step) + zero_point, low, high), and back.

    Half goes to even; all is computed in the input's dtype. A copied model carries its own copy.

    Args:
        params: the grid; `step` has one number, or one for each index of `axis`.

    Raises:
        ModelError: a grid that is not usable; the message starts with `where`.
    """

    def __init__(self, params: QuantParams, where: str) -> None:
        if any(not math.isfinite(step) or step <= 0 for step in params.step):
            raise ModelError(f"{where}: each step must be positive and finite, found {min(params.step)}")
        if params.axis is None and len(params.step) != 1:
            raise ModelError(f"{where}: {len(params.step)} steps without an axis; one is allowed")
        if not params.low <= params.zero_point <= params.high:
            raise ModelError(f"{where}: zero_point {params.zero_point} is outside {params.low}..{params.high}")
        self.params = params
        self.where = where

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward pre-hook: arguments with the first tensor replaced."""
        if args:
            return (self.quantize(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self.quantize(kwargs[name])}

    def quantize(self, x: Tensor) -> Tensor:
        """The grid values of a floating tensor, any shape."""
        return _Snap.apply(x, self._step(x), self.params)

    def _step(self, x: Tensor) -> Tensor | float:
        axis = self.params.axis
        if axis is None and x.device.type != "cuda":
            return self.params.step[0]
        # CUDA divides by a Python number as a multiplication with its reciprocal, which rounds otherwise.
        if axis is None:
            return torch.tensor(self.params.step[0], dtype=x.dtype, device=x.device)
        if x.shape[axis] != len(self.params.step):
            raise ModelError(f"{self.where}: {len(self.params.step)} steps for {x.shape[axis]} channels")
        shape = [1] * x.ndim
        shape[axis] = -1
        return torch.tensor(self.params.step, dtype=x.dtype, device=x.device).reshape(shape)


def insert_quant(model: nn.Module, decision: QuantizeDecision) -> None:
    """Fake-quantize the inputs of the decision's layers; quantization from an earlier call is taken out.

    Raises:
        ModelError: a path without a layer, or a grid that is not usable.
    """
    modules = find_modules(model, tuple(decision.activations), "quantize")
    hooks = {path: FakeQuant(params, f"quantize '{path}'") for path, params in decision.activations.items()}
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, FakeQuant)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for path, hook in hooks.items():
        modules[path].register_forward_pre_hook(hook, with_kwargs=True)


def reduce_inputs(model: nn.Module, run: Callable[[], object], paths: Sequence[str]) -> dict[str, dict[str, float]]:
    """Extremes of the first input of each layer while `run` runs, before any fake quantization of that layer.

    Returns:
        path -> "min", "max", "absmax"; over the runs of a layer that runs several times; NaN stays NaN.
    """
    seen: dict[str, list[Tensor]] = {}

    def observe(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            seen.setdefault(path, []).append(torch.stack(torch.aminmax(x)))

        return hook

    modules = find_modules(model, tuple(paths), "reduce")
    handles = [
        module.register_forward_pre_hook(observe(path), prepend=True, with_kwargs=True)
        for path, module in modules.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {path: _extremes(seen[path]) for path in paths if path in seen}


def _extremes(pairs: list[Tensor]) -> dict[str, float]:
    low, high = torch.stack(pairs).unbind(1)
    smallest, largest = low.amin(), high.amax()
    values = torch.stack([smallest, largest, torch.maximum(-smallest, largest)]).tolist()
    return dict(zip(("min", "max", "absmax"), values, strict=True))
