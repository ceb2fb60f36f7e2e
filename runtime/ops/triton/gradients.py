"""What the gradient at the result sends back through the down product and the formula, in one kernel.

G = gradient times the down matrix, one row a slot, is used while it is in registers, three times: weighted,
it goes through the formula's derivative to the up products; its dot product with the formula's result is the
gradient of the slot's weight, because <gradient, answer> = <gradient, down · a> = <G, a> (+ the bias's
share); and the formula's result is computed again for the gradient of the down matrix. So neither an expert's
answer nor the gathered rows nor the formula's result is kept for the backward: only the up products are. Guo
et al., SonicMoE (2025), save the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moec.runtime.ops.triton.launch import launch, precision
from moec.runtime.ops.triton.pointwise import Pointwise
from moec.runtime.ops.triton.shapes import Shape
from moec.runtime.ops.triton.tiles import Tiles
from moec.runtime.ops.triton.up import halves, leaf_places, load_weights, place_of, store_leaf, strides


def pull_back(
    grad_TD: Tensor,
    order_N: Tensor,
    top_k: int,
    tiles: Tiles,
    down_EDF: Tensor,
    bias_ED: Tensor | None,
    weights_N: Tensor,
    products: Sequence[Tensor],
    to_products: Sequence[Tensor],
    formula: Pointwise,
    shape: Shape,
) -> tuple[Tensor, Tensor]:
    """The weighted results of the formula [N, F], and <grad, answer> of each slot f32 [N], 0 for dropped
    ones.

    The gradients of the up products, `products` [N, F] a leaf, are written to `to_products`. `weights_N`:
    f32, what each slot's answer is multiplied by. Rows of dropped slots are left as they are.
    """
    num_rows, width = products[0].shape
    depth = grad_TD.shape[1]
    columns = triton.cdiv(width, shape.width)
    weighted_NF = products[0].new_empty(num_rows, width)
    dots = torch.empty(columns, num_rows, dtype=torch.float32, device=grad_TD.device)
    spare = (grad_TD, 0, 0)
    launch(
        _pull_back, (tiles.most * columns,),
        grad_TD, order_N, tiles.table, tiles.most,
        (down_EDF.mT,), down_EDF.mT.stride(), *(spare if bias_ED is None else (bias_ED, *bias_ED.stride())),
        weights_N, tuple(products), strides(products), tuple(to_products), strides(to_products),
        weighted_NF, dots,
        num_rows, down_EDF.shape[0], width, depth, columns, grad_TD.stride(0), grad_TD.stride(1),
        top_k, len(products), bias_ED is not None, formula.backward,
        precision(grad_TD.dtype), depth % shape.depth == 0,
        tiles.height, shape.width, shape.depth, shape.group, **shape.options,
    )  # fmt: skip
    return weighted_NF, dots.sum(0)


@triton.jit
def _through_formula(
    sums, weight, inside, first, local, n, width,
    products, product_strides, to_products, to_strides, weighted, LEAVES: tl.constexpr, FORMULA: tl.constexpr,
):  # fmt: skip
    """Store what `sums` give behind the formula, for columns n; returns their dot products with its
    result."""
    wanted = inside[:, None] & (n < width)[None, :]
    v0 = _load_leaf(products, product_strides, 0, first, local, n, wanted)
    v1, v2 = v0, v0
    if LEAVES > 1:
        v1 = _load_leaf(products, product_strides, 1, first, local, n, wanted)
    if LEAVES > 2:
        v2 = _load_leaf(products, product_strides, 2, first, local, n, wanted)
    g0, g1, g2, result = FORMULA(v0, v1, v2, sums * weight[:, None])
    store_leaf(to_products, to_strides, 0, first, local, n, g0, wanted)
    if LEAVES > 1:
        store_leaf(to_products, to_strides, 1, first, local, n, g1, wanted)
    if LEAVES > 2:
        store_leaf(to_products, to_strides, 2, first, local, n, g2, wanted)
    places = weighted + first.to(tl.int64) * width + (local[:, None] * width + n[None, :])
    tl.store(places, (result * weight[:, None]).to(weighted.dtype.element_ty), mask=wanted)
    return tl.sum(tl.where(wanted, sums * result, 0.0), 1)


@triton.jit
def _load_leaf(leaves, strides, LEAF: tl.constexpr, first, local, n, wanted):
    """A tile of one leaf, in float32."""
    return tl.load(leaf_places(leaves, strides, LEAF, first, local, n), mask=wanted, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["most", "num_rows", "experts", "columns"])
def _pull_back(
    grad, order, table, most,
    weights, weight_strides, bias, bias_expert, bias_column,
    slot_weights, products, product_strides, to_products, to_strides, weighted, dots,
    num_rows, experts, width, depth, columns, grad_row, grad_column,
    TOP_K: tl.constexpr, LEAVES: tl.constexpr, BIAS: tl.constexpr,
    FORMULA: tl.constexpr, INPUT: tl.constexpr, EVEN: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, column = place_of(tl.program_id(0), most, columns, GROUP)
    expert = tl.load(table + tile)
    if expert < 0:
        return
    first = tl.load(table + most + tile)
    local = tl.arange(0, HEIGHT)
    inside = first + local < tl.load(table + 2 * most + tile)
    slot = tl.load(order + first + local, mask=inside, other=0)
    dot_places = dots + column.to(tl.int64) * num_rows + slot
    if expert == experts:
        tl.store(dot_places, tl.zeros((HEIGHT,), tl.float32), mask=inside)
        return
    n = column * WIDTH + tl.arange(0, WIDTH)
    grad_rows = grad + (slot // TOP_K).to(tl.int64)[:, None] * grad_row
    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    bias_dot = tl.zeros((HEIGHT,), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        seen = inside[:, None] if EVEN else inside[:, None] & (k < depth)[None, :]
        left = tl.load(grad_rows + k[None, :] * grad_column, mask=seen, other=0.0)
        right = load_weights(weights, weight_strides, 0, expert, n, k, width, depth, EVEN)
        sums = tl.dot(left, right, sums, input_precision=INPUT)
        if BIAS:
            base = bias + expert.to(tl.int64) * bias_expert
            added = tl.load(base + k * bias_column, mask=k < depth, other=0.0)
            bias_dot += tl.sum(left.to(tl.float32) * added.to(tl.float32)[None, :], 1)
    weight = tl.load(slot_weights + slot, mask=inside, other=0.0)
    # Two halves, one after the other: all that the formula needs of a whole tile would not fit the registers.
    low, high = halves(sums, HEIGHT, WIDTH)
    n = column * WIDTH + tl.arange(0, WIDTH // 2)
    dot = _through_formula(low, weight, inside, first, local, n, width, products, product_strides,
                           to_products, to_strides, weighted, LEAVES, FORMULA)  # fmt: skip
    n += WIDTH // 2
    dot += _through_formula(high, weight, inside, first, local, n, width, products, product_strides,
                            to_products, to_strides, weighted, LEAVES, FORMULA)  # fmt: skip
    if BIAS:
        dot += tl.where(column == 0, bias_dot, 0.0)
    tl.store(dot_places, dot, mask=inside)
