"""The shape of a pass: graph → graph, with a contract.

A pass is a frozen dataclass; its fields are its options. It knows nothing of forking, timing, checking or
certificates: the runner (`moec.passes.runner`) does that around it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from .certificate import Check
    from .program import Program


@dataclass(frozen=True)
class Pass(ABC):
    """Base of every pass. Subclasses set `contract`, and `makes` when they complete a stage."""

    contract: ClassVar[str] = "exact"
    makes: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """`LiftExperts` → `lift_experts`, the name it has in listings and in `disable=[…]`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def contract_for(self, program: Program) -> str:
        """The contract that holds on this program with these options (most passes: always the same)."""
        return self.contract

    def requires(self, program: Program) -> None:
        """Raise `PassError`, naming the node, when the program is not one this pass can take."""

    @abstractmethod
    def apply(self, program: Program) -> Program:
        """Rewrite `program`, the pass's own fork, and return it."""

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """Checks of this pass's own, beside the comparison of the two programs that the runner makes."""
        return []
