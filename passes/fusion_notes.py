"""What a fusion says of each region it looked at, in the ledger: fused into what, or left, and why."""

from __future__ import annotations

from collections.abc import Iterable

from moec.ir import Program


class DeclinedError(Exception):
    """A fusion leaves a site as it is; the text says why. Caught by the pass, never seen by a user."""


def note_fusions(program: Program, name: str, findings: Iterable[tuple[str, str]]) -> None:
    """Add to the ledger one note for all regions of which the pass `name` says the same (region, text)."""
    told: dict[str, list[str]] = {}
    for region, text in findings:
        told.setdefault(text, []).append(region)
    for text, regions in told.items():
        program.ledger = program.ledger.note(f"{name}: {_listed(regions)}: {text}")


def _listed(names: list[str]) -> str:
    """`moe_1, moe_3`, or `moe_1 … moe_23 (12)`."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} … {names[-1]} ({len(names)})"
