"""Timelines say what happened: nothing is lost, doubled or put on the wrong side, folding included."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import given, settings
from torch._ops import OpOverload

import moec
from examples.gpt import GPT, GPTConfig
from moec.cost.reading.read import read_operations
from moec.cost.symbols import symbol
from moec.errors import CostError, MoecError, PassError
from moec.ir.graphs import graph_modules
from moec.plan import Plan
from moec.testing import DecoderRecipe, decoders_and_plans
from moec.view.filming import timeline_of
from moec.view.numbering import filled
from moec.view.timeline import Step, Timeline
from tests.view.written_out import lines_of_step, lines_of_text, numbers_of

PLAN = {
    "moe": {
        "layers": "1::2", "experts": 4, "residual": "learned",
        "override": [{"layers": "-1", "experts": 8}, {"layers": "0", "top_k": 2}],
    },
    "parallel": {"expert": 4, "tensor": 2},
}  # fmt: skip


def gpt(layers: int = 4) -> GPT:
    """Small, and made of blocks that are alike."""
    return GPT(GPTConfig(vocab=32, seq=16, layers=layers, width=16, heads=2))


@pytest.fixture(scope="module")
def placed() -> moec.Program:
    """A PR-MoE on eight ranks."""
    return moec.compile(gpt(), PLAN, world=8, verify="off")


@pytest.fixture(scope="module")
def film(placed: moec.Program) -> Timeline:
    """Its timeline."""
    return timeline_of(placed, B=3, S=16)


def require_all_lines(program: moec.Program, timeline: Timeline) -> None:
    """Every line of every text is in the step before it and the step after it, once."""
    now = program.text()
    for step in timeline.steps:
        after = now if step.name.endswith("→ now") else program.text(step.after)
        assert lines_of_step(step, timeline.drawings, "after") == lines_of_text(after), step.name
        if step.kind == "capture":
            assert not lines_of_step(step, timeline.drawings, "before")
        else:
            before = lines_of_text(program.text(step.before))
            assert lines_of_step(step, timeline.drawings, "before") == before, step.name


def require_sides(timeline: Timeline) -> None:
    """Statuses agree with the sides that a node stands on, indices with what they point at."""
    for drawing in timeline.drawings:
        for node in drawing.nodes:
            present = node.before is not None, node.after is not None
            assert present in {
                "kept": {(True, True)}, "rewired": {(True, True)}, "created": {(False, True)},
                "removed": {(True, False)}, "moved": {(True, True), (True, False), (False, True)},
            }[node.status]  # fmt: skip
            assert all(drawing.nodes[place].before is not None for place in node.made_from)
            regions = [side.region for side in (node.before, node.after) if side and side.region is not None]
            assert all(region < len(drawing.regions) for region in regions)
        for start, end, side in drawing.edges:
            ends = [drawing.nodes[place] for place in (start, end)]
            assert side == 2 or all(node.before is not None for node in ends)
            assert side == 1 or all(node.after is not None for node in ends)


@settings(max_examples=max(4, settings().max_examples // 12))
@given(decoders_and_plans())
def test_every_line_is_shown_once_on_the_right_side(pair: tuple[DecoderRecipe, Plan]) -> None:
    recipe, plan = pair
    program = moec.compile(recipe.build(device="meta"), plan, verify="off")
    timeline = timeline_of(program)
    require_all_lines(program, timeline)
    require_sides(timeline)
    assert not [note for note in timeline.notes if note.startswith("no FLOPs")]
    again = Timeline.from_json(json.loads(json.dumps(timeline.to_json(), allow_nan=False)))
    assert again == timeline


def test_a_placed_program(placed: moec.Program, film: Timeline) -> None:
    require_all_lines(placed, film)
    require_sides(film)
    names = [step.name for step in film.steps if step.kind == "pass"]
    assert names == [certificate.rewrite for certificate in placed.certificates]
    stages = ["captured → canonical", "canonical → structured", "structured → sparse", "sparse → placed"]
    assert [step.name for step in film.steps if step.kind == "stage"] == [*stages, "captured → now"]
    docs = {step.name: step.doc for step in film.steps}
    assert "before:  y = ffn" in docs["lift_experts"]
    assert film.text == placed.text()


def last(timeline: Timeline) -> Step:
    return timeline.steps[-1]


def test_alike_blocks_are_one_section(film: Timeline) -> None:
    captured = film.steps[0]
    assert [section.layers for section in captured.sections] == [(), (0, 1, 2, 3), ()]
    assert [section.title for section in captured.sections] == ["embedding", "blocks 0–3", "head"]
    lifted = next(step for step in film.steps if step.name == "lift_experts")
    assert [section.layers for section in lifted.sections if section.changed] == [(1,), (3,)]
    idle = next(step for step in film.steps if step.name == "spell_norms")
    assert not any(section.changed for section in idle.sections)


def test_the_layer_is_the_only_number_left_open(film: Timeline, placed: moec.Program) -> None:
    named = {f"moe_{n}.router.weight" for n in (1, 3)} | {"moe_1.up.weight", "moe_3.up.weight"}
    found = {
        filled(weight.name, layer)
        for section in last(film).sections
        for layer in numbers_of(section, "after")
        for node in film.drawings[section.drawing].nodes
        for weight in (node.after.weights if node.after else ())
    }
    assert named <= found
    assert found == {name.removeprefix("graph.") for name, _ in torch.nn.Module.named_parameters(placed)}


def test_weights_tell_their_origin_and_where_they_lie(film: Timeline) -> None:
    weights = {
        weight.name: weight
        for section in last(film).sections
        for node in film.drawings[section.drawing].nodes
        for weight in (node.after.weights if node.after else ())
    }
    up = weights["moe_{layer}.up.weight"]
    assert up.origin.startswith("← blocks.{layer}.mlp.up.weight")
    assert "dim 0 over expert" in up.placement
    assert weights["moe_{layer}.router.weight"].origin == "new"


def test_flops_and_bytes_are_those_of_the_whole_graph(placed: moec.Program, film: Timeline) -> None:
    """Read off one still of each kind; a walk over the whole graph says the same."""
    numbers = {symbol(letter): sympy.Integer(n) for letter, n in film.sizes.items()}
    operations = read_operations(placed.graph, None, training=False)
    for amount in ("flops", "bytes"):
        whole = sum(sympy.sympify(getattr(one.forward, amount)).xreplace(numbers) for one in operations)
        drawn = sum(
            getattr(node.after, amount) or 0
            for section in last(film).sections
            for _ in numbers_of(section, "after")
            for node in film.drawings[section.drawing].nodes
            if node.after is not None
        )
        assert whole > 0
        assert drawn == pytest.approx(float(whole), rel=1e-12), amount


def test_plan_lines_that_asked_for_a_region(film: Timeline) -> None:
    boxes = [box for section in last(film).sections for box in film.drawings[section.drawing].regions]
    sparse = [box for box in boxes if box.kind == "moe" and box.status == "created"]
    asked = [[film.plan_lines[line] for line in box.plan] for box in sparse]
    assert all('layers = "1::2"' in lines for lines in asked)
    assert ["top_k = 2" in lines for lines in asked] == [True, False]
    assert ["experts = 8" in lines for lines in asked] == [False, True]
    assert [box.settings["experts"] for box in sparse] == ["4", "8"]
    attention = next(box for box in boxes if box.kind == "attention")
    assert [film.plan_lines[line] for line in attention.plan][-1] == "tensor = 2"


def test_the_user_s_lines_are_there(film: Timeline) -> None:
    source = next(
        node.after.source
        for node in film.drawings[film.steps[0].sections[1].drawing].nodes
        if node.after and node.after.operator == "aten.gelu"
    )
    file, _, line = source.partition(":")
    written = (Path("examples") / file).read_text().splitlines()[int(line) - 1]
    assert film.sources[source] == written.strip()


def test_the_program_of_one_rank_says_what_it_sends(placed: moec.Program) -> None:
    local = placed.partition(0)
    timeline = timeline_of(local)
    require_all_lines(local, timeline)
    found = Counter(
        (side.collective, side.axis)
        for section in last(timeline).sections
        for node in timeline.drawings[section.drawing].nodes
        for _ in section.layers or (0,)
        if (side := node.after) is not None and side.collective
    )
    nodes = (node for _, module in graph_modules(local.graph) for node in module.graph.nodes)
    torch_s = Counter(
        node.target._opname
        for node in nodes
        if isinstance(node.target, OpOverload) and node.target.namespace == "_c10d_functional"
    )
    del torch_s["wait_tensor"]
    names = Counter(name for name, _ in found.elements())
    assert {name: names[name] for name in torch_s} == torch_s
    assert ("all_reduce", "tensor") in found
    assert any(axis.startswith("expert") for _, axis in found)


def test_a_fused_program_names_the_pass(placed: moec.Program) -> None:
    fused = moec.compile(gpt(2), {"moe": {"layers": "1", "experts": 4}}, verify="off").fused(verify="off")
    timeline = timeline_of(fused)
    require_all_lines(fused, timeline)
    by = {
        node.after.operator: node.fused_by
        for section in last(timeline).sections
        for node in timeline.drawings[section.drawing].nodes
        if node.after is not None and node.fused_by
    }
    assert by["moec.gate"] == "fuse_gate"
    assert by["moec.moe_ffn"] == "fuse_moe_ffn"


def test_a_decoder(placed: moec.Program) -> None:
    decoder = moec.compile(gpt(2), verify="off").decoder(16).program
    timeline = timeline_of(decoder, n=1, L=16)
    require_all_lines(decoder, timeline)
    assert last(timeline).after == "cached"


def test_a_student_is_told_by_both_numbers() -> None:
    plan = {"student": {"keep": [0, 2, 4]}, "moe": {"layers": "1::2", "experts": 4}}
    program = moec.compile(gpt(5), plan, verify="off")
    timeline = timeline_of(program)
    require_all_lines(program, timeline)
    cut = next(step for step in timeline.steps if step.name == "keep_layers")
    told = {section.title: (section.layers, section.before) for section in cut.sections if section.layers}
    assert told["blocks 1, 3, left out"] == ((1, 3), ())
    assert told["block 1, was 2"] == ((1,), (2,))
    assert told["block 2, was 4"] == ((2,), (4,))


def test_a_loaded_program_has_its_graph_and_the_texts(placed: moec.Program, tmp_path: Path) -> None:
    program = moec.compile(gpt(2), {"moe": {"layers": "1", "experts": 4}}, verify="off")
    loaded = moec.load(program.save(tmp_path / "program"))
    timeline = timeline_of(loaded)
    assert lines_of_step(last(timeline), timeline.drawings, "after") == lines_of_text(loaded.text())
    known = {step.name: step.diff for step in timeline_of(program).steps}
    assert {step.name: step.diff for step in timeline.steps} == known
    assert {node.status for drawing in timeline.drawings for node in drawing.nodes} == {"kept"}


def test_a_student_of_a_program_is_told_by_its_teacher_s_text() -> None:
    student = moec.compile(gpt(3), verify="off").student(depth=2, verify="off")
    timeline = timeline_of(student)
    assert last(timeline).diff == student.diff("teacher")
    assert lines_of_step(last(timeline), timeline.drawings, "after") == lines_of_text(student.text())


def test_letters_are_checked(placed: moec.Program) -> None:
    with pytest.raises(CostError, match="letters of a graph"):
        timeline_of(placed, b=3)
    with pytest.raises(CostError, match="at least one"):
        timeline_of(placed, B=0)


def test_only_a_timeline_is_read_as_one(film: Timeline) -> None:
    data = film.to_json()
    with pytest.raises(MoecError, match="format 99"):
        Timeline.from_json({**data, "format": 99})
    with pytest.raises(MoecError, match=r"timeline\.steps"):
        Timeline.from_json({**data, "steps": 3})
    with pytest.raises(MoecError, match=r"timeline\.drawings"):
        Timeline.from_json({**data, "sides": data["sides"][:3]})


def test_nothing_of_the_program_is_changed(placed: moec.Program) -> None:
    text, stages = placed.text(), list(placed.stages)
    timeline_of(placed)
    assert placed.text() == text
    assert list(placed.stages) == stages
    with pytest.raises(PassError):
        placed.text("now")
