"""The trainer as a whole: what it writes, how it ends, and that resuming changes nothing."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from moec.errors import ArtifactError, DataError, TrainError
from moec.plan import LayerSettings, Plan, Train
from moec.runtime.checkpoint import list_checkpoints, load_checkpoint
from moec.runtime.data import IGNORED, Batch, TextData
from moec.runtime.records import read_records
from moec.runtime.train import Trainer
from moec.runtime.trainable import LossTerms
from tests.runtime.tiny import LAYER, TinyProgram, tiny_settings, tiny_text

QUIET = Console(quiet=True)


@pytest.fixture
def data(tmp_path: Path) -> TextData:
    return tiny_text(tmp_path)


def trainer(program: TinyProgram, data: TextData, folder: Path, **changes: object) -> Trainer:
    return Trainer(program, tiny_settings(**changes), data, folder, console=QUIET)


def state(program: TinyProgram) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in program.state_dict().items()}


def assert_equal_states(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


# a run


def test_training_learns_and_reports(data: TextData, tmp_path: Path) -> None:
    program = TinyProgram(dropout=0.1).eval()
    told = trainer(program, data, tmp_path / "run", steps=200, batch=8, eval_every=50, lr=0.02).run()
    assert [record.step for record in told.history] == list(range(1, 201))
    assert told.step == 200
    assert not told.interrupted
    assert [record.step for record in told.evaluations] == [50, 100, 150, 200]
    assert told.final is not None
    assert told.history[0].loss > 5.0
    assert told.tokens_per_second > 0.0
    assert told.final.loss < 2.9
    assert not program.training  # left in the mode it came in


def test_records_hold_every_number_and_the_load(data: TextData, tmp_path: Path) -> None:
    program = TinyProgram()
    told = trainer(program, data, tmp_path / "run", steps=7, log_every=3, eval_every=4).run()
    rows = read_records(tmp_path / "run/train.jsonl")
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("step", 3), ("observed", 3), ("evaluation", 4), ("step", 6), ("observed", 6), ("step", 7),
        ("observed", 7), ("evaluation", 7),
    ]  # fmt: skip
    assert rows[0].keys() == {
        "kind", "step", "loss", "task", "balance", "z", "lr", "grad_norm", "tokens_per_second", "load",
    }  # fmt: skip
    assert rows[0]["loss"] == told.history[2].loss == pytest.approx(rows[0]["task"] + rows[0]["balance"])
    assert rows[0]["load"][LAYER].keys() == {"max_over_mean", "entropy", "dropped"}
    assert rows[0]["load"][LAYER]["dropped"] == 0.0
    assert sum(rows[1]["counts"][LAYER]) == 4 * 8 * 2  # batch, sequence, top_k
    assert (rows[1]["router_entropy"], rows[1]["traffic"]) == ({}, {})  # no operators of moec, no ranks
    assert rows[2]["bits"] == pytest.approx(rows[2]["loss"] / math.log(2))


def test_tensorboard_gets_the_same_numbers(data: TextData, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = trainer(TinyProgram(), data, tmp_path, steps=3).run()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(
        [record.loss for record in told.history]
    )
    assert {"held_out/loss", f"train/{LAYER}/max_over_mean", "train/lr"} <= set(board.Tags()["scalars"])


def test_lines_when_there_is_no_terminal(data: TextData, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        settings = tiny_settings(steps=5, log_every=2)
        Trainer(TinyProgram(), settings, data, tmp_path / "run", console=Console(file=file, width=200)).run()
    lines = (tmp_path / "out").read_text().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5", "step 5"]
    assert "tokens/s" in lines[0]
    assert "held-out loss" in lines[-1]


def test_checkpoints_hold_what_is_promised(data: TextData, tmp_path: Path) -> None:
    plan = Plan(train=tiny_settings(steps=6, save_every=2, keep=2))
    program = TinyProgram()
    told = Trainer(program, plan.train, data, tmp_path / "run", plan=plan, console=QUIET).run()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000006"]
    assert told.checkpoint is not None
    saved = load_checkpoint(told.checkpoint)
    assert saved.tensors["parameters"].keys() == dict(program.named_parameters()).keys()
    assert torch.equal(saved.tensors["buffers"]["bias"], program.bias)
    assert saved.tensors["optimizer"]["up/exp_avg_sq"].shape == program.up.shape
    assert saved.record["position"] == 24
    assert saved.record["program"] == program.fingerprint()
    assert Plan.from_text(saved.record["plan"]) == plan
    assert Train.model_validate({**saved.record["settings"], "betas": plan.train.betas}) == plan.train


def test_the_callers_random_state_is_untouched_and_does_not_matter(data: TextData, tmp_path: Path) -> None:
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        told = trainer(TinyProgram(dropout=0.3), data, tmp_path / str(seed), steps=3).run()
        assert torch.equal(before, torch.get_rng_state())
        losses.append([record.loss for record in told.history])
    assert losses[0] == losses[1]


# resuming


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resuming_continues_bit_for_bit(data: TextData, tmp_path: Path, dtype: str) -> None:
    layer = LayerSettings(experts=3, top_k=2, balance="bias", bias_rate=0.01)
    changes: dict[str, Any] = {"accumulate": 2, "eval_every": 3, "save_every": 4, "dtype": dtype}

    def fresh() -> TinyProgram:
        return TinyProgram(dropout=0.2, settings=layer)

    whole = fresh()
    told = trainer(whole, data, tmp_path / "whole", **changes).run()
    first = trainer(fresh(), data, tmp_path / "parts", **changes).run(stop_at=5)
    resumed = TinyProgram(dropout=0.2, settings=layer, seed=9)  # its own weights must not matter
    torch.manual_seed(77)
    second = trainer(resumed, data, tmp_path / "parts", **changes).run(resume=True)

    assert_equal_states(state(resumed), state(whole))
    assert bool(whole.bias.any())
    losses = [record.loss for record in first.history + second.history]
    assert losses == [record.loss for record in told.history]
    assert second.evaluations[-1].evaluation == told.evaluations[-1].evaluation
    saved = [load_checkpoint(tmp_path / folder / "step-00000010") for folder in ("whole", "parts")]
    for stem in saved[0].tensors:
        assert_equal_states(dict(saved[0].tensors[stem]), dict(saved[1].tensors[stem]))
    steps = [row["step"] for row in read_records(tmp_path / "parts/train.jsonl") if row["kind"] == "step"]
    assert steps == list(range(1, 11))


def test_steps_after_the_checkpoint_are_taken_again(data: TextData, tmp_path: Path) -> None:
    program = TinyProgram()
    run = trainer(program, data, tmp_path / "run", steps=6, save_every=2, eval_every=0)
    run.run(stop_at=5)
    for path in list_checkpoints(tmp_path / "run")[1:]:  # as if killed just after step 4 was saved
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    told = run.run(resume=True)
    assert [record.step for record in told.history] == [5, 6]
    steps = [row["step"] for row in read_records(tmp_path / "run/train.jsonl") if row["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_can_be_made_longer(data: TextData, tmp_path: Path) -> None:
    program = TinyProgram()
    trainer(program, data, tmp_path / "run", steps=3).run()
    told = trainer(program, data, tmp_path / "run", steps=5).run(resume=True)
    assert [record.step for record in told.history] == [4, 5]
    assert not trainer(program, data, tmp_path / "run", steps=5).run(resume=True).history


def test_what_cannot_be_resumed(data: TextData, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ArtifactError, match="no checkpoint"):
        trainer(TinyProgram(), data, folder).run(resume=True)
    trainer(TinyProgram(), data, folder, steps=2).run()
    with pytest.raises(TrainError, match="checkpoints of another run, up to step-00000002"):
        trainer(TinyProgram(), data, folder).run()
    with pytest.raises(ArtifactError, match="program tiny"):
        trainer(TinyProgram(dropout=0.4), data, folder).run(resume=True)
    with pytest.raises(ArtifactError, match="seed 0"):
        trainer(TinyProgram(), data, folder, seed=1).run(resume=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(ArtifactError, match="data"):
        trainer(TinyProgram(), tiny_text(tmp_path / "other", repeats=300), folder).run(resume=True)


def test_weights_of_another_shape_are_refused_before_anything_changes(data: TextData, tmp_path: Path) -> None:
    trainer(TinyProgram(width=12), data, tmp_path / "run", steps=2).run()
    wider = TinyProgram(width=14)
    before = state(wider)
    with pytest.raises(ArtifactError, match="needed"):
        trainer(wider, data, tmp_path / "run").run(resume=True)
    assert_equal_states(state(wider), before)


def test_a_damaged_checkpoint_is_named(data: TextData, tmp_path: Path) -> None:
    trainer(TinyProgram(), data, tmp_path / "run", steps=4, save_every=2).run()
    path = tmp_path / "run/step-00000004/optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="step-00000002") as caught:
        trainer(TinyProgram(), data, tmp_path / "run").run(resume=True)
    assert caught.value.where == str(path)


# ending early


class Interrupting(TinyProgram):
    """Sends this process a signal while it computes the loss of some batch."""

    def __init__(self, at: int, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__(dropout=0.2)
        self.at, self.number, self.calls = at, number, 0

    def loss_terms(self, *args: Any, **kwargs: Any) -> LossTerms:
        self.calls += self.training
        if self.calls == self.at:
            os.kill(os.getpid(), self.number)
        return super().loss_terms(*args, **kwargs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_between_steps(
    data: TextData, tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    told = trainer(Interrupting(4, number), data, tmp_path / "run").run()
    assert told.interrupted
    assert told.step == 4
    assert told.checkpoint == tmp_path / "run/step-00000004"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    program, whole = TinyProgram(dropout=0.2), TinyProgram(dropout=0.2)
    trainer(program, data, tmp_path / "run").run(resume=True)
    trainer(whole, data, tmp_path / "whole").run()
    assert_equal_states(state(program), state(whole))


def test_a_second_signal_ends_at_once(data: TextData, tmp_path: Path) -> None:
    class Impatient(Interrupting):
        def loss_terms(self, *args: Any, **kwargs: Any) -> LossTerms:
            if self.calls + 1 == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss_terms(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        trainer(Impatient(3), data, tmp_path / "run").run()
    assert not list_checkpoints(tmp_path / "run")


class Diverging(TinyProgram):
    """Its loss is not a number from some batch on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def loss_terms(self, *args: Any, **kwargs: Any) -> LossTerms:
        self.calls += self.training
        terms = super().loss_terms(*args, **kwargs)
        if self.calls >= self.at:
            terms["loss"] = terms["loss"] * math.nan
        return terms


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_checkpoint(
    data: TextData, tmp_path: Path
) -> None:
    program = Diverging(6)
    with pytest.raises(TrainError, match="loss, after 5 steps") as caught:
        trainer(program, data, tmp_path / "run", save_every=2).run()
    assert "nan" in caught.value.found
    assert str(tmp_path / "run/step-00000004") in caught.value.nearest
    saved = load_checkpoint(tmp_path / "run/step-00000004")
    assert list_checkpoints(tmp_path / "run")[-1] == saved.path
    assert all(bool(tensor.isfinite().all()) for tensor in saved.tensors["parameters"].values())
    assert all(bool(tensor.isfinite().all()) for tensor in program.state_dict().values())


