"""The matrix product under the grouped operators: which library computes it.

On the CPU, float32 products of at least `SMALLEST` multiplications go to oneDNN, through the operator that
Inductor also emits; everything else goes to `mm` (MKL, or oneDNN for bfloat16). Seen with torch 2.13 on an
AVX-512 AMD EPYC core, in GFLOP/s: 128 rows through 512 -> 2048, oneDNN 184 and `mm` 83; weight gradients 181
and 87. For one to eight rows oneDNN reads weights at 14 to 25 GB/s whatever the shape, `mm` at 7 to 22. Below
`SMALLEST` the call and the making of a kernel for each new shape cost more than they save.

The rule looks at shapes only, never at a clock, so equal programs give equal bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1 << 20

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def uses_onednn(x_ND: Tensor, width: int) -> bool:
    """Whether the product of `x_ND` with a weight of `width` rows goes to oneDNN."""
    eligible = _HAS_ONEDNN and x_ND.dtype == torch.float32 and x_ND.device.type == "cpu"
    return eligible and x_ND.numel() * width >= SMALLEST and torch._C._get_mkldnn_enabled()


def multiply(x_ND: Tensor, w_FD: Tensor, bias_F: Tensor | None, out_NF: Tensor) -> None:
    """Write ``x @ w.T + bias`` into `out_NF`; `x_ND` and `w_FD` may be transposed views."""
    if uses_onednn(x_ND, w_FD.shape[0]):
        out_NF.copy_(torch.ops.mkldnn._linear_pointwise(x_ND, w_FD, bias_F, "none", [], ""))
    elif bias_F is None:
        torch.mm(x_ND, w_FD.t(), out=out_NF)
    else:
        torch.addmm(bias_F, x_ND, w_FD.t(), out=out_NF)
