"""Records the aten operations of one forward pass on meta tensors (shapes without data) as neutral nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slimbridge.errors import ModelError
from slimbridge.graph import Call as ModuleCall
from slimbridge.graph import Node
from slimbridge.ports import tensors_in

Tensor = Any


class ViewWriteError(ModelError):
    """A tensor is read whose memory was changed through another view: the record would be wrong."""


@dataclass(frozen=True)
class OpInfo:
    """What the recorder needs to know of an operation, looked up once for each.

    Attributes:
        name: without namespace and without the underscore of the in-place form, e.g. "relu".
        overload: e.g. "Tensor".
        positions: argument name -> position.
        written: positions of the arguments that it changes in place.
        is_view: its outputs share memory with its first argument.
        moves: it changes the shape of its first argument in place, not the data.
    """

    name: str
    overload: str
    positions: Mapping[str, int]
    written: tuple[int, ...]
    is_view: bool
    moves: bool


def _op_info(func: Any) -> OpInfo:
    arguments = func._schema.arguments
    name = func._schema.name.split("::")[-1]
    written = tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
    return OpInfo(
        name=name.rstrip("_") if written else name,
        overload=func._overloadname,
        positions={argument.name: i for i, argument in enumerate(arguments)},
        written=written,
        is_view=bool(func.is_view),
        moves=torch.Tag.inplace_view in func.tags,
    )


@dataclass(frozen=True)
class Call:
    """One operation that is being recorded: what a handler sees."""

    recorder: Recorder
    info: OpInfo
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outs: tuple[Tensor, ...]

    def arg(self, key: int | str, default: Any = None) -> Any:
        """An argument by position or by its name in the schema; `default` where it was left out or is unknown."""
        if isinstance(key, str):
            if key in self.kwargs:
                return self.kwargs[key]
            key = self.info.positions.get(key, len(self.args))
        return self.args[key] if key < len(self.args) else default

    def value(self, tensor: Tensor) -> int:
        """The id of the value that a tensor holds now."""
        return self.recorder.value(tensor)

    def emit(
        self,
        kind: str,
        inputs: Sequence[int],
        shape: Sequence[int] | None = None,
        params: Mapping[str, str] | None = None,
        **attrs: Any,
    ) -> int:
        """Add a node with one output, of the operation's own output shape unless told; returns the output's id."""
        return self.recorder.emit(kind, inputs, [self.outs[0].shape if shape is None else shape], params, attrs)[0]

    def emit_many(self, kind: str, inputs: Sequence[int], shapes: Iterable[Sequence[int]], **attrs: Any) -> list[int]:
        """Add a node with several outputs."""
        return self.recorder.emit(kind, inputs, list(shapes), None, attrs)

    def shape(self, value: int) -> tuple[int, ...]:
        """The shape of a value."""
        return self.recorder.shapes[value]


Handler = Callable[[Call], Sequence[int] | None]
"""Records an operation and returns the values of its outputs, first ones first; None if it cannot."""


@dataclass
class _Values:
    ids: dict[int, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    families: dict[int, set[int]] = field(default_factory=dict)
    stale: set[int] = field(default_factory=set)
    extra: dict[int, tuple[str, list[Tensor]]] = field(default_factory=dict)
    literal: set[int] = field(default_factory=set)
    likes: dict[int, int] = field(default_factory=dict)
    twins: dict[int, Tensor] = field(default_factory=dict)
    backups: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """A dispatch mode that turns operations into nodes.

    Every tensor stays alive while it records, so that a tensor's `id` names it. In-place operations give the
    tensor a new value; other views of the same memory become stale, and reading one raises `ViewWriteError`.

    Attributes:
        nodes: in order of execution.
        shapes: value id -> shape.
        calls: of modules, in the order of their return.
        path: the layer that is running.
        expanded: ids of the tensors that an expansion gave.
    """

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.calls: list[ModuleCall] = []
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.path = ""
        self.expanded: set[int] = set()
        self._handlers = handlers
        self._values = _Values()
        self._makers: dict[int, Node] = {}
        self._infos: dict[Any, OpInfo] = {}

    def add_parameter(self, real: Tensor, meta: Tensor, name: str | None) -> None:
        """Declare a parameter or buffer and its meta twin; without a name it is a literal."""
        self._values.twins[id(real)] = meta
        self._values.kept += [real, meta]
        if name is not None:
            self._values.names[id(meta)] = name

    def add_input(self, tensor: Tensor) -> int:
        """Declare a model input."""
        value = self.emit("input", (), [tensor.shape], None, {})[0]
        self._bind(tensor, value)
        return value

    def add_like(self, tensor: Tensor, source: Tensor) -> None:
        """Declare a literal that takes its shape from an activation, as `zeros_like` makes it."""
        values = self._values
        if id(source) in values.ids:
            values.likes[id(tensor)] = values.ids[id(source)]

    def parameter(self, tensor: Tensor) -> str | None:
        """The name of an unchanged parameter or buffer, None for any other tensor."""
        return self._values.names.get(id(tensor))

    def value(self, tensor: Tensor) -> int:
        """The id of the value that a tensor holds; a constant node is made for what no operation made."""
        values = self._values
        key = id(tensor)
        if key in values.ids:
            return values.ids[key]
        if key in values.extra:
            op, sources = values.extra[key]
            inputs = [self.value(source) for source in sources]
            made = self.emit("unknown", inputs, [tensor.shape], None, {"op": op})[0]
        elif key in values.likes:
            made = self.emit("elementwise", [values.likes[key]], [tensor.shape], None, {"op": "like"})[0]
        else:
            name = values.names.get(key)
            made = self.emit("constant", (), [tensor.shape], {"value": name} if name else None, {})[0]
            if name is None:
                values.literal.add(made)
        self._bind(tensor, made)
        return made

    def known(self, tree: object) -> list[int | None]:
        """The ids of nested tensors, None for one that no recorded operation made; nothing is recorded for it."""
        tensors = [item for item in tensors_in(tree) if isinstance(item, torch.Tensor)]
        values = self._values
        return [None if id(tensor) in values.stale else values.ids.get(id(tensor)) for tensor in tensors]

    def add_call(self, path: str, inputs: Sequence[int | None], outputs: Sequence[int | None]) -> None:
        """Note a module's call, unless one of its tensors is unknown."""
        given, made = ([value for value in values if value is not None] for values in (inputs, outputs))
        if len(given) == len(inputs) and len(made) == len(outputs):
            self.calls.append(ModuleCall(path, tuple(given), tuple(made)))

    def maker(self, value: int) -> Node | None:
        """The node that made a value."""
        return self._makers.get(value)

    def emit(
        self,
        kind: str,
        inputs: Sequence[int],
        shapes: Sequence[Sequence[int]],
        params: Mapping[str, str] | None,
        attrs: Mapping[str, Any],
    ) -> list[int]:
        """Add a node; returns its outputs' ids."""
        outputs = range(len(self.shapes), len(self.shapes) + len(shapes))
        node = Node(kind, self.path, tuple(inputs), tuple(outputs), params or {}, attrs)
        for value, shape in zip(outputs, shapes, strict=True):
            self.shapes[value] = tuple(shape)
            self._makers[value] = node
        self.nodes.append(node)
        return list(outputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation on meta tensors and record it."""
        kwargs = kwargs or {}
        info = self._infos.get(func)
        if info is None:
            info = self._infos[func] = _op_info(func)
        tensors = list(tensors_of((*args, *kwargs.values())))
        if any(t.device.type == "meta" for t in tensors) and any(t.device.type != "meta" for t in tensors):
            args, kwargs = self._on_meta(info, args), {k: self._twin(v) for k, v in kwargs.items()}
            tensors = list(tensors_of((*args, *kwargs.values())))
        self._check_fresh(info.name, tensors)
        before = [args[i] for i in info.written if i < len(args)]
        self._back_up(before)
        out = _eval_norm(info, args) if info.name in _EVAL_NORMS else None
        out = func(*args, **kwargs) if out is None else out
        outs = tuple(tensors_of((out,)))
        self._values.kept += [*tensors, *outs]
        if any(map(self._is_data, tensors)):
            self._record(Call(self, info, args, kwargs, outs), tensors, before)
        elif before:
            self._values.likes.clear()  # a write that is not recorded may have set single channels of one
        elif info.name in _PASSING and id(tensors[0]) in self._values.likes:
            self._values.likes[id(outs[0])] = self._values.likes[id(tensors[0])]
        if info.is_view:
            self._join(tensors[0], outs)
        return out

    def output(self, tensor: Tensor) -> int:
        """The id of a model output."""
        self.path = ""
        self._check_fresh("output", [tensor])
        return self.value(tensor)

    def restore(self) -> None:
        """Give tensors with data that the pass wrote into (attributes that are no buffers) their values back."""
        with torch.no_grad():
            for tensor, values in self._values.backups.values():
                tensor.copy_(values)

    def _back_up(self, written: Iterable[Any]) -> None:
        backups = self._values.backups
        for item in written:
            if isinstance(item, torch.Tensor) and item.device.type != "meta" and id(item) not in backups:
                backups[id(item)] = (item, item.clone())

    def _check_fresh(self, op: str, tensors: Iterable[Tensor]) -> None:
        stale = self._values.stale
        if stale and any(id(tensor) in stale for tensor in tensors):
            raise ViewWriteError(f"trace: '{op}' in '{self.path}' reads a tensor that was changed through a view of it")

    def _is_data(self, tensor: Tensor) -> bool:
        values = self._values
        key = id(tensor)
        if key in values.names or key in values.extra:
            return True
        return key in values.ids and values.ids[key] not in values.literal

    def _record(self, call: Call, tensors: list[Tensor], before: list[Tensor]) -> None:
        if not call.outs and not before:  # an assertion
            return
        if not before and self._pass_on(call, tensors):
            return
        handler = self._handlers.get(call.info.name)
        made = handler(call) if handler is not None else None
        if made is None:
            inputs = tuple(self.value(tensor) for tensor in tensors)
            made = self.emit("unknown", inputs, [out.shape for out in call.outs], None, {"op": call.info.name})
        if before and not (len(before) == 1 and call.outs and call.outs[0] is before[0]):
            raise ViewWriteError(f"trace: '{call.info.name}' in '{self.path}' writes into one of its arguments")
        if before:
            self._written(before[0], made[0] if made else self._literal(before[0]), call.info.moves)
            return
        for out, value in zip(call.outs, made, strict=False):
            self._bind(out, value)
        for out in call.outs[len(made) :] if made else ():
            self._values.extra[id(out)] = (f"{call.info.name} (further output)", tensors)

    def _pass_on(self, call: Call, tensors: list[Tensor]) -> bool:
        """Do only further outputs go in? Then what comes out is one too, and is recorded when data meets it."""
        values = self._values
        data = [tensor for tensor in tensors if self._is_data(tensor)]
        if any(id(tensor) in values.ids or id(tensor) not in values.extra for tensor in data):
            return False
        origins = [values.extra[id(tensor)] for tensor in data]
        sources = [source for _, made_from in origins for source in made_from]
        for out in call.outs:
            values.extra[id(out)] = (origins[0][0], sources)
        return True

    def _literal(self, tensor: Tensor) -> int:
        value = self.emit("constant", (), [tensor.shape], None, {})[0]
        self._values.literal.add(value)
        return value

    def _written(self, tensor: Tensor, value: int, moves: bool) -> None:
        values = self._values
        values.names.pop(id(tensor), None)
        values.ids[id(tensor)] = value
        if not moves:
            values.stale |= values.families.get(id(tensor), set()) - {id(tensor)}

    def _join(self, base: Tensor, views: Sequence[Tensor]) -> None:
        families = self._values.families
        family = families.setdefault(id(base), {id(base)})
        for view in views:
            family.add(id(view))
            families[id(view)] = family

    def _bind(self, tensor: Tensor, value: int) -> None:
        self._values.ids[id(tensor)] = value
        self._values.kept.append(tensor)

    def _on_meta(self, info: OpInfo, args: Sequence[Any]) -> tuple[Any, ...]:
        for i in info.written:
            if i < len(args) and isinstance(args[i], torch.Tensor) and args[i].device.type != "meta":
                raise ViewWriteError(f"trace: '{info.name}' in '{self.path}' writes into a tensor that holds data")
        return tuple(self._twin(arg) for arg in args)

    def _twin(self, item: Any) -> Any:
        """Tensors with data (attributes that are no buffers, tables made on the CPU) as meta tensors."""
        if isinstance(item, (list, tuple)):
            return [self._twin(part) for part in item]
        if not isinstance(item, torch.Tensor) or item.device.type == "meta":
            return item
        values = self._values
        if id(item) not in values.twins:
            values.twins[id(item)] = torch.empty_like(item, device="meta")
            values.kept.append(item)
        return values.twins[id(item)]


_PASSING = ("alias", "clone", "contiguous", "detach", "_to_copy")
"""Operations that pass a literal on."""

_EVAL_NORMS = {"native_batch_norm": 5, "_native_batch_norm_legit_no_training": None}
"""BatchNorm operations and the position of their `training` argument; None: always in eval mode."""


def _eval_norm(info: OpInfo, args: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """What BatchNorm gives in eval mode, on meta tensors; None in train mode.

    PyTorch 2.13 runs a decomposition in Python for it there: two thirds of the time of tracing a ResNet-50.
    """
    position = _EVAL_NORMS[info.name]
    if position is not None and args[position]:
        return None
    return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)


def tensors_of(items: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among arguments, in order, lists of tensors included."""
    for item in items:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from tensors_of(item)