def test_without_a_checkpoint_the_error_says_so(data: TextData, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no checkpoint was written yet"):
        trainer(Diverging(1), data, tmp_path / "run").run()


@pytest.mark.parametrize(
    ("first", "accumulate", "where"), [(0, 1, "batch"), (0, 2, "batch"), (4, 2, "batch, part 2 of 2")]
)
def test_a_batch_in_which_nothing_counts_is_told_as_that(
    data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, accumulate: int, where: str
) -> None:
    """The mean over no positions is no number, and no lower lr makes it one."""
    drawn = TextData.train_batch

    def masked(self: TextData, seed: int, position: int, size: int) -> Batch:
        tokens, targets = drawn(self, seed, position, size)
        if position:
            targets[first:] = IGNORED
        return tokens, targets

    monkeypatch.setattr(TextData, "train_batch", masked)
    program = TinyProgram()
    with pytest.raises(TrainError) as caught:
        trainer(program, data, tmp_path / "run", batch=8, accumulate=accumulate).run()
    assert caught.value.where == f"{where}, after 1 steps"
    assert caught.value.found == "no position that counts: every target is -100"
    assert "lr" not in str(caught.value)
    assert all(bool(tensor.isfinite().all()) for tensor in program.state_dict().values())


def test_weights_that_are_not_finite_are_never_saved(
    data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = TinyProgram()
    run = trainer(program, data, tmp_path / "run", steps=6, save_every=2)
    take = run._stepper.take

    def take_and_spoil(*args: Any) -> Any:
        told = take(*args)
        if run._result.step == 3:
            with torch.no_grad():
                program.up[1, 2, 3] = math.inf
        return told

    monkeypatch.setattr(run._stepper, "take", take_and_spoil)
    with pytest.raises(TrainError, match="up, after 4 steps") as caught:
        run.run()
    assert "step-00000002" in caught.value.nearest
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]


# what does not fit


def test_settings_data_and_program_must_fit(data: TextData, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="sequence = 9, and data cut into 8"):
        trainer(TinyProgram(), data, tmp_path / "run", sequence=9)
    with pytest.raises(DataError, match="token 116, and a model with 100 token values"):
        trainer(TinyProgram(vocabulary=100), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
