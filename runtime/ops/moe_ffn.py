"""`moec::moe_ffn`: a whole layer of experts in one operator.

    moe_ffn(x [T,D], weights [T,K], order [N], counts [E], matrices, biases, formula, dense [T,D']?,
            mix [T,2]?) -> y [T,D']

    rows = dispatch(x, order, K)
    ups  = [grouped_linear(rows, m, b, counts) for the matrices [E,F,D] and biases [E,F]? but the last]
    sums = combine(grouped_linear(formula(*ups), matrices[-1], biases[-1], counts), weights, order, counts)
    y    = sums,  sums + dense,  or  sums * mix[:, :1] + dense * mix[:, 1:]

`matrices` has one entry for each parameter of `formula` (see `formula`), in order, and then the down matrix
[E,D',F']; `biases` likewise. `y` has the widest dtype of x, dense and mix.

Underneath are two operators without gradients of their own, and they are what a device brings kernels for:

    moe_ffn_forward(… the same …, save) -> y, ups
        with `save`, `ups` are the results of the up products [N,F], in the dtype of x: all that backward
        needs beside the inputs, so memory for activations is N * F for each of them and nothing more.
        Without it the list is empty.
    moe_ffn_backward(grad [T,D'], x, weights, order, counts, matrices, biases, formula, ups, needed)
        -> to_x [T,D], to_weights [T,K], to_matrices, to_biases
        for `grad` at `sums`, in the dtype of x. `mix` is folded into `weights` before, and `dense` has no
        part in it. `needed`: whether the gradients of (x, weights, matrices, biases) are wanted; what is not,
        and the gradient of a bias that is None, comes back with no elements. Rows beyond counts.sum() give
        nothing.

**Where kernels are chosen.** The two functions `forward` and `backward` below run on every device. A device's
own kernel is registered with `registry.LIBRARY.impl("moe_ffn_forward", kernel, "CPU")` (or "CUDA"), the same
for backward, in a module that `moec.runtime.ops` imports; the dispatcher takes it instead. Shapes and dtypes
were not checked by then: call `check_moe_ffn` first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from moec.runtime.ops.dispatch import sum_rows, token_of
from moec.runtime.ops.formula import Formula, read_formula
from moec.runtime.ops.moe_ffn_gradient import Biases, with_gradient
from moec.runtime.ops.registry import LIBRARY, define, define_composite, demand


def check_moe_ffn(
    x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor], biases: Biases,
    formula: str, dense: Tensor | None = None, mix: Tensor | None = None,
) -> Formula:  # fmt: skip
    """The formula; `OperatorError` for arguments that `moec::moe_ffn` cannot mean anything by.

    A decoder comes by here for every layer of every token: words are made only for complaints.
    """
    name, read = "moe_ffn", read_formula(formula)
    if (x.dim(), weights.dim(), order.dim(), counts.dim()) != (2, 2, 1, 1):
        dims = tuple(tensor.dim() for tensor in (x, weights, order, counts))
        demand(False, name, f"inputs with {dims} dimensions", "[T,D], [T,K], [N], [E]")
    if weights.shape[0] != x.shape[0]:
        demand(False, name, f"weights of {weights.shape[0]} tokens", f"{x.shape[0]}")
    needed, experts = len(read.parameters) + 1, counts.shape[0]
    if not len(matrices) == len(biases) == needed:
        found = f"{len(matrices)} matrices and {len(biases)} biases for {read}"
        demand(False, name, found, f"{needed} of each: the ups, then down")
    for place, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        _check_matrix(place, matrix, bias, x, experts)
    for matrix in matrices[:-1]:
        if matrix.shape[2] != x.shape[1]:
            demand(False, name, f"an up matrix {list(matrix.shape)}", f"[E, F, {x.shape[1]}]")
    inner, depth = read.width([matrix.shape[1] for matrix in matrices[:-1]]), matrices[-1].shape[2]
    if inner != depth:
        demand(False, name, f"a formula of width {inner}", f"{depth}, as the down matrix reads")
    _check_mix(x.shape[0], matrices[-1].shape[1], dense, mix)
    return read


def _check_matrix(place: int, matrix: Tensor, bias: Tensor | None, x: Tensor, experts: int) -> None:
    name = "moe_ffn"
    if matrix.dim() != 3 or matrix.shape[0] != experts:
        demand(False, name, f"matrix {place} {list(matrix.shape)}", f"[{experts}, out, in]")
    if matrix.dtype != x.dtype:
        demand(False, name, f"matrix {place} of {matrix.dtype}", f"{x.dtype}, as x")
    if bias is not None and (bias.dim() != 2 or bias.shape != matrix.shape[:2]):
        demand(False, name, f"bias {place} {list(bias.shape)}", f"[{experts}, {matrix.shape[1]}]")
    if bias is not None and bias.dtype != x.dtype:
        demand(False, name, f"bias {place} of {bias.dtype}", f"{x.dtype}, as x")


def _check_mix(tokens: int, width: int, dense: Tensor | None, mix: Tensor | None) -> None:
    if dense is not None:
        shaped = dense.dim() == 2 and tuple(dense.shape) == (tokens, width)
        demand(shaped, "moe_ffn", f"dense {list(dense.shape)}", f"[{tokens}, {width}]")
    if mix is not None:
        demand(dense is not None, "moe_ffn", "mix without dense", "both, or dense alone")
        shaped = mix.dim() == 2 and tuple(mix.shape) == (tokens, 2)
        demand(shaped, "moe_ffn", f"mix {list(mix.shape)}", f"[{tokens}, 2]")


def result_dtype(x: Tensor, dense: Tensor | None, mix: Tensor | None) -> torch.dtype:
    """The dtype of y: the widest of those that are there."""
    return reduce(torch.promote_types, [t.dtype for t in (x, dense, mix) if t is not None])


# kernels for any device


def forward(
    x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor], biases: Biases,
    formula: str, dense: Tensor | None, mix: Tensor | None, save: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """`moe_ffn_forward` by the operators it stands for."""
    read = check_moe_ffn(x, weights, order, counts, matrices, biases, formula, dense, mix)
    ops = torch.ops.moec
    rows_ND = ops.dispatch.default(x, order, weights.shape[1])
    ups = [
        ops.grouped_linear.default(rows_ND, m, b, counts) for m, b in zip(matrices[:-1], biases, strict=False)
    ]
    hidden_NF = read.apply(ups)
    kept = ups if save else []
    del rows_ND, ups
    out_ND = ops.grouped_linear.default(hidden_NF, matrices[-1], biases[-1], counts)
    return mixed(ops.combine.default(out_ND, weights, order, counts), dense, mix), kept


def mixed(sums_TD: Tensor, dense_TD: Tensor | None, mix_T2: Tensor | None) -> Tensor:
    """The sums, with the dense branch added or mixed in where there is one."""
    if dense_TD is None:
        return sums_TD
    if mix_T2 is None:
        return sums_TD + dense_TD
    return sums_TD * mix_T2[:, :1] + dense_TD * mix_T2[:, 1:]


def backward(
    grad: Tensor, x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor],
    biases: Biases, formula: str, ups: Sequence[Tensor], needed: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """`moe_ffn_backward` by the operators it stands for; the pointwise part is computed again from `ups`."""
    ops, read = torch.ops.moec, read_formula(formula)
    to_x, to_weights, to_matrices, to_biases = needed
    top_k = weights.shape[1]
    grad_ND = grad.index_select(0, token_of(order, top_k))
    weights_N1 = _kept_weights(weights, order, counts).unsqueeze(1).to(x.dtype)
    # The gradient of a weight is <grad, out>, and out is a product with the hidden values: it is taken on
    # their side, <grad @ down, hidden>, so neither out nor the gathered x of the forward pass are kept.
    pulled_NF = ops.grouped_linear.default(grad_ND, matrices[-1].mT, None, counts)
    to_ups, hidden_NF = read.pull_back(ups, pulled_NF)
    found_weights = _empty(weights)
    if to_weights:
        dots_N = (pulled_NF * hidden_NF).to(weights.dtype).sum(1) + _bias_dots(
            grad_ND, biases[-1], counts, weights
        )
        found_weights = _by_slot(dots_N, weights, order, counts)
    grad_ND = grad_ND * weights_N1
    to_ups = [(to_up * weights_N1) for to_up in to_ups]
    found_matrices = [_empty(matrix) for matrix in matrices]
    if to_matrices:
        rows_ND = ops.dispatch.default(x, order, top_k)
        found_matrices = [ops.grouped_outer.default(to_up, rows_ND, counts) for to_up in to_ups]
        found_matrices.append(ops.grouped_outer.default(grad_ND, hidden_NF, counts))
    found_x = _to_x(to_ups, matrices, order, counts, top_k) if to_x else _empty(x)
    return found_x, found_weights, found_matrices, _to_biases([*to_ups, grad_ND], biases, counts, to_biases)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _kept_weights(weights: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    """The weight of each row [N], zero for dropped ones."""
    return torch.where(_kept(order, counts), weights.reshape(-1).index_select(0, order), 0.0)


def _kept(order: Tensor, counts: Tensor) -> Tensor:
    return torch.arange(order.shape[0], device=order.device) < counts.sum()


def _bias_dots(grad_ND: Tensor, bias_ED: Tensor | None, counts: Tensor, weights: Tensor) -> Tensor | float:
    """<grad, bias> for each row [N]: the part of the weights' gradient that the down bias has."""
    if bias_ED is None:
        return 0.0
    places_N = torch.arange(grad_ND.shape[0], device=grad_ND.device)
    experts_N = torch.searchsorted(counts.cumsum(0), places_N, right=True).clamp_(max=counts.shape[0] - 1)
    return (grad_ND * bias_ED.index_select(0, experts_N)).to(weights.dtype).sum(1)


