"""A program in a notebook: what it is, what each pass proved, its text. HTML without a script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from moec.ir import Certificate, Program
from moec.ir.spelling import printable
from moec.view.facts import facts_of

_CELL = "padding:2px 12px 2px 0;text-align:left;vertical-align:top"
_CODE = "max-height:32em;overflow:auto;margin:.5em 0;white-space:pre;font-family:monospace"


def notebook_html(program: Program) -> str:
    """Facts, a table of passes, and the text, folded; every word of the program's is escaped."""
    title = f"<strong>{_text(program.source.name)}</strong> · {_text(program.stage)}"
    facts = _table((), ((name, value) for name, value in facts_of(program).items() if name != "model"))
    certificates = program.certificates
    passes = _table(("pass", "contract", "verdict", "error", "seconds"), map(_row, certificates))
    return (
        f"<div><p>{title}</p>{facts}"
        f"<details><summary>{len(certificates)} passes</summary>{passes}</details>"
        f'<details><summary>text</summary><pre style="{_CODE}">{_code(program.text())}</pre></details></div>'
    )


def _row(certificate: Certificate) -> tuple[str, ...]:
    worst = max((check.error for check in certificate.checks), default=None)
    error = "" if worst is None else f"{worst:.1e}"
    return certificate.rewrite, certificate.contract, certificate.verdict, error, f"{certificate.seconds:.3f}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f'<th style="{_CELL}">{_text(head)}</th>' for head in heads)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{_text(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f"<table>{f'<tr>{top}</tr>' if heads else ''}{body}</table>"


def _text(text: str) -> str:
    return escape(printable(text))


def _code(text: str) -> str:
    return "\n".join(_text(line) for line in text.split("\n"))
