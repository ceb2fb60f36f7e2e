"""What MkDocs calls while it builds: adds the pages that are made, and the files that pages link to.

Named in mkdocs.yml. The pages of passes compile small programs, which takes a minute or two.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.generate.pass_pages import groups, index_page, name_of, pages
from docs.generate.plan_page import plan_page

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = re.compile(r"\]\(((?:\.\./)+)([^)#\s]+)\)")
FILES = "files"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put passes and decisions into the navigation, below the pages that list them."""
    passes = [{group.title: [f"passes/{name_of(kind)}.md" for kind in group.passes]} for group in groups()]
    decisions = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    records = [f"decisions/{name}" for name in re.findall(r"^\* \[.*\]\((.+)\)$", decisions, re.MULTILINE)]
    config.nav = _expanded(config.nav, {"passes/index.md": passes, "decisions/README.md": records})
    return config


def _expanded(nav: Any, below: dict[str, list[Any]]) -> Any:
    """`nav` with what stands `below` some of its pages."""
    if isinstance(nav, list):
        return [_expanded(entry, below) for entry in nav]
    if isinstance(nav, dict):
        return {title: _expanded(entry, below) for title, entry in nav.items()}
    return [nav, *below[nav]] if nav in below else nav


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what is made, and what lies outside of docs/ and is linked to."""
    made = {"plan.md": plan_page(), "passes/index.md": index_page()}
    made |= {f"passes/{name}.md": page for name, page in pages()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    for path in sorted(linked_outside(files)):
        files.append(File.generated(config, f"{FILES}/{path}", abs_src_path=str(ROOT / path)))
    return files


def linked_outside(files: Files) -> set[str]:
    """Files of the project, by their path in it, that pages link to and that are no pages."""
    found = set()
    for file in files.documentation_pages():
        for up, path in OUTSIDE.findall(file.content_string):
            if up.count("../") > file.src_uri.count("/") and (ROOT / path).is_file():
                found.add(path)
    return found


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Let links that lead out of docs/ lead to the copies that `on_files` made."""
    depth = page.file.src_uri.count("/")

    def inside(found: re.Match[str]) -> str:
        up, path = found[1], found[2]
        if up.count("../") <= depth:
            return found[0]
        return f"]({'../' * depth}{FILES}/{path})"

    return OUTSIDE.sub(inside, markdown)
