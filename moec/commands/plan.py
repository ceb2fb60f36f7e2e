"""`moec plan`: search for the arrangement of ranks that does a job fastest, and write it as a plan."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.commands.outline import outline_of
from moec.commands.programs import shown_path
from moec.commands.screen import show, show_code, show_heading, show_json, show_next
from moec.errors import PlanError
from moec.models import is_saved_program, open_model
from moec.planning.found import Found
from moec.planning.outcome import Outcome
from moec.planning.search import search

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]i?)?B?", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Wanted:
    """What is asked for; sizes are as of `moec.search`, `max_memory` as it was typed: `38GB`."""

    cluster: str
    objective: str
    batch: int | None = None
    sequence: int | None = None
    past: int | None = None
    ranks: int | None = None
    max_memory: str | None = None
    captured: bool = False


def run(
    model: str, plan: str | None, wanted: Wanted, *, out: str | None, top: int, trust: bool, as_json: bool
) -> None:
    """Search, print the best plan and those that lost, and write the plan to `out` where it is given."""
    saved = is_saved_program(model)
    limit = bytes_of(wanted.max_memory) if wanted.max_memory is not None else None
    found = search(
        outline_of(model, trust=trust).program if saved else open_model(model, meta=True),
        wanted.cluster,
        objective=wanted.objective,
        plan=plan,
        batch=wanted.batch,
        sequence=wanted.sequence,
        past=wanted.past,
        ranks=wanted.ranks,
        max_memory=limit,
        captured=wanted.captured,
    )
    if out is not None:
        Path(out).write_text(found.best.plan.to_toml(), encoding="utf-8")
    if as_json:
        show_json(_plain(found, top))
        return
    show_heading(f"{model}: {found.job}")
    show("", str(found.table(top)))
    if out is None:
        show("", "the best plan (--out FILE writes it whole):", "")
        show_code(_parallel(found.best), "toml")
        return
    show("", f"written to {shown_path(out)}")
    if not saved:
        again = ("moec", "cost", model, "--plan", shown_path(out), "--hardware", wanted.cluster)
        show_next(
            {"what it costs": again, "compile it": ("moec", "compile", model, "--plan", shown_path(out))}
        )


def bytes_of(text: str) -> float:
    """`38GB`, `38e9`, `40GiB` as bytes; raises `PlanError` for what is no size."""
    try:
        return _positive(float(text), text)
    except ValueError:
        found = _SIZE.fullmatch(text.strip())
        if found is None:
            raise PlanError("--max-memory", f"'{text}'", "bytes: 38GB, 40GiB, 38e9") from None
    unit = found["unit"] or ""
    base = 1024 if unit.lower().endswith("i") else 1000
    return _positive(float(found["number"]) * base ** _POWERS.get(unit[:1].upper(), 0), text)


def _positive(size: float, text: str) -> float:
    if not 0 < size < float("inf"):
        raise PlanError("--max-memory", f"'{text}'", "more than no bytes: 38GB")
    return size


def _parallel(best: Outcome) -> str:
    """The table of the plan that was searched."""
    given = best.parallel.model_dump(exclude={"timeout"})
    rows = (
        f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}"
        for name, value in given.items()
    )
    return "\n".join(["[parallel]", *rows])


def _plain(found: Found, top: int) -> dict[str, Any]:
    return {
        "objective": found.job.objective,
        "ranks": found.hardware.world,
        "device": found.hardware.device.name,
        "shapes": found.shapes,
        "capture_seconds": found.capture_seconds,
        "search_seconds": found.search_seconds,
        "compiled_in_full": [proof.seconds for proof in found.proofs],
        "best": _outcome(found.best, found.best),
        "others": [_outcome(one, found.best) for one in found.ranked[1:top]],
        "too_large": [_outcome(one, found.best) for one in found.refused[:top]],
        "plan": found.best.plan.to_toml(),
    }


def _outcome(one: Outcome, best: Outcome) -> dict[str, Any]:
    fits = one.fits
    return {
        "parallel": one.parallel.model_dump(exclude={"timeout"}),
        "batch_per_rank": one.batch,
        "memory": dict(one.memory),
        "seconds": one.seconds if fits else None,
        "sequences_per_second": one.tokens_per_second if fits else None,
        "why": one.why_not(best),
    }
