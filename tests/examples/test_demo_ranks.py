"""`make demo-ranks`, shortened to two steps on two ranks: it goes through, and what it says is so."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from rich.console import Console

from examples import demo_ranks_screen as screen
from examples.demo_ranks import losses_of
from moec.ir.mesh import ExpertAxes, Mesh
from tests.distributed.jobs import ROOT, environment


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("demo")
    words = ["--steps", "2", "--ranks", "2", "--out", str(out), "--text", str(ROOT / "examples")]
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo_ranks", *words],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = out.iterdir()
    one, two = losses_of(folder / "1"), losses_of(folder / "2")
    assert len(one) == len(two) == 2
    assert one == pytest.approx(two, rel=1e-9)
    return done.stdout


def test_its_parts_come_in_order(printed: str) -> None:
    titles = re.findall(r"^(.*?) ─{3,}", printed, re.MULTILINE)
    report = ["Who computed what", "What was sent"]
    assert titles == ["In one process", "On 2 ranks", "Training on 2 ranks", *report, "The same losses"]


def test_progress_load_and_traffic_are_on_the_screen(printed: str) -> None:
    assert printed.count("step 2/2") == 2, "the one process, and rank 0 of the two"
    assert "def dispatch_1(self, x):" in printed
    assert re.search(r"moe_3 +rank 0 +experts 0–3 .* rows", printed)
    sent = re.findall(r"(forward|backward) +expert_2 +moec.exchange +\d+ +\d+ +([\d,]+) +([\d,]+)", printed)
    assert [direction for direction, *_ in sent] == ["backward", "forward"]
    assert all(counted == graph != "0" for _, counted, graph in sent)


def test_traffic_that_the_graph_does_not_say_is_an_error() -> None:
    counted, predicted = (
        [[["forward", "data", "all_reduce", 1, 2, 48]]],
        [[["forward", "data", "all_reduce", 1, 2, 40]]],
    )
    with pytest.raises(RuntimeError, match="counted"):
        screen.traffic(Console(quiet=True), counted, predicted)
    screen.traffic(Console(quiet=True), counted, counted)


def test_losses_that_differ_are_seen() -> None:
    console = Console(quiet=True)
    assert screen.losses(console, {1: [2.0, 4.0], 2: [2.0, 4.0]}) == 0
    assert screen.losses(console, {1: [2.0, 4.0], 2: [2.0, 4.2], 4: [2.0, 4.0]}) == pytest.approx(0.05)


def test_rows_are_those_of_the_experts_a_rank_holds() -> None:
    console = Console(width=120, color_system=None)
    mesh = Mesh(data=2, layers=(("moe_1", ExpertAxes(1, 2)),))
    with console.capture() as captured:
        screen.load(console, mesh, {"moe_1": [1, 2, 30, 40]})
    lines = captured.get().splitlines()
    assert re.search(r"moe_1 +rank 0 +experts 0–1 .* 4.1% +3 rows", lines[0])
    assert re.search(r"rank 1 +experts 2–3 .* 95.9% +70 rows", lines[1])
