"""Which axes of a reshaped tensor come from which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def axis_map(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Smallest runs of axes that hold the same entries before and after a reshape.

    Axes of length 1 belong to no run. Both shapes must hold equally many entries, at least one.

    >>> list(axis_map((1, 12, 5, 5), (1, 3, 4, 25)))
    [((1,), (1, 2)), ((2, 3), (3,))]
    """
    before = [axis for axis, size in enumerate(old) if size != 1]
    after = [axis for axis, size in enumerate(new) if size != 1]
    i = j = 0
    while i < len(before):
        left, right = [before[i]], [after[j]]
        a, b = old[before[i]], new[after[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                left.append(before[i])
                a, i = a * old[before[i]], i + 1
            else:
                right.append(after[j])
                b, j = b * new[after[j]], j + 1
        yield tuple(left), tuple(right)
