"""Layers of experts for the Triton tests: drawn in fp64, rounded to a dtype, the same numbers in fp64 again.

The kernels run on the GPU where there is one, and in Triton's interpreter where there is none.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.runtime.ops import reference
from moec.runtime.ops.formula import read_formula
from moec.runtime.ops.triton.register import interpreting
from moec.testing.tolerances import error_of, tolerance_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SWIGLU = "lambda gate, up: silu(gate) * up"
PACKED = "lambda h: silu(h[..., :{0}]) * h[..., {0}:]"


@dataclass(frozen=True)
class Layer:
    """One layer. `hidden`: width of the formula's result; `packed`: how many times that each up matrix is."""

    tokens: int = 13
    width: int = 7
    hidden: int = 11
    experts: int = 5
    top_k: int = 2
    formula: str = SWIGLU
    packed: int = 1
    bias: bool = False
    answer: int = 0  # width of the answers; 0: as `width`
    factor: float = 0.0
    crowd: bool = False
    dense: bool = False
    mix: bool = False
    dtype: torch.dtype = torch.float32

    def draw(self, *shape: int, salt: int) -> Tensor:
        """Standard normal numbers that `dtype` can hold, in fp64."""
        generator = torch.Generator().manual_seed(salt)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype).double()

    def routed(self) -> tuple[Tensor, Tensor, Tensor]:
        """weights (numbers that float32 can hold), order and counts."""
        scores = self.draw(self.tokens, self.experts, salt=1)
        if self.crowd:
            scores[:, self.experts // 2] += 50.0
        weights, experts = reference.route(scores, None, self.top_k, "normalized", "none", False)
        order, counts = reference.assign(experts, self.experts, self.factor, self.factor, 1, False, False)
        return weights.float().double(), order, counts

    def inputs(self) -> dict[str, Any]:
        """All of `moe_ffn`'s arguments, floating ones in fp64."""
        answer, ups = self.answer or self.width, len(read_formula(self.formula).parameters)
        weights, order, counts = self.routed()
        matrices = [
            self.draw(self.experts, self.packed * self.hidden, self.width, salt=10 + place)
            for place in range(ups)
        ]
        matrices.append(self.draw(self.experts, answer, self.hidden, salt=20))
        biases = [self.draw(*m.shape[:2], salt=30 + i) if self.bias else None for i, m in enumerate(matrices)]
        return {
            "x": self.draw(self.tokens, self.width, salt=2),
            "weights": weights,
            "order": order,
            "counts": counts,
            "matrices": matrices,
            "biases": biases,
            "formula": self.formula,
            "dense": self.draw(self.tokens, answer, salt=3) if self.dense else None,
            "mix": self.draw(self.tokens, 2, salt=4) if self.mix else None,
        }

    def gradient(self) -> Tensor:
        """What arrives at the result, fp64."""
        return self.draw(self.tokens, self.answer or self.width, salt=5)

    def rounded(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same numbers in `dtype` (weights in float32), where the kernels run."""

        def convert(name: str, value: Any) -> Any:
            if isinstance(value, list):
                return [convert(name, item) for item in value]
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value.to(DEVICE) if isinstance(value, Tensor) else value
            return value.to(DEVICE, torch.float32 if name == "weights" else self.dtype)

        return {name: convert(name, value) for name, value in inputs.items()}


def assert_close(found: Tensor, needed: Tensor, dtype: torch.dtype, what: str) -> None:
    """`found` is `needed` (fp64) but for the rounding of `dtype`, relative to scale."""
    error = error_of(found, needed)
    assert error <= tolerance_of(dtype), f"{what}: off by {error:.1e} of its scale, in {dtype}"


def kernels() -> AbstractContextManager[None]:
    """Inside, `torch.ops.moec` runs the Triton kernels on `DEVICE`; on a GPU it does so anyway."""
    return interpreting() if DEVICE.type == "cpu" else nullcontext()
