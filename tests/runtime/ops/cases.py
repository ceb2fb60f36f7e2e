"""Layers drawn at random for the operator tests: sizes, dtype, how tokens crowd at experts, capacity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from moec.runtime.ops import reference
from moec.runtime.ops.route import GATES

CROWDS = ("even", "one expert", "ties")


@dataclass(frozen=True)
class Case:
    """One layer; every tensor below is a function of these fields."""

    tokens: int = 13
    experts: int = 5
    top_k: int = 2
    depth: int = 7
    width: int = 11
    dtype: torch.dtype = torch.float64
    crowd: str = "even"
    gate: str = "normalized"
    selection_bias: bool = False
    linear_bias: bool = True
    factor: float = 0.0
    seed: int = 0

    def draw(self, *shape: int, salt: int = 0) -> Tensor:
        """Standard normal numbers, the same for the same fields and `salt`."""
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def scores(self) -> Tensor:
        """Router scores [T, E]."""
        scores = self.draw(self.tokens, self.experts, salt=1)
        if self.crowd == "ties":
            return scores.round()
        if self.crowd == "one expert":
            scores[:, self.seed % self.experts] += 9.0
        return scores

    def bias(self) -> Tensor | None:
        """Selection bias [E]."""
        return 0.1 * self.draw(self.experts, salt=2) if self.selection_bias else None

    def routed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """weights, experts, order and counts, by the reference."""
        weights, experts = reference.route(self.scores(), self.bias(), self.top_k, self.gate, "none", False)
        order, counts = reference.assign(experts, self.experts, self.factor, self.factor, 1, False, False)
        return weights, experts, order, counts

    def x(self) -> Tensor:
        """Tokens [T, D]."""
        return self.draw(self.tokens, self.depth, salt=3)

    def rows(self, width: int) -> Tensor:
        """Rows [N, width], of no particular origin."""
        return self.draw(self.tokens * self.top_k, width, salt=4)

    def weight(self) -> Tensor:
        """Expert weights [E, F, D]."""
        return self.draw(self.experts, self.width, self.depth, salt=5)

    def expert_bias(self) -> Tensor | None:
        """Expert biases [E, F]."""
        return self.draw(self.experts, self.width, salt=6) if self.linear_bias else None


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,)) -> Case:
    """Cases down to one token and one expert, with more experts than tokens, and with K = E."""
    experts = draw(st.integers(1, 9), label="experts")
    return Case(
        tokens=draw(st.sampled_from((1, 2, 3, 17, 29)), label="tokens"),
        experts=experts,
        top_k=draw(st.integers(1, experts) | st.just(1), label="top_k"),
        depth=draw(st.sampled_from((1, 3, 8, 13)), label="depth"),
        width=draw(st.sampled_from((1, 5, 16)), label="width"),
        dtype=draw(st.sampled_from(dtypes), label="dtype"),
        crowd=draw(st.sampled_from(CROWDS), label="crowd"),
        gate=draw(st.sampled_from(GATES), label="gate"),
        selection_bias=draw(st.booleans(), label="selection_bias"),
        linear_bias=draw(st.booleans(), label="linear_bias"),
        factor=draw(st.sampled_from((0.0, 0.3, 1.0, 1.1, 2.0)), label="factor"),
        seed=draw(st.integers(0, 999), label="seed"),
    )
