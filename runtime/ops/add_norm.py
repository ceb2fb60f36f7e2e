"""`moec::add_rms_norm` and `moec::add_layer_norm`: a residual sum, and the norm that reads it.

    add_rms_norm(x [..., D], y [..., D], weight [D]?, eps) -> sums [..., D], normed [..., D]
    add_layer_norm(x, y, weight?, bias?, eps) -> sums, normed
        sums = x + y;  normed = rms_norm(sums) or layer_norm(sums), over the last dim
    add_norm_backward(to_sums?, to_normed, sums, weight?, biased, centred, eps) -> to_x, to_weight, to_bias
        `to_x` is the gradient of x and of y; what there is no weight or bias for has no elements

Statistics are taken in float32 at least. The kernels here are torch's own, one after the other: a GPU brings
one that reads x and y once (`triton/add_norm.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.runtime.ops.registry import define, demand, differentiate, wide

Pair = tuple[Tensor, Tensor]


def check_add_norm(name: str, x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise an `OperatorError` for arguments that these operators cannot mean anything by."""
    demand(x.shape == y.shape and x.dim() > 0, name, f"{list(x.shape)} and {list(y.shape)}", "one shape")
    for given in (weight, bias):
        shaped = given is None or (given.dim() == 1 and given.shape[0] == x.shape[-1])
        demand(shaped, name, f"a weight {[] if given is None else list(given.shape)}", f"[{x.shape[-1]}]")


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor | None, eps: float) -> Pair:
    """The kernel for any device."""
    check_add_norm("add_rms_norm", x, y, weight, None)
    sums = x + y
    return sums, F.rms_norm(sums, [x.shape[-1]], weight, eps)


def add_layer_norm(x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Pair:
    """The kernel for any device."""
    check_add_norm("add_layer_norm", x, y, weight, bias)
    sums = x + y
    return sums, F.layer_norm(sums, [x.shape[-1]], weight, bias, eps)


def _fake_rms(x: Tensor, y: Tensor, weight: Tensor | None, eps: float) -> Pair:
    check_add_norm("add_rms_norm", x, y, weight, None)
    return _empty_pair(x, y)


def _fake_layer(x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Pair:
    check_add_norm("add_layer_norm", x, y, weight, bias)
    return _empty_pair(x, y)


def _empty_pair(x: Tensor, y: Tensor) -> Pair:
    made = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))
    return made, torch.empty_like(made)


def _norm_backward(
    to_sums: Tensor | None, to_normed: Tensor, sums: Tensor, weight: Tensor | None, biased: bool,
    centred: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = wide(sums.dtype)
    values, arriving = sums.to(dtype), to_normed.to(dtype)
    values = values - values.mean(-1, keepdim=True) if centred else values
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    normal = values * scale
    pulled = arriving if weight is None else arriving * weight.to(dtype)
    inner = pulled - normal * (pulled * normal).mean(-1, keepdim=True)
    inner = scale * (inner - pulled.mean(-1, keepdim=True) if centred else inner)
    to_x = inner if to_sums is None else inner + to_sums.to(dtype)
    found_weight = _over_rows(arriving * normal, weight) if weight is not None else sums.new_empty(0)
    found_bias = _over_rows(arriving, sums) if biased else sums.new_empty(0)
    return to_x.to(sums.dtype), found_weight, found_bias


def _over_rows(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).sum(0).to(like.dtype)


def _fake_backward(
    to_sums: Tensor | None, to_normed: Tensor, sums: Tensor, weight: Tensor | None, biased: bool,
    centred: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = sums.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return sums.new_empty(sums.shape), made, sums.new_empty(sums.shape[-1] if biased else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    x, y, weight, *bias, ctx.eps = inputs
    ctx.dtypes, ctx.centred = (x.dtype, y.dtype), bool(bias)
    ctx.biased = bool(bias) and bias[0] is not None
    ctx.save_for_backward(output[0], weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, to_sums: Tensor | None, to_normed: Tensor | None) -> tuple[Tensor | None, ...]:
    sums, weight = ctx.saved_tensors
    to_weight = to_bias = None
    found = to_sums
    if to_normed is not None:
        found, to_weight, to_bias = torch.ops.moec.add_norm_backward(
            to_sums, to_normed, sums, weight, ctx.biased, ctx.centred, ctx.eps
        )
    to_x, to_y = (None if found is None else found.to(dtype) for dtype in ctx.dtypes)
    to_weight = None if weight is None else to_weight
    biases = [to_bias if ctx.biased else None] * ctx.centred  # RMS norm has no argument for one
    return to_x, to_y, to_weight, *biases, None


define(
    "add_rms_norm(Tensor x, Tensor y, Tensor? weight, float eps) -> (Tensor, Tensor)", add_rms_norm, _fake_rms
)
define(
    "add_layer_norm(Tensor x, Tensor y, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    add_layer_norm,
    _fake_layer,
)
define(
    "add_norm_backward(Tensor? to_sums, Tensor to_normed, Tensor sums, Tensor? weight, bool biased,"
    " bool centred, float eps) -> (Tensor, Tensor, Tensor)",
    _norm_backward,
    _fake_backward,
)
differentiate("add_rms_norm", _keep, _backward)
differentiate("add_layer_norm", _keep, _backward)
