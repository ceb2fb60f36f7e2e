"""`moec plot RUN`: what experts did in a training, drawn and told; a mistake is told, and draws nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import GPT, Moec
from tests.runtime.pictures.runs import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a pyramid on ranks."""
    return write_run(tmp_path_factory.mktemp("runs") / "run", {"moe_1": 4, "moe_3": 8}, [5, 10])


def test_the_picture_and_the_last_numbers(moec_: Moec, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "experts.png"
    told = moec_("plot", run, "--out", out).stdout
    rows = [line.split() for line in told.splitlines()]
    assert rows[0] == ["layer", "experts", "busiest", "idle", "dropped", "router", "entropy"]
    assert rows[1][:2] + rows[1][3:] == ["moe_1", "4", "1", "1.0", "%", "0.69", "of", "1.39", "nats"]
    assert rows[5:7] == [["data", "12", "3,000", "B"], ["expert_4", "40", "1.2", "MB"]]
    assert told.splitlines()[-1] == f"drawn in {out}"
    assert out.stat().st_size > 10_000


def test_one_layer_and_one_part(moec_: Moec, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "load.svg"
    told = moec_("plot", run, "--of", "load", "--layers", 3, "--out", out).stdout
    assert "moe_3" in told
    assert "moe_1" not in told
    assert "moe_3 · 8 experts" in out.read_text()


def test_an_older_run_has_dashes(moec_: Moec, tmp_path: Path) -> None:
    old = write_run(tmp_path, {"moe_1": 4}, [5], observed=False)
    told = moec_("plot", old, "--out", tmp_path / "a.svg").stdout
    assert told.splitlines()[1].split() == ["moe_1", "–", "–", "–", "0.5", "%", "–"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--of", "trafic"), "nearest 'traffic'"),
        (("--of", "latency"), "experts, load, dropped, entropy, traffic"),
        (("--layers", "moe_4"), "no expert layer 'moe_4'"),
        (("--hardware", "a100x8"), "it is not predicted"),
        (("--over", "batch"), "--over"),
        (("--out", "plot.gif"), ".png, .svg, .pdf"),
    ],
)
def test_mistakes(refused: Callable[..., str], run: Path, words: tuple[object, ...], told: str) -> None:
    assert told in refused("plot", run, *words)


def test_what_only_a_training_has(refused: Callable[..., str], run: Path, tmp_path: Path) -> None:
    assert "no train.jsonl" in refused("plot", tmp_path, "--of", "experts")
    assert "no train.jsonl" in refused("plot", GPT, "--of", "load")
    assert "train.jsonl" in refused("plot", GPT, "--layers", 3)
