"""From a module and example inputs to the neutral graph.

First the module itself runs on meta tensors, which have shapes but no data, under a dispatch mode that records
each aten operation; that costs no computation. Where the module writes through views or looks at data,
`torch.export` makes a functional graph of it, which then runs under the same recorder.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as hooks

from slimbridge.errors import ModelError, SlimbridgeError
from slimbridge.graph import Graph
from slimbridge.ports import tensors_in
from slimbridge_torch.names import canonical, check_ready
from slimbridge_torch.quant import remove_quant
from slimbridge_torch.record import Recorder
from slimbridge_torch.trace_fold import fold
from slimbridge_torch.trace_ops import HANDLERS

Tensor = Any


def trace(model: nn.Module, inputs: Sequence[Tensor]) -> Graph:
    """The neutral graph of one forward pass in eval mode.

    Args:
        model: any module; its mode, tensors and attributes are left as they were.
        inputs: example tensors, as its forward takes them.

    Raises:
        ModelError: the pass fails, or depends on data; the message names the layer.
    """
    _check(model)
    for index, example in enumerate(inputs):
        if 0 in example.shape[:1]:
            raise ModelError(
                f"trace: input {index} has the shape {tuple(example.shape)}; a batch of at least 1 is needed"
            )
    with _preserved(model):
        remove_quant(model)
        return _traced(model, inputs)


def _traced(model: nn.Module, inputs: Sequence[Tensor]) -> Graph:
    recorder = Recorder(HANDLERS)
    try:
        with _preserved(model), torch.no_grad(), _plain_attention():
            ids = _by_dispatch(model, inputs, recorder)
    except Exception as first:  # a user's forward may raise anything
        if isinstance(first, SlimbridgeError) and not isinstance(first, ModelError):
            raise
        where = recorder.path
        recorder = Recorder(HANDLERS)
        try:
            with _preserved(model), torch.no_grad(), _plain_attention(), silent():
                ids = _by_export(model, inputs, recorder)
        except Exception as second:  # noqa: BLE001  (likewise)
            raise _explained(first, second, where) from first
    parameters = {name: tuple(tensor.shape) for name, tensor in canonical(model).items()}
    nodes = fold(recorder.nodes, recorder.shapes, ids[1])
    there = {value for node in nodes for value in node.outputs}
    calls = tuple(call for call in recorder.calls if there.issuperset((*call.inputs, *call.outputs)))
    return Graph(nodes, recorder.shapes, ids[0], ids[1], parameters, calls)


def _check(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"layer '{path}' is a TorchScript module, which" if path else "a TorchScript module"
            raise ModelError(f"trace: {where} cannot be traced; give the module that it was made from")
    check_ready(model, "trace")


def _explained(first: BaseException, second: BaseException, where: str) -> ModelError:
    if isinstance(first, ModelError):
        return ModelError(f"{first}; torch.export cannot follow it either: {_line(second)}")
    if "meta tensor" in str(first):
        return ModelError(
            f"trace: layer '{where}' looks at the data of a tensor (item(), a Python condition or the like),\n"
            f"which no trace can follow; torch.export cannot either: {_line(second)}"
        )
    return ModelError(f"trace: the forward pass failed in layer '{where}': {type(first).__name__}: {_line(first)}")


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def silent() -> Iterator[None]:
    """No warnings, logs or prints: torch.export and other toolkits tell more than their errors, which are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as products and a softmax: no fused kernel, and no encoder layer in one operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has its old attributes, tensors and mode.

    The entries of attributes that are plain containers come back too: the module's own tables (parameters, buffers,
    submodules, hooks) as well as a list or dict in which a forward pass keeps tensors for the next one.
    """
    saved = [(m.__dict__, dict(m.__dict__)) for m in model.modules()]
    containers = {id(v): (v, copy(v)) for _, attributes in saved for v in attributes.values() if type(v) in _CONTAINERS}
    try:
        model.eval()
        yield
    finally:
        for held, before in (*saved, *containers.values()):
            held.clear()
            add = held.extend if isinstance(held, (list, deque)) else held.update
            add(before)


_CONTAINERS = (dict, OrderedDict, defaultdict, set, list, deque)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _by_dispatch(
    model: nn.Module, inputs: Sequence[Tensor], recorder: Recorder
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    _swap(model, recorder)
    examples = [_empty(tensor) for tensor in inputs]
    ids = tuple(recorder.add_input(example) for example in examples)
    try:
        with _path_hooks(model, recorder), recorder:
            output = model(*examples)
    finally:
        recorder.restore()
    return ids, _outputs(output, recorder)


def _swap(model: nn.Module, recorder: Recorder) -> None:
    """Put meta twins in the place of all parameters and buffers, and declare them to the recorder."""
    names = {id(tensor): name for name, tensor in canonical(model).items()}
    twins: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in twins:
                    twin = _empty(tensor)
                    twins[id(tensor)] = nn.Parameter(twin, False) if isinstance(tensor, nn.Parameter) else twin
                    recorder.add_parameter(tensor, twins[id(tensor)], names.get(id(tensor)))
                held[key] = twins[id(tensor)]


@contextmanager
def _path_hooks(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Keep `recorder.path` at the innermost module of the model that is running, and note the modules' calls."""
    paths = {id(module): path for path, module in model.named_modules()}
    stack: list[tuple[str, list[int | None], int]] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack.append((recorder.path, recorder.known(args), len(recorder.shapes)))
        recorder.path = paths.get(id(module), recorder.path)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recorder.path, given, before = stack.pop()
        # Keywords are seen only now: a value that the call itself made was not what it was given.
        given += [value if value is not None and value < before else None for value in recorder.known(kwargs)]
        if paths.get(id(module)):
            recorder.add_call(paths[id(module)], given, recorder.known(output))

    enters = hooks.register_module_forward_pre_hook(enter)
    handles = [enters, hooks.register_module_forward_hook(leave, with_kwargs=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outputs(output: Any, recorder: Recorder) -> tuple[int, ...]:
    found = []
    for item in tensors_in(output):
        if isinstance(item, torch.Tensor):
            found.append(recorder.output(item))
        elif not isinstance(item, (int, float, str, bool)):
            raise ModelError(f"trace: the model returns a {type(item).__name__}; allowed: tensors in tuples and dicts")
    if not found:
        raise ModelError("trace: the model returns no tensor")
    return tuple(found)


def _by_export(
    model: nn.Module, inputs: Sequence[Tensor], recorder: Recorder
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    program: Any = torch.export.export(model, tuple(inputs), strict=False).run_decompositions({})
    names = {id(tensor): name for name, tensor in canonical(model).items()}
    examples = iter([_empty(tensor) for tensor in inputs])
    ids: list[int] = []
    arguments: list[Tensor] = []
    twins: dict[int, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind.name == "USER_INPUT":
            arguments.append(next(examples))
            ids.append(recorder.add_input(arguments[-1]))
            continue
        real = _held(model, program, spec)
        if id(real) not in twins:
            twins[id(real)] = _empty(real)
            recorder.add_parameter(real, twins[id(real)], names.get(id(real)))
        arguments.append(twins[id(real)])
    with recorder:
        results = _PathInterpreter(program.graph_module, recorder).run(*arguments)
    specs = program.graph_signature.output_specs
    wanted = [result for spec, result in zip(specs, results, strict=True) if spec.kind.name == "USER_OUTPUT"]
    return tuple(ids), _outputs(wanted, recorder)


def _held(model: nn.Module, program: Any, spec: Any) -> Tensor:
    """The tensor behind a lifted argument of an exported program."""
    finders: dict[str, Callable[[str], Tensor]] = {
        "PARAMETER": model.get_parameter,
        "BUFFER": model.get_buffer,
        "CONSTANT_TENSOR": program.constants.__getitem__,
    }
    if spec.kind.name not in finders:
        raise ModelError(f"trace: torch.export gives '{spec.target}' as {spec.kind.name.lower()}; tensors are allowed")
    return finders[spec.kind.name](spec.target)


class _PathInterpreter(torch.fx.Interpreter):
    """Runs an exported graph and tells the recorder which layer each operation came from."""

    def __init__(self, graph_module: Any, recorder: Recorder) -> None:
        super().__init__(graph_module)
        self._recorder = recorder

    def run_node(self, n: Any) -> Any:
        """One operation, under the path of its innermost layer."""
        stack = n.meta.get("nn_module_stack")
        path = list(stack.values())[-1][0] if stack else ""
        self._recorder.path = re.sub(r"@\d+", "", path)  # a repeated call is marked "name@1"
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The operation, but circular padding without the writes through views that aten makes it of."""
        if target is torch.ops.aten.pad.default and "circular" in (*args[2:3], kwargs.get("mode")):
            return _wrapped(args[0], args[1])
        return super().call_function(target, args, kwargs)


def _wrapped(x: Tensor, pads: Sequence[int]) -> Tensor:
    """Circular padding; `pads` holds (before, after) from the last axis on."""
    for i in range(0, len(pads), 2):
        axis = x.ndim - 1 - i // 2
        before, after = x.narrow(axis, x.shape[axis] - pads[i], pads[i]), x.narrow(axis, 0, pads[i + 1])
        x = torch.cat([before, x, after], axis)
    return x
