"""How each weight of a program begins, when it is drawn anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from moec.errors import PassError
from moec.ir import Program, region_of
from moec.ir.graphs import named_weights

from .branch_ends import BranchEnds, branch_ends
from .carry_ids import MixedError
from .weight_roles import Role, weight_roles

SLOPE = 0.25  # of a PReLU, as torch.nn.PReLU begins
CONSTANTS = {"shift": 0.0, "selection": 0.0, "slope": SLOPE}
KNOWN = "products, embeddings, tables of positions, norms, factors, biases, routers and mixes of branches"


@dataclass(frozen=True)
class Draw:
    """How one weight begins: normal around zero with `std`, or `value` everywhere where `std` is 0.

    `padding`: a row that is zero instead, -1 for none.
    """

    std: float = 0.0
    value: float = 0.0
    padding: int = -1

    def make(self, like: Tensor, seed: int) -> Tensor:
        """A new tensor like `like`. Numbers are drawn in fp32 on the CPU: the same for every dtype."""
        if like.is_meta or not self.std:
            return torch.full_like(like, self.value)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(like.shape, dtype=torch.float32).normal_(0.0, self.std, generator=generator)
        if self.padding >= 0:
            drawn[self.padding] = 0.0
        return drawn.to(device=like.device, dtype=like.dtype)


def first_draws(program: Program, std: float, rewrite: str) -> dict[str, Draw]:
    """Structural name → how it begins: every parameter that learns, and the biases of selections.

    A weight under several names has the same draw under each. Raises `PassError` in the name of `rewrite`,
    naming a weight and its reader, where what the weight is for is not known.
    """
    reading = _Reading(program, std, rewrite)
    return {name: draw for name, value in named_weights(program.graph) if (draw := reading.of(name, value))}


class _Reading:
    def __init__(self, program: Program, std: float, rewrite: str) -> None:
        self.program, self.std, self.rewrite = program, std, rewrite
        self.named = dict(named_weights(program.graph))
        self.ends = self._ends()
        self.end_matrices = {id(self.named[name]) for name in self.ends.matrices}
        # A weight that is read under two names has the roles of both.
        self.roles: dict[int, list[Role]] = {}
        for name, roles in weight_roles(program.graph).items():
            self.roles.setdefault(id(self.named[name]), []).extend(roles)

    def _ends(self) -> BranchEnds:
        try:
            return branch_ends(self.program.graph)
        except MixedError as mixed:
            where = f"{self.rewrite}: {self.program.source.name}"
            needed = "a head, whose input tells which products end a branch"
            raise PassError(where, str(mixed), needed, 'init = "teacher"') from mixed

    def of(self, name: str, value: Tensor) -> Draw | None:
        """How one weight begins; None for what stays as it is."""
        roles = self.roles.get(id(value), [])
        if not isinstance(value, nn.Parameter):
            return Draw() if any(role.kind == "selection" for role in roles) else None
        if not value.requires_grad:
            return None
        kind, offset = self._agreed(name, value, roles)
        if kind in CONSTANTS:
            return Draw(value=CONSTANTS[kind])
        if kind == "scale":
            return Draw(value=1.0 - offset)
        if kind in ("router", "mix"):
            return Draw(std=self._router_std(roles[0].layer))
        padding = max(role.padding for role in roles)
        ends = id(value) in self.end_matrices
        return Draw(std=self.std / self.ends.branches**0.5 if ends else self.std, padding=padding)

    def _agreed(self, name: str, value: Tensor, roles: list[Role]) -> tuple[str, float]:
        """What all readers take the weight for."""
        found = {role.agreed for role in roles}
        if len(found) == 1 and roles[0].kind != "unknown":
            return found.pop()
        public = self.program.origins.public_name(name)
        readers = ", ".join(dict.fromkeys(f"{role.kind} of `{role.reader}`" for role in roles))
        raise PassError(
            f"{self.rewrite}: {public} {list(value.shape)}", readers or "a weight that nothing reads",
            f"weights whose readers say, as one, how they begin: {KNOWN}",
            'init = "teacher" keeps the weights',
        )  # fmt: skip

    def _router_std(self, layer: int) -> float:
        settings = _moe_settings(self.program.graph, layer)
        # As `lift_experts` has it: slices weigh equally under equal scores alone.
        opinionless = settings["init"] == "split" and settings["top_k"] == settings["experts"]
        return 0.0 if opinionless else float(settings["router_std"])


def _moe_settings(root: fx.GraphModule, layer: int) -> dict[str, Any]:
    region = region_of(root.get_submodule(f"moe_{layer}"))
    assert region is not None
    return region.settings


def frozen(program: Program) -> list[str]:
    """The user's names of the parameters that do not learn, and are therefore not drawn."""
    named: Iterable[tuple[str, nn.Parameter]] = program.graph.named_parameters()
    return [program.origins.public_name(name) for name, value in named if not value.requires_grad]
