"""`moec show --html`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import GPT, run_moec


def test_a_page_is_written_and_named(tmp_path: Path) -> None:
    result = run_moec("show", GPT, "--html", tmp_path / "out.html", "--meta")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out.html'}: open it in a browser\n"
    assert (tmp_path / "out.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_for_machines_its_path_is_json(tmp_path: Path) -> None:
    result = run_moec("show", GPT, "--html", tmp_path / "out.html", "--json", "--meta")
    assert json.loads(result.stdout) == {"html": str(tmp_path / "out.html")}


def test_a_folder_that_is_not_there_is_refused_before_any_work(tmp_path: Path) -> None:
    result = run_moec("show", "no_such_model.py:gpt", "--html", tmp_path / "nowhere" / "out.html")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
