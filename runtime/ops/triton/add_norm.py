"""`moec::add_rms_norm` and `moec::add_layer_norm` in one kernel: x and y are read once, a row a program.

The sum is rounded to its dtype before the norm reads it, as it is when the two are computed apart.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moec.runtime.ops.add_norm import Pair, check_add_norm
from moec.runtime.ops.triton.launch import demand_device, launch, power_of_two

_WIDEST = 16384


def refusal(x: Tensor) -> str:
    """Why a call is not one for this kernel; '' when it is."""
    if x.dtype == torch.float64:
        return "float64"
    return f"rows of {x.shape[-1]}, more than {_WIDEST}" if x.shape[-1] > _WIDEST else ""


def add_norm(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> Pair:
    """sums and normed, both [..., D]; `centred`: layer norm, otherwise RMS norm."""
    check_add_norm("add_layer_norm" if centred else "add_rms_norm", x, y, weight, bias)
    demand_device("add_norm", x)
    x, y = x.contiguous(), y.contiguous()
    sums = torch.empty_like(x, dtype=torch.promote_types(x.dtype, y.dtype))
    normed = torch.empty_like(sums)
    width = x.shape[-1]
    block = power_of_two(width)
    launch(
        _add_norm, (x.numel() // max(width, 1),),
        x, y, sums if weight is None else weight.contiguous(), sums if bias is None else bias.contiguous(),
        sums, normed, width, eps, centred, weight is not None, bias is not None, block,
        num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return sums, normed


@triton.jit
def _add_norm(
    x, y, weight, bias, sums, normed, width, eps,
    CENTRED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    n = tl.arange(0, BLOCK)
    inside = n < width
    left = tl.load(x + row + n, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(y + row + n, mask=inside, other=0.0).to(tl.float32)
    rounded = (left + right).to(sums.dtype.element_ty)
    tl.store(sums + row + n, rounded, mask=inside)
    values = rounded.to(tl.float32)
    if CENTRED:
        values = tl.where(inside, values - tl.sum(values, 0) / width, 0.0)
    values = values * tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    if WEIGHTED:
        values *= tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        values += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + n, values.to(normed.dtype.element_ty), mask=inside)
