"""Folds what aten splits: products over many axes, biases added afterwards, selections of every entry of an axis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from slimbridge.graph import Node

Shapes = Mapping[int, tuple[int, ...]]


class _Folder:
    def __init__(self, nodes: list[Node], shapes: Shapes, outputs: Collection[int]) -> None:
        self.shapes = shapes
        self.nodes: list[Node | None] = list(nodes)
        self.outputs = frozenset(outputs)
        self.maker = {value: i for i, node in enumerate(nodes) for value in node.outputs}
        self.uses = Counter(value for node in nodes for value in node.inputs)
        self.reader = {value: i for i, node in enumerate(nodes) for value in node.inputs}

    def only_reader(self, value: int) -> int | None:
        """Position of the only node that reads a value."""
        return self.reader[value] if self.uses[value] == 1 and value not in self.outputs else None

    def unflatten(self, at: int) -> None:
        """reshape, linear, reshape -> linear, where the reshapes only merge and part the leading axes.

        Reshapes of another layer than the linear one stay: the model's code has them, maybe with a width in it.
        """
        node = self.nodes[at]
        before = self.nodes[self.maker[node.inputs[0]]] if node else None
        reader = self.only_reader(node.outputs[0]) if node else None
        after = self.nodes[reader] if reader is not None else None
        if node is None or before is None or after is None or reader is None:
            return
        source, result = self.shapes[before.inputs[0]] if before.inputs else (), self.shapes[after.outputs[0]]
        if not before.name == node.name == after.name or source == self.shapes[node.inputs[0]]:
            return
        if before.kind != "reshape" or after.kind != "reshape" or source[:-1] != result[:-1]:
            return
        if source[-1] != self.shapes[node.inputs[0]][-1] or result[-1] != self.shapes[node.outputs[0]][-1]:
            return
        first = self.maker[node.inputs[0]]
        self.uses[node.inputs[0]] -= 1
        if not self.uses[node.inputs[0]] and node.inputs[0] not in self.outputs:
            self.nodes[first] = None
            self.reader[before.inputs[0]] = at
        else:
            self.uses[before.inputs[0]] += 1
        self.nodes[at] = replace(node, inputs=before.inputs, outputs=after.outputs)
        self.nodes[reader] = None
        self.maker[after.outputs[0]] = at

    def unflatten_product(self, at: int) -> None:
        """A product between reshapes that only merge and part its batch axes -> the product with those axes."""
        node = self.nodes[at]
        reader = self.only_reader(node.outputs[0]) if node else None
        after = self.nodes[reader] if reader is not None else None
        if node is None or reader is None or after is None or (after.kind, after.name) != ("reshape", node.name):
            return
        result = self.shapes[after.outputs[0]]
        found = [self._before_merge(value, node.name, result[:-2]) for value in node.inputs]
        sources = tuple(source for source in found if source is not None)
        if result[-2:] != self.shapes[node.outputs[0]][-2:] or len(sources) < len(found):
            return
        for value, source in zip(node.inputs, sources, strict=True):
            self.uses[value] -= 1
            self.uses[source] += 1
            self.reader[source] = at
        for value, source in {*zip(node.inputs, sources, strict=True)}:
            if not self.uses[value] and value not in self.outputs:
                self.nodes[self.maker[value]] = None
                self.uses[source] -= 1
        self.nodes[at] = replace(node, inputs=sources, outputs=after.outputs)
        self.nodes[reader] = None
        self.maker[after.outputs[0]] = at

    def _before_merge(self, value: int, name: str, batch: tuple[int, ...]) -> int | None:
        """The value that a reshape of the same layer flattened the batch axes of."""
        before = self.nodes[self.maker[value]]
        if before is None or (before.kind, before.name) != ("reshape", name):
            return None
        shape = self.shapes[before.inputs[0]]
        return before.inputs[0] if shape == (*batch, *self.shapes[value][-2:]) else None

    def add_bias(self, at: int) -> None:
        """A linear layer without bias and the addition of a vector parameter -> a linear layer with bias."""
        node = self.nodes[at]
        reader = self.only_reader(node.outputs[0]) if node else None
        add = self.nodes[reader] if reader is not None else None
        if node is None or reader is None or add is None or "bias" in node.params:
            return
        if add.kind != "binary" or add.attrs["op"] != "add" or len(add.inputs) != 2:
            return
        product = node.outputs[0]
        other = add.inputs[1] if add.inputs[0] == product else add.inputs[0]
        constant = self.nodes[self.maker[other]]
        if constant is None or constant.kind != "constant" or "value" not in constant.params:
            return
        if self.shapes[other] != self.shapes[product][-1:] or self.shapes[add.outputs[0]] != self.shapes[product]:
            return
        self.uses[other] -= 1
        self.nodes[at] = replace(node, params={**node.params, "bias": constant.params["value"]}, outputs=add.outputs)
        self.nodes[reader] = None
        self.maker[add.outputs[0]] = at

    def join_selects(self) -> None:
        """Selections of each entry of an axis, as `q, k, v = qkv[0], qkv[1], qkv[2]` makes them -> one split."""
        selects: dict[tuple[int, int], list[int]] = {}
        for at, node in enumerate(self.nodes):
            if node is not None and node.kind == "slice" and node.attrs["stop"] - node.attrs["start"] == 1:
                selects.setdefault((node.inputs[0], int(node.attrs["axis"])), []).append(at)
        for (value, axis), places in selects.items():
            pieces = {int(node.attrs["start"]): node for at in places if (node := self.nodes[at]) is not None}
            size = self.shapes[value][axis]
            if len(places) != len(pieces) or len(pieces) != size or size == 1:
                continue
            first = self.nodes[places[0]]
            if first is None:
                continue
            outputs = tuple(pieces[i].outputs[0] for i in range(size))
            attrs = {"axis": axis, "sizes": (1,) * size}
            self.nodes[places[0]] = replace(first, kind="split", outputs=outputs, attrs=attrs)
            for at in places[1:]:
                self.nodes[at] = None

    def drop_unused(self) -> None:
        """Constants, and other arrangements of constants, that nothing reads."""
        fixed: set[int] = set()
        for node in self.nodes:
            if node is not None and node.kind in _ARRANGED and fixed.issuperset(node.inputs):
                fixed.update(node.outputs)
        for at in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[at]
            if node is None or not fixed.issuperset(node.outputs) or self.outputs.intersection(node.outputs):
                continue
            if not any(self.uses[value] for value in node.outputs):
                self.nodes[at] = None
                self.uses.subtract(node.inputs)


_ARRANGED = frozenset({"constant", "transpose", "reshape", "expand"})


def fold(nodes: list[Node], shapes: Shapes, outputs: Collection[int]) -> tuple[Node, ...]:
    """The nodes with linear layers whole, entries selected together, and without unused constants.

    Args:
        nodes: in order of execution.
        shapes: value id -> shape.
        outputs: ids of the model's outputs.
    """
    folder = _Folder(nodes, shapes, outputs)
    for at, node in enumerate(nodes):
        if node.kind == "linear":
            folder.unflatten(at)
            folder.add_bias(at)
            folder.unflatten(at)
        elif node.kind == "matmul":
            folder.unflatten_product(at)
    folder.join_selects()
    folder.drop_unused()
    return tuple(node for node in folder.nodes if node is not None)
