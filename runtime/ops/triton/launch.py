"""How a kernel is started, on a GPU, in Triton's interpreter, or only compiled.

Triton decides when it is first imported: with ``TRITON_INTERPRET=1`` in the environment kernels run as NumPy
on CPU tensors, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from moec.errors import OperatorError

_RECORD: ContextVar[list[Any] | None] = ContextVar("compiled kernels", default=None)
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether kernels run in the interpreter, on CPU tensors."""
    return bool(knobs.runtime.interpret)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start `kernel` on a grid of programs; an empty grid is no work."""
    record = _RECORD.get()
    if record is not None:
        record.append(kernel.run(*arguments, grid=grid, warmup=True, **options))
    elif all(grid):
        kernel[grid](*arguments, **options)


@contextmanager
def compile_only() -> Iterator[list[Any]]:
    """Inside, kernels are compiled and not run; yields the list that the compiled ones are appended to."""
    compiled: list[Any] = []
    token = _RECORD.set(compiled)
    try:
        yield compiled
    finally:
        _RECORD.reset(token)


def demand_device(operator: str, tensor: Tensor) -> None:
    """Raise an `OperatorError` unless kernels can run on `tensor`."""
    if tensor.is_cuda or interpreted() or _RECORD.get() is not None:
        return
    raise OperatorError(
        f"moec::{operator} in Triton", f"a tensor on {tensor.device}", "a CUDA tensor, or TRITON_INTERPRET=1"
    )


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 exactly, unless torch's own products may use TF32."""
    may_round = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and may_round else "ieee"


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`."""
    return max(triton.next_power_of_2(max(number, 1)), least)


if interpreted():
    from moec.runtime.ops.triton.interpreter import mend

    mend()
