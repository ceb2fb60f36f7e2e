"""The one table of tolerances, by dtype, and the one way numbers are compared: relative to scale.

The error of a tensor is max |found - needed| divided by max(|needed|): one number per tensor, so that elements
near zero, whose relative error means nothing after a sum was reassociated, do not decide.

| dtype | tolerance | why |
|---|---|---|
| float64 | 1e-10 | a contract's word for *exact*: rounding is 1.1e-16 a step, and some 1e4 reassociated steps with a condition of 100 stay below; any real mistake is above 1e-6 |
| float32 | 5e-5 | rounding is 6e-8 a step, times the same growth, of which sums of a few thousand terms use a tenth |
| bfloat16 | 6e-2 | rounding is 4e-3 a step, and a tensor is rounded again at every operation between the two |
| float16 | 8e-3 | rounding is 5e-4 a step, likewise |
"""  # noqa: E501

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 5e-5,
    torch.bfloat16: 6e-2,
    torch.float16: 8e-3,
}


def tolerance_of(dtype: torch.dtype) -> float:
    """The tolerance for values computed in `dtype`; anything that is not floating point must be equal (0)."""
    return TOLERANCES[dtype] if dtype.is_floating_point or dtype in TOLERANCES else 0.0


def scale_of(value: Tensor) -> float:
    """The largest finite magnitude in `value`; 0 when there is none."""
    finite = value.detach().double().abs()
    finite = finite[finite.isfinite()]
    return float(finite.amax()) if finite.numel() else 0.0


def error_of(found: Tensor, needed: Tensor, floor: float = 0.0) -> float:
    """max |found - needed| / max(|needed|, floor), in fp64; infinite when there is a NaN or shapes differ.

    Infinities in the same places with the same sign agree. When `needed` is all zeros and there is no
    `floor`, the error is absolute.
    """
    if found.shape != needed.shape:
        return float("inf")
    if not needed.numel():
        return 0.0
    found_64, needed_64 = found.detach().to("cpu", torch.float64), needed.detach().to("cpu", torch.float64)
    gap = (found_64 - needed_64).abs().masked_fill(found_64 == needed_64, 0.0)
    error = float(gap.nan_to_num(nan=float("inf"), posinf=float("inf")).amax())
    return error / (max(scale_of(needed_64), floor) or 1.0)
