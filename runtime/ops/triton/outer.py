"""Gradients of expert weights: for each expert the product of two sets of rows, summed over its rows.

Either side may be gathered from tokens as it is loaded. Experts without rows get zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moec.runtime.ops.triton.launch import launch, precision
from moec.runtime.ops.triton.shapes import Shape


def outer(
    left: Tensor,
    right: Tensor,
    out_EFD: Tensor,
    counts_E: Tensor,
    ends_E: Tensor,
    order_N: Tensor,
    top_k: int,
    gather: str,
    shape: Shape,
) -> None:
    """Write into out[e] the sum of left[i] ⊗ right[i] over the rows i of each expert e.

    `gather` ("left" or "right"): which side is tokens, read at order[i] // top_k; the other is rows.
    `ends_E`: the end of each expert's rows. `out_EFD` may be any view, such as a slice of a gradient.
    """
    experts, height, width = out_EFD.shape
    columns = triton.cdiv(width, shape.width)
    launch(
        _outer, (triton.cdiv(height, shape.height) * columns, experts),
        left, right, out_EFD, counts_E, ends_E, order_N,
        height, width, columns, *left.stride(), *right.stride(), *out_EFD.stride(),
        top_k, gather == "left", gather == "right", precision(left.dtype),
        shape.height, shape.width, shape.depth, **shape.options,
    )  # fmt: skip


@triton.jit(do_not_specialize=["columns"])
def _outer(
    left, right, out, counts, ends, order,
    height, width, columns, left_row, left_column, right_row, right_column, out_expert, out_row, out_column,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, INPUT: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    m = (tl.program_id(0) // columns) * HEIGHT + tl.arange(0, HEIGHT)
    n = (tl.program_id(0) % columns) * WIDTH + tl.arange(0, WIDTH)
    end = tl.load(ends + expert).to(tl.int32)
    begin = end - tl.load(counts + expert).to(tl.int32)
    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for start in range(begin, end, DEPTH):
        row = start + tl.arange(0, DEPTH)
        inside = row < end
        token = tl.load(order + row, mask=inside, other=0) // TOP_K
        from_left = (token if GATHER_LEFT else row).to(tl.int64)
        from_right = (token if GATHER_RIGHT else row).to(tl.int64)
        left_places = left + m[:, None] * left_column + from_left[None, :] * left_row
        right_places = right + from_right[:, None] * right_row + n[None, :] * right_column
        left_tile = tl.load(left_places, mask=inside[None, :] & (m < height)[:, None], other=0.0)
        right_tile = tl.load(right_places, mask=inside[:, None] & (n < width)[None, :], other=0.0)
        sums = tl.dot(left_tile, right_tile, sums, input_precision=INPUT)
    places = out + expert.to(tl.int64) * out_expert + m[:, None] * out_row + n[None, :] * out_column
    tl.store(places, sums.to(out.dtype.element_ty), mask=(m < height)[:, None] & (n < width)[None, :])


def sums_by_expert(
    rows: Tensor,
    out_EF: Tensor,
    counts_E: Tensor,
    ends_E: Tensor,
    order_N: Tensor,
    top_k: int,
    weights_N: Tensor | None = None,
) -> None:
    """Write into out[e] the sum of the rows of each expert: the gradient of a bias.

    With `weights_N` (f32, a slot each) `rows` are tokens, read at order[i] // top_k, and each is weighted.
    """
    experts, width = out_EF.shape
    launch(
        _sums, (triton.cdiv(width, 64), experts),
        rows, out_EF, counts_E, ends_E, order_N, rows if weights_N is None else weights_N,
        width, *rows.stride(), *out_EF.stride(), top_k, weights_N is not None, 32, 64, num_warps=4,
    )  # fmt: skip


@triton.jit
def _sums(
    rows, out, counts, ends, order, slot_weights, width, rows_row, rows_column, out_expert, out_column,
    TOP_K: tl.constexpr, WEIGH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    end = tl.load(ends + expert).to(tl.int32)
    begin = end - tl.load(counts + expert).to(tl.int32)
    sums = tl.zeros((WIDTH,), tl.float32)
    for start in range(begin, end, HEIGHT):
        row = start + tl.arange(0, HEIGHT)
        inside = row < end
        seen = inside[:, None] & (n < width)[None, :]
        if WEIGH:
            slot = tl.load(order + row, mask=inside, other=0)
            places = rows + (slot // TOP_K).to(tl.int64)[:, None] * rows_row + n[None, :] * rows_column
            weight = tl.load(slot_weights + slot, mask=inside, other=0.0)
            sums += tl.sum(tl.load(places, mask=seen, other=0.0).to(tl.float32) * weight[:, None], 0)
        else:
            places = rows + row.to(tl.int64)[:, None] * rows_row + n[None, :] * rows_column
            sums += tl.sum(tl.load(places, mask=seen, other=0.0).to(tl.float32), 0)
    places = out + expert.to(tl.int64) * out_expert + n * out_column
    tl.store(places, sums.to(out.dtype.element_ty), mask=n < width)
