"""Paddle's matrix products -> linear layers and matmul nodes; what fuses several products is taken apart."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from slimbridge_paddle.names import Entry
from slimbridge_paddle.refs import Active, Bundle, Literal, Ref, Stored, Unsupported
from slimbridge_paddle.trace_layers import may_fold
from slimbridge_paddle.trace_ops import Call, Shape, handles

if TYPE_CHECKING:
    from slimbridge_paddle.trace import Builder


@handles("matmul", "bmm")
def _matmul(builder: Builder, call: Call) -> list[Ref]:
    """A linear layer where a stored matrix is on the right, else a product of two tensors."""
    left, right = call.operands
    attrs = call.attrs
    swaps = bool(attrs.get("transpose_x", False)), bool(attrs.get("transpose_y", False))
    made, linear = _product(builder, left, right, call.shape, swaps)
    if linear:
        may_fold(builder, call, made)
    return [Active(made)]


def _product(
    builder: Builder, left: Ref | None, right: Ref | None, shape: Shape, swaps: tuple[bool, bool] = (False, False)
) -> tuple[int, bool]:
    """The matrix product, the last two axes of either exchanged on demand; and whether it became a linear layer."""
    entry, turned = _matrix(right)
    # The canonical layout is (out, in) exactly when an odd number of transpositions takes place.
    if isinstance(left, Active) and entry is not None and not swaps[0] and entry.transposed ^ turned ^ swaps[1]:
        return builder.one("linear", (left.tensor,), shape, {"weight": entry.name}), True
    inputs = [swapped(builder, builder.tensor(ref)) if swap else builder.tensor(ref)
              for ref, swap in zip((left, right), swaps, strict=True)]  # fmt: skip
    return builder.one("matmul", inputs, shape), False


def _matrix(ref: Ref | None) -> tuple[Entry | None, bool]:
    """The parameter, if it is one with two axes, and whether it was transposed since; None for anything else."""
    if not isinstance(ref, Stored) or len(ref.origin) != 2 or any(step.kind != "transpose" for step in ref.steps):
        return None, False
    return ref.entry, sum(dict(step.attrs)["perm"] == (1, 0) for step in ref.steps) % 2 == 1


def swapped(builder: Builder, tensor: int) -> int:
    """The tensor with its last two axes exchanged; a vector stays as it is."""
    rank = len(builder.shapes[tensor])
    return tensor if rank < 2 else permuted(builder, tensor, (*range(rank - 2), rank - 1, rank - 2))


def permuted(builder: Builder, tensor: int, perm: tuple[int, ...]) -> int:
    """The tensor with its axes in the order of `perm`; itself where that changes nothing."""
    shape = builder.shapes[tensor]
    if perm == tuple(range(len(shape))):
        return tensor
    return builder.one("transpose", (tensor,), tuple(shape[axis] for axis in perm), perm=perm)


def reshaped(builder: Builder, tensor: int, shape: Shape) -> int:
    """The tensor in another shape; itself where that changes nothing."""
    return tensor if builder.shapes[tensor] == shape else builder.one("reshape", (tensor,), shape)


@handles("addmm", "baddbmm")
def _addmm(builder: Builder, call: Call) -> list[Ref]:
    """A product and an addition, each scaled where it is."""
    attrs = call.attrs
    added, left, right = call.operands
    shape = call.shape
    made, _ = _product(builder, left, right, shape)
    if attrs["alpha"] != 1:
        made = builder.one("elementwise", (made,), shape, op="scale")
    other = builder.tensor(added)
    if attrs["beta"] != 1:
        other = builder.one("elementwise", (other,), builder.shapes[other], op="scale")
    return [Active(builder.one("binary", (other, made), shape, op="add"))]


@handles("einsum")
def _einsum(builder: Builder, call: Call) -> list[Ref]:
    """One operand is transposed; two are multiplied as matrices, over axes joined where there are several.

    Ellipses, diagonals and sums over an axis of one operand alone are not taken.
    """
    items = call.operands[0].items if isinstance(call.operands[0], Bundle) else []
    terms, arrow, wanted = str(call.attrs["equation"]).replace(" ", "").partition("->")
    letters = terms.split(",")
    flat = "".join(letters) + wanted
    if not arrow or "." in flat or any(len(set(term)) < len(term) for term in (*letters, wanted)):
        raise Unsupported
    if len(items) == 1 and set(letters[0]) == set(wanted):
        made = permuted(builder, builder.tensor(items[0]), tuple(letters[0].index(letter) for letter in wanted))
    elif len(items) == 2:
        made = _contract(builder, (items[0], items[1]), (letters[0], letters[1]), wanted)
    else:
        raise Unsupported
    return [Active(made), *(Bundle(()) for _ in call.results[1:])]


def _contract(builder: Builder, refs: tuple[Ref, Ref], terms: tuple[str, str], wanted: str) -> int:
    """The product of two tensors, their axes named by letters, with its axes in the order of `wanted`."""
    first, second = terms
    both = set(first) & set(second)
    batch = [letter for letter in first if letter in both and letter in wanted]
    over = [letter for letter in first if letter in both and letter not in wanted]
    rows = [letter for letter in first if letter not in both]
    columns = [letter for letter in second if letter not in both]
    if not over or set(wanted) != {*batch, *rows, *columns}:
        raise Unsupported
    left, right = (builder.tensor(ref) for ref in refs)
    size = dict(zip(first + second, builder.shapes[left] + builder.shapes[right], strict=True))
    lead = tuple(size[letter] for letter in batch)
    m, k, n = (prod(size[letter] for letter in part) for part in (rows, over, columns))

    def matrix(tensor: int, term: str, axes: list[str], shape: Shape) -> int:
        return reshaped(builder, permuted(builder, tensor, tuple(term.index(axis) for axis in axes)), shape)

    parts = (matrix(left, first, [*batch, *rows, *over], (*lead, m, k)),
             matrix(right, second, [*batch, *over, *columns], (*lead, k, n)))  # fmt: skip
    order = [*batch, *rows, *columns]
    made = builder.one("matmul", parts, (*lead, m, n))
    made = reshaped(builder, made, tuple(size[letter] for letter in order))
    return permuted(builder, made, tuple(order.index(letter) for letter in wanted))


@handles("flash_attn", "memory_efficient_attention")
def _attention(builder: Builder, call: Call) -> list[Ref]:
    """softmax(scale * Q K^T + mask) V for tensors (batch, positions, heads, size), one head at a time."""
    query, key, value = (builder.tensor(call.operand(index)) for index in range(3))
    if builder.shapes[query][2] != builder.shapes[key][2]:
        raise Unsupported  # several heads share a key
    query, key, value = (permuted(builder, tensor, (0, 2, 1, 3)) for tensor in (query, key, value))
    query = builder.one("elementwise", (query,), builder.shapes[query], op="scale")
    key = swapped(builder, key)
    scores = (*builder.shapes[query][:3], builder.shapes[key][3])
    made = builder.one("matmul", (query, key), scores)
    mask = call.operand(4 if call.name == "flash_attn" else 3)
    if mask is not None:
        made = builder.one("binary", (made, builder.tensor(mask)), scores, op="add")
    made = builder.one("softmax", (made,), scores, axis=3)
    made = builder.one("matmul", (made, value), (*scores[:3], builder.shapes[value][3]))
    made = permuted(builder, made, (0, 2, 1, 3))
    return [Active(made), *(Literal(tuple(int(size) for size in rest.shape)) for rest in call.results[1:])]
