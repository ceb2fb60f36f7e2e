"""Products whose rows are scattered to their slots as they are stored, and the sum of a token's slots.

Each slot has a row of its own, so nothing is added atomically and the result is the same every time. With one
choice a token a slot *is* its token, and the weights, the dense branch and the mix are applied on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moec.runtime.ops.triton.launch import launch, power_of_two, precision
from moec.runtime.ops.triton.shapes import Shape
from moec.runtime.ops.triton.tiles import Tiles
from moec.runtime.ops.triton.up import leaf_places, load_weights, place_of, strides


def scatter(
    rows: Sequence[Tensor],
    order_N: Tensor,
    tiles: Tiles,
    matrices: Sequence[Tensor],
    bias_ED: Tensor | None,
    shape: Shape,
    dtype: torch.dtype | None = None,
    weights_N: Tensor | None = None,
    dense_TD: Tensor | None = None,
    mix_T2: Tensor | None = None,
) -> Tensor:
    """sum over l of rows[l] [N, F] times matrices[l] [E, D, F] transposed, plus bias, in slot order [N, D].

    `dtype` of the result: that of the rows, where it is not given. Dropped slots get zeros. `weights_N`,
    `dense_TD`, `mix_T2` (of one choice a token alone): the result is rows·weights, + dense, or each times its
    column of mix.
    """
    (num_rows, depth), width = rows[0].shape, matrices[0].shape[1]
    out_ND = rows[0].new_empty(num_rows, width, dtype=dtype or rows[0].dtype)
    columns = triton.cdiv(width, shape.width)
    launch(
        _scatter, (tiles.most * columns,),
        tuple(rows), strides(rows), order_N, tiles.table, tiles.most, tuple(matrices), strides(matrices),
        *_or_spare(bias_ED, out_ND), *_or_spare(weights_N, out_ND)[:1],
        *_or_spare(dense_TD, out_ND), *_or_spare(mix_T2, out_ND),
        out_ND, matrices[0].shape[0], width, depth, columns,
        len(rows), bias_ED is not None, weights_N is not None, dense_TD is not None,
        mix_T2 is not None, precision(rows[0].dtype), depth % shape.depth == 0,
        tiles.height, shape.width, shape.depth, shape.group, **shape.options,
    )  # fmt: skip
    return out_ND


def _or_spare(tensor: Tensor | None, spare: Tensor) -> tuple[Tensor, int, int]:
    """A pointer and two strides; for what is absent, those of another tensor, which are not used."""
    if tensor is None:
        return spare, 0, 0
    return (
        (tensor, tensor.stride(0), tensor.stride(1)) if tensor.dim() == 2 else (tensor, tensor.stride(0), 0)
    )


@triton.jit
def with_dense(
    sums, dense, dense_row, dense_column, mix, mix_row, mix_column, token, n, seen, MIX: tl.constexpr
):
    """sums + dense, or each times its column of mix, for rows `token` and columns `n`."""
    places = dense + token.to(tl.int64)[:, None] * dense_row + n[None, :] * dense_column
    other = tl.load(places, mask=seen, other=0.0).to(tl.float32)
    if MIX:
        here = mix + token.to(tl.int64) * mix_row
        first = tl.load(here).to(tl.float32)
        second = tl.load(here + mix_column).to(tl.float32)
        return sums * first[:, None] + other * second[:, None]
    return sums + other


@triton.jit(do_not_specialize=["most", "experts", "columns"])
def _scatter(
    rows, row_strides, order, table, most,
    weights, weight_strides, bias, bias_expert, bias_column, slot_weights,
    dense, dense_row, dense_column, mix, mix_row, mix_column,
    out, experts, width, depth, columns,
    LEAVES: tl.constexpr, BIAS: tl.constexpr, WEIGH: tl.constexpr, DENSE: tl.constexpr,
    MIX: tl.constexpr, INPUT: tl.constexpr, EVEN: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, column = place_of(tl.program_id(0), most, columns, GROUP)
    expert = tl.load(table + tile)
    if expert < 0:
        return
    first = tl.load(table + most + tile)
    local = tl.arange(0, HEIGHT)
    inside = first + local < tl.load(table + 2 * most + tile)
    n = column * WIDTH + tl.arange(0, WIDTH)
    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    if expert < experts:
        for leaf in tl.static_range(LEAVES):
            for start in range(0, depth, DEPTH):
                k = start + tl.arange(0, DEPTH)
                seen = inside[:, None] if EVEN else inside[:, None] & (k < depth)[None, :]
                left = tl.load(leaf_places(rows, row_strides, leaf, first, local, k), mask=seen, other=0.0)
                right = load_weights(weights, weight_strides, leaf, expert, n, k, width, depth, EVEN)
                sums = tl.dot(left, right, sums, input_precision=INPUT)
        if BIAS:
            base = bias + expert.to(tl.int64) * bias_expert
            added = tl.load(base + n * bias_column, mask=n < width, other=0.0)
            sums += added.to(tl.float32)[None, :]
    slot = tl.load(order + first + local, mask=inside, other=0)
    seen = inside[:, None] & (n < width)[None, :]
    if WEIGH:
        sums *= tl.load(slot_weights + slot)[:, None]
    if DENSE:
        sums = with_dense(sums, dense, dense_row, dense_column, mix, mix_row, mix_column, slot, n, seen, MIX)
    places = slot.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=seen)


def combine(
    parts_SND: Tensor,
    top_k: int,
    dtype: torch.dtype,
    weights_N: Tensor | None = None,
    dense_TD: Tensor | None = None,
    mix_T2: Tensor | None = None,
) -> Tensor:
    """The sum of a token's slots [T, D], of slot rows [S, N, D] in S parts, in `dtype`.

    Times weights f32 [N] where they are given; then with `dense` and `mix` as `moec.moe_ffn` has them.
    """
    splits, slots, width = parts_SND.shape
    tokens = slots // top_k
    out_TD = torch.empty(tokens, width, dtype=dtype, device=parts_SND.device)
    block = min(1024, power_of_two(width, 16))
    height = max(1, 1024 // block)
    launch(
        _combine, (triton.cdiv(tokens, height), triton.cdiv(width, block)),
        parts_SND, *_or_spare(weights_N, out_TD)[:1],
        *_or_spare(dense_TD, out_TD), *_or_spare(mix_T2, out_TD), out_TD, tokens, width, slots * width,
        splits, top_k, weights_N is not None, dense_TD is not None, mix_T2 is not None,
        height, block, num_warps=4,
    )  # fmt: skip
    return out_TD


@triton.jit(do_not_specialize=["tokens"])
def _combine(
    parts, slot_weights, dense, dense_row, dense_column, mix, mix_row, mix_column,
    out, tokens, width, part_size,
    SPLITS: tl.constexpr, TOP_K: tl.constexpr, WEIGH: tl.constexpr, DENSE: tl.constexpr, MIX: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = token < tokens
    seen = inside[:, None] & (n < width)[None, :]
    token = tl.where(inside, token, 0).to(tl.int64)
    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for choice in tl.static_range(TOP_K):
        slot = token * TOP_K + choice
        row = tl.zeros((HEIGHT, WIDTH), tl.float32)
        places = parts + slot[:, None] * width + n[None, :]
        for _ in tl.static_range(SPLITS):
            row += tl.load(places, mask=seen, other=0.0).to(tl.float32)
            places += part_size
        if WEIGH:
            row *= tl.load(slot_weights + slot)[:, None]
        sums += row
    if DENSE:
        sums = with_dense(sums, dense, dense_row, dense_column, mix, mix_row, mix_column, token, n, seen, MIX)
    tl.store(out + token[:, None] * width + n[None, :], sums.to(out.dtype.element_ty), mask=seen)
