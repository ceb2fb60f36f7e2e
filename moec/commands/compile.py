"""`moec compile`: make a program, say what was done, save it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from moec.commands.programs import compiled, shown_path
from moec.commands.screen import show, show_heading, show_json, show_next, show_table
from moec.explain import SETTINGS, Explanation, explain
from moec.program import Program


def run(
    model: str,
    plan: str | None,
    out: str | None,
    verify: str | None,
    disable: Collection[str],
    meta: bool,
    as_json: bool,
) -> None:
    """Compile, print the passes and the totals, save to `out` where it is given."""
    program = compiled(model, plan, verify=verify, disable=disable, meta=meta)
    saved = shown_path(program.save(out)) if out else None
    told = explain(program)
    if as_json:
        show_json(_plain(program, told, saved))
        return
    show_heading(f"{program.source.name} → {program.stage}")
    show("")
    show_passes(program)
    show("")
    show_layers(told)
    show(*(f"note: {note}" for note in told.notes), told.summary)
    if saved is None:
        show("not saved: --out FOLDER saves it")
        return
    show(f"saved in {saved}")
    show_next(
        {
            "read the program": ("moec", "show", saved),
            "every matrix product, and why": ("moec", "explain", saved),
            "what became sparse": ("moec", "diff", saved, "structured", program.stage),
            "train it": ("moec", "train", saved, "--out", "run"),
        }
    )


def show_passes(program: Program) -> None:
    """A row for each pass: its contract, what was seen of it, and the seconds it took."""
    rows = []
    for certificate in program.certificates:
        worst = max(certificate.checks, key=lambda check: check.error, default=None)
        seen = f"{worst.error:.0e} ({worst.what})" if worst else ""
        told = "  ".join(part for part in (seen, certificate.note) if part)
        rows.append(
            (
                certificate.rewrite,
                certificate.contract,
                certificate.verdict,
                f"{certificate.seconds:.1f}",
                told,
            )
        )
    show_table(("pass", "contract", "verdict", "s", "largest error"), rows)


def show_layers(told: Explanation) -> None:
    """A row for each sparse layer; nothing for a dense program."""
    if not told.layers:
        return
    rows = []
    for layer in told.layers:
        settings = [layer.settings.get(key, "") for key in SETTINGS]
        rows.append(
            (layer.name, *settings, layer.capacity, layer.before, layer.after, layer.active, layer.path)
        )
    show_table(("layer", *SETTINGS, "capacity", "before", "after", "active", "module"), rows)
    show("")


def _plain(program: Program, told: Explanation, saved: str | None) -> dict[str, Any]:
    return {
        "model": program.source.name,
        "stage": program.stage,
        "saved": saved,
        "fingerprint": program.fingerprint(),
        "parameters": dict(told.parameters),
        "counts": told.counts,
        "certificates": [certificate.to_json() for certificate in program.certificates],
    }
