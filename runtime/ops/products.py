"""The matrix product under the operators: which library computes it, spelled how.

A table of what was measured answers by shape and dtype alone, never by a clock, so equal programs give equal
bits. Seen with torch 2.13 on one core of an AMD EPYC with AVX-512:

* float32, many rows: oneDNN, through the operator that Inductor also emits, does 180 to 215 GFLOP/s where
  `mm` (MKL) does 83 to 96, forward and for both gradients. bfloat16 and float16: `mm` is oneDNN already, and
  writes where it is told to: 350 to 430 GFLOP/s, 5 to 20 % above the other spelling.
* few rows: a product is a reading of its weights. GB/s for weights 1024 -> 4096 that are in no cache:

      rows   oneDNN   mm     weights @ rows (mm)   packed
      1      23       19     19                    34
      2      17        9     18 to 20              33
      4      14       10     19 to 21              31
      8      14        9      6                    24
      16     12        6      4                    17

  `weights @ rows` is the same product with the sides exchanged. Of 16 rows and deep weights oneDNN is a
  quarter faster with sides exchanged too. *Packed* weights (`moec.runtime.ops.packed`) are for decoders.
* Below `SMALLEST` multiplications oneDNN's call, and its making of a kernel for each new shape, cost more
  than they save.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.runtime.ops.packed import PACKED

SMALLEST = 1 << 20

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True)
class Choice:
    """A kernel of `KERNELS` by name, and why it is the one."""

    name: str
    reason: str


_PACKED = Choice("packed", "packed weights are read at almost the speed of memory")
_MM = Choice("mm", "torch's own product")
_TINY = Choice("mm", f"below {SMALLEST:,} multiplications the call is what costs")
_ONEDNN = Choice("onednn", "float32: about twice mm with many rows, and faster with one")
_TURNED = Choice("mm turned", "two to four rows: the weights stand on the left")
_TURNED_ONEDNN = Choice("onednn turned", "16 to 64 rows of deep weights: the weights stand on the left")


def choice(rows: int, width: int, depth: int, dtype: torch.dtype, *, packed: bool = False) -> Choice:
    """The kernel for `rows` of `depth` through weights `[width, depth]` on a CPU, and the reason."""
    if packed:
        return _PACKED
    if dtype != torch.float32 or not _onednn_enabled():
        return _MM
    if 2 <= rows <= 4 and depth <= 1024 and rows != 3 and width >= 64:
        return _TURNED
    if rows * width * depth < SMALLEST:
        return _TINY
    if rows in (16, 32, 48, 64) and depth >= 1024:
        return _TURNED_ONEDNN
    return _ONEDNN


def choices(width: int, depth: int, dtype: torch.dtype, *, packed: bool = False) -> str:
    """`choice` for every number of rows in one line: ``1 row: onednn, 2: mm turned, 3: onednn, …``."""
    found: dict[int, str] = {}
    for rows in (1, 2, 3, 4, 5, 16, 17, 32, 33, 48, 49, 64, 65):
        name = choice(rows, width, depth, dtype, packed=packed).name
        if not found or name != list(found.values())[-1]:
            found[rows] = name
    if len(found) == 1:
        return found[1]
    first, *others = (f"{rows}: {name}" for rows, name in found.items())
    return ", ".join([f"rows from {first}", *others])


def multiply(x_ND: Tensor, w_FD: Tensor, bias_F: Tensor | None, out_NF: Tensor) -> None:
    """Write ``x @ w.T + bias`` into `out_NF`; `x_ND` and `w_FD` may be transposed views."""
    if _kernel(x_ND, w_FD).name != "mm":
        out_NF.copy_(product(x_ND, w_FD, bias_F))
    elif bias_F is None:
        torch.mm(x_ND, w_FD.t(), out=out_NF)
    else:
        torch.addmm(bias_F, x_ND, w_FD.t(), out=out_NF)


def product(x_ND: Tensor, w_FD: Tensor, bias_F: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """``x @ w.T + bias`` [N, F], in memory of its own; `packed` is the packed form of `w_FD`, if any."""
    if packed is not None:
        return _onednn(x_ND, packed, bias_F)
    return KERNELS[_kernel(x_ND, w_FD).name](x_ND, w_FD, bias_F)


def packed_part(weight: Tensor, part: int = 0) -> Tensor | None:
    """The packed form of `weight[part]` (of `weight` itself, where it is one product)."""
    parts = PACKED.find(weight)
    return None if parts is None else parts[part]


def _kernel(x_ND: Tensor, w_FD: Tensor) -> Choice:
    if x_ND.device.type != "cpu":
        return _MM
    found = choice(x_ND.shape[0], w_FD.shape[0], x_ND.shape[1], x_ND.dtype)
    # With sides exchanged it is the weights that are read in rows.
    return _ONEDNN if found is _TURNED_ONEDNN and w_FD.stride(1) != 1 else found


def _onednn_enabled() -> bool:
    return _HAS_ONEDNN and torch._C._get_mkldnn_enabled()


def _onednn(x_ND: Tensor, w_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    out_NF: Tensor = torch.ops.mkldnn._linear_pointwise(x_ND, w_FD, bias_F, "none", [], "")
    return out_NF


def _onednn_turned(x_ND: Tensor, w_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    return _upright(torch.ops.mkldnn._linear_pointwise(w_FD, x_ND, None, "none", [], ""), bias_F)


def _mm(x_ND: Tensor, w_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    return torch.mm(x_ND, w_FD.t()) if bias_F is None else torch.addmm(bias_F, x_ND, w_FD.t())


def _mm_turned(x_ND: Tensor, w_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    return _upright(torch.mm(w_FD, x_ND.t()), bias_F)


def _upright(out_FN: Tensor, bias_F: Tensor | None) -> Tensor:
    out_NF = out_FN.t().contiguous()
    return out_NF if bias_F is None else out_NF.add_(bias_F)


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "mm": _mm,
    "mm turned": _mm_turned,
    "onednn": _onednn,
    "onednn turned": _onednn_turned,
}
