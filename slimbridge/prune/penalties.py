"""Penalties that, while the model trains, make channels unimportant that are to be removed afterwards.

Each is a term of the loss over `Pass.parameters`, made of the port's operations, so that it is the same on every
framework. A unit is what must be removed together (`slimbridge.graph.Units`): entries of several parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from math import floor

import numpy as np
from numpy.typing import NDArray

from slimbridge.errors import ModelError
from slimbridge.graph import ChannelGroup, Graph, Units
from slimbridge.plan.pruning import PreparationSection
from slimbridge.ports import Array, Backend, Model, Ops, Pass, Tensor

Penalty = Callable[[Pass, float], Tensor]
"""From a forward pass and the share of the training that is done (0..1) to a scalar term of the loss."""


def penalty(
    section: PreparationSection,
    ops: Ops,
    units: Units,
    graph: Graph,
    backend: Backend,
    model: Model,
    goes: Collection[int] = (),
    groups: Sequence[ChannelGroup] | None = None,
) -> Penalty:
    """The penalty that a preparation asks for, its strength included.

    Args:
        section: method and strength; soft pruning has no penalty.
        ops: of the backend.
        units: of the model.
        graph: the traced model.
        backend: makes the constants of the term.
        model: says where they are to be, and their type.
        goes: units that will go, for "growing".
        groups: the channel groups that may be pruned, for the other two; None takes all.

    Raises:
        ModelError: there is nothing that the penalty could act on.
        ValueError: the method is "soft".
    """
    chosen = units.groups() if groups is None else groups
    if section.method == "group_lasso":
        return _group_lasso(section, ops, units, chosen, graph, backend, model)
    if section.method == "bn_slimming":
        return _bn_slimming(section, ops, units, chosen, graph, backend, model)
    if section.method == "growing":
        return _growing(section, ops, units, graph, backend, model, goes)
    raise ValueError("soft filter pruning has no penalty")


def _group_lasso(
    section: PreparationSection,
    ops: Ops,
    units: Units,
    groups: Sequence[ChannelGroup],
    graph: Graph,
    backend: Backend,
    model: Model,
) -> Penalty:
    """Strength times the sum, over all removable units, of the Euclidean norm of the unit's parameters.

    Source: Wen et al. 2016, "Learning Structured Sparsity in Deep Neural Networks", section 3.1, with the units of
    Fang et al. 2023, "DepGraph", section 3.4, as groups (all coupled parameters; without that paper's weights).
    """
    if not groups:
        raise ModelError("group_lasso: no channel of any layer may be removed")
    constants: dict[bytes, Tensor] = {}
    plan = [list(_parts(group, units, graph, backend, model, constants)) for group in groups]

    names = tuple(dict.fromkeys(name for parts in plan for name, *_ in parts))  # in one order, as gradients are summed

    def term(result: Pass, done: float) -> Tensor:
        squares = {name: _squared(result, name) for name in names}

        def norms(parts: list[tuple[str, int, Tensor | None]]) -> Tensor:
            sums = _sum(_per_unit(ops, _along(ops, squares[name], axis), matrix) for name, axis, matrix in parts)
            return ops.sum(_safe_sqrt(ops, sums))

        return _sum(norms(parts) for parts in plan) * section.strength

    return term


def _squared(result: Pass, name: str) -> Tensor:
    parameter = result.parameters[name]
    return parameter * parameter  # a power costs several times as much on Paddle


def _per_unit(ops: Ops, rows: Tensor, matrix: Tensor | None) -> Tensor:
    return rows if matrix is None else ops.reshape(ops.reshape(rows, (1, -1)) @ matrix, (-1,))


def _parts(
    group: ChannelGroup, units: Units, graph: Graph, backend: Backend, model: Model, constants: dict[bytes, Tensor]
) -> Iterator[tuple[str, int, Tensor | None]]:
    """Each axis of a parameter that a group's units touch, with the 0/1 matrix (entries of the axis, units) that sums
    its rows into units; None where row i is unit i. Equal matrices are one.
    """
    skip = _statistics(graph)
    count = group.units.size
    place = np.full(int(max(group.units.max(), *(u.max(initial=0) for u in units.touched.values()))) + 1, -1)
    place[group.units] = np.arange(count)
    for (name, axis), touched in sorted(units.touched.items()):
        column = place[touched]
        if name in skip or (column < 0).all():
            continue
        if np.array_equal(column, np.arange(count)):
            yield name, axis, None
            continue
        key = column.tobytes() + count.to_bytes(8, "little")
        if key not in constants:
            constants[key] = backend.tensor(model, (column[:, None] == np.arange(count)).astype(np.float32))
        yield name, axis, constants[key]


def _statistics(graph: Graph) -> set[str]:
    """Running statistics, which are no parameters."""
    roles = ("running_mean", "running_var")
    return {name for node in graph.nodes for role, name in node.params.items() if role in roles}


def _along(ops: Ops, x: Tensor, axis: int) -> Tensor:
    """Sums over all other axes, shape (size of the axis,)."""
    others = tuple(a for a in range(len(ops.shape(x))) if a != axis)
    return ops.sum(x, others) if others else x


def _safe_sqrt(ops: Ops, x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0, a subgradient of the norm there, and not NaN."""
    positive = x > 0
    return ops.where(positive, ops.sqrt(ops.where(positive, x, x * 0 + 1)), x * 0)


def _bn_slimming(
    section: PreparationSection,
    ops: Ops,
    units: Units,
    groups: Sequence[ChannelGroup],
    graph: Graph,
    backend: Backend,
    model: Model,
) -> Penalty:
    """Strength times the sum of |scale| over the BatchNorm scales of removable channels.

    Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", equation 1.
    """
    free = np.concatenate([group.units for group in groups] or [np.empty(0, np.int64)])
    scales = {node.params["weight"] for node in graph.nodes if node.kind == "batch_norm" and "weight" in node.params}
    chosen: dict[str, Tensor] = {}
    for name in sorted(scales):
        inside = np.isin(units.touched.get((name, 0), np.empty(0, np.int64)), free)
        if inside.any():
            chosen[name] = backend.tensor(model, inside.astype(np.float32))
    if not chosen:
        raise ModelError("bn_slimming: no BatchNorm scale belongs to a channel that may be removed; use group_lasso")

    def term(result: Pass, done: float) -> Tensor:
        return (
            _sum(ops.sum(ops.abs(result.parameters[name]) * mask) for name, mask in chosen.items()) * section.strength
        )

    return term


def _growing(
    section: PreparationSection,
    ops: Ops,
    units: Units,
    graph: Graph,
    backend: Backend,
    model: Model,
    goes: Collection[int],
) -> Penalty:
    """Half of a coefficient times the sum of the squares of all entries of the units that will go.

    The coefficient is the strength in the first epoch and grows by it with each further one, so that weight decay on
    these entries alone becomes stronger and stronger.

    Source: Wang et al. 2021, "Neural Pruning via Growing Regularization", section 3.2 (GReg-1), growing each epoch.
    """
    masks = {name: backend.tensor(model, mask) for name, mask in _entries_of(units, graph, goes).items()}
    if not masks:
        raise ModelError("growing: no unit that will go was given, or none touches a parameter")
    epochs = section.train.epochs

    def term(result: Pass, done: float) -> Tensor:
        # a share such as 3/10 of 10 epochs may lie below 3 by a rounding error
        epoch = min(floor(round(done * epochs, 9)), epochs - 1)
        total = _sum(ops.sum(_squared(result, name) * mask) for name, mask in masks.items())
        return total * (0.5 * section.strength * (1 + epoch))

    return term


def _entries_of(units: Units, graph: Graph, goes: Collection[int]) -> dict[str, Array]:
    """Parameter -> 1.0 where an entry belongs to one of the units along any axis; shapes broadcast to its own."""
    skip, chosen = _statistics(graph), np.fromiter(goes, np.int64, len(goes))
    stays: dict[str, NDArray[np.float32]] = {}
    for (name, axis), touched in sorted(units.touched.items()):
        inside = np.isin(touched, chosen)
        if inside.any() and name not in skip:
            view = [-1 if a == axis else 1 for a in range(len(graph.parameters[name]))]
            old = stays.get(name, np.ones((1,) * len(view), np.float32))
            stays[name] = old * np.where(inside, 0, 1).astype(np.float32).reshape(view)
    return {name: 1 - array for name, array in stays.items()}


def _sum(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total = total + term
    return total
