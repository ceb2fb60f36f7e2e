"""The same steps in a terminal, a notebook and model-explorer; what names hold stays text everywhere."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import moec
from examples.gpt import GPT, GPTConfig
from moec.errors import MoecError
from moec.ir.graphs import graph_modules
from moec.view.filming import Film, letters_of, timeline_of
from moec.view.folding import differing, runs
from moec.view.model_explorer import graph_collection
from moec.view.terminal import step_on_screen
from moec.view.timeline import Section

EVIL = "</script><img src=x onerror=alert(1)>[red]\x1b[31m\u202e"


@pytest.fixture(scope="module")
def program() -> moec.Program:
    """Six layers, experts in every other one, more of them in the last."""
    model = GPT(GPTConfig(vocab=32, seq=16, layers=6, width=16, heads=2))
    plan = {"moe": {"layers": "1::2", "experts": 4, "override": [{"layers": "-1", "experts": 8}]}}
    return moec.compile(model, plan, verify="off")


@pytest.fixture
def evil(program: moec.Program) -> moec.Program:
    """The same, with names that mean something to whatever shows them."""
    model = GPT(GPTConfig(vocab=32, seq=16, layers=1, width=16, heads=2))
    made = moec.compile(model, verify="off")
    for graph in {id(one): one for one in (*made.stages.values(), made.graph)}.values():
        for _, module in graph_modules(graph):
            for node in module.graph.nodes:
                if node.meta.get("path"):
                    node.meta["path"] = f"{node.meta['path']}.{EVIL}"
                    node.meta["source"] = f"{EVIL}.py:3"
    made.source = type(made.source)(**{**vars(made.source), "name": EVIL, "notes": (EVIL,)})
    return made


def on_screen(program: moec.Program, before: str, after: str, width: int, **how: Any) -> str:
    """What a terminal of this width gets."""
    film = Film(program, letters_of(program, {}))
    step = film.step(before, after)
    console = Console(width=width, file=io.StringIO(), highlight=False, **how)
    console.print(step_on_screen(step, film.drawings.drawn, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_runs_of_layers() -> None:
    assert runs(()) == ""
    assert runs((3,)) == "3"
    assert runs((0, 1)) == "0, 1"
    assert runs((*range(11), *range(12, 23))) == "0–10, 12–22"
    assert runs((1, 3, 5, 7)) == "1, 3 … 7"
    assert runs((0, 1, 2, 5, 9)) == "0–2, 5, 9"


def test_what_differs_is_said_in_one_line() -> None:
    alike = Section("blocks", (*range(3), *range(4, 7), *range(8, 24)), 0, changed=True)
    others = [Section("block 3", (3,), 1, changed=True), Section("block 7", (7,), 2, changed=True)]
    head = Section("head", (), 3, changed=False)
    assert differing([alike, *others, head]) == "×22 alike, 2 differ: 3, 7"
    assert differing([alike]) == "×22 alike"
    assert differing([head]) == ""
    assert differing([*others, head]) == "2 blocks, no two alike"
    assert differing(others[:1]) == ""


def test_a_narrow_terminal_reads_downwards(program: moec.Program) -> None:
    lines = on_screen(program, "canonical", "structured", 100).splitlines()
    assert lines[0] == "canonical → structured"
    assert lines[2] == "×6 alike"
    assert any(line.startswith("blocks 0–5   ×6 alike ─") for line in lines)
    assert "+ a_0 = self.attention_0(n_0)" in lines
    assert "→     h = linear(x, self.up.weight, self.up.bias)" in lines


def test_alike_blocks_are_drawn_once(program: moec.Program) -> None:
    text = on_screen(program, "structured", "lift_experts", 100)
    assert "block 5" in text
    assert "blocks 1, 3   ×2 alike" in text
    assert text.count("moec.router") == 2
    assert "norm_1" not in text, "what was kept is left out"


def test_a_wide_terminal_has_both_sides(program: moec.Program) -> None:
    lines = on_screen(program, "structured", "lift_experts", 200).splitlines()
    replaced = next(line for line in lines if line.startswith("±") and "linear(x, self.up.weight" in line)
    before, after = replaced[:100], replaced[100:]
    assert "linear(x, self.up.weight, self.up.bias)" in before
    assert "grouped_linear" not in before
    assert "moec.grouped_linear(rows, self.up.weight, self.up.bias, counts)" in after


def test_a_step_that_changed_nothing_says_so(program: moec.Program) -> None:
    text = on_screen(program, "spell_linears", "spell_norms", 100)
    assert "kept" in text
    assert "─" not in text


def test_names_are_no_markup_on_a_terminal(evil: moec.Program) -> None:
    plain = on_screen(evil, "captured", "now", 160, force_terminal=True, color_system=None)
    assert "\x1b" not in plain
    assert "\u202e" not in plain


def test_a_timeline_keeps_names_as_they_are(evil: moec.Program) -> None:
    timeline = timeline_of(evil)
    paths = {side.path for d in timeline.drawings for n in d.nodes for side in (n.before, n.after) if side}
    assert any(path.endswith(EVIL) for path in paths)
    assert timeline.notes[0] == EVIL
    assert json.loads(json.dumps(timeline.to_json()))["name"] == EVIL


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert all(name == "style" for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_notebook_shows_what_a_program_is(program: moec.Program) -> None:
    page = Tags()
    page.feed(program._repr_html_())
    assert f"{program.num_parameters():,}" in page.text
    assert all(certificate.rewrite in page.text for certificate in program.certificates)
    assert program.text() in page.text


def test_names_are_no_markup_in_a_notebook(evil: moec.Program) -> None:
    page = Tags()
    page.feed(evil._repr_html_())
    allowed = {"div", "p", "strong", "table", "tr", "td", "th", "details", "summary", "pre"}
    assert set(page.tags) == allowed
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "\x1b" not in page.text


def test_model_explorer_gets_a_graph_for_each_stage(program: moec.Program, tmp_path: Path) -> None:
    path = program.to_model_explorer(tmp_path / "program.json", B=2)
    collection = json.loads(path.read_text())
    assert collection == graph_collection(program, B=2)
    assert collection["label"] == "GPT"
    assert [graph["id"] for graph in collection["graphs"]] == [
        "captured",
        "canonical",
        "structured",
        "sparse",
    ]
    for graph in collection["graphs"]:
        identifiers = [node["id"] for node in graph["nodes"]]
        assert len(set(identifiers)) == len(identifiers)
        for node in graph["nodes"]:
            assert set(node) == {"id", "label", "namespace", "attrs", "incomingEdges", "outputsMetadata"}
            assert all(edge["sourceNodeId"] in identifiers for edge in node["incomingEdges"])
    sparse = {node["id"]: node for node in collection["graphs"][-1]["nodes"]}
    router = sparse["moe_3.scores"]
    assert router["label"] == "moec.router"
    assert router["namespace"] == "block 3 · blocks.3/moe_3"
    told = {attribute["key"]: attribute["value"] for attribute in router["attrs"]}
    assert told["code"].startswith("scores = moec.router(")
    assert told["code"] in program.text()
    assert told["moe_3.router.weight"] == "f32 4×16 · new"
    groups = collection["graphs"][-1]["groupNodeAttributes"]
    assert groups["block 5 · blocks.5/moe_5"]["experts"] == "8"
    (edge,) = router["incomingEdges"]
    assert sparse[edge["sourceNodeId"]]["namespace"] == router["namespace"]


def test_a_file_that_cannot_be_written_is_told(program: moec.Program, tmp_path: Path) -> None:
    with pytest.raises(MoecError, match="a file in a folder that exists"):
        program.to_model_explorer(tmp_path / "nowhere" / "program.json")


def test_costs_that_cannot_be_read_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(GPTConfig(vocab=32, seq=16, layers=1, width=16, heads=2))
    made = moec.compile(model, verify="off")
    assert timeline_of(made).notes == ()

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("a sum of apples and pears")

    monkeypatch.setattr("moec.view.overlays.read_operations", refuse)
    timeline = timeline_of(made)
    assert "no FLOPs and bytes of head: ValueError: a sum of apples and pears" in timeline.notes
    assert all(node.after is None or node.after.flops is None for d in timeline.drawings for node in d.nodes)


class Summed(torch.nn.Module):
    """A product spelled with dots."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weight = torch.nn.Embedding(11, 6), torch.nn.Parameter(torch.randn(11, 6))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...d,vd->...v", self.table(tokens), self.weight)


def test_dots_of_an_einsum_are_dims() -> None:
    timeline = timeline_of(moec.compile(Summed(), verify="off"), B=2, S=5)
    nodes = [node.after for node in timeline.drawings[timeline.steps[0].sections[0].drawing].nodes]
    assert [side.flops for side in nodes if side and side.operator == "aten.einsum"] == [2 * 2 * 5 * 6 * 11]
