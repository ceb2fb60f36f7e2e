"""`moec calibrate`: a file of this machine that predictions can be made with; what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moec
from moec.calibration.watched import WatchedRun, intervals
from moec.cost import Hardware, predict
from tests.cli.conftest import Moec
from tests.cli.models import gpt


@pytest.fixture(scope="module")
def file(moec_: Moec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick calibration, of one process."""
    path = tmp_path_factory.mktemp("hardware") / "this.toml"
    said = moec_("calibrate", "--quick", "--ranks", 1, "--out", path).stdout
    assert str(path) in said
    assert "GFLOP/s" in said
    return path


def test_the_file_says_where_it_comes_from(file: Path) -> None:
    known = Hardware.from_toml(file).device.measured
    assert known is not None
    assert (known.about.threads, known.about.torch) == (1, torch.__version__)
    assert known.about.command == "moec calibrate --threads 1 --ranks 1 --quick"
    assert set(known.operators["aten::gelu"]) == {"forward", "backward", "inference"}


@pytest.mark.parametrize("phase", ["training", "forward", "decode"])
def test_predictions_know_every_operator_of_a_gpt(file: Path, phase: str) -> None:
    cost = moec.compile(gpt(), verify="off").cost(phase)  # type: ignore[arg-type]
    letters = {"B": 2, "n": 1, "m": 1, "L": 12} if phase == "decode" else {"B": 2, "S": 12}
    found = predict(cost, Hardware.from_toml(file), captured=False, **letters)
    assert found.unmeasured == ()
    assert 1e-5 < found.seconds < 1.0
    assert found.seconds == pytest.approx(sum(found.by("kind").values()))


def test_what_was_not_measured_is_listed(file: Path) -> None:
    text = file.read_text().replace('"aten::gelu"', '"aten::erf"')
    found = predict(
        moec.compile(gpt(), verify="off").cost("forward"),
        Hardware.from_text(text),
        captured=False,
        B=2,
        S=12,
    )
    assert found.unmeasured == ("aten::gelu",)


def test_old_and_damaged_files_are_refused(file: Path) -> None:
    text = file.read_text()
    for changed, where in (
        (text.replace("version = 1", "version = 0", 1), "device.measured.version"),
        (text.replace("[device.measured.caches]", "[device.measured.cache]"), "device.measured"),
    ):
        with pytest.raises(moec.errors.PlanError) as error:
            Hardware.from_text(changed, "old.toml")
        assert "old.toml:" in error.value.where
        assert where in error.value.where


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--out", "this.json"), "this.json"),
        (("--threads", 4096), "4096 threads"),
        (("--thread", 1), "--thread"),
    ],
)
def test_mistakes(refused: Callable[..., str], words: tuple[object, ...], found: str) -> None:
    assert found in refused("calibrate", *words)


def test_operators_are_told_apart_and_the_program_runs_as_ever() -> None:
    program = moec.compile(gpt(), verify="off").train()
    tokens = torch.randint(0, 20, (2, 9))
    watched = WatchedRun(program.graph)
    torch.manual_seed(0)
    logits = watched.run(tokens)
    torch.manual_seed(0)
    torch.testing.assert_close(logits, program(tokens), rtol=0, atol=0)
    watched.run_backward(logits.square().mean())
    names = {one.name for one in program.cost("training").operations}
    assert watched.forward.keys() <= names
    assert watched.backward.keys() <= watched.forward.keys()
    assert all(seconds >= 0 for times in watched.backward.values() for seconds in times)


def test_the_time_between_gradients_belongs_to_the_operator_that_got_the_first() -> None:
    marks = [("down", 1.0), ("up", 4.0), ("up", 4.5), ("norm", 6.0)]
    assert dict(intervals(marks, 10.0)) == {"down": 3.0, "up": 2.0, "norm": 4.0}
