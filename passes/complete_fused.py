"""Mark the end of stage *fused*.

before:  what the fusions left
after:   the same graph; the runner checks that only what may stand at the stage does

Assumes: every fusion ran.
Contract: exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moec.ir import Pass, Program


@dataclass(frozen=True)
class CompleteFused(Pass):
    """See the module."""

    makes: ClassVar[str] = "fused"

    def apply(self, program: Program) -> Program:
        return program
