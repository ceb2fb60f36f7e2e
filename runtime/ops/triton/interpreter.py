"""What Triton 3.6's interpreter gets wrong, put right; only ever imported where kernels are interpreted."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@cache
def mend() -> None:
    """Change the interpreter of this process, once."""
    _scalars_from_arrays()
    _products_of_bfloat16()


def _scalars_from_arrays() -> None:
    """NumPy 2.4 no longer makes an int of an array of one element, which `range` over a scalar relies on."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _products_of_bfloat16() -> None:
    """NumPy has no bfloat16: its bits are kept as uint16, and `tl.dot` multiplies those integers."""
    create = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return create(self, _widened(a), _widened(b), d, *options)

    InterpreterBuilder.create_dot = create_dot


def _widened(handle: Any) -> Any:
    """The same numbers in float32 if they are bfloat16, whose bits are the upper half of a float32's."""
    import triton.language as tl

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(numpy.uint32) << 16
    return TensorHandle(bits.view(numpy.float32), tl.float32)
