"""The blocks of code on the pages: README.md, CONTRIBUTING.md and docs/.

What a block is follows from how it is marked:

| marked | |
|---|---|
| `python` | runs, after those above it, in the names of the page |
| `text`, `diff`, or no mark, right after a `python` block | what that block prints |
| `console`, with `$` | commands, each with what it prints |
| `console` or `sh`, without `$` | commands |
| `toml` | a plan, or a part of one; with `title="plan.toml"` a file that later blocks read |
| any with `title="name"` | that file |
| `py`, or no mark, between comments `… : begin` and `… : end` | kept up to date by a golden test |

In a text that is compared, a line `…` stands for any number of lines, `…` in a line for anything, and numbers
with a fraction for any number. A comment right above a block says that it is not for every day:
`<!-- not run: why -->`, `<!-- nightly: why -->`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCED = re.compile(
    r"(?:^<!-- (?P<when>not run|nightly): (?P<why>.+?) -->\n+)?^```(?P<mark>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
EDGE = re.compile(r"<!-- [\w ]+: (begin|end) -->")
TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block: `line` is the line of the page that its first line stands on. `when`: '' for every day,
    `nightly` or `not run`, and `why`. `follows`: whether nothing but blank lines stands between it and the
    block before it. `golden`: whether it stands between comments of a golden test."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    when: str
    why: str
    follows: bool
    golden: bool

    @property
    def where(self) -> str:
        """`docs/cli.md:12`, of its first line."""
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page}:{self.line}"

    @property
    def kind(self) -> str:
        """`file`, `golden`, `python`, `output`, `commands`, `plan`, or `other`, which nothing tests."""
        if self.title:
            return "file"
        if self.golden:
            return "golden"
        known = {"python": "python", "console": "commands", "sh": "commands", "toml": "plan"}
        is_output = self.follows and self.language in ("text", "diff", "py", "")
        return "output" if is_output else known.get(self.language, "other")


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, from top to bottom."""
    text = page.read_text(encoding="utf-8")
    blocks: list[Block] = []
    end = 0
    for found in FENCED.finditer(text):
        language, _, rest = found["mark"].partition(" ")
        title = TITLE.search(rest)
        edges = EDGE.findall(text[: found.start()])
        blocks.append(
            Block(
                page,
                text.count("\n", 0, found.start("text")) + 1,
                language,
                title[1] if title else "",
                found["text"],
                found["when"] or "",
                found["why"] or "",
                bool(blocks) and not text[end : found.start()].strip(),
                bool(edges) and edges[-1] == "begin",
            )
        )
        end = found.end()
    return blocks
