"""Fake quantization where a layer's tensors are: its forward is wrapped, its keepings are registered on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import paddle

from slimbridge.decisions import Site
from slimbridge.errors import ModelError, nearest
from slimbridge.ports import FakeQuant
from slimbridge_paddle.names import BATCH_NORMS, every_name, find_layers
from slimbridge_paddle.ops import PaddleOps
from slimbridge_paddle.tensors import assign, dtype_name, is_float, model_dtype, model_place, native, replace_data

Tensor: TypeAlias = Any
Where: TypeAlias = tuple[Any, str]
"""A layer and the attribute that holds a tensor; a copied model's own ones in the copy."""

_OPS = PaddleOps()
_HELD = "_slimbridge_held"


class Inserted:
    """One fake quantization at its site.

    Args:
        site: the tensor.
        quant: what to do to it.
        own: name of `quant.parameters` and `buffers` -> where it is kept.

    Attributes:
        reads: name of `quant.reads` -> where the model keeps it, and is it transposed?
    """

    def __init__(self, site: Site, quant: FakeQuant, own: Mapping[str, Where]) -> None:
        self.site, self.quant, self.own = site, quant, own
        self.reads: Mapping[str, tuple[Any, str, bool]] = {}

    def __call__(self, x: Tensor, training: bool) -> Tensor:
        """The tensor on its grid; what the fake quantization keeps is brought up to date."""
        if not is_float(x):
            raise ModelError(f"quantize '{self.site}': the tensor is of {dtype_name(x)}; floating ones are allowed")
        state = {name: _stored(*where) for name, where in self.own.items()}
        state.update({name: state[name].clone() for name in self.quant.buffers})  # for a backward pass to come
        for name, (layer, attribute, transposed) in self.reads.items():
            tensor = _stored(layer, attribute)
            state[name] = paddle.transpose(tensor, [1, 0]) if transposed else tensor
        made, changed = self.quant(_OPS, x, state, training)
        for name, value in changed.items():
            kept = _stored(*self.own[name])
            if value.shape != kept.shape:
                found, wanted = tuple(value.shape), tuple(kept.shape)
                raise ModelError(f"quantize '{self.site}': '{name}' became of shape {found}, it has {wanted}")
            replace_data(kept, value.detach().astype(kept.dtype).clone())
        return made


def _stored(layer: Any, attribute: str) -> Tensor:
    """A parameter or buffer itself, whatever a fake quantization puts in front of it."""
    return layer._parameters[attribute] if attribute in layer._parameters else layer._buffers[attribute]


class Session:
    """What is inserted in a model: the model's pre-hook, which starts a pass.

    Attributes:
        training: is the pass one of a training step?
        forwards: the wrapped layers.
    """

    def __init__(self) -> None:
        self.training = False
        self.forwards: list[Forward] = []

    def __call__(self, layer: Any, args: Any) -> None:
        """Count the calls of each layer from 0; an earlier pass may have ended anywhere."""
        for forward in self.forwards:
            forward.calls = 0


