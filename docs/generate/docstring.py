"""The docstring of a pass, taken apart: first sentence, drawing, prose, and what it assumes and promises."""

from __future__ import annotations

import re
from dataclasses import dataclass

LABEL = re.compile(r"^(Assumes|Contract|Source): +")


@dataclass(frozen=True)
class PassDoc:
    """`title`: the first sentence, without its full stop. `drawing`: the lines from `before:` on, one string
    for each rewrite that is drawn. `prose`: Markdown paragraphs. `assumes`, `contract`, `source`: '' where
    the docstring has none."""

    title: str
    drawing: tuple[str, ...]
    prose: tuple[str, ...]
    assumes: str
    contract: str
    source: str


def read_docstring(text: str) -> PassDoc:
    """Take the docstring of a pass's module apart; raises `ValueError` when it draws nothing."""
    first, *paragraphs = [part for part in re.split(r"\n\s*\n", text.strip("\n")) if part.strip()]
    drawing, prose, labelled = [], [], dict[str, str]()
    for paragraph in paragraphs:
        if paragraph.startswith(("before:", "after:")):
            drawing.append(paragraph)
            continue
        said, labels = _labels(paragraph)
        labelled |= labels
        prose += [said] if said else []
    if not drawing:
        raise ValueError(f"a docstring without a drawing (before: …, after: …):\n{text}")
    words = [labelled.get(label, "") for label in ("Assumes", "Contract", "Source")]
    return PassDoc(" ".join(first.split()).removesuffix("."), tuple(drawing), tuple(prose), *words)


def _labels(paragraph: str) -> tuple[str, dict[str, str]]:
    """The lines of a paragraph that stand before the first label, and label → words."""
    said: list[str] = []
    labels: dict[str, list[str]] = {}
    here = said
    for line in paragraph.splitlines():
        found = LABEL.match(line)
        if found:
            here = labels.setdefault(found[1], [])
        here.append(line[found.end() :] if found else line)
    return "\n".join(said), {label: " ".join(" ".join(lines).split()) for label, lines in labels.items()}
