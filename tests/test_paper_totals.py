"""The parameter totals of the paper come out of an ordinary dense GPT and a shipped plan."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.paper_totals import PAPER, PaperModel, compiled, digits, measure_apart, plan_of
from moec.ir import region_of, regions

DOCS = Path(__file__).parents[1] / "docs" / "paper.md"


@pytest.mark.parametrize("model", PAPER, ids=lambda model: model.name)
def test_total_at_the_printed_digits(model: PaperModel) -> None:
    """In a process of its own, in under a minute and 2 GB; and docs/paper.md says the same numbers."""
    found = measure_apart(model)
    assert digits(found.parameters, model.total) == model.total
    assert found.seconds < 60
    assert found.peak_bytes < 2e9
    assert written_of(model) == [found.parameters, found.active]


def written_of(model: PaperModel) -> list[int]:
    """The numbers that docs/paper.md gives for a model: parameters, and those active for a token."""
    row = next(line for line in DOCS.read_text().splitlines() if model.name in line)
    return [int(number.replace(",", "")) for number in re.findall(r"\d{1,3}(?:,\d{3})+", row)]


def test_a_teacher_that_is_cut_has_the_same_total() -> None:
    """350M+PR-MoE-32/64 with 21 of its layers: the paper's student again, with the teacher's own experts."""
    teacher, student = PAPER[2], PAPER[4]
    assert (teacher.plan, student.plan) == ("pr_moe", "pr_mos")
    cut = compiled(teacher).student(plan_of(student))
    assert [cut.num_parameters(), cut.num_parameters(active=True)] == written_of(student)
    experts = [region_of(m).settings["experts"] for m in regions(cut.graph, "moe").values()]  # type: ignore[union-attr]
    assert experts == [32] * 8 + [64] * 2
