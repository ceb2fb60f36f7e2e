"""The comparison of predictions with the clock: its points are new ones, and its table adds up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import page
from benchmarks.predicted import chosen, error, page_table, run_alone
from benchmarks.predicted_points import ALONE, TOGETHER, Point
from moec.calibration.grids import Sizes
from moec.calibration.references import SHAPES

POINTS = ALONE + TOGETHER


def test_no_size_of_a_point_was_calibrated() -> None:
    sizes = Sizes()
    widths = {shape.width for shape in SHAPES} | set(sizes.widths)
    lengths = {shape.sequence for shape in SHAPES} | {shape.past for shape in SHAPES}
    lengths |= set(sizes.lengths) | set(sizes.positions)
    for point in POINTS:
        assert point.width not in widths, point.name
        assert point.vocabulary not in {shape.vocabulary for shape in SHAPES}, point.name
        assert (point.batch, point.sequence) not in {(shape.batch, shape.sequence) for shape in SHAPES}
        assert point.sequence not in lengths or point.phase != "decode", point.name


def test_points_cover_what_is_promised() -> None:
    assert len(POINTS) >= 16
    assert len({point.name for point in POINTS}) == len(POINTS)
    assert {point.phase for point in POINTS} == {"training", "forward", "decode"}
    assert {point.kind for point in POINTS} == {"dense", "top-1", "top-2", "PR-MoE"}
    assert {point.ranks for point in POINTS} == {1, 2}


def test_words_choose_points() -> None:
    alone, together = chosen(["expert 2"])
    assert alone == ()
    assert {point.parallel for point in together} == {(("expert", 2),)}
    assert chosen([]) == (ALONE, TOGETHER)


@pytest.mark.parametrize("phase", ["training", "forward", "decode"])
def test_a_point_runs(phase: str) -> None:
    point = Point(phase, "top-1", 24, 2, 2, 50, 2, 8)  # type: ignore[arg-type]
    found = run_alone((replace(point, kind="dense"), point), 1)
    assert set(found) == {replace(point, kind="dense").name, point.name}
    assert all(times["min_ms"] > 0 for times in found.values())


def test_the_table_says_median_and_worst() -> None:
    cases = [
        {"case": f"point {number}", "predicted_ms": predicted, "min_ms": 10.0, "median_ms": 11.0}
        for number, predicted in enumerate((9.0, 10.5, 12.0))
    ]
    table = page_table(cases)
    assert error(cases[0]) == pytest.approx(-0.1)
    assert "| point 2 | 12.00 | 10.00 | 11.00 | +20.0% |" in table
    assert "Median error 10.0%, worst 20.0%, 3 points." in table


def test_the_page_has_a_place_for_it() -> None:
    begin, end = page.marks("predicted")
    text = page.PAGE.read_text(encoding="utf-8")
    assert text.count(begin) == text.count(end) == 1
