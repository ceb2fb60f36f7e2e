"""The page of real programs: every step, section and region can be looked at, and shows what it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

import moec
from examples.gpt import GPT, GPTConfig
from moec.program import Program
from moec.view.filming import timeline_of
from moec.view.timeline import Drawing, Timeline
from tests.view.conftest import Open

PLAN: dict[str, Any] = {
    "moe": {"layers": "1::2", "experts": 4, "residual": "learned"},
    "parallel": {"expert": 4},
}

# Whether every operator stands on the sides where it is, at a place that is a number; per pane, its labels.
LOOK = """() => {
  const look = (svg) => ({
    operators: svg.querySelectorAll('.operator').length,
    frames: svg.querySelectorAll('.frame').length,
    broken: [...svg.querySelectorAll('[transform], path')].filter((each) =>
      /NaN|undefined|Infinity/.test(`${each.getAttribute('transform')} ${each.getAttribute('d')}`)).length,
  });
  return Object.fromEntries(
    [...document.querySelectorAll('.pane-picture')].map((svg) => [svg.dataset.side, look(svg)]));
}"""


@pytest.fixture(scope="module")
def program() -> Program:
    """A PR-MoE on four ranks."""
    model = GPT(GPTConfig(vocab=32, seq=16, layers=3, width=16, heads=2))
    return moec.compile(model, PLAN, world=4, verify="off")


@pytest.fixture(scope="module")
def placed(program: Program) -> Timeline:
    """What is shown of it."""
    return timeline_of(program, B=4, S=16)


def regions_on(drawing: Drawing, side: str) -> set[int]:
    """Regions that some operator stands in."""
    sides = [getattr(node, side) for node in drawing.nodes]
    return {seen.region for seen in sides if seen is not None and seen.region is not None}


def expected(drawing: Drawing) -> dict[str, dict[str, int]]:
    """What `LOOK` gives of a drawing whose regions are all unfolded."""
    return {
        side: {
            "operators": sum(getattr(node, side) is not None for node in drawing.nodes),
            "frames": len(regions_on(drawing, side)),
            "broken": 0,
        }
        for side in ("before", "after")
    }


def go(page: Page, step: int, section: int) -> None:
    """Look at a section with all of its regions unfolded."""
    page.evaluate(
        "([step, section]) => { state.change({ step, section });"
        "state.change({ open: new Set(state.drawing().regions.keys()) }); }",
        [step, section],
    )


def test_every_section_of_every_step_shows_each_operator_where_it_is(
    open_page: Open, placed: Timeline
) -> None:
    page = open_page(placed, "#sizes")
    shown = 0
    for at, step in enumerate(placed.steps):
        for number, section in enumerate(step.sections):
            go(page, at, number)
            wanted = expected(placed.drawings[section.drawing])
            for side, seen in page.evaluate(LOOK).items():
                assert seen == wanted[side], f"{step.name}, {section.title}, {side}"
                shown += 1
    assert shown > 2 * len(placed.steps)


def test_the_experts_of_a_placed_program_tell_their_axis(open_page: Open, placed: Timeline) -> None:
    names = [step.name for step in placed.steps]
    at = names.index("place_experts")
    section = next(number for number, each in enumerate(placed.steps[at].sections) if 1 in each.layers)
    page = open_page(placed, f"#step=place_experts&section={section}&overlay=axis")
    moe = page.locator('svg[data-side="after"] .region', has_text="moe_1")
    assert "expert" in (moe.locator(".second").text_content() or "")
    assert page.locator("#heading").inner_text().count("marked") == 1


def test_the_page_of_a_program_carries_its_timeline(
    program: Program, placed: Timeline, tmp_path: Path
) -> None:
    text = program.show(tmp_path / "page.html", B=4, S=16).read_text(encoding="utf-8")
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert [step["name"] for step in data["steps"]] == [step.name for step in placed.steps]
    assert data["sizes"]["B"] == 4
