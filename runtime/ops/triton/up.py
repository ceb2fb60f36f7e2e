"""The up products of a feed-forward: rows of x are gathered as they are loaded, and the formula is applied to
the sums while they are in registers. Neither the gathered rows nor (unless a backward follows) the products
are written to memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from moec.runtime.ops.triton.launch import launch, precision
from moec.runtime.ops.triton.pointwise import Pointwise
from moec.runtime.ops.triton.shapes import Shape
from moec.runtime.ops.triton.tiles import Tiles


def up(
    x_TD: Tensor,
    order_N: Tensor,
    top_k: int,
    tiles: Tiles,
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    formula: Pointwise,
    shape: Shape,
    keep: Sequence[Tensor] = (),
) -> Tensor:
    """The formula's result [N, F], in the dtype of x.

    `matrices`, `biases`: one [E, F, D] and one [E, F]? a leaf. `keep`: nothing, or one [N, F] a leaf that its
    products are written to. Rows of dropped slots are left as they are.
    """
    num_rows, width, depth = order_N.shape[0], matrices[0].shape[1], x_TD.shape[1]
    out_NF = x_TD.new_empty(num_rows, width)
    columns = triton.cdiv(width, shape.width)
    launch(
        _up, (tiles.most * columns,),
        x_TD, order_N, tiles.table, tiles.most,
        tuple(matrices), strides(matrices), *biases_of(biases, x_TD),
        out_NF, tuple(keep) or (out_NF,), strides(keep or (out_NF,)),
        matrices[0].shape[0], width, depth, columns, x_TD.stride(0), x_TD.stride(1),
        top_k, len(matrices), tuple(bias is not None for bias in biases), len(keep) > 0,
        formula.forward, precision(x_TD.dtype), depth % shape.depth == 0,
        tiles.height, shape.width, shape.depth, shape.group, **shape.options,
    )  # fmt: skip
    return out_NF


def strides(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The strides of all tensors, one after the other."""
    return tuple(stride for tensor in tensors for stride in tensor.stride())


