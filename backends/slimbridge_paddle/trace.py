"""From a captured Paddle program to the neutral graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import paddle

from slimbridge.errors import ModelError
from slimbridge.graph import Call, Graph, Node
from slimbridge.ports import Array
from slimbridge_paddle import (
    trace_layers,  # noqa: F401  (registers its handlers)
    trace_moves,  # noqa: F401  (likewise)
    trace_ops,
    trace_products,  # noqa: F401  (likewise)
)
from slimbridge_paddle.capture import Program, capture
from slimbridge_paddle.names import Entry, entries
from slimbridge_paddle.refs import Active, Bundle, Literal, Ref, Stored, Unsupported
from slimbridge_paddle.run import check_output

Shape: TypeAlias = tuple[int, ...]


def trace(model: Any, inputs: Sequence[Array]) -> Graph:
    """The graph of one eval pass; see `slimbridge.ports.Backend.trace`.

    Raises:
        ModelError: the pass cannot be captured, a shape is not known, or an output is not a tensor.
    """
    program = capture(model, inputs)
    known = [entry for entry in entries(model) if not entry.inserted]
    builder = Builder({id(entry.tensor): entry for entry in known}, program)
    builder.build()
    outputs = tuple(builder.outputs())  # may add constants, for parameters that are returned
    return Graph(
        nodes=tuple(builder.nodes),
        shapes=builder.shapes,
        inputs=builder.inputs,
        outputs=outputs,
        parameters={entry.name: entry.shape for entry in known},
        calls=builder.calls(),
    )


def shape_of(value: Any) -> Shape:
    """A value's shape; -1 where it depends on data."""
    return tuple(int(size) for size in value.shape)


