"""Every parameterised matrix product of the model, and what became of it.

Each row says *rewritten*, *kept* or *refused*, by which pass, and why. Nothing with weights is missing, so
the ledger is the place to look when a layer was expected to change and did not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

STATUSES = ("rewritten", "kept", "refused")


@dataclass(frozen=True)
class Entry:
    """One matrix product: its `weight` (the user's name), `shape` [out, in], and its fate."""

    weight: str
    shape: tuple[int, ...]
    role: str
    status: str
    reason: str
    by: str = ""
    source: str = ""


class Ledger:
    """An immutable list of entries, one per parameterised matrix product, in program order."""

    def __init__(self, entries: Iterable[Entry] = (), notes: Iterable[str] = ()) -> None:
        self.entries = tuple(entries)
        self.notes = tuple(notes)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, weight: str) -> Entry:
        """The entry of the user's weight `weight` (the first, when one weight serves several products)."""
        for entry in self.entries:
            if entry.weight == weight:
                return entry
        raise KeyError(weight)

    def where(self, *, status: str | None = None, role: str | None = None) -> list[Entry]:
        """The entries with this status and role."""
        return [e for e in self.entries if status in (None, e.status) and role in (None, e.role)]

    @property
    def rewritten(self) -> list[Entry]:
        """What a pass changed."""
        return self.where(status="rewritten")

    @property
    def refused(self) -> list[Entry]:
        """What looked like a candidate, and the reason it was left alone."""
        return self.where(status="refused")

    def update(self, weights: Iterable[str], **changes: str) -> Ledger:
        """A ledger in which the entries of `weights` carry `changes` (status, reason, by, role)."""
        names = set(weights)
        changed = (replace(e, **changes) if e.weight in names else e for e in self.entries)  # type: ignore[arg-type]
        return Ledger(changed, self.notes)

    def note(self, text: str) -> Ledger:
        """A ledger with one more remark that belongs to no single product."""
        return Ledger(self.entries, (*self.notes, text))

    def __str__(self) -> str:
        rows = [("weight", "shape", "role", "status", "why")]
        rows += [(e.weight, "×".join(map(str, e.shape)), e.role, e.status, e.reason) for e in self.entries]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]) for row in rows
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
