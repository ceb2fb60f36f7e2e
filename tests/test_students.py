"""`program.student` and `moec.compile` with [student]: a program of its own that can do what any can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from examples.gpt import GPT, GPTConfig
from moec.errors import PassError, PlanError
from moec.ir import regions
from moec.plan import Student
from moec.plan.depth import kept_layers
from moec.testing import assert_golden
from moec.testing.recipe import DecoderRecipe

GOLDEN = Path(__file__).parent / "golden"
CONFIG = GPTConfig(vocab=31, seq=16, layers=4, width=8, heads=2, dropout=0.0)
PR_MOE = {
    "moe": {
        "layers": "1::2", "experts": 2, "residual": "learned",
        "override": [{"layers": "-1:", "experts": 4}],
    }
}  # fmt: skip


def gpt(layers: int = 4) -> GPT:
    return GPT(replace(CONFIG, layers=layers))


def tokens() -> torch.Tensor:
    return torch.randint(CONFIG.vocab, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def teacher() -> moec.Program:
    return moec.compile(gpt(), PR_MOE, verify="off")


def test_a_student_is_its_own(teacher: moec.Program) -> None:
    """Its weights are copies, its teacher stays as it was, and no stage of it holds the teacher's weights."""
    text = teacher.text()
    student = teacher.student(keep=[0, 1, 3])
    own = {value.data_ptr() for value in student.parameters()}
    assert own.isdisjoint(value.data_ptr() for value in teacher.parameters())
    held = {p.data_ptr() for stage in student.stages.values() for p in stage.parameters()}
    assert held <= own
    before = teacher.eval()(tokens())
    student.train().loss(tokens()).backward()
    torch.optim.SGD(student.parameters(), lr=0.5).step()
    assert torch.equal(teacher(tokens()), before)
    assert all(value.grad is None for value in teacher.parameters())
    assert teacher.text() == text == student.text("teacher")


@pytest.mark.golden
def test_the_diff_against_the_teacher(teacher: moec.Program) -> None:
    student = teacher.student(keep=[0, 1, 3], verify="off")
    assert_golden(student.diff("teacher"), GOLDEN / "student_diff.txt")


def test_nothing_to_say_of_all_layers(teacher: moec.Program) -> None:
    assert teacher.student(keep=range(4), verify="off").diff("teacher") == ""


def test_what_a_student_can_do(teacher: moec.Program, tmp_path: Path) -> None:
    """It is saved and read, writes, is fused, placed on ranks, and has students of its own."""
    student = teacher.student(depth=3).eval()
    logits = student(tokens())
    again = moec.load(student.save(tmp_path / "student")).eval()
    assert torch.equal(again(tokens()), logits)
    assert again.fingerprint() == student.fingerprint() != teacher.fingerprint()
    assert dict(again.origins) == dict(student.origins)
    assert again.diff("teacher") == student.diff("teacher")
    written = again.generate(tokens()[:, :3], 4)
    assert isinstance(written, torch.Tensor)
    for length in range(3, 7):  # what the cache gives is what the whole program gives
        assert torch.equal(written[:, length], student(written[:, :length])[:, -1].argmax(-1))
    torch.testing.assert_close(student.fused(verify="full").eval()(tokens()), logits)
    youngest = again.student(keep=[1])
    assert youngest.origins["ffn_0.up.weight"].teacher == "blocks.1.mlp.up.weight"
    assert youngest.text("teacher") == again.text()


def test_a_placed_student_computes_the_same(teacher: moec.Program) -> None:
    plan = {**PR_MOE, "student": {"keep": [0, 1, 3]}, "parallel": {"data": 2, "expert": 2}}
    student = teacher.student(plan, verify="off")
    placed = moec.api.place(student, 2)
    simulation = placed.simulate(torch.cat([tokens(), tokens()]))
    assert simulation.agrees, str(simulation)


def test_compile_cuts_before_it_makes_experts() -> None:
    """`[moe]` counts the student's own layers, and the student reads as the shallow model does."""
    plan = {**PR_MOE, "student": {"keep": [0, 2, 3]}}
    student = moec.compile(gpt(), plan, verify="off")
    built = moec.compile(gpt(3), PR_MOE, verify="off")
    assert student.text() == built.text()
    assert student.ledger.notes == ("layer 1 dropped",)
    assert student.origins["moe_1.up.weight"].teacher == "blocks.2.mlp.up.weight"
    later = moec.compile(gpt(), verify="off").student(plan, verify="off")
    assert later.text() == student.text()
    assert [name for name in student.stages if name in ("keep_layers", "lift_experts")] == [
        "keep_layers", "lift_experts",
    ]  # fmt: skip


def test_a_teacher_with_experts_keeps_them(teacher: moec.Program) -> None:
    student = teacher.student({**PR_MOE, "student": {"keep": [1, 2]}}, verify="off")
    assert list(regions(student.graph, "moe")) == ["moe_0"]
    note = student.ledger.notes[-1]
    assert note.startswith("experts are the teacher's")
    assert note.endswith("layer 0 has 2, not 0, layer 1 has 0, not 4")
    assert student.moe_settings()["moe_0"].experts == 2


def test_the_papers_student_has_its_layers() -> None:
    """24 → 21 layers of PR-MoE: 8 × 32 experts and 2 × 64, among the student's own."""
    plan = moec.Plan.shipped("pr_moe")
    layers = kept_layers(Student(depth=21), 24)
    settings = plan.layer_settings(len(layers), [f"h.{i}.mlp" for i in range(len(layers))])
    assert [layer.experts for layer in settings.values()] == [32] * 8 + [64] * 2


def test_explain_names_the_teachers_layer(teacher: moec.Program) -> None:
    said = teacher.student(keep=[0, 3], verify="off").explain("1")
    assert "teacher's  blocks.3.mlp.up.weight" in said


@pytest.mark.parametrize(
    ("options", "where", "found"),
    [
        ({"depth": 4}, "student.depth", "depth = 4, the teacher has 4 layers"),
        ({"keep": [0, 4]}, "student.keep", "layer 4"),
        ({}, "program.student", "without [student]"),
        ({"depth": 2, "keep": [0]}, "plan: student", "both depth and keep"),
        ({"keep": [2, 0]}, "plan: student.keep", "[2, 0]"),
        ({"keep": []}, "plan: student.keep", "[]"),
        ({"plan": {"student": {"depth": 2, "by": "importance"}}}, "student.by", "no text"),
    ],
)
def test_what_cannot_be_kept(teacher: moec.Program, options: dict[str, Any], where: str, found: str) -> None:
    with pytest.raises(PlanError) as caught:
        teacher.student(**options)
    assert caught.value.where == where
    assert found in caught.value.found


def test_importance_needs_text_at_compile() -> None:
    with pytest.raises(PlanError, match=r"program\.student"):
        moec.compile(gpt(2), {"student": {"depth": 1, "by": "importance"}}, verify="off")


def test_a_depth_that_the_model_does_not_have() -> None:
    with pytest.raises(PlanError, match="the teacher has 2 layers"):
        moec.compile(DecoderRecipe().build(), {"student": {"depth": 2}}, verify="off")


def test_the_program_of_a_rank_has_no_student(teacher: moec.Program) -> None:
    local = moec.api.place(teacher, 2).partition(0)
    with pytest.raises(PassError, match="a student is cut first"):
        local.student(depth=1)
