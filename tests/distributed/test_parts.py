"""The part that a rank of `moec train` holds: of a model, of a saved program, placed before or not."""

from __future__ import annotations

from pathlib import Path

import pytest

import moec
from moec.api import place
from moec.commands.programs import part_of
from moec.errors import PlanError
from moec.models import open_model
from moec.plan import Plan
from tests.distributed.jobs import GPT, write_plan


def placed_on(world: int) -> moec.Program:
    plan = Plan.model_validate({"moe": {"layers": "1::2", "experts": 4}, "parallel": {"expert": 4}})
    return moec.compile(open_model(GPT), plan, world=world, verify="off")


def test_a_program_placed_anew_is_as_if_it_had_never_been_elsewhere() -> None:
    """The text holds the placements of weights and values."""
    on_two = placed_on(2)
    for before in (1, 4):
        again = place(placed_on(before), 2)
        assert again.layout == on_two.layout
        assert again.text() == on_two.text()
        assert again.partition(1).text() == on_two.partition(1).text()


def test_placing_leaves_the_program_as_it_is() -> None:
    program = placed_on(2)
    text, layout = program.text(), program.layout
    place(program, 4)
    assert (program.text(), program.layout) == (text, layout)


@pytest.mark.parametrize("saved_for", [1, 2, 4])
def test_ranks_take_their_part_of_a_saved_program(saved_for: int, tmp_path: Path) -> None:
    folder = str(placed_on(saved_for).save(tmp_path / "program"))
    for rank in (0, 1):
        part = part_of(folder, None, rank, 2)
        assert part.layout.mesh.world == 2
        assert part.text() == placed_on(2).partition(rank).text()


def test_a_part_of_a_model_by_a_plan(tmp_path: Path) -> None:
    plan = str(write_plan(tmp_path))
    part = part_of(GPT, plan, 1, 2, verify="off")
    assert (part.rank, part.layout.mesh.world) == (1, 2)
    with pytest.raises(PlanError, match="a plan for"):
        part_of(str(placed_on(2).save(tmp_path / "program")), plan, 0, 2)


def test_a_world_that_the_axes_do_not_divide(tmp_path: Path) -> None:
    path = tmp_path / "tensor.toml"
    path.write_text("[parallel]\ntensor = 2\n")
    with pytest.raises(PlanError, match="a number that divides 3: 1, 3"):
        part_of(GPT, str(path), 0, 3)