@dataclass
class Builder:
    """The graph in the making.

    Attributes:
        entries: id of a parameter or buffer -> its canonical name and layout.
        program: what was captured.
        nodes, shapes, inputs: of the graph.
        refs: id of a Paddle value -> what it is.
        uses: id of a Paddle value -> how often it is read.
        foldable: tensor id -> index of the layer node that made it and may still take a bias.
        path: path of the layer that runs now.
    """

    entries: Mapping[int, Entry]
    program: Program
    nodes: list[Node] = field(default_factory=list)
    shapes: dict[int, Shape] = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    refs: dict[str, Ref] = field(default_factory=dict)
    uses: dict[str, int] = field(default_factory=dict)
    foldable: dict[int, int] = field(default_factory=dict)
    path: str = ""

    def build(self) -> None:
        """Walk the operations in order."""
        operations = self.program.program.global_block().ops
        for operation in operations:
            self._count(operation)
        for output in self.program.outputs:
            if isinstance(output, paddle.pir.Value):
                self.uses[output.id] = self.uses.get(output.id, 0) + 1
        for value in self.program.inputs:
            self.refs[value.id] = Active(self.emit("input", (), [shape_of(value)])[0])
        self.inputs = tuple(node.outputs[0] for node in self.nodes)
        for operation in operations:
            self._add(operation)
            self.path = self.program.paths.get(operation.id(), self.path)

    def _count(self, operation: Any) -> None:
        read = [value.id for value in operation.operands_source() if value.initialized()]
        for key in (*read, *_captured(operation)):
            self.uses[key] = self.uses.get(key, 0) + 1

    def _add(self, operation: Any) -> None:
        name = operation.name()
        results = [value for value in operation.results() if value.initialized()]
        if name == "builtin.parameter":
            tensor = self.program.tensors.get(results[0].id)
            self.refs[results[0].id] = Stored(self.entries.get(id(tensor)), shape_of(results[0]))
            return
        if name == "pd_op.data" and results[0].id in self.refs:
            return
        operands = [self.refs.get(v.id) if v.initialized() else None for v in operation.operands_source()]
        if name.endswith("_") and isinstance(operands[0], Literal):
            self._forget_likes()
        call = trace_ops.Call(_short(name), operation, operands, results)
        before = len(self.nodes)
        try:
            found = trace_ops.translate(self, call)
        except Unsupported:
            for node in self.nodes[before:]:
                for output in node.outputs:
                    del self.shapes[output]
            del self.nodes[before:]
            found = self._unknown(call)
        for node in self.nodes[before:]:
            self._check_shapes(node, call.name)
        for value, ref in zip(results, found, strict=False):
            self.refs[value.id] = ref

    def _forget_likes(self) -> None:
        """A write into a literal, whose old value later operations read, may have set single channels of it."""
        literals = {key: ref for key, ref in self.refs.items() if isinstance(ref, Literal) and ref.like is not None}
        self.refs.update({key: replace(ref, like=None) for key, ref in literals.items()})

    def _check_shapes(self, node: Node, op: str) -> None:
        """Raise ModelError for a shape that Paddle does not know (-1), or that leaves a window nothing to look at."""
        least = 1 if "conv" in op or "pool" in op else 0
        for output in node.outputs:
            if min(self.shapes[output], default=least) < least:
                raise ModelError(
                    f"trace: '{op}' in layer '{node.name}' gives the shape {self.shapes[output]};\n"
                    "an axis depends on the data, or the example input is too small for the layer"
                )

    def _unknown(self, call: trace_ops.Call) -> list[Ref]:
        """Everything that the operation reads and makes; inner blocks read what they captured.

        A result that nothing reads is left out where its shape is not known (scratch space of a normalisation).
        """
        read = [*call.operands, *(self.refs.get(key) for key in _captured(call.operation))]
        inputs = tuple(dict.fromkeys(self.tensor(ref) for ref in _flat(read) if not isinstance(ref, Literal)))
        kinds = [value.type().as_vec_type() for value in call.results]
        shapes = [
            [tuple(int(size) for size in item.shape) for item in kind.as_list()] if kind else self._used_shape(value)
            for value, kind in zip(call.results, kinds, strict=True)
        ]
        last = call.attrs.get("data_format")
        op = f"{call.name} ({last})" if last in trace_ops.CHANNELS_LAST else call.name
        made = iter(self.emit("unknown", inputs, [shape for group in shapes for shape in group], op=op))
        refs = [tuple(Active(next(made)) for _ in group) for group in shapes]
        return [ref[0] if len(ref) == 1 and not kind else Bundle(ref) for ref, kind in zip(refs, kinds, strict=True)]

    def _used_shape(self, value: Any) -> list[Shape]:
        shape = shape_of(value)
        return [] if min(shape, default=0) < 0 and not self.uses.get(value.id) else [shape]

    def emit(
        self,
        kind: str,
        inputs: Sequence[int],
        shapes: Sequence[Shape],
        params: Mapping[str, str] | None = None,
        **attrs: Any,
    ) -> tuple[int, ...]:
        """Add a node; the ids of its outputs."""
        outputs = tuple(range(len(self.shapes), len(self.shapes) + len(shapes)))
        self.shapes.update(zip(outputs, shapes, strict=True))
        self.nodes.append(Node(kind, self.path, tuple(inputs), outputs, params or {}, attrs))
        return outputs

    def one(
        self, kind: str, inputs: Sequence[int], shape: Shape, params: Mapping[str, str] | None = None, **attrs: Any
    ) -> int:
        """Add a node with one output; its id."""
        return self.emit(kind, inputs, [shape], params, **attrs)[0]

    def tensor(self, ref: Ref | None) -> int:
        """The tensor id of a value; parameters and literals become constant nodes."""
        if isinstance(ref, Active):
            return ref.tensor
        if isinstance(ref, Literal) and ref.like is not None:
            return self.one("elementwise", (ref.like,), ref.shape, op="like")
        if isinstance(ref, Literal):
            return self.one("constant", (), ref.shape)
        if isinstance(ref, Stored):
            return self._constant(ref)
        raise Unsupported

    def _constant(self, ref: Stored) -> int:
        if ref.entry is None:
            made = self.one("constant", (), ref.origin)
        else:
            made = self.one("constant", (), ref.entry.shape, {"value": ref.entry.name})
            if ref.entry.transposed:
                made = self.one("transpose", (made,), ref.origin, perm=(1, 0))
        for step in ref.steps:
            made = self.one(step.kind, (made,), step.shape, **dict(step.attrs))
        return made

    def add_bias(self, tensor: int, name: str) -> None:
        """Give the layer that made `tensor` a bias."""
        index = self.foldable.pop(tensor)
        node = self.nodes[index]
        self.nodes[index] = replace(node, params={**node.params, "bias": name})

    def outputs(self) -> list[int]:
        """Tensor ids of the model's outputs; plain numbers and strings are left out.

        Raises:
            ModelError: an output is of a type that nothing can be said about, or there is no tensor.
        """
        found: list[int] = []
        for output in self.program.outputs:
            check_output(output, "trace")
            if isinstance(output, paddle.pir.Value):
                found.extend(self.tensor(ref) for ref in _flat([self.refs[output.id]]))
            elif isinstance(output, paddle.Tensor):
                entry = self.entries.get(id(output))
                found.append(self.tensor(Stored(entry, shape_of(output))))
        if not found:
            raise ModelError("trace: the model returns no tensor")
        return found

    def calls(self) -> tuple[Call, ...]:
        """The layers' calls, those left out of which a tensor is none of the graph's."""
        found = []
        for path, given, made in self.program.calls:
            ids = [self._known(value) for value in (*given, *made)]
            known = tuple(tensor for tensor in ids if tensor is not None)
            if len(known) == len(ids):
                found.append(Call(path, known[: len(given)], known[len(given) :]))
        return tuple(found)

    def _known(self, value: Any) -> int | None:
        ref = None if value is None else self.refs.get(value.id)
        return ref.tensor if isinstance(ref, Active) else None


def _short(name: str) -> str:
    """The name without its dialect and the in-place mark; what unpacks bundles keeps a name of its own."""
    return {"builtin.split": "builtin_split", "builtin.slice": "slice_of_bundle"}.get(
        name, name.split(".", 1)[1].rstrip("_")
    )


def _flat(refs: Sequence[Ref | None]) -> list[Ref]:
    flat: list[Ref] = []
    for ref in refs:
        if isinstance(ref, Bundle):
            flat.extend(_flat(ref.items))
        elif ref is not None:
            flat.append(ref)
    return flat


def _captured(operation: Any) -> list[str]:
    """Ids of the values that the inner blocks of an operation read; those made inside are not known to us."""
    found: list[str] = []
    for block in operation.blocks() if operation.num_regions() else ():
        for inner in block.ops:
            found.extend(value.id for value in inner.operands_source() if value.initialized())
            found.extend(_captured(inner))
    return found
