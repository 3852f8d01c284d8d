"""One forward pass of a model as a Paddle program (PIR), with the path of the layer that ran each operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import paddle
from paddle.base.dygraph.base import switch_to_static_graph

from slimbridge.errors import ModelError, SlimbridgeError
from slimbridge.ports import Array, tensors_in
from slimbridge_paddle._compat import graph_tracing_guard, no_call_stacks, quiet_capture
from slimbridge_paddle.names import walk
from slimbridge_paddle.quant import remove_quant
from slimbridge_paddle.tensors import check_list, model_dtype

LayerCall: TypeAlias = tuple[str, list[Any], list[Any]]


@dataclass(frozen=True)
class Program:
    """A captured pass.

    Attributes:
        program: the Paddle program; it owns the values.
        inputs: the values of the model's inputs.
        outputs: the values (or tensors) of its outputs, flattened.
        tensors: id of a parameter's value -> the parameter or buffer.
        paths: id of an operation -> path of the layer that runs what follows it.
        calls: path, inputs and outputs of each layer's call, in the order of return; None stands for a tensor that
            is no value of the program. Empty where the source was translated.
    """

    program: Any
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    tensors: dict[str, Any]
    paths: dict[int, str]
    calls: Sequence[LayerCall] = ()


def capture(model: Any, inputs: Sequence[Array]) -> Program:
    """Capture one eval pass; the model, attributes that its forward writes included, is left as it was.

    The forward is first run as it is on symbolic values; where its Python depends on data, Paddle's translation of
    the source (`paddle.jit.to_static`) is tried.

    Raises:
        ModelError: neither works, or there is no input.
    """
    check_list(inputs)
    if not inputs:
        raise ModelError("trace: at least one example input is needed")
    for index, array in enumerate(inputs):
        if 0 in np.shape(array)[:1]:
            raise ModelError(f"trace: input {index} has the shape {np.shape(array)}; a batch of at least 1 is needed")
    dtype = model_dtype(model)
    specs = [_spec(np.asarray(array), dtype) for array in inputs]
    try:
        with untouched(model):
            found: Program = _direct(model, specs)
            return found
    except SlimbridgeError:
        raise
    except Exception as first:  # noqa: BLE001  (a user's forward may raise anything)
        try:
            with untouched(model):
                return _translated(model, specs)
        except SlimbridgeError:
            raise
        except Exception as second:  # noqa: BLE001  (likewise)
            raise ModelError(f"trace: the forward pass cannot be captured: {_line(second)}") from first


def _line(error: Exception) -> str:
    """The last line of a message, where Paddle has the cause; with the class's name where that is not a usual one."""
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return name
    usual = type(error).__module__ == "builtins" or name in lines[-1]
    return lines[-1] if usual else f"{name}: {lines[-1]}"


def _spec(array: Array, dtype: str) -> tuple[list[int], str]:
    kind = dtype if array.dtype.kind == "f" else "int64" if array.dtype.kind in "iu" else array.dtype.name
    return list(array.shape), kind


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Eval mode without inserted quantization; each layer's attributes and hooks are as before at the end.

    A forward that stores a value on its layer would otherwise leave a symbolic one there. Paddle is in dynamic mode
    at the end, whatever happened.
    """
    layers = model.sublayers(include_self=True)
    saved = [(layer, dict(layer.__dict__), _containers(layer)) for layer in layers]
    try:
        remove_quant(model)
        model.eval()
        yield
    finally:
        paddle.disable_static()
        for layer, attributes, containers in saved:
            layer.__dict__.clear()
            layer.__dict__.update(attributes)
            for container, content in containers:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)


def _containers(layer: Any) -> list[tuple[Any, Any]]:
    return [(value, value.copy()) for value in layer.__dict__.values() if isinstance(value, (dict, list, set))]


@dataclass
class _Record:
    """Whose turn it is after each operation, and the calls of layers, noted as the layers run.

    Attributes:
        paths, calls: of `Program`.
        stack: the layers that run now, with their inputs.
    """

    paths: dict[int, str] = field(default_factory=dict)
    calls: list[LayerCall] = field(default_factory=list)
    stack: list[tuple[str, list[Any]]] = field(default_factory=list)

    def watch(self, model: Any) -> None:
        """Register the hooks; the caller removes them."""
        seen: set[int] = set()
        for path, layer in walk(model):
            if id(layer) not in seen:
                seen.add(id(layer))
                layer.register_forward_pre_hook(self._enter(path), prepend=True, with_kwargs=True)
                layer.register_forward_post_hook(self._leave)

    def _mark(self) -> None:
        block = paddle.static.default_main_program().global_block()
        self.paths[block.back().id()] = self.stack[-1][0] if self.stack else ""

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.stack.append((path, _values((args, kwargs))))
            self._mark()

        return hook

    def _leave(self, layer: Any, args: Any, output: Any) -> None:
        path, given = self.stack.pop()
        if path:
            self.calls.append((path, given, _values(output)))
        self._mark()


def _values(item: Any) -> list[Any]:
    return [value if isinstance(value, paddle.pir.Value) else None for value in tensors_in(item)]


@switch_to_static_graph
def _direct(model: Any, specs: Sequence[tuple[list[int], str]]) -> Program:
    record = _Record()
    record.watch(model)
    program, startup = paddle.static.Program(), paddle.static.Program()
    guard = paddle.static.program_guard(program, startup)
    with quiet_capture(), no_call_stacks(), guard, graph_tracing_guard(program) as context:
        inputs = tuple(paddle.static.data(f"input_{i}", shape, dtype) for i, (shape, dtype) in enumerate(specs))
        outputs = tuple(tensors_in(model(*inputs)))
    return Program(program, inputs, outputs, _tensors(context.get_params_with_values()), record.paths, record.calls)


class _Caller(paddle.nn.Layer):
    """Calls the model, so that the translation replaces this layer's forward and not the model's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Sequence[Any]) -> Any:  # one list: the translation refuses *inputs
        """The model's own output."""
        return self.model(*inputs)


def _translated(model: Any, specs: Sequence[tuple[list[int], str]]) -> Program:
    record = _Record()
    record.watch(model)
    caller = _Caller(model)
    caller.eval()
    spec = [paddle.static.InputSpec(shape, dtype) for shape, dtype in specs]
    concrete = paddle.jit.to_static(caller, input_spec=[spec], full_graph=True).forward.concrete_program
    inputs = tuple(value for value in tensors_in(list(concrete.inputs)) if isinstance(value, paddle.pir.Value))
    outputs = tuple(tensors_in(concrete.outputs))
    return Program(concrete.main_program, inputs, outputs, _tensors(concrete.parameters), record.paths)


def _tensors(pairs: Any) -> dict[str, Any]:
    tensors, values = pairs
    return {value.id: tensor for tensor, value in zip(tensors, values, strict=True)}
