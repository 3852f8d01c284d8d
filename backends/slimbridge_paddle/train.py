"""The optimizer adapter and one training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle

from slimbridge.errors import BackendError, ModelError, listed, nearest
from slimbridge.ports import Array, Loss, OptimizerSettings
from slimbridge_paddle._compat import AdamW, Momentum, corrected_statistic, quiet_training
from slimbridge_paddle.names import BATCH_NORMS, Entry, entries, inserted
from slimbridge_paddle.quant import training_pass
from slimbridge_paddle.run import hooked, mode, run, summed
from slimbridge_paddle.tensors import assign, copied, dtype_name, place_of, replace_data

_POWERS = ("beta1_pow_acc", "beta2_pow_acc")


class PaddleOptimizer:
    """A Paddle optimizer over a model's trainable parameters, with named state.

    Slots: "velocity" (SGD with momentum); "moment1", "moment2" and "step" (Adam, AdamW). A parameter that was
    never stepped has zeros, which is how each of them starts. Regularizers and learning rates that the model's
    own ParamAttr gave a parameter do not count: the settings say all.

    Args:
        model: its parameters with `stop_gradient=False`, at least one.
        settings: see `OptimizerSettings`.
    """

    def __init__(self, model: Any, settings: OptimizerSettings) -> None:
        """Raise ModelError for a model that has nothing to train, BackendError for settings without a meaning."""
        known = entries(model)
        self._entries = {entry.name: entry for entry in known if entry.trainable}
        self._untrained = {entry.name for entry in known if not entry.trainable}
        if not self._entries:
            raise ModelError("make_optimizer: the model has no trainable parameter")
        self.settings = settings
        self._native = _native([entry.tensor for entry in self._entries.values()], settings)
        self._slots = _slots(settings)
        self._steps = dict.fromkeys(self._entries, 0)
        self._masks: dict[str, Any] = {}
        self._ready = False

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next steps."""
        self._native.set_lr(float(lr))
        self._ready = True

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._native.clear_grad(set_to_zero=False)

    def step(self) -> None:
        """One update from the gradients.

        Raises:
            BackendError: `set_lr` was never called.
            ModelError: a slot no longer has its parameter's shape (Paddle itself would go on).
        """
        if not self._ready:
            raise BackendError("optimizer: set_lr must be called before the first step")
        for entry in self._entries.values():
            self._check(entry)
        stepped = [name for name, entry in self._entries.items() if entry.tensor.grad is not None]
        with _plain([entry.tensor for entry in self._entries.values()]):
            self._native.step()
        with paddle.no_grad():
            for name, mask in self._masks.items():
                tensor = self._entries[name].tensor
                paddle.assign(paddle.where(mask, tensor, paddle.zeros_like(tensor)), output=tensor)
        for name in stepped:
            self._steps[name] += 1

    def hold_zeros(self, masks: Mapping[str, Array]) -> None:
        """Zero the entries whose mask is False after each step; see `slimbridge.ports.Optimizer.hold_zeros`."""
        masks = {name: mask for name, mask in masks.items() if name not in self._untrained}
        for name, mask in masks.items():
            if name not in self._entries:
                raise ModelError(f"hold_zeros: no parameter '{name}'{nearest(name, self._entries)}")
            if np.shape(mask) != self._entries[name].shape:
                shape = self._entries[name].shape
                raise ModelError(f"hold_zeros: '{name}' has shape {shape}, its mask {np.shape(mask)}")
        self._masks = {
            name: _mask(self._entries[name].canonical(np.asarray(mask)), self._entries[name])
            for name, mask in masks.items()
        }

    def _check(self, entry: Entry) -> None:
        mask = {"mask": self._masks.get(entry.name)}
        for slot, tensor in (*((slot, self._slot(entry, slot)) for slot in self._slots), *mask.items()):
            if tensor is not None and list(tensor.shape) != list(entry.tensor.shape):
                raise ModelError(
                    f"optimizer: '{entry.name}/{slot}' has shape {list(tensor.shape)}, its parameter "
                    f"{list(entry.tensor.shape)}: give the optimizer to whatever resizes the model"
                )

    def _slot(self, entry: Entry, slot: str) -> Any:
        table: Mapping[str, Any] = self._native._accumulators.get(slot, {})
        return table.get(entry.tensor.name)

    def state(self) -> dict[str, Array]:
        """Copies as "<parameter>/<slot>"; "step" is a 0-d int64 array, the others have the parameter's shape."""
        found: dict[str, Array] = {}
        for name, entry in self._entries.items():
            for slot in self._slots:
                tensor = self._slot(entry, slot)
                empty = tensor is None
                value = np.zeros(entry.shape, dtype_name(entry.tensor)) if empty else entry.canonical(copied(tensor))
                found[f"{name}/{slot}"] = value
            if "moment1" in self._slots:
                found[f"{name}/step"] = np.array(self._steps[name], np.int64)
        return found

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` gave; nothing is changed when anything is wrong.

        Raises:
            ModelError: slots that are unknown, missing or of another shape.
        """
        shapes = {key: value.shape for key, value in self.state().items()}
        for key, array in state.items():
            if key not in shapes:
                raise ModelError(f"optimizer: unknown slot '{key}'{nearest(key, shapes)}")
            if np.shape(array) != shapes[key]:
                raise ModelError(f"optimizer: '{key}' has shape {np.shape(array)}, {shapes[key]} is needed")
        missing = [key for key in shapes if key not in state]
        if missing:
            raise ModelError(f"optimizer: {len(missing)} slots are missing: {listed(missing, 4)}")
        if shapes:
            self._restore(state)

    def _restore(self, state: Mapping[str, Array]) -> None:
        block = paddle.static.default_main_program().global_block()
        self._native._create_accumulators(block, [entry.tensor for entry in self._entries.values()])
        for name, entry in self._entries.items():
            dtype = dtype_name(entry.tensor)
            for slot in self._slots:
                assign(self._slot(entry, slot), entry.canonical(np.asarray(state[f"{name}/{slot}"]).astype(dtype)))
            if "moment1" in self._slots:
                self._steps[name] = int(state[f"{name}/step"])
                for slot, beta in zip(_POWERS, self.settings.betas, strict=True):
                    assign(self._slot(entry, slot), _power(beta, self._steps[name] + 1, dtype))

    def slice(self, entry: Entry, cut: Callable[[Array], Array]) -> None:
        """Cut the slots and the mask of a parameter as it was cut itself; `cut` takes and gives the stored layout."""
        for slot in self._slots:
            tensor = self._slot(entry, slot) if entry.name in self._entries else None
            if tensor is not None:
                assign(tensor, cut(copied(tensor)))
        if entry.name in self._masks:
            self._masks[entry.name] = _mask(cut(copied(self._masks[entry.name])), entry)


def _mask(keep: Array, entry: Entry) -> Any:
    """A mask in the stored layout, on the parameter's device."""
    return paddle.to_tensor(np.ascontiguousarray(keep, bool).reshape(keep.shape), place=place_of(entry.tensor))


def _power(beta: float, count: int, dtype: str) -> Array:
    """beta**count, multiplied one by one in `dtype` as the kernel does, so that a restored run goes on bit by bit."""
    factors = np.full(count, beta, dtype)
    return np.multiply.accumulate(factors)[-1:]


def _native(parameters: list[Any], settings: OptimizerSettings) -> Any:
    decay = settings.weight_decay
    if settings.kind == "sgd" and settings.nesterov and not settings.momentum:
        raise BackendError("optimizer: nesterov needs a momentum above 0, found 0")
    if settings.kind == "sgd" and not settings.momentum:
        return paddle.optimizer.SGD(0.0, parameters, weight_decay=decay or None)
    if settings.kind == "sgd":
        return Momentum(0.0, settings.momentum, parameters, settings.nesterov, weight_decay=decay or None)
    beta1, beta2 = settings.betas
    if settings.kind == "adam":
        return paddle.optimizer.Adam(0.0, beta1, beta2, settings.eps, parameters, weight_decay=decay or None)
    return AdamW(0.0, beta1, beta2, settings.eps, parameters, weight_decay=decay)


def _slots(settings: OptimizerSettings) -> tuple[str, ...]:
    if settings.kind == "sgd":
        return ("velocity",) if settings.momentum else ()
    return ("moment1", "moment2")


@contextmanager
def _plain(parameters: list[Any]) -> Iterator[None]:
    """Parameters without a regularizer or a learning rate of their own, for as long as a step takes."""
    odd = []
    for tensor in parameters:
        regularizer, attributes = getattr(tensor, "regularizer", None), getattr(tensor, "optimize_attr", None)
        if regularizer is not None or (attributes or {}).get("learning_rate", 1.0) != 1.0:
            odd.append((tensor, regularizer, attributes))
    for tensor, _, attributes in odd:
        tensor.regularizer, tensor.optimize_attr = None, {**(attributes or {}), "learning_rate": 1.0}
    try:
        yield
    finally:
        for tensor, regularizer, attributes in odd:
            tensor.regularizer, tensor.optimize_attr = regularizer, attributes


@contextmanager
def unbiased_statistics(model: Any) -> Iterator[None]:
    """Batch normalisations keep the canonical running statistics for as long as the context lasts.

    Each call of a layer in train mode is corrected on its own (see `corrected_statistic`).
    """
    before: dict[int, tuple[Any, Any]] = {}

    def enter(path: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any) -> None:
            if not tracks(layer):
                return
            if _values_per_channel(layer, args) < 2:
                raise ModelError(f"'{path}': one value per channel in train mode has no variance; use larger batches")
            before[id(layer)] = (layer._mean.clone(), layer._variance.clone())

        return hook

    def leave(layer: Any, args: Any, output: Any) -> None:
        if not tracks(layer):
            return
        count = _values_per_channel(layer, args)
        mean, variance = before.pop(id(layer))
        with paddle.no_grad():
            fixed = corrected_statistic(mean, layer._mean, layer._momentum)
            replace_data(layer._mean, fixed)
            fixed = corrected_statistic(variance, layer._variance, layer._momentum, count / (count - 1))
            replace_data(layer._variance, fixed)

    def tracks(layer: Any) -> bool:
        return bool(layer.training and not layer._use_global_stats)

    handles = []
    for path, layer in model.named_sublayers(include_self=True):
        if isinstance(layer, BATCH_NORMS):
            handles += [layer.register_forward_pre_hook(enter(path)), layer.register_forward_post_hook(leave)]
    with hooked(handles):
        yield


def _values_per_channel(layer: Any, args: Any) -> int:
    return int(np.prod(args[0].shape)) // int(layer._mean.shape[0])


@contextmanager
def undone_on_failure(model: Any) -> Iterator[None]:
    """Running statistics, and what fake quantizations keep of them, as before if anything is raised inside."""
    layers = model.sublayers(include_self=True)
    changing = [
        tensor for layer in layers if isinstance(layer, BATCH_NORMS) for tensor in (layer._mean, layer._variance)
    ]
    changing += [layer._buffers[name] for layer in layers for name in inserted(layer) if name in layer._buffers]
    kept = [(tensor, tensor.clone()) for tensor in changing]
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            for tensor, old in kept:
                replace_data(tensor, old)


def train_step(
    model: Any, optimizer: PaddleOptimizer, inputs: Sequence[Array], loss: Loss, capture: Sequence[str]
) -> dict[str, float]:
    """One step in train mode, each layer's own mode restored; the terms of the loss before it.

    A step that fails leaves parameters and running statistics as they were.
    """
    optimizer.zero_grad()
    with undone_on_failure(model), mode(model, train=True):
        with quiet_training(), unbiased_statistics(model), training_pass(model):
            done = run(model, inputs, capture)
        total, values = summed(loss(done))
        total.backward()
        optimizer.step()
    optimizer.zero_grad()
    return values
