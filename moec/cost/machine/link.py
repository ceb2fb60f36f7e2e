"""Links between devices, and the ways in which collectives go over them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from moec.cost.machine.pattern import ALGORITHMS, PATTERNS, Algorithm
from moec.errors import nearest
from moec.plan.section import Section, complaint


class Link(Section):
    """What connects two devices: seconds of one message are latency + bytes / bandwidth."""

    latency: float = Field(ge=0, description="Seconds until the first byte arrives.")
    bandwidth: float = Field(gt=0, description="Bytes a second that one device sends.")


class Way(Section):
    """How a collective goes: an algorithm, in a protocol that has its own latency and share of bandwidth.

    `ring`: every rank sends to its neighbour, step by step; `tree` (all_reduce only): a chain inside a node,
    a binary tree between nodes, up and down; `direct`: every rank to every other (all_to_all).
    """

    name: str = Field(description="What it is called.")
    algorithm: Algorithm = Field(description="Who sends to whom.")
    start: float = Field(default=0.0, ge=0, description="Seconds before anything moves.")
    inside: float = Field(ge=0, description="Seconds of latency of one step inside a node.")
    between: float = Field(default=0.0, ge=0, description="Seconds of latency of one step between nodes.")
    share: float = Field(default=1.0, gt=0, description="Share of the bandwidth of a link that it reaches.")
    parallel: int = Field(default=1, ge=1, description="Messages of one rank under way at a time (direct).")
    operators: tuple[str, ...] = Field(
        default=(), description="Collectives that go so, as traffic names them; left out: all it can do."
    )

    @field_validator("operators", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return tuple(given) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _can_go_so(self) -> Way:
        """A way of a collective that nobody sends, or that cannot go so, would never be taken."""
        able = [name for name, pattern in PATTERNS.items() if self.algorithm in ALGORITHMS[pattern]]
        for name in self.operators:
            if name not in able:
                told = f"'{name}', which does not go by {self.algorithm}" if name in PATTERNS else f"'{name}'"
                needed = f"collectives that do: {', '.join(able)}"
                raise complaint(told, needed, nearest(name, able), ("operators",))
        return self


def plain_ways(inside: Link, between: Link | None) -> tuple[Way, ...]:
    """What holds where hardware names no ways: every step and every message pays the latency of its link."""
    there = between.latency if between else 0.0
    return (
        Way(name="ring", algorithm="ring", inside=inside.latency, between=there),
        Way(name="direct", algorithm="direct", inside=inside.latency, between=there),
    )