def biases_of(biases: Sequence[Tensor | None], spare: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The biases with `spare`, which is not read, for those that are absent; and two strides each."""
    present = tuple(spare if bias is None else bias for bias in biases)
    return present, tuple(stride for bias in biases for stride in ((0, 0) if bias is None else bias.stride()))


@triton.jit
def place_of(program, most, columns, GROUP: tl.constexpr):
    """(tile, column) of a program: GROUP tiles take one column before the next one."""
    block = program // (GROUP * columns)
    first = block * GROUP
    size = tl.minimum(most - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % size, inside // size


@triton.jit
def load_weights(weights, strides, LEAF: tl.constexpr, expert, n, k, width, depth, EVEN: tl.constexpr):
    """A tile [depth, width] of one leaf's matrix of one expert.

    What lies outside is masked, not wrapped around: an index that the compiler cannot see through costs the
    wide loads, and with them the copies that run ahead.
    """
    base = weights[LEAF] + expert.to(tl.int64) * strides[3 * LEAF]
    places = base + n[None, :] * strides[3 * LEAF + 1] + k[:, None] * strides[3 * LEAF + 2]
    if EVEN:
        return tl.load(places, mask=(n < width)[None, :], other=0.0)
    return tl.load(places, mask=(n < width)[None, :] & (k < depth)[:, None], other=0.0)


@triton.jit
def add_bias(sums, biases, strides, LEAF: tl.constexpr, HAS: tl.constexpr, expert, n, width):
    """The sums, with the leaf's bias where it has one."""
    if HAS[LEAF]:
        base = biases[LEAF] + expert.to(tl.int64) * strides[2 * LEAF]
        bias = tl.load(base + n * strides[2 * LEAF + 1], mask=n < width, other=0.0)
        return sums + bias.to(tl.float32)[None, :]
    return sums


@triton.jit
def leaf_places(leaves, strides, LEAF: tl.constexpr, first, local, n):
    """Where rows first + local and columns `n` of one leaf stand: one wide base, and narrow distances from
    it."""
    base = leaves[LEAF] + first.to(tl.int64) * strides[2 * LEAF]
    return base + local[:, None] * strides[2 * LEAF] + n[None, :] * strides[2 * LEAF + 1]


@triton.jit
def store_leaf(leaves, strides, LEAF: tl.constexpr, first, local, n, values, wanted):
    """Write a tile of one leaf."""
    places = leaf_places(leaves, strides, LEAF, first, local, n)
    tl.store(places, values.to(leaves[LEAF].dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["most", "experts", "columns"])
def _up(
    x, order, table, most,
    weights, weight_strides, biases, bias_strides,
    out, kept, kept_strides,
    experts, width, depth, columns, x_row, x_column,
    TOP_K: tl.constexpr, LEAVES: tl.constexpr, BIASES: tl.constexpr,
    KEEP: tl.constexpr, FORMULA: tl.constexpr, INPUT: tl.constexpr, EVEN: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, column = place_of(tl.program_id(0), most, columns, GROUP)
    expert = tl.load(table + tile)
    if (expert < 0) | (expert == experts):
        return
    first = tl.load(table + most + tile)
    local = tl.arange(0, HEIGHT)
    inside = first + local < tl.load(table + 2 * most + tile)
    n = column * WIDTH + tl.arange(0, WIDTH)
    token = tl.load(order + first + local, mask=inside, other=0) // TOP_K
    x_rows = x + token.to(tl.int64)[:, None] * x_row
    sums0 = tl.zeros((HEIGHT, WIDTH), tl.float32)
    sums1 = tl.zeros((HEIGHT, WIDTH), tl.float32)
    sums2 = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        seen = inside[:, None] if EVEN else inside[:, None] & (k < depth)[None, :]
        left = tl.load(x_rows + k[None, :] * x_column, mask=seen, other=0.0)
        right = load_weights(weights, weight_strides, 0, expert, n, k, width, depth, EVEN)
        sums0 = tl.dot(left, right, sums0, input_precision=INPUT)
        if LEAVES > 1:
            right = load_weights(weights, weight_strides, 1, expert, n, k, width, depth, EVEN)
            sums1 = tl.dot(left, right, sums1, input_precision=INPUT)
        if LEAVES > 2:
            right = load_weights(weights, weight_strides, 2, expert, n, k, width, depth, EVEN)
            sums2 = tl.dot(left, right, sums2, input_precision=INPUT)
    if LEAVES > 1:
        _finish(sums0, sums1, sums2, inside, first, local, n, expert, biases, bias_strides, out, kept,
                kept_strides, width, LEAVES, BIASES, KEEP, FORMULA)  # fmt: skip
    else:
        # A wide tile in two halves, one after the other: what the formula needs of all of it would not fit.
        low, high = halves(sums0, HEIGHT, WIDTH)
        n = column * WIDTH + tl.arange(0, WIDTH // 2)
        _finish(low, low, low, inside, first, local, n, expert, biases, bias_strides, out, kept,
                kept_strides, width, LEAVES, BIASES, KEEP, FORMULA)  # fmt: skip
        n += WIDTH // 2
        _finish(high, high, high, inside, first, local, n, expert, biases, bias_strides, out, kept,
                kept_strides, width, LEAVES, BIASES, KEEP, FORMULA)  # fmt: skip


@triton.jit
def halves(sums, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(sums, (HEIGHT, 2, WIDTH // 2)), (0, 2, 1)))


@triton.jit
def _finish(
    sums0, sums1, sums2, inside, first, local, n, expert, biases, bias_strides, out, kept, kept_strides,
    width, LEAVES: tl.constexpr, BIASES: tl.constexpr, KEEP: tl.constexpr, FORMULA: tl.constexpr,
):  # fmt: skip
    """Biases, the formula, and what is stored, for columns n."""
    sums0 = add_bias(sums0, biases, bias_strides, 0, BIASES, expert, n, width)
    if LEAVES > 1:
        sums1 = add_bias(sums1, biases, bias_strides, 1, BIASES, expert, n, width)
    if LEAVES > 2:
        sums2 = add_bias(sums2, biases, bias_strides, 2, BIASES, expert, n, width)
    wanted = inside[:, None] & (n < width)[None, :]
    result = FORMULA(sums0, sums1, sums2).to(out.dtype.element_ty)
    tl.store(out + first.to(tl.int64) * width + (local[:, None] * width + n[None, :]), result, mask=wanted)
    if KEEP:
        store_leaf(kept, kept_strides, 0, first, local, n, sums0, wanted)
        if LEAVES > 1:
            store_leaf(kept, kept_strides, 1, first, local, n, sums1, wanted)
        if LEAVES > 2:
            store_leaf(kept, kept_strides, 2, first, local, n, sums2, wanted)
