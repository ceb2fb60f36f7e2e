"""`moe_ffn_forward` and `moe_ffn_backward` on a CPU: expert by expert, while its rows are in the cache.

An expert's rows are gathered, multiplied, passed through the formula and multiplied again before the next
expert's are touched: in and out of memory go the inputs, the weights of the experts that have rows, what is
kept for backward, and the results. Backward computes the formula again from the kept up products. Sums over a
token's experts are taken in float32 at least.

With `T` tokens of a decoder only the weights of the chosen experts are read, packed where they were packed
(`moec.runtime.ops.packed`); which library multiplies is in the table of `moec.runtime.ops.products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.runtime.ops.buffers import GRADIENTS, ROWS
from moec.runtime.ops.combine import sum_bags
from moec.runtime.ops.dispatch import invert, sum_rows, token_of
from moec.runtime.ops.formula import Formula, read_formula
from moec.runtime.ops.grouped_linear import spans
from moec.runtime.ops.moe_ffn import check_moe_ffn, mixed
from moec.runtime.ops.products import multiply, packed_part, product
from moec.runtime.ops.registry import LIBRARY, wide

Biases = Sequence[Tensor | None]


@dataclass(frozen=True)
class Expert:
    """One expert's part of a call: its number, its rows `[start, end)`, and the tokens these are of."""

    index: int
    start: int
    end: int
    tokens_n: Tensor

    def of(self, values: Tensor) -> Tensor:
        """This expert's stretch of something that has a row for each slot."""
        return values[self.start : self.end]

    def rows(self, values_TD: Tensor) -> Tensor:
        """The values of this expert's tokens [n, D]."""
        return values_TD.index_select(0, self.tokens_n)


def _experts(order_N: Tensor, counts_E: Tensor, top_k: int) -> list[Expert]:
    """The experts that have rows. Reads `counts` (which a CPU has at hand)."""
    tokens_N = token_of(order_N, top_k)
    return [
        Expert(index, start, start + count, tokens_N[start : start + count])
        for index, start, count in spans(counts_E, order_N.shape[0])
    ]


# forward


def _forward(
    x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor], biases: Biases,
    formula: str, dense: Tensor | None, mix: Tensor | None, save: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    read = check_moe_ffn(x, weights, order, counts, matrices, biases, formula, dense, mix)
    if x.shape[0] == 1 and not save:
        return mixed(_one_token(x, weights, order, counts, matrices, biases, read), dense, mix), []
    experts, slots = _experts(order, counts, weights.shape[1]), order.shape[0]
    kept = [ROWS.empty((slots, m.shape[1]), x.dtype, x.device) for m in matrices[:-1]] if save else []
    out_ND = ROWS.empty((slots, matrices[-1].shape[1]), wide(x.dtype), x.device)
    for expert in experts:
        ups = _ups(expert, x, matrices, biases, kept)
        expert.of(out_ND).copy_(_product(expert.index, read.apply(ups), matrices[-1], biases[-1]))
    num_kept = experts[-1].end if experts else 0
    for ups_NF in kept:
        ups_NF[num_kept:].zero_()
    return mixed(_combine(out_ND, weights, order, num_kept).to(x.dtype), dense, mix), kept


def _ups(
    expert: Expert, x: Tensor, matrices: Sequence[Tensor], biases: Biases, kept: Sequence[Tensor]
) -> list[Tensor]:
    """The up products of one expert; written into `kept`, if that is not empty."""
    rows_nD = expert.rows(x)
    if not kept:
        return [_product(expert.index, rows_nD, m, b) for m, b in zip(matrices[:-1], biases, strict=False)]
    ups = [expert.of(ups_NF) for ups_NF in kept]
    for up, matrix, bias in zip(ups, matrices, biases, strict=False):
        multiply(rows_nD, matrix[expert.index], None if bias is None else bias[expert.index], up)
    return ups


def _one_token(
    x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor], biases: Biases,
    read: Formula,
) -> Tensor:  # fmt: skip
    """What `_forward` sums for a single token, without tables of rows: there is nothing to sort."""
    weights_N = weights.view(-1)[order]
    sums_1D = torch.zeros(1, matrices[-1].shape[1], dtype=torch.promote_types(wide(x.dtype), weights.dtype))
    for index, start, count in spans(counts, order.shape[0]):
        ups = [_product(index, x, m, b) for m, b in zip(matrices[:-1], biases, strict=False)]
        down_1D = _product(index, read.apply(ups), matrices[-1], biases[-1])
        sums_1D.addcmul_(down_1D, weights_N[start : start + count].sum())
    return sums_1D.to(x.dtype)


def _product(index: int, rows_nD: Tensor, matrix_EFD: Tensor, bias_EF: Tensor | None) -> Tensor:
    """Rows through the matrix of expert `index`, packed if it was."""
    bias_F = None if bias_EF is None else bias_EF[index]
    return product(rows_nD, matrix_EFD[index], bias_F, packed_part(matrix_EFD, index))


def _combine(out_ND: Tensor, weights_TK: Tensor, order_N: Tensor, num_kept: int) -> Tensor:
    """The weighted sum of each token's rows, in the dtype of `out_ND` or wider."""
    sums = torch.promote_types(out_ND.dtype, weights_TK.dtype)
    places_TK = invert(order_N).view(weights_TK.shape)
    return sum_bags(out_ND.to(sums), weights_TK.to(sums), places_TK, num_kept)


