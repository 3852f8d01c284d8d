"""Neutral graphs written by hand, with the module calls that a tracer sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimbridge.graph import Call, Graph, Node
from slimbridge.ports import Layer

ROLES = ("weight", "bias", "running_mean", "running_var")


class Made:
    """A graph, operation by operation; every method gives the id of the tensor that it made."""

    def __init__(self, *shape: int) -> None:
        self.nodes: list[Node] = []
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.calls: list[Call] = []
        self.layers: dict[str, Layer] = {}
        self.x = self.function("input", [], shape)

    def function(
        self, kind: str, inputs: Sequence[int], shape: tuple[int, ...] | None = None, name: str = "", **rest: Any
    ) -> int:
        """An operation in the forward of the container `name`."""
        made = len(self.shapes)
        self.shapes[made] = self.shapes[inputs[0]] if shape is None else shape
        self.nodes.append(Node(kind, name, tuple(inputs), (made,), rest.pop("params", {}), rest))
        return made

    def module(self, kind: str, path: str, x: int, shape: tuple[int, ...] | None = None, **rest: Any) -> int:
        """An operation that is a module of its own."""
        made = self.function(kind, [x], shape, path, **rest)
        self.call(path, [x], [made])
        return made

    def call(self, path: str, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """A module returned."""
        self.calls.append(Call(path, tuple(inputs), tuple(outputs)))

    def conv(self, x: int, path: str, out: int = 4, bias: bool = False, weight: str = "", **attrs: Any) -> int:
        n, channels, *space = self.shapes[x]
        params = {"weight": weight or f"{path}.weight", **({"bias": f"{path}.bias"} if bias else {})}
        self._layer(
            path,
            "conv_transpose" if attrs.get("transposed") else "conv",
            params,
            {"weight": (out, channels, 3, 3), "bias": (out,)},
        )
        return self.module("conv", path, x, (n, out, *space), params=params, **attrs)

    def linear(self, x: int, path: str, out: int = 2) -> int:
        params = {"weight": f"{path}.weight", "bias": f"{path}.bias"}
        self._layer(path, "linear", params, {"weight": (out, self.shapes[x][-1]), "bias": (out,)})
        return self.module("linear", path, x, (*self.shapes[x][:-1], out), params=params)

    def norm(self, x: int, path: str, affine: bool = True, eps: float = 1e-5) -> int:
        params = {role: f"{path}.{role}" for role in (ROLES if affine else ROLES[2:])}
        self._layer(path, "batch_norm", params, dict.fromkeys(ROLES, (self.shapes[x][1],)))
        return self.module("batch_norm", path, x, params=params, eps=eps)

    def act(self, x: int, path: str, op: str = "relu") -> int:
        return self.module("elementwise", path, x, op=op)

    def binary(self, x: int, y: int, op: str = "add", name: str = "") -> int:
        return self.function("binary", [x, y], name=name, op=op)

    def pool(self, x: int, path: str, op: str = "max", side: int = 2) -> int:
        return self.module("pool", path, x, (*self.shapes[x][:2], side, side), op=op)

    def flatten(self, x: int) -> int:
        n, *rest = self.shapes[x]
        size = 1
        for side in rest:
            size *= side
        return self.function("reshape", [x], (n, size))

    def graph(self, *outputs: int) -> Graph:
        return Graph(
            tuple(self.nodes), self.shapes, (self.x,), outputs or (len(self.shapes) - 1,), self.parameters,
            tuple(self.calls),
        )  # fmt: skip

    def _layer(self, path: str, kind: str, params: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> None:
        self.layers[path] = Layer(path, kind, params)
        self.parameters.update({name: shapes[role] for role, name in params.items()})
