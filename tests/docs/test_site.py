"""The documents as static pages: they build without a warning, and need nothing from anywhere else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.generate.pass_pages import all_passes, name_of
from tests.docs.pages import ROOT

LOADED = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(https?:[^\s\">]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # of the theme, about a MkDocs that is not installed
    done = subprocess.run(build, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.mark.nightly
def test_every_pass_has_a_page_with_a_before_and_an_after(site: Path) -> None:
    for kind in all_passes():
        page = (site / "passes" / f"{name_of(kind)}.html").read_text(encoding="utf-8")
        assert "What it does" in page
        assert "after:" in page


@pytest.mark.nightly
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(all_passes())
    loaded = {url for page in pages for url in LOADED.findall(page.read_text(encoding="utf-8"))}
    assert not loaded


@pytest.mark.nightly
def test_search_knows_what_the_pages_say(site: Path) -> None:
    text = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    index = json.loads(text[text.index("{") :].rstrip("; \n"))
    places = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {"plan.html", "passes/lift_experts.html", "tutorials/huggingface.html"} <= places


@pytest.mark.nightly
def test_files_that_pages_link_to_come_along(site: Path) -> None:
    assert (site / "files" / "examples" / "gpt.py").is_file()
    assert (site / "files" / "benchmarks" / "results" / "layer.json").is_file()
