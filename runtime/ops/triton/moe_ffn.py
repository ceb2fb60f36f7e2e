"""`moe_ffn_forward` and `moe_ffn_backward` by the kernels of this package.

Forward: up products, formula; down product to slots; sum of slots. For at most 16 tokens without a backward,
the kernels of `decode`. Backward: `pull_back`, the gradients of the matrices, the gradient of x. What is kept
for it are the up products [N, F] alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moec.runtime.ops.formula import Formula, read_formula
from moec.runtime.ops.formula_tree import Leaf
from moec.runtime.ops.moe_ffn import check_moe_ffn, result_dtype
from moec.runtime.ops.triton.decode import MOST_TOKENS, decode_down, decode_up
from moec.runtime.ops.triton.down import combine, scatter
from moec.runtime.ops.triton.gradients import pull_back
from moec.runtime.ops.triton.launch import demand_device
from moec.runtime.ops.triton.outer import outer, sums_by_expert
from moec.runtime.ops.triton.pointwise import Pointwise, pointwise
from moec.runtime.ops.triton.pointwise import refusal as formula_refusal
from moec.runtime.ops.triton.shapes import Shape, shape_for, shared_memory, splits_for
from moec.runtime.ops.triton.tiles import Tiles, cut
from moec.runtime.ops.triton.up import up

Biases = Sequence[Tensor | None]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Layer:
    """One call: what the kernels are told, and what they share."""

    x_TD: Tensor
    weights_TK: Tensor
    order_N: Tensor
    counts_E: Tensor
    matrices: Sequence[Tensor]
    biases: Biases
    formula: Formula

    @cached_property
    def pointwise(self) -> Pointwise:
        """The formula's Triton functions."""
        return pointwise(self.formula)

    @property
    def top_k(self) -> int:
        """Choices of a token, K."""
        return self.weights_TK.shape[1]

    @cached_property
    def weights_N(self) -> Tensor:
        """The weight of each slot, f32, contiguous."""
        return self.weights_TK.to(torch.float32).contiguous().view(-1)

    @cached_property
    def ends_E(self) -> Tensor:
        """Where each expert's rows end."""
        return self.counts_E.cumsum(0)

    @cached_property
    def inner(self) -> int:
        """Width of the formula's result, F."""
        return self.matrices[-1].shape[2]

    @property
    def rows_per_expert(self) -> int:
        """On average, if all rows are kept."""
        return -(-self.order_N.shape[0] // self.counts_E.shape[0])

    def of_leaves(self, per_parameter: Sequence[Tensor], dim: int) -> list[Tensor]:
        """For each leaf its slice of its parameter's tensor, along `dim`."""
        return [_part(leaf, per_parameter[self._place(leaf)], dim) for leaf in self.formula.leaves]

    def leaf_biases(self) -> list[Tensor | None]:
        """For each leaf its slice of its parameter's bias [E, F]."""
        found = [(leaf, self.biases[self._place(leaf)]) for leaf in self.formula.leaves]
        return [None if bias is None else _part(leaf, bias, 1) for leaf, bias in found]

    def shape(self, kind: str, rows: int, width: int, depth: int, leaves: int = 1) -> Shape:
        """The tiles of a product, on this device; see `shape_for`."""
        memory = shared_memory(self.x_TD.device)
        return shape_for(kind, self.x_TD.dtype, rows, width, depth, leaves, memory)

    def tiles(self, height: int) -> Tiles:
        """The tiles of the rows, `height` rows each."""
        return cut(self.counts_E, self.order_N.shape[0], height)

    def fresh(self, widths_of: Sequence[Tensor], rows: int) -> list[Tensor]:
        """One [rows, F] a parameter, zero where no leaf writes."""
        made = [self.x_TD.new_empty(rows, matrix.shape[1]) for matrix in widths_of]
        for place, tensor in enumerate(made):
            if not covered(self.formula, place, tensor.shape[1]):
                tensor.zero_()
        return made

    def _place(self, leaf: Leaf) -> int:
        return self.formula.parameters.index(leaf.name)


def _part(leaf: Leaf, tensor: Tensor, dim: int) -> Tensor:
    return (
        tensor if leaf.is_whole else tensor[(slice(None),) * dim + (slice(leaf.start, leaf.stop, leaf.step),)]
    )


def _places(formula: Formula, place: int, width: int) -> list[int]:
    """The places that are read of a parameter of this width, as often as they are."""
    name = formula.parameters[place]
    return [at for leaf in formula.leaves if leaf.name == name for at in leaf.places(width)]


def covered(formula: Formula, place: int, width: int) -> bool:
    """Whether every place of a parameter of this width is read."""
    return len(set(_places(formula, place, width))) == width


def overlapping(formula: Formula, widths: Sequence[int]) -> bool:
    """Whether two leaves read the same place, whose gradients would have to be added."""
    read = [_places(formula, place, width) for place, width in enumerate(widths)]
    return any(len(places) != len(set(places)) for places in read)


def refusal(x: Tensor, matrices: Sequence[Tensor], formula: str) -> str:
    """Why a call is not one for these kernels; '' when it is."""
    if x.dtype not in _DTYPES:
        return str(x.dtype)
    read = read_formula(formula)
    if overlapping(read, [matrix.shape[1] for matrix in matrices[:-1]]):
        return "slices of one up product that overlap"
    return formula_refusal(read)


def forward(
    x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor], biases: Biases,
    formula: str, dense: Tensor | None, mix: Tensor | None, save: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """`moe_ffn_forward`: y [T, D'], and with `save` the up products [N, F] of each parameter."""
    read = check_moe_ffn(x, weights, order, counts, matrices, biases, formula, dense, mix)
    demand_device("moe_ffn", x)
    layer = Layer(x, weights, order.contiguous(), counts, matrices, biases, read)
    dtype = result_dtype(x, dense, mix)
    kept = layer.fresh(matrices[:-1], order.shape[0]) if save else []
    if not x.shape[0]:
        return x.new_empty(0, matrices[-1].shape[1], dtype=dtype), kept
    if x.shape[0] <= MOST_TOKENS and not save:
        return _decode(layer, dense, mix, dtype), kept
    return _layer(layer, dense, mix, dtype, kept), kept


def _layer(
    layer: Layer, dense: Tensor | None, mix: Tensor | None, dtype: torch.dtype, kept: list[Tensor]
) -> Tensor:
    x, down, leaves = layer.x_TD, layer.matrices[-1], layer.of_leaves(layer.matrices, 1)
    shape = layer.shape("rows", layer.rows_per_expert, layer.inner, x.shape[1], len(leaves))
    tiles, keep = layer.tiles(shape.height), layer.of_leaves(kept, 1) if kept else ()
    hidden_NF = up(
        x, layer.order_N, layer.top_k, tiles, leaves, layer.leaf_biases(), layer.pointwise, shape, keep
    )
    shape = layer.shape("rows", tiles.height, down.shape[1], layer.inner)
    rest = (layer.weights_N, dense, mix)
    if layer.top_k == 1:
        return scatter([hidden_NF], layer.order_N, tiles, [down], layer.biases[-1], shape, dtype, *rest)
    slots_ND = scatter([hidden_NF], layer.order_N, tiles, [down], layer.biases[-1], shape)
    return combine(slots_ND.unsqueeze(0), layer.top_k, dtype, *rest)


def _decode(layer: Layer, dense: Tensor | None, mix: Tensor | None, dtype: torch.dtype) -> Tensor:
    x, down, leaves = layer.x_TD, layer.matrices[-1], layer.of_leaves(layer.matrices, 1)
    shape = layer.shape("decode", 16, layer.inner, x.shape[1], len(leaves))
    hidden_NF = decode_up(
        x, layer.order_N, layer.top_k, layer.counts_E, leaves, layer.leaf_biases(), layer.pointwise, shape
    )
    shape = layer.shape("decode", 16, down.shape[1], layer.inner)
    programs = -(-down.shape[1] // shape.width) * min(layer.order_N.shape[0], down.shape[0])
    splits = splits_for(programs, layer.inner, shape.depth, _processors(x.device))
    alone = x.shape[0] == 1
    parts = decode_down(
        hidden_NF, layer.order_N, layer.counts_E, down, layer.biases[-1], shape, splits, alone
    )
    return combine(parts, layer.top_k, dtype, layer.weights_N, dense, mix)


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; 132, as an H100 has, where there is no GPU to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def backward(
    grad: Tensor, x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor],
    biases: Biases, formula: str, ups: Sequence[Tensor], needed: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """`moe_ffn_backward`: gradients of x, weights, matrices and biases; what is not `needed` has no
    elements."""
    read = check_moe_ffn(x, weights, order, counts, matrices, biases, formula)
    demand_device("moe_ffn_backward", x)
    layer = Layer(x, weights, order.contiguous(), counts, matrices, biases, read)
    to_x, to_weights, to_matrices, to_biases = needed
    if not x.shape[0]:
        return _no_tokens(layer, needed)
    down, leaves = matrices[-1], layer.of_leaves(matrices, 1)
    shape = layer.shape("rows", layer.rows_per_expert, layer.inner, down.shape[1], max(2, len(leaves)))
    tiles, to_ups = layer.tiles(shape.height), layer.fresh(matrices[:-1], order.shape[0])
    to_leaves = layer.of_leaves(to_ups, 1)
    weighted_NF, dots_N = pull_back(
        grad, layer.order_N, layer.top_k, tiles, down, biases[-1], layer.weights_N,
        layer.of_leaves(ups, 1), to_leaves, layer.pointwise, shape,
    )  # fmt: skip
    # What is not wanted is a tensor of its own each time: an operator's results must not be one another.
    return (
        _to_x(layer, tiles, to_leaves, leaves) if to_x else x.new_empty(0),
        dots_N.view_as(weights).to(weights.dtype) if to_weights else weights.new_empty(0),
        _to_matrices(layer, grad, to_ups, weighted_NF) if to_matrices else [m.new_empty(0) for m in matrices],
        _to_biases(layer, grad, to_ups) if to_biases else [x.new_empty(0) for _ in biases],
    )


def _no_tokens(layer: Layer, needed: Sequence[bool]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    def zeros(tensor: Tensor | None, wanted: bool) -> Tensor:
        return torch.zeros_like(tensor) if wanted and tensor is not None else layer.x_TD.new_empty(0)

    matrices = [zeros(matrix, needed[2]) for matrix in layer.matrices]
    biases = [zeros(bias, needed[3]) for bias in layer.biases]
    return zeros(layer.x_TD, needed[0]), zeros(layer.weights_TK, needed[1]), matrices, biases


def _to_x(layer: Layer, tiles: Tiles, to_leaves: Sequence[Tensor], leaves: Sequence[Tensor]) -> Tensor:
    x = layer.x_TD
    shape = layer.shape("rows", tiles.height, x.shape[1], layer.inner)
    slots_ND = scatter(to_leaves, layer.order_N, tiles, [leaf.mT for leaf in leaves], None, shape)
    return slots_ND if layer.top_k == 1 else combine(slots_ND.unsqueeze(0), layer.top_k, x.dtype)


def _to_matrices(layer: Layer, grad: Tensor, to_ups: Sequence[Tensor], weighted_NF: Tensor) -> list[Tensor]:
    common = (layer.counts_E, layer.ends_E, layer.order_N, layer.top_k)
    found = [torch.empty_like(matrix) for matrix in layer.matrices]
    for to_up, out in zip(to_ups, found, strict=False):
        shape = layer.shape("outer", out.shape[1], out.shape[2], layer.rows_per_expert)
        outer(to_up, layer.x_TD, out, *common, "right", shape)
    shape = layer.shape("outer", found[-1].shape[1], found[-1].shape[2], layer.rows_per_expert)
    outer(grad, weighted_NF, found[-1], *common, "left", shape)
    return found


def _to_biases(layer: Layer, grad: Tensor, to_ups: Sequence[Tensor]) -> list[Tensor]:
    common = (layer.counts_E, layer.ends_E, layer.order_N, layer.top_k)
    found = [grad.new_empty(0) if bias is None else torch.empty_like(bias) for bias in layer.biases]
    for rows, bias, out in zip([*to_ups, grad], layer.biases, found, strict=True):
        if bias is not None:
            sums_by_expert(rows, out, *common, layer.weights_N if rows is grad else None)
    return found
