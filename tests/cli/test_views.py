"""`show --json`, `show --model-explorer` and `diff` on a terminal draw the timeline of the program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import moec
from moec.commands.programs import compiled
from moec.view.filming import timeline_of
from moec.view.timeline import Timeline
from tests.cli.conftest import GPT, Moec


def test_show_for_machines_has_the_timeline(moec_: Moec, saved: Path) -> None:
    told = json.loads(moec_("show", saved, "--json").stdout)
    program = moec.load(saved)
    assert list(told) == ["text", "stages", "timeline", "ledger", "origins", "certificates"]
    assert Timeline.from_json(told["timeline"]) == timeline_of(program)
    assert list(json.loads(moec_("show", saved, "--json", "--ledger", "--origins").stdout)) == [
        "ledger", "origins",
    ]  # fmt: skip


def test_show_writes_graphs_for_model_explorer(moec_: Moec, plan: Path, tmp_path: Path) -> None:
    path = tmp_path / "graphs.json"
    out = moec_("show", GPT, "--plan", plan, "--model-explorer", path).stdout
    assert out == f"{path}: open it with model-explorer\n"
    assert [graph["id"] for graph in json.loads(path.read_text())["graphs"]][-1] == "sparse"


def test_graphs_that_cannot_be_written_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "a file in a folder that exists" in refused(
        "show", GPT, "--model-explorer", tmp_path / "no" / "graphs.json"
    )


def test_diff_on_a_terminal_is_drawn(moec_: Moec, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piped = moec_("diff", GPT, "structured", "sparse", "--plan", plan).stdout
    assert piped == compiled(GPT, str(plan), verify="off").diff("structured", "sparse")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    drawn = moec_("diff", GPT, "structured", "sparse", "--plan", plan).stdout
    assert "structured → sparse" in drawn
    assert "scores = moec.router(" in drawn
    assert "@@" not in drawn
