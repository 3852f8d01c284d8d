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
from slimbridge_paddle.names import Entry, entries, find_layers
from slimbridge_paddle.quant import training_pass
from slimbridge_paddle.tensors import all_tensors, assign, check_list, copied, model_dtype, model_place, native


class Parameters(Mapping[str, Tensor]):
    """Canonical name -> parameter in canonical layout, differentiable; the model is read when one is asked for."""

    def __init__(self, model: Any) -> None:
        """Nothing is computed yet."""
        self._model = model
        self._known: dict[str, Entry] | None = None

    def _entries(self) -> dict[str, Entry]:
        if self._known is None:
            self._known = {entry.name: entry for entry in entries(self._model) if entry.is_parameter}
        return self._known

    def __getitem__(self, name: str) -> Tensor:
        """The parameter itself or, where its layout differs, its transpose; KeyError for a name it has not."""
        entry = self._entries()[name]
        return paddle.transpose(entry.tensor, [1, 0]) if entry.transposed else entry.tensor

    def __iter__(self) -> Iterator[str]:
        """Names in order of definition."""
        return iter(self._entries())

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self._entries())


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
    check_list(inputs)
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


def check_output(item: object, purpose: str) -> None:
    """Is it something that a model may return, beside the lists, tuples and dicts around it?

    Raises:
        ModelError: it is no tensor and no plain value, so that tensors may hide in it.
    """
    allowed = (paddle.Tensor, paddle.pir.Value, int, float, str, bool)
    if item is not None and not isinstance(item, allowed):
        raise ModelError(
            f"{purpose}: the model returns a {type(item).__name__}; allowed: tensors in lists, tuples and dicts"
        )


def forward(model: Any, inputs: Sequence[Any], capture: Sequence[str]) -> Pass:
    """One eval pass without gradient, its output known to be made of tensors.

    Raises:
        ModelError: as `run`, or the output holds something else.
    """
    with mode(model, train=False), paddle.no_grad():
        done = run(model, inputs, capture)
    for item in tensors_in(done.output):
        check_output(item, "forward")
    return done


def run(model: Any, inputs: Sequence[Any], capture: Sequence[str]) -> Pass:
    """One forward pass in the mode and gradient setting of the moment.

    Raises:
        ModelError: a captured layer does not exist, did not run, or gave no tensor.
    """
    features: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, output: Any) -> None:
            found = tensors_in(output)
            if not found or not isinstance(found[0], paddle.Tensor):
                raise ModelError(f"capture: layer '{path}' gives no tensor but a {type(output).__name__}")
            features[path] = found[0]

        return hook

    layers = find_layers(model, capture, "capture")
    handles = [layer.register_forward_post_hook(keep(path)) for path, layer in layers.items()]
    with hooked(handles):
        output = model(*to_native(model, inputs))
    absent = [path for path in capture if path not in features]
    if absent:
        raise ModelError(f"capture: {listed(absent)} did not run in the forward pass")
    return Pass(output, features, Parameters(model))


def _check_terms(terms: object) -> None:
    if not isinstance(terms, Mapping):
        raise ModelError(f"loss: a dict of terms is needed, found {type(terms).__name__}")
    if not terms:
        raise ModelError("loss: it returned no terms")
    for name, term in terms.items():
        if not isinstance(term, paddle.Tensor) or int(np.prod(term.shape)) != 1:
            found = tuple(term.shape) if isinstance(term, paddle.Tensor) else type(term).__name__
            raise ModelError(f"loss: term '{name}' must be a scalar tensor, found {found}")


def summed(terms: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The sum of a loss's terms, and each as a number.

    Raises:
        ModelError: there is no term, one is not a scalar tensor, or one is not finite.
    """
    _check_terms(terms)
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
        with mode(model, train), quiet_training(), training_pass(model, train):
            total, _ = summed(loss(run(model, inputs, ())))
            found = paddle.grad(total, [entry.tensor for entry in chosen], allow_unused=True)
    finally:
        for tensor, values in zip(fixed, saved, strict=True):
            assign(tensor, values)
    return {
        entry.name: np.zeros(entry.shape, model_dtype(model)) if grad is None else entry.canonical(copied(grad))
        for entry, grad in zip(chosen, found, strict=True)
    }
