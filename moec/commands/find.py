"""`moec bisect`: name the first pass that breaks its contract, and write a script that shows it."""

from __future__ import annotations

from collections.abc import Collection

from moec.bisect import Bisection, bisect
from moec.commands.programs import shown_path
from moec.commands.screen import show, show_heading, show_json, show_next, show_table
from moec.models import open_model
from moec.plan import Plan
from moec.reproduction import write_script


def run(model: str, plan: str | None, disable: Collection[str], out: str, as_json: bool) -> int:
    """Print what held and what did not; the exit status is 1 when something did not."""
    chosen = Plan.resolve(plan)
    done = bisect(open_model(model), chosen, disable=disable)
    script = None
    if done.finding is not None:
        script = shown_path(write_script(done.finding, model, chosen, out, disable=disable))
    if as_json:
        show_json({**done.to_json(), "script": script})
    else:
        _report(done, script)
    return 1 if done.finding else 0


def _report(done: Bisection, script: str | None) -> None:
    rows = [(c.rewrite, c.contract, "holds", _seen(c.checks)) for c in done.certificates]
    finding = done.finding
    if finding is None:
        show_table(("pass", "contract", "", "largest error"), rows)
        show("", "every pass keeps its contract")
        return
    show_table(
        ("pass", "contract", "", "largest error"), [*rows, (finding.rewrite, finding.contract, "broken", "")]
    )
    show("")
    show_heading(f"{finding.rewrite} does not keep its contract ({finding.contract})")
    show(*str(finding.difference).split("\n"))
    show(*([finding.without] if finding.without else []))
    show_next({"see it again": ("python", str(script))})


def _seen(checks: Collection[object]) -> str:
    errors = [check.error for check in checks]  # type: ignore[attr-defined]
    return f"{max(errors):.0e}" if errors else ""
