"""A feed-forward of a few tokens: each used expert is read once, and reading it is all the time there is.

With at most 16 tokens an expert has at most 16 rows, one tile. Programs are narrow and many, so that every
processor has several reads in flight; the summed dim of the down product is cut into parts for the same
reason, whose sums are added afterwards in one order. One token alone is not padded to 16 rows: its products
are taken by the ordinary units, a tile of weights times one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moec.runtime.ops.triton.launch import launch, power_of_two, precision
from moec.runtime.ops.triton.pointwise import Pointwise
from moec.runtime.ops.triton.shapes import Shape
from moec.runtime.ops.triton.tiles import most_tiles, tile_of
from moec.runtime.ops.triton.up import add_bias, biases_of, strides

MOST_TOKENS = 16


def decode_up(
    x_TD: Tensor,
    order_N: Tensor,
    top_k: int,
    counts_E: Tensor,
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    formula: Pointwise,
    shape: Shape,
) -> Tensor:
    """The formula's result [N, F] of at most 16 tokens; as `up` otherwise."""
    num_rows, depth = order_N.shape[0], x_TD.shape[1]
    experts, width, _ = matrices[0].shape
    out_NF = x_TD.new_empty(num_rows, width)
    launch(
        _decode_up, (triton.cdiv(width, shape.width), most_tiles(num_rows, experts, shape.height)),
        x_TD, order_N, counts_E,
        tuple(matrices), strides(matrices), *biases_of(biases, x_TD),
        out_NF, num_rows, experts, width, depth, x_TD.stride(0), x_TD.stride(1),
        top_k, len(matrices), tuple(bias is not None for bias in biases),
        formula.forward, precision(x_TD.dtype), x_TD.shape[0] == 1,
        shape.height, shape.width, shape.depth, power_of_two(experts + 1, 2), **shape.options,
    )  # fmt: skip
    return out_NF


def decode_down(
    rows_NF: Tensor,
    order_N: Tensor,
    counts_E: Tensor,
    matrix_EDF: Tensor,
    bias_ED: Tensor | None,
    shape: Shape,
    splits: int,
    alone: bool,
) -> Tensor:
    """rows times the matrix transposed, plus bias, in slot order, as `splits` parts f32 [S, N, D] to be
    added.

    `alone`: there is one token, so every expert has one row at most.
    """
    (num_rows, depth), (experts, width, _) = rows_NF.shape, matrix_EDF.shape
    out_SND = torch.empty(splits, num_rows, width, dtype=torch.float32, device=rows_NF.device)
    part = triton.cdiv(triton.cdiv(depth, splits), shape.depth) * shape.depth
    spare = (rows_NF, 0, 0)
    launch(
        _decode_down, (triton.cdiv(width, shape.width), most_tiles(num_rows, experts, shape.height), splits),
        rows_NF, order_N, counts_E, (matrix_EDF,), matrix_EDF.stride(),
        *(spare if bias_ED is None else (bias_ED, *bias_ED.stride())),
        out_SND, num_rows, experts, width, depth, part, num_rows * width,
        bias_ED is not None, precision(rows_NF.dtype), alone,
        shape.height, shape.width, shape.depth, power_of_two(experts + 1, 2), **shape.options,
    )  # fmt: skip
    return out_SND


