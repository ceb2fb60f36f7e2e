"""Draw every weight of a program anew, as GPT-2 begins: a student with nothing of its teacher but the form.

before:  every weight as it was
after:   every weight by what it is for:

    matrix, embedding, table    normal(0, std); experts each their own numbers
    … that ends a branch        normal(0, std / √N), N the number of branches of the residual stream
    scale                       where it does nothing: 1, or 0 where the norm multiplies by 1 + w
    shift, selection bias       0
    router, mix of branches     as `lift_experts` and `branch_experts` draw them
    buffers (rotary tables, …)  as they are

What a weight is for is told by its readers (`weight_roles`), what ends a branch by dataflow (`branch_ends`).
A weight read in two places is drawn once. Every weight has a seed of its own, made of `seed` and its name, so
the order of weights does not matter, and neither does dtype or device. Parameters that do not learn
(`requires_grad=False`) stay as they are. On `meta` nothing is drawn.

Assumes: stage *structured* or *sparse*; every parameter is read in a way that `weight_roles` knows.
Contract: changes-model.
Source:  Radford et al., 2019, section 2.3; std and zeros as in its code, and Megatron-LM, arXiv 1909.08053,
         section 4.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from moec.errors import PassError
from moec.ir import Check, Pass, Program
from moec.ir.graphs import named_weights
from moec.ir.local import swap

from .first_draws import Draw, first_draws, frozen
from .prove_fresh import prove_fresh


@dataclass(frozen=True)
class RenewWeights(Pass):
    """See the module. `seed`: of all numbers; `std`: spread of matrices that end no branch."""

    contract: ClassVar[str] = "changes-model"
    seed: int = 0
    std: float = 0.02

    def requires(self, program: Program) -> None:
        if program.stage not in ("structured", "sparse"):
            needed = "stage structured or sparse: weights are drawn before they are dealt out or packed"
            raise PassError(self.name, f"a program at stage {program.stage}", needed)
        if not (math.isfinite(self.std) and self.std > 0):
            raise PassError(f"{self.name}: std", f"{self.std}", "a spread above zero", "std = 0.02")
        if not any(value.requires_grad for value in program.graph.parameters()):
            found = "no parameter that learns (requires_grad=True)"
            raise PassError(f"{self.name}: {program.source.name}", found, "weights to draw anew")
        first_draws(program, self.std, self.name)

    def apply(self, program: Program) -> Program:
        draws = first_draws(program, self.std, self.name)
        made: dict[int, Tensor] = {}
        for name, value in list(named_weights(program.graph)):
            if name not in draws:
                continue
            if id(value) not in made:
                made[id(value)] = _renewed(value, draws[name], seed_of(self.seed, name))
            owner, _, leaf = name.rpartition(".")
            swap(program.graph.get_submodule(owner), leaf, made[id(value)])
        return self._recorded(program, draws)

    def _recorded(self, program: Program, draws: Mapping[str, Draw]) -> Program:
        """Experts are copies of nothing any more; what does not learn is said to have stayed."""
        renewed = {n: replace(o, how="fresh") for n, o in program.origins.items() if o.experts and n in draws}
        program.origins = program.origins.with_(renewed)
        program.ledger = program.ledger.note(f"all weights drawn anew (seed {self.seed})")
        stayed = frozen(program)
        if stayed:
            more = f" and {len(stayed) - 4} more" if len(stayed) > 4 else ""
            program.ledger = program.ledger.note(
                f"not drawn anew: {', '.join(stayed[:4])}{more} do not learn"
            )
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """The numbers themselves, and that norms do nothing but normalise where the program runs."""
        return prove_fresh(before, after, first_draws(after, self.std, self.name))


def _renewed(value: Tensor, draw: Draw, seed: int) -> Tensor:
    made = draw.make(value.detach(), seed)
    return nn.Parameter(made, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else made


def seed_of(seed: int, name: str) -> int:
    """The seed of one weight; two names have nothing in common."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest())
