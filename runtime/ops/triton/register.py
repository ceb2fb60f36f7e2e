"""Which calls go to the kernels of this package: those on a GPU that they can compute.

What they cannot (float64, noise, capacities, formulas with many leaves) goes to the plain operators, on the
same GPU; `gate.refusal` and `moe_ffn.refusal` give the reason. There the plain `moe_ffn` reads the counts
back, so a program that needs it cannot stand in a CUDA graph; the plain gate does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moec.runtime.ops.overhear import tell


def available() -> bool:
    """Whether there is a GPU of NVIDIA's, and Triton."""
    return torch.version.cuda is not None and torch.cuda.is_available() and find_spec("triton") is not None


def register(key: str) -> torch.library.Library:
    """Have the kernels called for tensors of a dispatch key ("CUDA") for as long as the library that is
    returned is kept. They take the place of what is registered there."""
    library = torch.library.Library("moec", "IMPL")
    for name, kernel in KERNELS.items():
        library.impl(name, kernel, key, allow_override=True)
    return library


@contextmanager
def interpreting() -> Iterator[None]:
    """Inside, tensors on the CPU go to the kernels, in Triton's interpreter: for tests, slow beyond all
    use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # they take another's place
        library = register("CPU")
    try:
        yield
    finally:
        library._destroy()


def _there(x: Tensor) -> AbstractContextManager[object]:
    """Kernels start on the current device, which must be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _gate(
    x: Tensor, router: Tensor, bias: Tensor | None, top_k: int, gate: str, noise: str,
    capacity_factor: float, eval_capacity_factor: float, min_capacity: int, random: bool, training: bool,
) -> Any:  # fmt: skip
    from moec.runtime.ops import gate as plain
    from moec.runtime.ops.triton import gate as kernels

    factor = capacity_factor if training else eval_capacity_factor
    if kernels.refusal(x, router, noise, training, factor):
        limits = (capacity_factor, eval_capacity_factor, min_capacity, random, training)
        return plain.gate_by_parts(x, router, bias, top_k, gate, noise, *limits)
    with _there(x):
        gated = kernels.gate(x, router, bias, top_k, gate)
    tell(gated[0], gate)
    return gated


def _forward(
    x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor],
    biases: Sequence[Tensor | None], formula: str, dense: Tensor | None, mix: Tensor | None, save: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    from moec.runtime.ops import moe_ffn as plain
    from moec.runtime.ops.triton import moe_ffn as kernels

    chosen = plain if kernels.refusal(x, matrices, formula) else kernels
    with _there(x):
        return chosen.forward(x, weights, order, counts, matrices, biases, formula, dense, mix, save)


def _backward(
    grad: Tensor, x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, matrices: Sequence[Tensor],
    biases: Sequence[Tensor | None], formula: str, ups: Sequence[Tensor], needed: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    from moec.runtime.ops import moe_ffn as plain
    from moec.runtime.ops.triton import moe_ffn as kernels

    chosen = plain if kernels.refusal(x, matrices, formula) else kernels
    with _there(x):
        return chosen.backward(grad, x, weights, order, counts, matrices, biases, formula, ups, needed)


def _add_rms_norm(x: Tensor, y: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    from moec.runtime.ops import add_norm as plain
    from moec.runtime.ops.triton import add_norm as kernels

    if kernels.refusal(x):
        return plain.add_rms_norm(x, y, weight, eps)
    return kernels.add_norm(x, y, weight, None, eps, centred=False)


def _add_layer_norm(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    from moec.runtime.ops import add_norm as plain
    from moec.runtime.ops.triton import add_norm as kernels

    if kernels.refusal(x):
        return plain.add_layer_norm(x, y, weight, bias, eps)
    return kernels.add_norm(x, y, weight, bias, eps, centred=True)


KERNELS = {
    "gate": _gate,
    "moe_ffn_forward": _forward,
    "moe_ffn_backward": _backward,
    "add_rms_norm": _add_rms_norm,
    "add_layer_norm": _add_layer_norm,
}
LIBRARY = register("CUDA") if available() else None
