"""The proof that a rewrite kept its contract, stored in the program.

A contract is one of
  `exact`          the same function: bitwise, or reassociated and ≤ 1e-10 in fp64, forward and gradients;
  `approximate`    close by a stated measure;
  `changes-model`  another function on purpose, asked for by the plan.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

CONTRACTS = ("exact", "approximate", "changes-model")


@dataclass(frozen=True)
class Check:
    """One comparison: `error` is relative to the scale of the reference; it holds when error ≤ tolerance."""

    what: str
    error: float
    tolerance: float
    dtype: str = "float64"
    worst: str = ""

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance (a NaN is not)."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Certificate:
    """What was claimed of a pass and what was seen. `verdict`: proved · stated (not checked) · measured."""

    rewrite: str
    contract: str
    verdict: str
    checks: tuple[Check, ...] = ()
    note: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data for the saved program."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Certificate:
        """The inverse of `to_json`."""
        return Certificate(**{**data, "checks": tuple(Check(**c) for c in data["checks"])})

    def __str__(self) -> str:
        worst = max(
            self.checks, key=lambda c: c.error / c.tolerance if c.tolerance else c.error, default=None
        )
        seen = f"{worst.error:.1e} ≤ {worst.tolerance:.0e} ({worst.dtype}, {worst.what})" if worst else ""
        return "  ".join(
            p for p in (f"{self.rewrite:<24} {self.contract:<13} {self.verdict:<8}", seen, self.note) if p
        )
