"""`moec plot`: the numbers are predictions, the picture shows them, and nothing is drawn by mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

import moec
from moec.cost import Hardware, predict
from moec.drawing import draw
from moec.errors import CostError
from moec.models import open_model
from moec.sweep import Curve, Point, Sweep, doublings, swept
from tests.cli.conftest import GPT, Moec

A100 = Hardware.shipped("a100x8")


def test_points_are_predictions() -> None:
    program = moec.compile(open_model(GPT, meta=True), plan={"parallel": {"data": 2}}, verify="off")
    sweep = swept({"ours": program}, A100, "batch", "forward", {"S": 8}, [1, 4])
    cost = program.cost("forward")
    for point in sweep.curves[0].points:
        assert point.of("latency") == predict(cost, A100, B=point.at, S=8).seconds
        assert point.of("throughput") == pytest.approx(2 * point.at * 8 / point.seconds)
        assert point.fits


def test_over_ranks_the_program_is_placed_anew() -> None:
    program = moec.compile(open_model(GPT, meta=True), verify="off")
    sweep = swept({"ours": program}, A100, "ranks", "decode", {"B": 2, "L": 16}, [1, 2, 4])
    assert [(point.at, point.tokens) for point in sweep.curves[0].points] == [(1, 2), (2, 4), (4, 8)]


def test_a_picture_names_its_curves(tmp_path: Path) -> None:
    fitting, too_large = Point(1, 0.5, 8, True), Point(2, 0.75, 16, False)
    curves = (Curve("one plan", (fitting, too_large)), Curve("another", (fitting, too_large)))
    sweep = Sweep("batch", "forward", A100, {"S": 8}, curves)
    picture = draw(sweep, "throughput", tmp_path / "plot.svg").read_text()
    ElementTree.fromstring(picture)
    for text in (
        "one plan",
        "another",
        "hollow: does not fit into memory",
        "Tokens a second of a forward run",
    ):
        assert f"<!-- {text}" in picture
    assert draw(sweep, "latency", tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_draws_and_tells(moec_: Moec, plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "plot.png"
    words = (
        "plot",
        GPT,
        "-p",
        "dense",
        "-p",
        plan,
        "--hardware",
        "a100x8",
        "--sequence",
        8,
        "--to",
        4,
        "-o",
        out,
    )
    told = moec_(*words).stdout
    assert [line.split()[0] for line in told.splitlines()[:4]] == ["batch", "1", "2", "4"]
    assert told.splitlines()[0].split() == ["batch", "dense", str(plan)]
    assert out.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "--hardware\n  found   none"),
        (("--hardware", "a100x8"), "no --sequence"),
        (("--hardware", "a100x8", "--over", "batc"), "nearest 'batch'"),
        (("--hardware", "a100x8", "--over", "past"), "ranks, batch, sequence"),
        (("--hardware", "a100x8", "--batch", 4, "--sequence", 8), "--to 4"),
        (("--of", "speed"), "one of latency, throughput"),
        (("--out", "plot.gif"), ".png, .svg, .pdf"),
        (("--hardware", "a100x8", "--sequence", 8, "--from", 8, "--to", 4), "from 8 to 4"),
        (("--hardware", "a100x8", "--sequence", 99999), "at most 16, the model's limit"),
        (("--hardware", "a100x8", "--over", "sequence", "--batch", 1, "--to", 99999), "99,999 positions"),
    ],
)
def test_mistakes(refused: Callable[..., str], words: tuple[object, ...], told: str) -> None:
    assert told in refused("plot", GPT, *words)


def test_without_matplotlib_it_says_so(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'moec[plot]'" in refused("plot", GPT)


def test_doublings_stay_in_the_range() -> None:
    assert doublings(3, 40) == [3, 6, 12, 24]
    with pytest.raises(CostError, match="nearest 'ranks'"):
        swept({}, A100, "rank", "forward", {}, [1])
