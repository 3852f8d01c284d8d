"""Folds what aten splits: a linear layer on the last axis of many, a bias added afterwards, unused constants."""

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
    """The nodes with linear layers whole and without unused constants.

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
    folder.drop_unused()
    return tuple(node for node in folder.nodes if node is not None)