@triton.jit
def _multiply(
    left_rows, left_column, inside, weights, strides, LEAF: tl.constexpr, expert, n, begin, end, width, depth,
    INPUT: tl.constexpr, ALONE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Rows times one leaf's matrix of one expert, over places begin to end of the summed dim."""
    base = weights[LEAF] + expert.to(tl.int64) * strides[3 * LEAF]
    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    products = tl.zeros((WIDTH, DEPTH), tl.float32)
    for start in range(begin, end, DEPTH):
        k = start + tl.arange(0, DEPTH)
        tile = base + n[:, None] * strides[3 * LEAF + 1] + k[None, :] * strides[3 * LEAF + 2]
        right = tl.load(
            tile, mask=(k < depth)[None, :] & (n < width)[:, None], other=0.0, eviction_policy="evict_first"
        )
        if ALONE:
            # Row 0 is the only one: added up across the tile once, after the loop.
            left = tl.load(left_rows + k * left_column, mask=k < depth, other=0.0)
            products += right.to(tl.float32) * left.to(tl.float32)[None, :]
        else:
            seen = inside[:, None] & (k < depth)[None, :]
            left = tl.load(left_rows[:, None] + k[None, :] * left_column, mask=seen, other=0.0)
            sums = tl.dot(left, tl.trans(right), sums, input_precision=INPUT)
    if ALONE:
        sums += tl.sum(products, 1)[None, :]
    return sums


@triton.jit(do_not_specialize=["num_rows", "experts"])
def _decode_up(
    x, order, counts,
    weights, weight_strides, biases, bias_strides,
    out, num_rows, experts, width, depth, x_row, x_column,
    TOP_K: tl.constexpr, LEAVES: tl.constexpr, BIASES: tl.constexpr,
    FORMULA: tl.constexpr, INPUT: tl.constexpr, ALONE: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    expert, first, size = tile_of(counts, experts, num_rows, tl.program_id(1), HEIGHT, GROUPS)
    if (size <= 0) | (expert >= experts):
        return
    row = first + tl.arange(0, HEIGHT)
    inside = tl.arange(0, HEIGHT) < size
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    if ALONE:
        left = x
    else:
        left = x + (tl.load(order + row, mask=inside, other=0) // TOP_K).to(tl.int64) * x_row
    sums0 = _multiply(left, x_column, inside, weights, weight_strides, 0, expert, n, 0, depth, width, depth,
                      INPUT, ALONE, HEIGHT, WIDTH, DEPTH)  # fmt: skip
    sums0 = add_bias(sums0, biases, bias_strides, 0, BIASES, expert, n, width)
    sums1, sums2 = sums0, sums0
    if LEAVES > 1:
        sums1 = _multiply(left, x_column, inside, weights, weight_strides, 1, expert, n, 0, depth, width,
                          depth, INPUT, ALONE, HEIGHT, WIDTH, DEPTH)  # fmt: skip
        sums1 = add_bias(sums1, biases, bias_strides, 1, BIASES, expert, n, width)
    if LEAVES > 2:
        sums2 = _multiply(left, x_column, inside, weights, weight_strides, 2, expert, n, 0, depth, width,
                          depth, INPUT, ALONE, HEIGHT, WIDTH, DEPTH)  # fmt: skip
        sums2 = add_bias(sums2, biases, bias_strides, 2, BIASES, expert, n, width)
    result = FORMULA(sums0, sums1, sums2).to(out.dtype.element_ty)
    wanted = inside[:, None] & (n < width)[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * width + n[None, :], result, mask=wanted)


@triton.jit(do_not_specialize=["num_rows", "experts"])
def _decode_down(
    rows, order, counts,
    weights, weight_strides, bias, bias_expert, bias_column,
    out, num_rows, experts, width, depth, part, part_size,
    BIAS: tl.constexpr, INPUT: tl.constexpr, ALONE: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(2)
    expert, first, size = tile_of(counts, experts, num_rows, tl.program_id(1), HEIGHT, GROUPS)
    if size <= 0:
        return
    row = first + tl.arange(0, HEIGHT)
    inside = tl.arange(0, HEIGHT) < size
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    if expert < experts:
        if ALONE:
            left = rows + first.to(tl.int64) * depth
        else:
            left = rows + row.to(tl.int64) * depth
        begin = split * part
        sums = _multiply(left, 1, inside, weights, weight_strides, 0, expert, n, begin, begin + part, width,
                         depth, INPUT, ALONE, HEIGHT, WIDTH, DEPTH)  # fmt: skip
        if BIAS:
            if split == 0:
                base = bias + expert.to(tl.int64) * bias_expert
                added = tl.load(base + n * bias_column, mask=n < width, other=0.0)
                sums += added.to(tl.float32)[None, :]
    slot = tl.load(order + row, mask=inside, other=0)
    places = out + split.to(tl.int64) * part_size + slot.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(places, sums, mask=inside[:, None] & (n < width)[None, :])