# backward


@dataclass(frozen=True)
class _Found:
    """Where the gradients are written: rows of x (one a slot), of the weights (one a slot), and the rest."""

    rows_ND: Tensor
    dots_N: Tensor
    matrices: list[Tensor]
    biases: list[Tensor]


def _backward(
    grad: Tensor, x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor],
    biases: Biases, formula: str, ups: Sequence[Tensor], needed: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    top_k, read = weights.shape[1], read_formula(formula)
    to_x, to_weights, _, _ = needed
    found = _room(x, weights, matrices, biases, needed)
    weights_N1 = weights.reshape(-1).index_select(0, order).unsqueeze(1)
    experts = _experts(order, counts, top_k)
    for expert in experts:
        _expert_gradients(expert, grad, x, weights_N1, matrices, biases, read, ups, found)
    num_kept = experts[-1].end if experts else 0
    _clear_idle(found, {expert.index for expert in experts}, num_kept)
    found_x = sum_rows(found.rows_ND, order, top_k).to(x.dtype) if to_x else x.new_empty(0)
    found_weights = weights.new_empty(0)
    if to_weights:
        found_weights = torch.empty_like(found.dots_N).scatter_(0, order, found.dots_N).view(weights.shape)
    return found_x, found_weights, found.matrices, found.biases


def _room(
    x: Tensor, weights: Tensor, matrices: Sequence[Tensor], biases: Biases, needed: Sequence[bool]
) -> _Found:
    """Memory for what is wanted; tensors without elements for what is not."""
    slots, nothing = weights.numel(), x.new_empty(0)
    to_x, to_weights, to_matrices, to_biases = needed
    rows_shape = (slots, x.shape[1]) if to_x else (0,)
    return _Found(
        ROWS.empty(rows_shape, wide(x.dtype), x.device),
        weights.new_empty(slots if to_weights else 0),
        [GRADIENTS.empty(m.shape, m.dtype, m.device) if to_matrices else nothing.clone() for m in matrices],
        [torch.empty_like(b) if to_biases and b is not None else nothing.clone() for b in biases],
    )


def _expert_gradients(
    expert: Expert, grad: Tensor, x: Tensor, weights_N1: Tensor, matrices: Sequence[Tensor], biases: Biases,
    read: Formula, ups: Sequence[Tensor], found: _Found,
) -> None:  # fmt: skip
    """Everything that the rows of one expert give."""
    index = expert.index
    grad_nD, weights_n1 = expert.rows(grad), expert.of(weights_N1)
    # The gradient of a weight is <grad, out>, and out is a product with the hidden values: it is taken on
    # their side, <grad @ down, hidden>, so `out` need not be kept.
    pulled_nF = product(grad_nD, matrices[-1][index].t())
    to_ups, hidden_nF = read.pull_back([expert.of(up) for up in ups], pulled_nF * weights_n1.to(x.dtype))
    if found.dots_N.numel():
        dots_n = (pulled_nF * hidden_nF).sum(1, dtype=found.dots_N.dtype)
        if biases[-1] is not None:
            dots_n += torch.mv(grad_nD, biases[-1][index])
        expert.of(found.dots_N).copy_(dots_n)
    grads = [*to_ups, grad_nD * weights_n1.to(x.dtype)]
    _add_to_x(expert, to_ups, matrices, found.rows_ND)
    _weight_gradients(expert, grads, hidden_nF, x, found)


def _add_to_x(expert: Expert, to_ups: Sequence[Tensor], matrices: Sequence[Tensor], rows_ND: Tensor) -> None:
    if rows_ND.dim() != 2:
        return
    out_nD = expert.of(rows_ND)
    for place, (to_up, matrix) in enumerate(zip(to_ups, matrices, strict=False)):
        part_nD = product(to_up, matrix[expert.index].t())
        out_nD.add_(part_nD) if place else out_nD.copy_(part_nD)


def _weight_gradients(
    expert: Expert, grads: Sequence[Tensor], hidden_nF: Tensor, x: Tensor, found: _Found
) -> None:
    """The gradients of one expert's matrices and biases, for `grads` at the results of its products."""
    if found.matrices[0].numel():
        rows_nD = expert.rows(x)
        inputs = [rows_nD] * (len(grads) - 1) + [hidden_nF]
        for grad, read, to_matrix in zip(grads, inputs, found.matrices, strict=True):
            multiply(grad.t(), read.t(), None, to_matrix[expert.index])
    for grad, to_bias in zip(grads, found.biases, strict=True):
        if to_bias.numel():
            torch.sum(grad, 0, out=to_bias[expert.index])


def _clear_idle(found: _Found, busy: set[int], num_kept: int) -> None:
    """Zeros for experts without rows, and for dropped slots."""
    for gradient in (*found.matrices, *found.biases):
        for index in range(gradient.shape[0]):
            if index not in busy:
                gradient[index].zero_()
    found.rows_ND[num_kept:].zero_()
    found.dots_N[num_kept:].zero_()


LIBRARY.impl("moe_ffn_forward", _forward, "CPU")
LIBRARY.impl("moe_ffn_backward", _backward, "CPU")
