"""Running a model: modes, captured features, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle

from slimbridge.errors import ModelError, listed
from slimbridge.ports import Array, Loss, Pass, Tensor, tensors_in
from slimbridge_paddle._compat import quiet_training
from slimbridge_paddle.names import entries, find_layers
from slimbridge_paddle.tensors import all_tensors, assign, copied, model_dtype, model_place, native


@contextmanager
def mode(model: Any, train: bool) -> Iterator[None]:
    """The model in one mode; each layer's own flag is restored."""
    flags = [(layer, layer.training) for layer in model.sublayers(include_self=True)]
    if train:
        model.train()
    else:
        model.eval()
    try:
        yield
    finally:
        for layer, flag in flags:
            layer.training = flag


def to_native(model: Any, inputs: Sequence[Any]) -> list[Tensor]:
    """Inputs on the model's device, in its dtype."""
    dtype, place = model_dtype(model), model_place(model)
    return [native(array, dtype, place) for array in inputs]


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Hooks that were registered already, removed at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: Any, inputs: Sequence[Any], capture: Sequence[str]) -> Pass:
    """One forward pass in the mode and gradient setting of the moment.

    Raises:
        ModelError: a captured layer does not exist, did not run, or gave no tensor.
    """
    features: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, output: Any) -> None:
            found = tensors_in(output)
            if not found:
                raise ModelError(f"capture: layer '{path}' gives no tensor")
            features[path] = found[0]

        return hook

    layers = find_layers(model, capture, "capture")
    handles = [layer.register_forward_post_hook(keep(path)) for path, layer in layers.items()]
    with hooked(handles):
        output = model(*to_native(model, inputs))
    absent = [path for path in capture if path not in features]
    if absent:
        raise ModelError(f"capture: {listed(absent)} did not run in the forward pass")
    return Pass(output, features)


def summed(terms: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The sum of a loss's terms, and each as a number.

    Raises:
        ModelError: there is no term, one is not a scalar, or one is not finite.
    """
    wrong = [f"{name} {tuple(term.shape)}" for name, term in terms.items() if int(np.prod(term.shape)) != 1]
    if wrong or not terms:
        raise ModelError(f"loss: at least one term is needed, each a scalar; found {listed(wrong)}")
    values = {name: float(term.detach().numpy().reshape(())) for name, term in terms.items()}
    bad = [f"{name} = {value}" for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise ModelError(f"loss: {listed(bad)}: not finite")
    total: Tensor = None
    for term in terms.values():
        flat = term.reshape([])
        total = flat if total is None else total + flat
    if total.stop_gradient:
        raise ModelError(f"loss: {listed(terms)}: no term depends on a trainable parameter")
    if not np.isfinite(float(total.detach().numpy())):
        raise ModelError(f"loss: the sum of {listed(f'{n} = {v}' for n, v in values.items())} is not finite")
    return total, values


def gradients(model: Any, inputs: Sequence[Array], loss: Loss, train: bool) -> dict[str, Array]:
    """Gradient of the summed terms by canonical name; zeros where the loss does not depend on a parameter."""
    chosen = [entry for entry in entries(model) if entry.trainable]
    fixed = [tensor for tensor in all_tensors(model) if tensor.stop_gradient]
    saved = [copied(tensor) for tensor in fixed]
    try:
        with mode(model, train), quiet_training():
            total, _ = summed(loss(run(model, inputs, ())))
            found = paddle.grad(total, [entry.tensor for entry in chosen], allow_unused=True)
    finally:
        for tensor, values in zip(fixed, saved, strict=True):
            assign(tensor, values)
    return {
        entry.name: np.zeros(entry.shape, model_dtype(model)) if grad is None else entry.canonical(copied(grad))
        for entry, grad in zip(chosen, found, strict=True)
    }
