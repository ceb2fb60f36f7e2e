"""`moec train`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moec
from moec.commands.asked import training_settings
from moec.errors import PlanError
from moec.plan import Train
from tests.cli.conftest import GPT, Moec, run_moec

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def trained(moec_: Moec, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    run = tmp_path_factory.mktemp("runs") / "run"
    text = run.with_name("text.txt")
    text.write_text("abc abd abe " * 100)
    moec_("train", saved, "--data", text, "--out", run)
    return run


def test_a_run_trains_saves_and_says_what_next(moec_: Moec, plan: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    out = moec_("train", GPT, "--plan", plan, "--data", text, "--out", run).stdout
    assert "step 4/4" in out
    assert "held-out loss" in out
    assert f"moec generate {run}/program --prompt The" in out
    trained, fresh = moec.load(run / "program"), moec.compile(model(), plan, verify="off")
    assert not trained.training
    moved = {n for n, v in trained.state_dict().items() if not torch.equal(v, fresh.state_dict()[n])}
    assert {"moe_1.up.weight", "moe_1.router.weight", "token_embedding.weight"} <= moved
    assert len((run / "train.jsonl").read_text().splitlines()) >= 2


def model() -> torch.nn.Module:
    from moec.models import open_model

    return open_model(GPT)


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(moec.load(run / "program").state_dict())


def test_a_resumed_run_is_the_same_run(moec_: Moec, plan: Path, text: Path, tmp_path: Path) -> None:
    common = (GPT, "--plan", plan, "--data", text)
    moec_("train", *common, "--out", tmp_path / "whole")
    (tmp_path / "halves").mkdir()
    for step in (2, 4):  # the second half starts from the checkpoint of the first alone
        resume = ["--resume"] if step == 4 else []
        words = ("train", *common, "--out", tmp_path / "halves", *resume)
        moec_(*words) if step == 4 else stopped_at_2(tmp_path / "whole", tmp_path / "halves")
    whole, halves = weights_of(tmp_path / "whole"), weights_of(tmp_path / "halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def stopped_at_2(whole: Path, folder: Path) -> None:
    """What a run leaves that was killed after its second step."""
    (whole / "step-00000002").rename(folder / "step-00000002")


def test_settings_given_here_come_before_the_plan(
    moec_: Moec, saved: Path, text: Path, tmp_path: Path
) -> None:
    words = ("--steps", 1, "--batch", 3, "--sequence", 8, "--lr", "1e-4", "--seed", 5)
    told = json.loads(moec_("train", saved, "--data", text, "--out", tmp_path / "r", *words, "--json").stdout)
    assert told["steps"] == 1
    (record,) = (tmp_path / "r").glob("step-*/*.json")
    settings = json.loads(record.read_text())["record"]["settings"]
    given = {"steps": 1, "batch": 3, "sequence": 8, "lr": 1e-4, "seed": 5}
    assert {key: settings[key] for key in given} == given


def test_sequences_fit_the_model_where_nobody_says_how_long(moec_: Moec, text: Path, tmp_path: Path) -> None:
    """Of 16 positions, and not the 256 that are the default; the run and its program say so."""
    run = tmp_path / "run"
    common = ("--data", text, "--steps", 1, "--batch", 2, "--out")
    moec_("train", GPT, *common, run)
    (record,) = run.glob("step-*/*.json")
    assert json.loads(record.read_text())["record"]["settings"]["sequence"] == 16
    assert moec.load(run / "program").plan.train.sequence == 16
    moec_("train", run / "program", *common, tmp_path / "further")


def test_defaults_follow_what_they_are_computed_from() -> None:
    planned = Train(steps=1000, lr=1e-3, warmup=100, min_lr=1e-4, batch=4)
    changed = training_settings(planned, {"steps": 20, "lr": 1e-5})
    assert (changed.steps, changed.warmup, changed.batch) == (20, 2, 4)
    assert changed.lr == 1e-5
    assert changed.min_lr == pytest.approx(1e-6)
    assert training_settings(planned, {}) == planned
    with pytest.raises(PlanError, match="1 or more"):
        training_settings(planned, {"batch": 0})


# what is refused


def test_a_folder_with_another_run(trained: Path, saved: Path, text: Path, refused: Refused) -> None:
    told = refused("train", saved, "--data", text, "--out", trained)
    assert "a run that came to step-00000004" in told
    assert "--resume" in told


def test_resuming_what_is_not_there(saved: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    assert "no checkpoint" in refused("train", saved, "--data", text, "--out", tmp_path / "r", "--resume")


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", ["text.txt", "empty text"]),
        (b"\0\1", ["text.txt", "NUL bytes"]),
        (b"abc", ["text.txt"]),
        (None, ["text.txt", "no such file or folder"]),
    ],
)
def test_texts(
    content: bytes | None, lines: list[str], saved: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content) if content is not None else None
    told = refused("train", saved, "--data", path, "--out", tmp_path / "r")
    assert [line for line in lines if line not in told] == [], told
    assert not (tmp_path / "r").exists()


def test_tokens_outside_of_the_vocabulary(text: Path, tmp_path: Path, refused: Refused) -> None:
    words = ("--data", text, "--out", tmp_path / "r", "--sequence", 8)
    told = refused("train", f"{GPT}?vocab=99", *words)
    assert "token 101, and a model with 99 token values" in told
    assert not (tmp_path / "r").exists()


def test_sequences_longer_than_the_model(text: Path, tmp_path: Path, refused: Refused) -> None:
    told = refused("train", GPT, "--data", text, "--out", tmp_path / "r", "--sequence", 17)
    assert "at most 16" in told
    assert "nearest --sequence 16" in told


def test_a_missing_tokenizer(saved: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    words = ("--data", text, "--out", tmp_path / "r", "--tokenizer", tmp_path / "tokenizer.json")
    assert "tokenizer.json\n  found   no such file" in refused("train", saved, *words)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(text: Path, tmp_path: Path) -> None:
    run, plan = tmp_path / "run", tmp_path / "plan.toml"
    plan.write_text("[train]\nbatch = 2\nsequence = 8\nsave_every = 1\nwarmup = 0\n")
    words = ("--data", text, "--out", run, "--lr", "1e37", "--steps", 40)
    result = run_moec("train", GPT, "--plan", plan, *words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    kept = max(run.glob("step-*"))
    assert f"the last good checkpoint is {kept}" in result.stderr
    assert "not finite" in result.stderr or "nan" in result.stderr or "inf" in result.stderr
    assert not (run / "program").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(saved: Path, text: Path, tmp_path: Path) -> None:
    """A real process with a real signal."""
    run = tmp_path / "run"
    words = ["train", saved, "--data", text, "--out", run, "--steps", 100_000]
    command = [sys.executable, "-m", "moec", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(run.glob("step-*")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted after step" in out
    assert "--resume   go on where it stopped" in out
    assert "Traceback" not in err
