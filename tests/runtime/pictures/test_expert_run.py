"""What is read of a run is what was written, whatever there is of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import ArtifactError
from moec.runtime.observed import Observed
from moec.runtime.pictures.expert_run import Series, is_run, read_run
from moec.runtime.records import RecordBook, read_records
from tests.runtime.pictures.runs import TRAFFIC, write_run

PYRAMID = {"moe_1": 3, "moe_3": 6, "moe_11": 6}


def test_every_number_is_read_back(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, PYRAMID, [5, 10, 12]))
    rows = [row for row in read_records(tmp_path / "train.jsonl") if row["kind"] == "observed"]
    for layer, experts in PYRAMID.items():
        series = run.load[layer]
        assert series.steps.tolist() == [5, 10, 12]
        counts = np.array([row["counts"][layer] for row in rows])
        np.testing.assert_allclose(series.values, counts * experts / counts.sum(1, keepdims=True))
        np.testing.assert_allclose(series.values.sum(1), experts)
        assert run.dropped[layer].values.tolist() == [0.005, 0.010, 0.012]
        assert run.router_entropy[layer].values[0] == pytest.approx(np.log(experts) / 2)
    assert run.experts == PYRAMID
    assert run.layers == list(PYRAMID)
    assert {axis: series.values.tolist() for axis, series in run.num_bytes.items()} == {
        axis: [sending.bytes] * 3 for axis, sending in TRAFFIC.items()
    }
    assert run.messages["data"].values.tolist() == [12.0] * 3
    assert not run.held_out


def test_an_older_run_has_what_it_has(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, PYRAMID, [5, 10], observed=False, evaluations=[10]))
    assert run.held_out
    assert run.load["moe_1"].steps.tolist() == [10]
    assert run.dropped["moe_1"].steps.tolist() == [5, 10]
    assert (run.router_entropy, run.num_bytes) == ({}, {})


def test_a_resumed_run_is_one_run(tmp_path: Path) -> None:
    write_run(tmp_path, PYRAMID, [5, 10, 15])
    with RecordBook(tmp_path, 10) as book:  # goes on after step 10
        book.write(Observed(12, {layer: (1,) * number for layer, number in PYRAMID.items()}))
    run = read_run(tmp_path)
    assert run.load["moe_3"].steps.tolist() == [5, 10, 12]
    assert run.load["moe_3"].values[-1].tolist() == [1.0] * 6


def test_a_line_that_is_still_written_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, PYRAMID, [5, 10])
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text()[:-9])
    assert read_run(tmp_path).load["moe_1"].steps.tolist() == [5]


def test_an_expert_layer_without_rows_is_idle(tmp_path: Path) -> None:
    with RecordBook(tmp_path, 0) as book:
        book.write(Observed(1, {"moe_1": (0, 0, 0)}))
    assert read_run(tmp_path).load["moe_1"].values.tolist() == [[0.0, 0.0, 0.0]]


def test_damage_and_absence_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", PYRAMID, [5])
    (run / "program").mkdir()
    assert is_run(run)
    assert not is_run(run / "program")
    with pytest.raises(ArtifactError, match=r"no train.jsonl[\s\S]*run, which has one"):
        read_run(run / "program")
    path = run / "train.jsonl"
    path.write_text("{not json}\n" + path.read_text())
    with pytest.raises(ArtifactError, match=r"train\.jsonl:1"):
        read_run(run)


def test_layers_are_chosen_by_name_number_or_glob(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, PYRAMID, [5]))
    assert run.only(["3"]).layers == ["moe_3"]
    assert run.only(["moe_1*"]).layers == ["moe_1", "moe_11"]
    assert run.only(["moe_11", "1"]).layers == ["moe_1", "moe_11"]
    assert run.only(["3"]).num_bytes == run.num_bytes
    with pytest.raises(ArtifactError, match="nearest 'moe_1'"):
        run.only(["mo_1"])


@given(number=st.integers(1, 40), most=st.integers(1, 12))
def test_thinning_averages_neighbours(number: int, most: int) -> None:
    series = Series(np.arange(1, number + 1), np.arange(number, dtype=np.float64)[:, None] * [1.0, 2.0])
    thin = series.thinned(most)
    assert len(thin.steps) == len(thin.values) == min(number, most)
    assert thin.steps[-1] == number
    assert (np.diff(thin.steps) > 0).all()
    first = np.concatenate([[0], thin.steps[:-1]])  # each stands for the steps after the one before it
    np.testing.assert_allclose(thin.values[:, 0], (first + thin.steps - 1) / 2)
