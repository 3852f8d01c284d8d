"""One optimizer adapter, one training step, one gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from slimbridge.errors import BackendError, ModelError, nearest
from slimbridge.ports import Array, OptimizerSettings
from slimbridge_torch.names import canonical, to_array, to_tensor

Tensor = Any

_SLOTS = {"velocity": "momentum_buffer", "moment1": "exp_avg", "moment2": "exp_avg_sq", "step": "step"}


class TorchOptimizer:
    """A torch optimizer over a model's trainable parameters, with named state.

    Slots: "velocity" (SGD with momentum); "moment1", "moment2" and "step" (Adam, AdamW). A parameter that was
    never stepped has zeros, which is how each of them starts.

    Args:
        model: its parameters with `requires_grad`, at least one.
        settings: see `OptimizerSettings`.

    Raises:
        ModelError: the model has nothing to train.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings) -> None:
        tensors = canonical(model)
        self._parameters = {name: t for name, t in tensors.items() if isinstance(t, nn.Parameter) and t.requires_grad}
        if not self._parameters:
            raise ModelError("make_optimizer: the model has no trainable parameter")
        self._untrained = tensors.keys() - self._parameters.keys()
        self._native = _native(list(self._parameters.values()), settings)
        self._slots = _slots(settings)
        self._ready = False
        self._held: dict[str, Tensor] = {}  # name -> True where an entry stays 0

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next steps."""
        for group in self._native.param_groups:
            group["lr"] = lr
        self._ready = True

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._native.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One update from the gradients.

        Raises:
            BackendError: `set_lr` was never called.
        """
        if not self._ready:
            raise BackendError("optimizer: set_lr must be called before the first step")
        self._native.step()
        with torch.no_grad():
            for name, zero in self._held.items():
                parameter = self._parameters[name]
                parameter.masked_fill_(zero.to(parameter.device), 0)  # a product would keep NaN

    def hold_zeros(self, masks: Mapping[str, Array]) -> None:
        """After each step from now on, entries whose mask is False are 0; replaces an earlier call, {} lifts it.

        Args:
            masks: parameter's name -> bool array of its shape, True = trained as ever.

        Raises:
            ModelError: a name is unknown, a shape differs, or an array is not bool; nothing is changed.
        """
        held = {}
        for name, mask in masks.items():
            parameter = self._parameters.get(name)
            if parameter is None and name in self._untrained:
                continue
            if parameter is None:
                raise ModelError(f"hold_zeros: '{name}' is no parameter{nearest(name, self._parameters)}")
            if np.shape(mask) != tuple(parameter.shape) or np.asarray(mask).dtype != bool:
                found = f"{np.asarray(mask).dtype} of shape {np.shape(mask)}"
                raise ModelError(f"hold_zeros: '{name}': bool of shape {tuple(parameter.shape)} needed, found {found}")
            held[name] = torch.tensor(~np.asarray(mask), device=parameter.device)
        self._held = held

    def state(self) -> dict[str, Array]:
        """Slots as "<parameter>/<slot>" -> copy; "step" is a 0-d int64 array, the others have the parameter's shape."""
        found: dict[str, Array] = {}
        for name, parameter in self._parameters.items():
            native = self._native.state.get(parameter, {})
            for slot in self._slots:
                value = native.get(_SLOTS[slot])
                found[f"{name}/{slot}"] = _to_array(value, slot, parameter)
        return found

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Restore what `state` gave; nothing is changed when anything is wrong.

        Raises:
            ModelError: slots that are unknown, missing, of another shape or no numbers.
        """
        expected = {f"{name}/{slot}": (p, slot) for name, p in self._parameters.items() for slot in self._slots}
        for key, array in state.items():
            if key not in expected:
                raise ModelError(f"optimizer: unknown slot '{key}'{nearest(key, expected)}")
            parameter, slot = expected[key]
            shape = () if slot == "step" else tuple(parameter.shape)
            if np.shape(array) != shape:
                raise ModelError(f"optimizer: '{key}' has shape {np.shape(array)}, {shape} is needed")
        missing = [key for key in expected if key not in state]
        if missing:
            raise ModelError(f"optimizer: {len(missing)} slots were not given, '{missing[0]}' first")
        tensors = {key: _to_tensor(state[key], key, parameter) for key, (parameter, _) in expected.items()}
        self._native.state.clear()
        for key, (parameter, slot) in expected.items():
            self._native.state[parameter][_SLOTS[slot]] = tensors[key]

    def check_covers(self, tensors: Mapping[str, Tensor]) -> None:
        """Is this the optimizer of the model that holds these tensors, with state of their shapes?

        Raises:
            ModelError: one of its parameters is not among them, or a slot has another shape.
        """
        held = {id(tensor) for tensor in tensors.values()}
        for name, parameter in self._parameters.items():
            if id(parameter) not in held:
                raise ModelError(f"prune: the optimizer trains '{name}' of another model")
            for slot, value in self._shaped(parameter).items():
                if value.shape != parameter.shape:
                    found = f"{tuple(value.shape)}, not {tuple(parameter.shape)}"
                    raise ModelError(f"prune: optimizer slot '{slot}' of '{name}' has shape {found}")

    def slice_state(self, parameter: Tensor, take: Callable[[Tensor], Tensor]) -> None:
        """Apply `take` to each slot of a parameter that has its shape, and to the mask of its zeros."""
        for name, zero in self._held.items():
            if self._parameters[name] is parameter:
                self._held[name] = take(zero)
        for slot, value in self._shaped(parameter).items():
            self._native.state[parameter][slot] = take(value)

    def _shaped(self, parameter: Tensor) -> dict[str, Tensor]:
        slots = self._native.state.get(parameter, {})
        return {slot: value for slot, value in slots.items() if isinstance(value, torch.Tensor) and slot != "step"}


def _native(parameters: list[Tensor], settings: OptimizerSettings) -> Any:
    decay = settings.weight_decay
    if settings.kind == "sgd":
        momentum, nesterov = settings.momentum, settings.nesterov
        if nesterov and not momentum:
            raise BackendError("optimizer: nesterov needs a momentum above 0, found 0")
        return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if settings.kind not in kinds:
        raise BackendError(f"optimizer: unknown kind '{settings.kind}'; allowed: sgd, adam, adamw")
    return kinds[settings.kind](parameters, lr=0.0, betas=settings.betas, eps=settings.eps, weight_decay=decay)


def _slots(settings: OptimizerSettings) -> tuple[str, ...]:
    if settings.kind == "sgd":
        return ("velocity",) if settings.momentum else ()
    return ("moment1", "moment2", "step")


def _to_array(value: Tensor | None, slot: str, parameter: Tensor) -> Array:
    if slot == "step":
        return np.array(0 if value is None else int(value), dtype=np.int64)
    return to_array(torch.zeros_like(parameter) if value is None else value)


def _to_tensor(array: Array, key: str, parameter: Tensor) -> Tensor:
    value = to_tensor(array, f"optimizer: '{key}'")
    if key.endswith("/step"):
        # torch keeps its counter as a floating scalar on the host.
        return value.to(torch.get_default_dtype())
    return value.to(dtype=parameter.dtype, device=parameter.device)


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of a loss's terms.

    Raises:
        ModelError: no terms, one that is not a scalar, or nothing trainable behind them.
    """
    if not isinstance(terms, Mapping):
        raise ModelError(f"loss: it must return a mapping of names to scalar tensors, found {type(terms).__name__}")
    if not terms:
        raise ModelError("loss: it returned no terms")
    for name, term in terms.items():
        if not isinstance(term, torch.Tensor) or term.numel() != 1:
            found = tuple(term.shape) if isinstance(term, torch.Tensor) else type(term).__name__
            raise ModelError(f"loss: term '{name}' must be a scalar tensor, found {found}")
    summed = torch.stack([term.reshape(()) for term in terms.values()]).sum()
    if not summed.requires_grad:
        raise ModelError("loss: it does not depend on any trainable parameter")
    return summed


def values(terms: Mapping[str, Tensor]) -> dict[str, float]:
    """The terms as numbers.

    Raises:
        ModelError: some are not finite; the message names them.
    """
    numbers = torch.stack([term.detach().reshape(()) for term in terms.values()]).tolist()
    found = dict(zip(terms, numbers, strict=True))
    bad = [f"'{name}' = {number}" for name, number in found.items() if not np.isfinite(number)]
    if bad:
        raise ModelError(f"loss: not finite before the step: {', '.join(bad)}")
    return found