def _by_slot(dots_N: Tensor, weights: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    dots_N = torch.where(_kept(order, counts), dots_N, 0.0).to(weights.dtype)
    return torch.empty_like(dots_N).scatter_(0, order, dots_N).view(weights.shape)


def _to_x(
    to_ups: Sequence[Tensor], matrices: Sequence[Tensor], order: Tensor, counts: Tensor, top_k: int
) -> Tensor:
    ops = torch.ops.moec
    parts = [
        ops.grouped_linear.default(g, m.mT, None, counts) for g, m in zip(to_ups, matrices, strict=False)
    ]
    return sum_rows(reduce(Tensor.add_, parts), order, top_k)


def _to_biases(grads: list[Tensor], biases: Biases, counts: Tensor, wanted: bool) -> list[Tensor]:
    return [
        torch.ops.moec.grouped_sum.default(grad, counts) if wanted and bias is not None else _empty(grad)
        for grad, bias in zip(grads, biases, strict=True)
    ]


# shapes


def _fake_forward(
    x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor], biases: Biases,
    formula: str, dense: Tensor | None, mix: Tensor | None, save: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    check_moe_ffn(x, weights, order, counts, matrices, biases, formula, dense, mix)
    y = x.new_empty(x.shape[0], matrices[-1].shape[1], dtype=result_dtype(x, dense, mix))
    return y, [x.new_empty(order.shape[0], m.shape[1]) for m in matrices[:-1]] if save else []


def _fake_backward(
    grad: Tensor, x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor],
    biases: Biases, formula: str, ups: Sequence[Tensor], needed: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    def like(tensor: Tensor, wanted: bool) -> Tensor:
        return tensor.new_empty(tensor.shape) if wanted else _empty(tensor)

    return (
        like(x, needed[0]),
        like(weights, needed[1]),
        [like(matrix, needed[2]) for matrix in matrices],
        [x.new_empty(0) if bias is None else like(bias, needed[3]) for bias in biases],
    )


# the operator itself


def _moe_ffn(
    x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor], biases: Biases,
    formula: str, dense: Tensor | None = None, mix: Tensor | None = None,
) -> Tensor:  # fmt: skip
    inputs = (x, weights, *matrices, *biases, dense, mix)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, _ = torch.ops.moec.moe_ffn_forward.default(
        x, weights, order, counts, matrices, biases, formula, dense, mix, save
    )
    return y


