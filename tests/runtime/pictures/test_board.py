"""TensorBoard gets numbers at every logged step, and pictures after evaluations while they cost little."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moec.runtime import records
from moec.runtime.display import TrainingDisplay
from moec.runtime.pictures import board as boards
from moec.runtime.pictures.board import FIRST, SHARE, BoardPictures
from tests.runtime.pictures.runs import write_run

PYRAMID = {"moe_1": 4, "moe_3": 8}


def read_board(folder: Path) -> Any:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "histograms": 0, "scalars": 0})
    board.Reload()
    return board


def test_numbers_have_groups_and_pictures_come_after_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boards, "SHARE", 1e9)
    write_run(tmp_path, PYRAMID, [5, 10, 15], evaluations=[10])
    board = read_board(tmp_path)
    assert [event.step for event in board.Images("experts")] == [10]
    assert board.Images("experts")[0].width > 500
    for tag in ("router_entropy/moe_1", "traffic_bytes/expert_4", "traffic_messages/data"):
        assert [event.step for event in board.Scalars(tag)] == [5, 10, 15]
    assert board.Scalars("traffic_bytes/expert_4")[0].value == 1_200_000
    (first, *_) = board.Histograms("load_over_mean/moe_3")
    assert first.histogram_value.num == 8
    assert first.histogram_value.sum == pytest.approx(8.0)  # the mean of them is one
    assert first.histogram_value.min == 0.0


def test_a_short_training_is_not_held_up(tmp_path: Path) -> None:
    write_run(tmp_path, PYRAMID, [5], evaluations=[5])
    assert read_board(tmp_path).Tags()["images"] == []


def test_pictures_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = [0.0], []

    class Board:
        def add_image(self, *_: object, **__: object) -> None:
            drawn.append(now[0])

    def draw(_: Path) -> None:
        now[0] += 3.0

    monkeypatch.setattr(boards, "pixels_of", draw)
    pictures = BoardPictures(Board(), tmp_path, clock=lambda: now[0])
    for step in range(2000):
        now[0] += 1.0
        pictures.show(step)
        assert 3.0 * len(drawn) <= SHARE * now[0] + 3.0 - FIRST
    assert len(drawn) > 15
    assert drawn[0] >= FIRST / SHARE


def test_without_matplotlib_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "can_draw", lambda: False)
    with records.RecordBook(tmp_path, 0) as book:
        assert book.has_board
        assert not book.has_pictures
        told = io.StringIO()
        TrainingDisplay(Console(file=told, width=200), 0, 1, 1).start(book)
    assert "no matplotlib (pip install 'moec[plot]')" in told.getvalue()
