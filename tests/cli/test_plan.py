"""`moec plan`: the plan that is found can be compiled; mistakes in four lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.commands.plan import bytes_of
from moec.errors import PlanError
from moec.plan import Plan
from tests.cli.conftest import GPT, Moec

FIXED = "[parallel]\ntensor = 1\nexpert = 1\n"


def test_a_plan_is_found_and_written(moec_: Moec, tmp_path: Path) -> None:
    given, out = tmp_path / "given.toml", tmp_path / "best.toml"
    given.write_text(FIXED)
    words = ("plan", GPT, "--cluster", "a100x2", "--plan", given, "--batch", 4, "--past", 8)
    told = moec_(*words, "--out", out).stdout
    assert "latency of decoding, 4 sequences on all ranks, 8 positions" in told
    assert "the best" in told
    assert "compiled in full" in told
    assert Plan.from_toml(out).parallel.data == 2
    data = json.loads(moec_(*words, "--json").stdout)
    assert data["best"]["parallel"]["tensor"] == 1
    assert data["compiled_in_full"] == pytest.approx([data["best"]["seconds"]], rel=1e-9)
    assert data["plan"] == out.read_text()


def test_mistakes_are_told_in_four_lines(refused: Callable[..., str]) -> None:
    words = ("plan", GPT, "--cluster", "a100x2")
    assert "nearest 'latency'" in refused(*words, "--objective", "latence")
    assert "a100" in refused("plan", GPT, "--cluster", "a10x2")
    assert "38GB" in refused(*words, "--max-memory", "a lot")


def test_a_cluster_without_its_keys(refused: Callable[..., str], tmp_path: Path) -> None:
    cluster = tmp_path / "ours.toml"
    cluster.write_text('[device]\nname = "ours"\n')
    told = refused("plan", GPT, "--cluster", cluster)
    assert "ours.toml" in told


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("38GB", 38e9),
        ("40GiB", 40 * 2**30),
        ("38e9", 38e9),
        ("512 MB", 512e6),
        ("1.5T", 1.5e12),
        ("100", 100),
    ],
)
def test_sizes(text: str, size: float) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["a lot", "", "-1", "0GB", "inf", "nan", "38XB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(PlanError):
        bytes_of(text)
