"""Fake quantization in a model: hooks that pass tensors of a layer on, and what they keep beside its parameters.

The hooks refer to modules only, never to tensors, so that they go along when a model is copied or moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from slimbridge.decisions import Site
from slimbridge.errors import ModelError, nearest
from slimbridge.ports import Array, FakeQuant, Ops
from slimbridge_torch.names import INSERTED, all_names, find_modules, inserted_names

Tensor = Any
Change = Callable[[Tensor], Tensor]


@dataclass
class _Pass:
    """The model as a whole: is it training, and which pass is this? A pre-hook of the model counts."""

    root: nn.Module
    number: int = 0

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.number += 1


@dataclass
class _Quant:
    """One site's fake quantization, and where its state is: name -> module and attribute."""

    site: Site
    quant: FakeQuant
    kept: Mapping[str, tuple[nn.Module, str]]
    ops: Ops
    whole: _Pass

    def __deepcopy__(self, memo: dict[int, Any]) -> _Quant:
        """With the modules of the copied model; the fake quantization has no state of its own and is shared."""
        return _Quant(self.site, self.quant, deepcopy(self.kept, memo), self.ops, deepcopy(self.whole, memo))

    def __call__(self, x: Tensor) -> Tensor:
        """The tensor on its grid."""
        if not x.is_floating_point():
            raise ModelError(f"quantize '{self.site}': the tensor is of {x.dtype}; floating ones are allowed")
        state = {name: _now(module, attribute) for name, (module, attribute) in self.kept.items()}
        y, changed = self.quant(self.ops, x, state, self.whole.root.training)
        for name, value in changed.items():
            module, attribute = self.kept[name]
            old = module._buffers[attribute]
            if old is None or value.shape != old.shape:
                raise ModelError(f"quantize '{self.site}': '{name}' became {tuple(value.shape)}, its shape must stay")
            # A new tensor in its place: the old one may be needed for the gradient.
            module._buffers[attribute] = value.detach().to(old.dtype)
        return y


@dataclass
class _Layer:
    """The sites of one layer, by side and argument; counts the layer's calls in a pass."""

    whole: _Pass
    quants: list[_Quant] = field(default_factory=list)
    number: int = 0
    call: int = -1

    def begin(self) -> None:
        """The layer is called."""
        self.call = self.call + 1 if self.number == self.whole.number else 0
        self.number = self.whole.number

    def changes(self, side: str) -> dict[int, list[Change]]:
        """Argument -> what to do with it in this call."""
        found: dict[int, list[Change]] = {}
        for quant in self.quants:
            if quant.site.side == side and quant.site.call in (None, self.call):
                found.setdefault(quant.site.argument, []).append(quant)
        return found


@dataclass
class _Before:
    """The pre-hook of a layer: its inputs and its weight."""

    layer: _Layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.layer.begin()
        for change in self.layer.changes("weight").get(0, ()):
            # An attribute of the object hides the parameter, which `_parameters` still has.
            module.__dict__["weight"] = change(module.__dict__.get("weight", module._parameters["weight"]))
        changes = self.layer.changes("input")
        return _replaced((args, kwargs), changes, self.layer) if changes else None


@dataclass
class _After:
    """The hook after a layer: its outputs; it runs after errors too, and takes the weight back."""

    layer: _Layer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        module.__dict__.pop("weight", None)
        changes = self.layer.changes("output")
        return _replaced(output, changes, self.layer) if changes and output is not None else None


def _now(module: nn.Module, attribute: str) -> Tensor:
    """A parameter or buffer itself, also where a fake quantized weight hides it."""
    found = module._parameters.get(attribute)
    return module._buffers[attribute] if found is None else found


def _replaced(tree: Any, changes: Mapping[int, list[Change]], layer: _Layer) -> Any:
    """The nested tensors, flattened in the order of `tensors_in`, with some of them changed."""
    count = 0

    def walk(item: Any) -> Any:
        nonlocal count
        if isinstance(item, torch.Tensor):
            for change in changes.get(count, ()):
                item = change(item)
            count += 1
        elif isinstance(item, Mapping):
            new = copy(item)
            for key, value in item.items():
                new[key] = walk(value)  # type: ignore[index]
            return new
        elif isinstance(item, (tuple, list)):
            parts = [walk(part) for part in item]
            return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
        return item

    result = walk(tree)
    if max(changes) >= count:
        site = next(quant.site for quant in layer.quants if quant in changes[max(changes)])
        raise ModelError(f"quantize '{site}': {count} tensors are there in this call, the first is number 0")
    return result


