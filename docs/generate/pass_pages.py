"""A page for each pass: its docstring, its options, and what it does to a program; and a list of them all."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields

import moec.passes
from moec.ir import Pass
from moec.passes import pipeline
from moec.plan import Plan

from .docstring import PassDoc, read_docstring
from .examples import EXAMPLES, Example, Screen

LONGEST = 90  # lines of output that a page shows
CONTRACTS = {
    "exact": "exact: the same function",
    "approximate": "approximate, by a stated measure",
    "changes-model": "changes the model, where the plan asks for it",
}


@dataclass(frozen=True)
class Group:
    """A list of passes that belong together, and what it is for."""

    title: str
    said: str
    passes: tuple[type[Pass], ...]


def groups() -> list[Group]:
    """All passes, in the order in which the pipelines run them; each once."""
    plan = Plan.resolve({"moe": {"experts": 2, "layers": "all"}, "student": {"depth": 1, "init": "fresh"}})
    lists = {
        "canonical": ("captured → canonical: few operators, one spelling each.", pipeline.canonical()),
        "structured": ("canonical → structured: regions, found by dataflow.", pipeline.structured()),
        "student": ("Fewer layers, or fresh weights: what `[student]` asks for.", pipeline.student(plan)),
        "sparse": ("structured → sparse: what `[moe]` asks for.", pipeline.sparse(plan)),
        "placed": ("sparse → placed: where everything lies on several ranks.", pipeline.placed(plan, 2)),
        "partitioned": ("placed → partitioned: the program of one rank.", pipeline.partitioned(0)),
        "cached": ("→ cached: the program that decodes, of any of the last three.", pipeline.cached(8)),
        "fused": ("Fewer, larger operators; the first and the last of them for a decoder only.", [
            *pipeline.fused_decoder(packed=True), *pipeline.fused(),
        ]),
    }  # fmt: skip
    known: set[type[Pass]] = set()
    found = []
    for title, (said, passes) in lists.items():
        new = tuple(dict.fromkeys(type(one) for one in passes if type(one) not in known))
        known |= set(new)
        found.append(Group(title, said, new))
    others = tuple(one for one in all_passes() if one not in known)
    return [*found, Group("when asked", "In no pipeline: these run when they are asked for.", others)]


def all_passes() -> list[type[Pass]]:
    """Every class of a pass in `moec.passes`, by name."""
    names = [one.name for one in pkgutil.iter_modules(moec.passes.__path__)]
    modules = [importlib.import_module(f"moec.passes.{name}") for name in names]
    classes = {
        one
        for module in modules
        for _, one in inspect.getmembers(module, inspect.isclass)
        if issubclass(one, Pass) and one is not Pass and one.__module__ == module.__name__
    }
    return sorted(classes, key=lambda one: one.__name__)


def name_of(kind: type[Pass]) -> str:
    """`lift_experts`: the name of the pass, and of its file."""
    return kind.__module__.rpartition(".")[2]


def doc_of(kind: type[Pass]) -> PassDoc:
    """The docstring of the module of a pass."""
    return read_docstring(inspect.getdoc(importlib.import_module(kind.__module__)) or "")


def index_page() -> str:
    """The list of all passes, stage by stage."""
    lines = ["# Passes", "", INTRODUCTION]
    for group in groups():
        lines += [f"## {group.title}", "", group.said, "", "| pass | | contract |", "|---|---|---|"]
        for kind in group.passes:
            doc = doc_of(kind)
            lines.append(f"| [`{name_of(kind)}`]({name_of(kind)}.md) | {doc.title} | {kind.contract} |")
        lines.append("")
    return "\n".join(lines)


INTRODUCTION = """\
A pass rewrites a program and proves that it kept its contract; [Concepts](../concepts.md) has the words,
and [Write a pass](../tutorials/write-a-pass.md) makes one. These are all of them, in the order in which they
run. Each has a page with its drawing, its options, and what it does to a small program: run as the page is
built, not written by hand.
"""


def pages(screen: Screen | None = None) -> Iterator[tuple[str, str]]:
    """(name, Markdown) of the page of every pass; compiles the programs that they show."""
    screen = screen or Screen()
    for group in groups():
        for kind in group.passes:
            yield name_of(kind), pass_page(kind, group, screen)


def pass_page(kind: type[Pass], group: Group, screen: Screen) -> str:
    """The page of one pass."""
    doc, name = doc_of(kind), name_of(kind)
    drawing = "\n\n".join(doc.drawing)
    parts = [
        "---\nhide: [toc]\n---",  # programs are wide
        f"# {name}",
        f"{doc.title}.",
        f"```text\n{drawing}\n```",
        *doc.prose,
        _facts(kind, group, doc),
        _options(kind),
        "## What it does",
        _shown(EXAMPLES[name], screen),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(kind: type[Pass], group: Group, doc: PassDoc) -> str:
    contract = doc.contract or CONTRACTS[kind.contract]
    facts = {
        "Contract": contract,
        "Assumes": doc.assumes,
        "Source": doc.source,
        "Stage": f"[{group.title}](index.md#{group.title.replace(' ', '-')})",
        "Code": f"`passes/{name_of(kind)}.py`, class `{kind.__name__}`",
    }
    return "\n".join(f"* **{key}**: {text}" for key, text in facts.items() if text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _options(kind: type[Pass]) -> str:
    options = fields(kind)
    if not options:
        return ""
    said = " ".join((inspect.getdoc(kind) or "").removeprefix("See the module.").split())
    rows = [f"| `{one.name}` | `{_cell(str(one.type))}` | {_default(one)} |" for one in options]
    return "\n".join(["## Options", "", said, "", "| option | type | default |", "|---|---|---|", *rows])


def _default(option: Field[object]) -> str:
    return "*required*" if option.default is MISSING else f"`{option.default!r}`"


def _shown(example: Example, screen: Screen) -> str:
    printed = screen.printed(example)
    if not printed:
        raise ValueError(f"an example that shows nothing:\n{example.code}")
    lines = printed.splitlines()
    rest = f"\n… {len(lines) - LONGEST} lines more" if len(lines) > LONGEST else ""
    shown = "\n".join(lines[:LONGEST]) + rest
    remark = f"{example.said}\n\n" if example.said else ""
    return f"```python\n{example.code}```\n\n{remark}```{example.language}\n{shown}\n```"
