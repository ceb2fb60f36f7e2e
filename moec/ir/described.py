"""What a value is, in a few characters: `[B, S, 96]`, `i64 [B]`, `3 × [B, 4, S, 32]`."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .shapes import symbols

_SHORT_DTYPE = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "bool",
}  # fmt: skip


class Described:
    """Spells the values of one graph: its letters for sizes, no dtype where it is that of the weights."""

    def __init__(self, root: fx.GraphModule) -> None:
        self.letters = symbols(root)
        self.dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)
        # Many nodes share one value. It is kept, so that no other gets its identity.
        self._known: dict[int, tuple[Any, str]] = {}

    def of(self, value: Any) -> str:
        """`node.meta["val"]` in words; '' for what is neither a tensor, nor several, nor a size."""
        if id(value) not in self._known:
            self._known[id(value)] = value, self._said(value)
        return self._known[id(value)][1]

    def _said(self, value: Any) -> str:
        if isinstance(value, Tensor):
            shape = f"[{', '.join(map(self._size, value.shape))}]"
            return shape if value.dtype == self.dtype else f"{short_dtype(value.dtype)} {shape}"
        if isinstance(value, tuple | list):
            shapes = [self.of(item) for item in value if isinstance(item, Tensor)]
            alike = len(shapes) > 2 and len(set(shapes)) == 1
            return f"{len(shapes)} × {shapes[0]}" if alike else ", ".join(shapes)
        return self._size(value) if isinstance(value, torch.SymInt) else ""

    def _size(self, size: int | torch.SymInt) -> str:
        if isinstance(size, int):
            return str(size)
        expression = size.node.expr
        free = {symbol: self.letters.get(str(symbol), str(symbol)) for symbol in expression.free_symbols}
        letters = {symbol: sympy.Symbol(letter, positive=True) for symbol, letter in free.items()}
        return str(expression.xreplace(letters)).replace(" ", "")


def short_dtype(dtype: torch.dtype) -> str:
    """`bf16` of `torch.bfloat16`."""
    return _SHORT_DTYPE.get(dtype, str(dtype).removeprefix("torch."))