def insert_quant(
    model: nn.Module, quants: Mapping[Site, FakeQuant], ops: Ops, tensor: Callable[[Array], Tensor]
) -> None:
    """Fake-quantize these sites from now on, in place of those of an earlier call.

    Args:
        model: any module.
        quants: site -> what its tensor passes through.
        ops: handed to them.
        tensor: makes an initial value a tensor of the model's type, on its device.

    Raises:
        ModelError: a path, a weight or a parameter that does not exist, or a name that is taken; nothing is changed.
    """
    modules = find_modules(model, tuple(site.path for site in quants), "quantize")
    added = _added(modules, quants)
    kept = {site: _places(model, modules, site, quants) for site in quants}
    values = [tensor(value) for _, _, value, _ in added]
    remove_quant(model)
    for (module, attribute, _, trained), value in zip(added, values, strict=True):
        module.__dict__.setdefault(INSERTED, set()).add(attribute)
        if trained:
            module.register_parameter(attribute, nn.Parameter(value))
        else:
            module.register_buffer(attribute, value)
    whole = _Pass(model)
    layers: dict[int, tuple[nn.Module, _Layer]] = {}
    for site, quant in quants.items():
        module = modules[site.path]
        layer = layers.setdefault(id(module), (module, _Layer(whole)))[1]
        layer.quants.append(_Quant(site, quant, kept[site], ops, whole))
    if layers:
        model.register_forward_pre_hook(whole)
    for module, layer in layers.values():
        module.register_forward_pre_hook(_Before(layer), with_kwargs=True)
        module.register_forward_hook(_After(layer), always_call=True)


def _added(
    modules: Mapping[str, nn.Module], quants: Mapping[Site, FakeQuant]
) -> list[tuple[nn.Module, str, Array, bool]]:
    """Module, attribute and initial value of what will be kept, and whether it is trained."""
    found: dict[tuple[int, str], tuple[nn.Module, str, Array, bool]] = {}
    for site, quant in quants.items():
        module = modules[site.path]
        if site.side == "weight" and module._parameters.get("weight") is None:
            raise ModelError(f"quantize '{site}': the layer has no weight of its own")
        for name, value in (*quant.parameters.items(), *quant.buffers.items()):
            attribute, trained = site.held(name), name in quant.parameters
            taken = hasattr(module, attribute) and attribute not in inserted_names(module)
            if taken or (id(module), attribute) in found:
                raise ModelError(f"quantize '{site}': its layer has a '{attribute}' already")
            array = np.asarray(value, dtype=np.float64) if trained else np.asarray(value)
            found[id(module), attribute] = (module, attribute, array, trained)
    return list(found.values())


def _places(
    model: nn.Module, modules: Mapping[str, nn.Module], site: Site, quants: Mapping[Site, FakeQuant]
) -> dict[str, tuple[nn.Module, str]]:
    """Name in a fake quantization's state -> module and attribute."""
    quant = quants[site]
    places = {name: (modules[site.path], site.held(name)) for name in (*quant.parameters, *quant.buffers)}
    if not quant.reads:
        return places
    known = {path: module for path, module in model.named_modules(remove_duplicate=False)}
    old = {f"{path}.{name}".lstrip(".") for path, module in known.items() for name in inserted_names(module)}
    new = {
        f"{other.path}.{other.held(name)}".lstrip(".")
        for other, its in quants.items()
        for name in (*its.parameters, *its.buffers)
    }
    readable = (all_names(model).keys() - old) | new
    for name, full in quant.reads.items():
        if full not in readable:
            raise ModelError(f"quantize '{site}': the model has no parameter '{full}'{nearest(full, readable)}")
        path, _, attribute = full.rpartition(".")
        places[name] = (known[path], attribute)
    return places


def remove_quant(model: nn.Module) -> None:
    """Take all out again, parameters and buffers included."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, (_Pass, _Before))]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _After)]:
            del module._forward_hooks[key]
            module._forward_hooks_always_called.pop(key, None)
        for name in inserted_names(module):
            delattr(module, name)
        module.__dict__.pop(INSERTED, None)


def hold_statistics(model: nn.Module, hold: bool) -> None:
    """BatchNorm layers stay in eval mode in training steps, or no longer; see `keep_held`."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if hold:
                module.__dict__[_HELD] = True
            else:
                module.__dict__.pop(_HELD, None)


def keep_held(model: nn.Module) -> None:
    """After `model.train()`: layers whose statistics are held go back to eval mode."""
    for module in model.modules():
        if _HELD in module.__dict__:
            module.training = False


_HELD = "_slimbridge_held"
