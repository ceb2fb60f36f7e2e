"""Links between pages lead somewhere; those to pages that are made (passes, the plan) count as well."""

from __future__ import annotations

import re

from docs.generate.pass_pages import all_passes, name_of
from tests.docs.pages import PAGES, ROOT

CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_every_link_to_a_file_leads_to_one() -> None:
    docs = ROOT / "docs"
    made = {docs / "plan.md", docs / "passes/index.md"}
    made |= {docs / f"passes/{name_of(kind)}.md" for kind in all_passes()}
    missing = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))
        if "://" not in target and not (path := page.parent / target).exists() and path.resolve() not in made
    ]
    assert not missing