def _autocast(device: str) -> Callable[..., Tensor]:
    """As for `grouped_linear`: x, matrices and biases take the autocast dtype."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(tensor: Tensor | None) -> Any:
        castable = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(torch.get_autocast_dtype(device)) if castable and tensor is not None else tensor

    def kernel(
        x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor], biases: Biases,
        formula: str, dense: Tensor | None = None, mix: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        matrices, biases = [cast(matrix) for matrix in matrices], [cast(bias) for bias in biases]
        x = cast(x)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.moec.moe_ffn.default(
                x, weights, order, counts, matrices, biases, formula, dense, mix
            )

    return kernel


_INPUTS = (
    "Tensor x, Tensor weights, Tensor order, Tensor counts, Tensor[] matrices, Tensor?[] biases, str formula"
)
define(
    f"moe_ffn_forward({_INPUTS}, Tensor? dense, Tensor? mix, bool save) -> (Tensor, Tensor[])",
    forward,
    _fake_forward,
)
define(
    f"moe_ffn_backward(Tensor grad, {_INPUTS}, Tensor[] ups, bool[] needed)"
    " -> (Tensor, Tensor, Tensor[], Tensor[])",
    backward,
    _fake_backward,
)
define_composite(f"moe_ffn({_INPUTS}, Tensor? dense=None, Tensor? mix=None) -> Tensor", _moe_ffn)
LIBRARY.impl("moe_ffn_forward", with_gradient, "Autograd")
LIBRARY.impl("moe_ffn", _autocast("cpu"), "AutocastCPU")
LIBRARY.impl("moe_ffn", _autocast("cuda"), "AutocastCUDA")
