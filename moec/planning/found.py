"""`Found`: what a search gives, and how it reads."""

from __future__ import annotations

from dataclasses import dataclass

from moec.cost.machine.hardware import Hardware
from moec.cost.shown.spelling import spelled
from moec.cost.shown.table import Column, Table

from .job import Job
from .outcome import Outcome

SHOWN = 5


@dataclass(frozen=True)
class Proof:
    """What a plan that was compiled in full says of itself: `seconds` of a run, bytes of `memory` of a rank;
    `took`: seconds to find that out."""

    seconds: float
    memory: int
    took: float


@dataclass(frozen=True)
class Found:
    """`ranked`: what fits, the best first; `refused`: what does not, the nearest to it first. `shapes`:
    programs that were lowered; `capture_seconds`, `search_seconds`: on the clock; `proofs` of the first few
    of `ranked`."""

    job: Job
    hardware: Hardware
    ranked: tuple[Outcome, ...]
    refused: tuple[Outcome, ...]
    shapes: int
    capture_seconds: float
    search_seconds: float
    proofs: tuple[Proof, ...] = ()

    @property
    def best(self) -> Outcome:
        """The winner; `best.plan` is what `moec.compile` takes."""
        return self.ranked[0]

    def table(self, top: int = SHOWN) -> Table:
        """The first few of what fits and the nearest of what does not, each with why it lost."""
        shown = [*self.ranked[:top], *self.refused[: max(1, top // 2)]]
        columns = (
            Column("data"), Column("tensor"), Column("expert"), Column("slice"), Column("exchange"),
            Column("batch"), Column("memory", "B"), Column("time", "s"), Column("tokens/s"), Column("why"),
        )  # fmt: skip
        return Table(columns, tuple(self._row(one) for one in shown), notes=self._notes())

    def _row(self, one: Outcome) -> tuple[object, ...]:
        parallel = one.parallel
        time = (spelled(one.seconds, "s"), f"{one.tokens_per_second:,.0f}") if one.fits else ("", "")
        return (
            one.mesh.data, parallel.tensor, parallel.expert, parallel.slice, parallel.all_to_all, one.batch,
            spelled(one.memory["total"], "B"), *time, one.why_not(self.best) or "the best",
        )  # fmt: skip

    def _notes(self) -> tuple[str, ...]:
        tried = len(self.ranked) + len(self.refused)
        notes = [
            f"{tried} arrangements of {self.hardware.world} {self.hardware.device.name}, "
            f"{len(self.refused)} of them too large; {self.shapes} programs lowered; "
            f"captured in {self.capture_seconds:.1f} s, searched in {self.search_seconds:.1f} s"
        ]
        for one, proof in zip(self.ranked, self.proofs, strict=False):
            away = abs(proof.seconds / one.seconds - 1)
            notes.append(f"compiled in full: {spelled(proof.seconds, 's')}, off by {away:.0e}")
        return tuple(notes)

    def __str__(self) -> str:
        return f"{self.job}\n\n{self.table()}"
