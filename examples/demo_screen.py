"""How the demo looks: code, folded tables and bars, in a terminal or in a pipe."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from rich.bar import Bar
from rich.console import Console
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

import moec
from moec.ir import Certificate
from moec.ir.ledger import Entry, Ledger
from moec.passes import pipeline
from moec.plan import Plan
from moec.runtime.evaluate import Evaluation

#: A number that stands between dots or underscores, as layers do in `blocks.3.mlp.up.weight` and `ffn_3 up`.
LAYER = re.compile(r"(?<=[._])\d+(?=[._: ]|$)")


def open_console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal and has no width of its own."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


def title(console: Console, what: str, where: str) -> None:
    """A heading, and under it where the thing comes from."""
    console.print()
    console.print(Rule(Text(what, style="bold"), align="left"))
    console.print(Text(where, style="dim"), soft_wrap=True)
    console.print()


def code(console: Console, text: str, language: str = "python") -> None:
    """Text in colours, no line cut or broken."""
    shown = Syntax(text, language, theme="ansi_dark", background_color="default").highlight(text.strip("\n"))
    shown.rstrip()
    console.print(shown, soft_wrap=True)


def sizes(console: Console, program: moec.Program, dense: int, seconds: float) -> None:
    """How large the model was, is, and is for one token."""
    total, active = program.num_parameters(), program.num_parameters(active=True)
    console.print(
        f"{dense:,} parameters became {total:,}, of which a token uses {active:,}; "
        f"captured, rewritten and proved in {seconds:.1f} s",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def ledger(console: Console, entries: Ledger) -> None:
    """The ledger; products that differ in the number of their layer alone share a row."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("product", "layers", "shape", "status"):
        table.add_column(name, no_wrap=True)
    table.add_column("why")
    for (weight, shape, status, why), layers in fold(entries).items():
        style = {"rewritten": "green", "refused": "yellow"}.get(status, "")
        table.add_row(weight, ", ".join(layers), shape, Text(status, style=style), why)
    console.print(table)


def fold(entries: Iterable[Entry]) -> dict[tuple[str, str, str, str], list[str]]:
    """Rows with `*` for the number of a layer → those numbers, in the order of the ledger."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for entry in entries:
        weight, why = (LAYER.sub("*", text) for text in (entry.weight, entry.reason))
        row = (weight, "×".join(map(str, entry.shape)), entry.status, why)
        rows.setdefault(row, []).extend(LAYER.findall(entry.weight)[:1])
    return rows


def certificates(console: Console, program: moec.Program, plan: Plan) -> None:
    """What was claimed and measured of the rewrites, a row for each stage's passes of one verdict."""
    columns = "stage", "rewrites", "contract", "verdict", "largest error"
    table = Table(*columns, box=None, pad_edge=False, header_style="dim")
    made = pipeline.canonical(), pipeline.structured(), pipeline.sparse(plan)
    stages = zip(("canonical", "structured", "sparse"), made, strict=True)
    stage_of = {rewrite.name: stage for stage, rewrites in stages for rewrite in rewrites}
    kinds = groupby(program.certificates, lambda c: (stage_of[c.rewrite], c.contract, c.verdict))
    for (stage, contract, verdict), group in kinds:
        members = list(group)
        names = ", ".join(certificate.rewrite for certificate in members)
        table.add_row(stage, names, contract, verdict, _largest_error(members))
    console.print(table)


def _largest_error(members: list[Certificate]) -> str:
    checks = [(check, certificate) for certificate in members for check in certificate.checks]
    if not checks:
        return "; ".join(dict.fromkeys(certificate.note for certificate in members))
    check, certificate = max(checks, key=lambda pair: pair[0].error)
    if not check.error:
        return f"none in {len(checks)} checks"
    where = f"{certificate.rewrite}, {check.what}"
    return f"{check.error:.0e} ≤ {check.tolerance:.0e} in {len(checks)} checks ({where})"


def learned(console: Console, before: Evaluation, after: Evaluation, tokens_per_second: float) -> None:
    """Held-out bits per byte before and after."""
    console.print(
        f"held-out text, {after.num_tokens:,} bytes: {before.bits:.3f} → [bold]{after.bits:.3f}[/bold] bits "
        f"per byte; {tokens_per_second:,.0f} bytes a second in training",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def load(console: Console, counts: Mapping[str, tuple[int, ...]]) -> None:
    """A bar for every expert of every layer: its share of the layer's rows."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for layer, rows in counts.items():
        largest = max(rows)
        for expert, count in enumerate(rows):
            name = layer if expert == 0 else ""
            bar, share = Bar(largest, 0, count, width=40), f"{count / sum(rows):.1%}"
            table.add_row(name, f"expert {expert}", bar, share, f"{count:,} rows")
        table.add_row()
    console.print(table)


def sample(console: Console, prompt: str, text: str) -> None:
    """Sampled text, the prompt in another colour; what would steer a terminal is shown as �."""
    shown = Text(prompt, style="dim")
    shown.append(
        "".join(c if c.isprintable() or c == "\n" else "�" for c in text.removeprefix(prompt)), "bold"
    )
    console.print(shown, soft_wrap=True)


def files(console: Console, folder: Path) -> None:
    """What lies in a folder, with sizes; a folder in it is one line."""
    for path in sorted(folder.iterdir()):
        inside = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in inside)
        name = path.name if path.is_file() else f"{path.name}/ ({len(inside)} files)"
        console.print(f"  {name:<24} {size:>12,} bytes", highlight=False)


def next_commands(console: Console, commands: Mapping[str, str]) -> None:
    """What to try next: command → what it is for."""
    width = max(map(len, commands))
    for command, purpose in commands.items():
        line = Text(f"  {command:<{width}}   ", style="bold")
        console.print(line.append(purpose, style="not bold"), soft_wrap=True)