class Forward:
    """A layer's forward between fake quantizations.

    Attributes:
        layer: the wrapped layer.
        inner: an instance's own forward, None for that of its class.
        registered: attributes of the layer that hold what the fake quantizations keep.
        calls: of the layer so far, in this pass.
        taps: are shown the output before it is quantized.
    """

    def __init__(self, layer: Any, session: Session) -> None:
        self.layer, self.session = layer, session
        self.inner = layer.__dict__.get("forward")
        self.sites: list[Inserted] = []
        self.registered: set[str] = set()
        self.calls = 0
        self.taps: list[Callable[[Any], None]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward on quantized tensors."""
        call, self.calls = self.calls, self.calls + 1
        args, kwargs = self._quantized((args, kwargs), "input", call)
        weight = self._weight(call)
        if weight is not None:
            self.layer.__dict__["weight"] = weight  # found before the parameter
        try:
            if self.inner is None:
                output = type(self.layer).forward(self.layer, *args, **kwargs)
            else:
                output = self.inner(*args, **kwargs)
        finally:
            if weight is not None:
                del self.layer.__dict__["weight"]
        for tap in self.taps:
            tap(output)
        return self._quantized(output, "output", call)

    def _chosen(self, side: str, call: int) -> list[Inserted]:
        return [one for one in self.sites if one.site.side == side and one.site.call in (None, call)]

    def _weight(self, call: int) -> Tensor | None:
        """The quantized weight, None where it is none of the sites."""
        weight: Tensor | None = None
        for one in self._chosen("weight", call):
            flip = isinstance(self.layer, paddle.nn.Linear)
            given = self.layer._parameters["weight"] if weight is None else weight
            weight = one(paddle.transpose(given, [1, 0]) if flip else given, self.session.training)
            weight = paddle.transpose(weight, [1, 0]) if flip else weight
        return weight

    def _quantized(self, value: Any, side: str, call: int) -> Any:
        chosen = self._chosen(side, call)
        if not chosen:
            return value
        count = 0

        def change(tensor: Tensor) -> Tensor:
            nonlocal count
            for one in chosen:
                if one.site.argument == count:
                    tensor = one(tensor, self.session.training)
            count += 1
            return tensor

        made = changed(value, change)
        for one in chosen:
            if one.site.argument >= count:
                raise ModelError(f"quantize '{one.site}': call {call} of the layer has {count} {side} tensors")
        return made


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested lists, tuples and dicts with each tensor changed, in order."""
    if isinstance(value, paddle.Tensor):
        return change(value)
    kind: Any = type(value)
    if isinstance(value, Mapping):
        return kind({key: changed(item, change) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        items = [changed(item, change) for item in value]
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    return value


def wrapped(layer: Any) -> Forward | None:
    """The layer's wrapper, None where nothing is inserted."""
    found = layer.__dict__.get("forward")
    return found if isinstance(found, Forward) else None


@contextmanager
def training_pass(model: Any, train: bool = True) -> Iterator[None]:
    """The passes inside are those of a training step, of whatever part of the model has something inserted."""
    layers = model.sublayers(include_self=True)
    sessions = [hook for layer in layers for hook in layer._forward_pre_hooks.values() if isinstance(hook, Session)]
    for session in sessions:
        session.training = train
    try:
        yield
    finally:
        for session in sessions:
            session.training = False


def remove_quant(model: Any) -> None:
    """Take out every fake quantization and what it keeps."""
    for layer in model.sublayers(include_self=True):
        for key in [key for key, hook in layer._forward_pre_hooks.items() if isinstance(hook, Session)]:
            del layer._forward_pre_hooks[key]
        forward = wrapped(layer)
        if forward is None:
            continue
        for name in forward.registered:
            layer._parameters.pop(name, None)
            layer._buffers.pop(name, None)
        del layer.__dict__["forward"]
        if forward.inner is not None:
            layer.__dict__["forward"] = forward.inner


def insert_quant(model: Any, quants: Mapping[Site, FakeQuant]) -> None:
    """Put these fake quantizations in place of whatever was inserted before.

    Raises:
        ModelError: see `slimbridge.ports.Backend.insert_quant`; the model is then unchanged.
    """
    layers = find_layers(model, [site.path for site in quants], "quantize")
    _check(layers, quants)
    _check_reads(model, quants)
    remove_quant(model)
    if not quants:
        return
    session = Session()
    for site, quant in quants.items():
        layer = layers[site.path]
        forward = wrapped(layer)
        if forward is None:
            forward = Forward(layer, session)
            layer.__dict__["forward"] = forward
            session.forwards.append(forward)
        forward.sites.append(Inserted(site, quant, _register(model, forward, site, quant)))
    known = every_name(model)
    for forward in session.forwards:
        for one in forward.sites:
            one.reads = {name: known[read].where for name, read in one.quant.reads.items()}
    model.register_forward_pre_hook(session, prepend=True)


def _check(layers: Mapping[str, Any], quants: Mapping[Site, FakeQuant]) -> None:
    """Raise ModelError for a layer without a weight, or one tensor under two names."""
    seen: dict[tuple[int, str], Site] = {}
    for site, quant in quants.items():
        layer = layers[site.path]
        if site.side == "weight" and layer._parameters.get("weight") is None:
            raise ModelError(f"quantize '{site}': layer '{site.path}' has no weight")
        first = seen.setdefault((id(layer), site.held("")), site)
        if first != site:
            raise ModelError(f"quantize: '{first}' and '{site}' are one tensor, of a layer with two names")
        for name in (*quant.parameters, *quant.buffers):
            forward, attribute = wrapped(layer), site.held(name)
            if hasattr(layer, attribute) and not (forward and attribute in forward.registered):
                raise ModelError(f"quantize '{site}': layer '{site.path}' has an attribute '{attribute}' of its own")


def _check_reads(model: Any, quants: Mapping[Site, FakeQuant]) -> None:
    """Raise ModelError for a name that is none of the model's, nor of what is to be inserted."""
    known = {name for name, entry in every_name(model).items() if not entry.inserted}
    for site, quant in quants.items():
        start = f"{site.path}." if site.path else ""
        known |= {start + site.held(name) for name in (*quant.parameters, *quant.buffers)}
    for site, quant in quants.items():
        for name in quant.reads.values():
            if name not in known:
                raise ModelError(f"quantize '{site}': the model has no parameter '{name}'{nearest(name, known)}")


def _register(model: Any, forward: Forward, site: Site, quant: FakeQuant) -> dict[str, Where]:
    """Make the parameters and buffers of a site on its layer."""
    layer, own = forward.layer, {}
    dtype, place = model_dtype(model), model_place(model)
    for name, value in (*quant.parameters.items(), *quant.buffers.items()):
        attribute = site.held(name)
        trained = name in quant.parameters
        tensor = native(np.asarray(value, np.float64 if trained else None), dtype, place)
        if trained:
            made = paddle.create_parameter([1], dtype_name(tensor))
            assign(made, tensor.numpy(), place)  # Paddle's initialisers know no tensor without axes
            layer.add_parameter(attribute, made)
        else:
            layer.register_buffer(attribute, tensor)
        forward.registered.add(attribute)
        own[name] = (layer, attribute)
    return own


def hold_statistics(model: Any, hold: bool) -> None:
    """Let batch normalisations use and keep their running statistics in training steps, or do as before."""
    for layer in model.sublayers(include_self=True):
        if not isinstance(layer, BATCH_NORMS):
            continue
        if hold and _HELD not in layer.__dict__:
            layer.__dict__[_HELD] = layer._use_global_stats
            layer._use_global_stats = True
        elif not hold and _HELD in layer.__dict__:
            layer._use_global_stats = layer.__dict__.pop(_HELD)
