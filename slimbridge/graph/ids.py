"""Bookkeeping of channel ids: which are one, which are frozen, which parameter entries they touch.

Ids live in integer arrays shaped like the activations they stand for. Along axes over which they do not vary
the arrays are stride-0 broadcast views, so that an array of a large image costs no more than its channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

IdArray = NDArray[np.int64]


def thin(ids: IdArray) -> IdArray:
    """The array with every stride-0 axis cut to length 1: what varies, and nothing else."""
    return ids[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in ids.strides)]


def spread(ids: IdArray, shape: Iterable[int]) -> IdArray:
    """A read-only view of `ids` broadcast to `shape`."""
    return np.broadcast_to(ids, tuple(shape))


def along(ids: IdArray, axis: int) -> IdArray | None:
    """The ids along one axis, shape (size of the axis,), or None when they also vary along another."""
    size = ids.shape[axis]
    rows = np.moveaxis(thin(ids), axis, 0)
    rows = rows.reshape(rows.shape[0], -1)
    if rows.shape[1] > 1 and not np.array_equal(rows[:, 1:], np.broadcast_to(rows[:, :1], rows[:, 1:].shape)):
        return None
    return np.array(spread(rows[:, 0], (size,)))


def first_along(ids: IdArray, axis: int) -> IdArray:
    """The first entry along an axis, as a view with that axis of length 1."""
    return ids[tuple(slice(0, 1) if a == axis else slice(None) for a in range(ids.ndim))]


def varies(ids: IdArray, axis: int) -> bool:
    """Do the ids change along the axis?"""
    if ids.shape[axis] == 1 or ids.strides[axis] == 0:
        return False
    varying = thin(ids)
    return not np.array_equal(varying, spread(first_along(varying, axis), varying.shape))


def same_shape_axes(ids: IdArray, channel_axis: int, shape: tuple[int, ...]) -> IdArray | None:
    """Ids of a tensor whose other axes changed size (pooling, resizing); None if ids vary along one of those."""
    channel = along(ids, channel_axis)
    if channel is None or len(shape) != ids.ndim:
        return None
    view = [1] * ids.ndim
    view[channel_axis] = channel.size
    return spread(channel.reshape(view), shape)


@dataclass(frozen=True)
class Frozen:
    """Ids that must stay, and why."""

    ids: IdArray
    reason: str


@dataclass
class Ledger:
    """Collects, during one walk over a graph, everything that is said about ids.

    Attributes:
        count: ids issued so far.
        touched: (parameter, axis) -> id of each entry along the axis.
        freezes: what must stay.
    """

    count: int = 0
    touched: dict[tuple[str, int], IdArray] = field(default_factory=dict)
    freezes: list[Frozen] = field(default_factory=list)
    _edges: list[tuple[IdArray, IdArray]] = field(default_factory=list)

    def issue(self, size: int) -> IdArray:
        """`size` new ids."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def opaque(self, shape: tuple[int, ...], reason: str) -> IdArray:
        """One new frozen id, spread over a whole tensor."""
        one = self.issue(1)
        self.freeze(one, reason)
        return spread(one.reshape([1] * len(shape)) if shape else one[0], shape)

    def freeze(self, ids: IdArray, reason: str) -> None:
        """These ids must stay."""
        self.freezes.append(Frozen(np.unique(thin(ids)), reason))

    def unite(self, a: IdArray, b: IdArray) -> None:
        """Each id of `a` is one with the id of `b` at the same place (shapes broadcast)."""
        a, b = np.broadcast_arrays(thin(a), thin(b))
        left, right = a.ravel(), b.ravel()
        differ = left != right
        if differ.any():
            self._edges.append((left[differ], right[differ]))

    def touch(self, parameter: str, axis: int, ids: IdArray) -> None:
        """Entry i along the axis of the parameter belongs to ids[i]; a second touch unites with the first."""
        known = self.touched.setdefault((parameter, axis), ids)
        if known is not ids:
            self.unite(known, ids)

    def components(self) -> NDArray[np.int64]:
        """The unit of each id, shape (count,): numbers 0.. in order of each unit's first id."""
        left = np.concatenate([edge[0] for edge in self._edges]) if self._edges else np.empty(0, np.int64)
        right = np.concatenate([edge[1] for edge in self._edges]) if self._edges else np.empty(0, np.int64)
        links = coo_array((np.ones(left.size, np.int64), (left, right)), shape=(self.count, self.count))
        _, labels = connected_components(links, directed=False)
        _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
        rank = np.empty(first.size, np.int64)
        rank[np.argsort(first, kind="stable")] = np.arange(first.size)
        return np.asarray(rank[inverse], dtype=np.int64)
