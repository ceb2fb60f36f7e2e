"""`moec show`, `moec diff`, `moec explain`, `moec plans`: commands that only read."""

from __future__ import annotations

from dataclasses import asdict

from moec.commands.compile import show_layers, show_passes
from moec.commands.programs import program_of
from moec.commands.screen import on_terminal, show, show_code, show_diff, show_drawn, show_json, show_table
from moec.errors import PlanError, nearest
from moec.explain import Explanation, explain
from moec.ir import Origins
from moec.plan import Plan
from moec.plan.shipped import shipped_text
from moec.program import Program
from moec.view.filming import NOW, Film, letters_of, timeline_of
from moec.view.terminal import step_on_screen
from moec.view.whole_file import require_place


def show_program(
    name: str,
    plan: str | None,
    *,
    stage: str | None,
    ledger: bool,
    origins: bool,
    certificates: bool,
    html: str | None,
    explorer: str | None,
    meta: bool,
    trust: bool,
    as_json: bool,
) -> None:
    """`moec show`: the text, the tables that are asked for, or the page."""
    for written in (html, explorer):
        if written is not None:
            require_place(written)
    program = program_of(name, plan, verify=None if certificates or html else "off", meta=meta, trust=trust)
    if html is not None:
        path = program.show(html)
        show_json({"html": str(path)}) if as_json else show(f"{path}: open it in a browser")
        return
    if explorer is not None:
        path = program.to_model_explorer(explorer)
        show_json({"model_explorer": str(path)}) if as_json else show(f"{path}: open it with model-explorer")
        return
    asked = {"ledger": ledger, "origins": origins, "certificates": certificates}
    if as_json:
        wanted = [key for key, is_wanted in asked.items() if is_wanted]
        tables = _tables(program)
        show_json({key: tables[key] for key in wanted} if wanted else _plain(program, stage) | tables)
        return
    if stage is not None or not any(asked.values()):
        show_code(program.text(stage))
    if ledger:
        show_ledger(explain(program))
    if origins:
        show_origins(program.origins)
    if certificates:
        show_passes(program)


def _plain(program: Program, stage: str | None) -> dict[str, object]:
    """A program beside its tables, as JSON has it."""
    return {
        "text": program.text(stage),
        "stages": list(dict.fromkeys([*program.stages, *program.texts])),
        "timeline": timeline_of(program).to_json(),
    }


def _tables(program: Program) -> dict[str, object]:
    return {
        "ledger": [asdict(entry) for entry in program.ledger],
        "origins": {name: asdict(origin) for name, origin in program.origins.items()},
        "certificates": [certificate.to_json() for certificate in program.certificates],
    }


def show_ledger(told: Explanation) -> None:
    """A row for each product."""
    rows = [
        (row.weight, "×".join(map(str, row.shape)), row.role, row.source, row.status, row.by, row.reason)
        for row in told.products
    ]
    show_table(("weight", "shape", "role", "line", "status", "by", "why"), rows)
    show(*(f"note: {note}" for note in told.notes))


def show_origins(origins: Origins) -> None:
    """A row for each parameter of the program."""
    rows = [(f"{name}[e]" if origin.experts else name, origin.describe()) for name, origin in origins.items()]
    show_table(("parameter", "origin"), rows)


def diff_program(
    name: str, before: str, after: str | None, plan: str | None, meta: bool, trust: bool
) -> None:
    """`moec diff`: what changed between two stages."""
    program = program_of(name, plan, verify="off", meta=meta, trust=trust)
    text = program.diff(before, after)
    if not text:
        show(f"no difference between {before} and {after or program.stage}")
    elif not on_terminal() or not {before, after or before} <= program.stages.keys():
        show_diff(text)
    else:
        film = Film(program, letters_of(program, {}))
        step = film.step(before, NOW if after is None else after)
        show_drawn(lambda width: step_on_screen(step, film.drawings.drawn, width))


def explain_program(
    name: str, about: str, plan: str | None, *, meta: bool, trust: bool, as_json: bool
) -> None:
    """`moec explain`: what was done to each product, and why; in words when it is about a part."""
    program = program_of(name, plan, verify="off", meta=meta, trust=trust)
    told = explain(program, about)
    if as_json:
        show_json(told.to_json())
        return
    if about:
        show(str(told))
        return
    show_ledger(told)
    show("")
    show_layers(told)
    show(told.summary)


def show_plans(name: str | None, as_json: bool) -> None:
    """`moec plans`: the shipped plans, or the text of one."""
    names = Plan.shipped_names()
    if name is not None and name not in names:
        raise PlanError(
            "plans", f"no shipped plan '{name}'", f"one of {', '.join(names)}", nearest(name, names)
        )
    if name is not None:
        show_json(Plan.shipped(name).model_dump(mode="json")) if as_json else show_code(
            shipped_text(name), "toml"
        )
        return
    rows = [(each, *_facts(Plan.shipped(each)), _first_comment(each)) for each in names]
    if as_json:
        show_json([{"name": row[0], "about": row[-1]} for row in rows])
        return
    show_table(("plan", "layers", "experts", "top_k", "residual", "about"), rows)
    show("", "moec plans NAME prints one; --plan NAME uses it, and --plan FILE.toml one of your own.")


def _facts(plan: Plan) -> tuple[object, ...]:
    """Layers, experts (those of overrides after a slash), top_k, residual."""
    moe = plan.moe
    if moe is None:
        return "none", "", "", ""
    sizes = dict.fromkeys([moe.experts, *(o.experts for o in moe.override if o.experts)])
    return str(moe.layers), "/".join(map(str, sizes)), str(moe.top_k), moe.residual


def _first_comment(name: str) -> str:
    return shipped_text(name).partition("\n")[0].lstrip("# ")
