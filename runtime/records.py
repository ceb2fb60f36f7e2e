"""What training writes down: a record per step and per evaluation, as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from moec.runtime.balance import Load
from moec.runtime.evaluate import Evaluation


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; `step` counts the steps taken. `balance` and `z` are weighted parts of `loss`.

    `kl` and `hidden` are those of a teacher, without their weights `alpha` (times `temperature`²) and that of
    the plan; None where none speaks. `stage`: "distill" while a teacher speaks and "task" afterwards; None in
    a run without one.
    """

    step: int
    loss: float
    task: float
    balance: float
    z: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    load: Mapping[str, Load]
    kl: float | None = None
    hidden: float | None = None
    alpha: float | None = None
    temperature: float | None = None
    stage: Literal["distill", "task"] | None = None


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation after `step` steps."""

    step: int
    evaluation: Evaluation


class RecordBook:
    """Writes records under `folder`: `train.jsonl`, and `tensorboard/` where TensorBoard is installed.

    Opened after `step` steps, it keeps the lines up to there and drops later ones: those of steps that a
    resumed run takes again. Use as a context manager.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "train.jsonl"
        kept = _lines_until(self.path, step) if step else []
        draft = folder / ".train.jsonl"
        draft.write_text("".join(kept), encoding="utf-8")
        draft.replace(self.path)
        self._file: TextIO = self.path.open("a", encoding="utf-8", buffering=1)
        self._board = _open_board(folder / "tensorboard", step)

    @property
    def has_board(self) -> bool:
        """Whether TensorBoard is installed and written to."""
        return self._board is not None

    def write(self, record: StepRecord | EvaluationRecord) -> None:
        """Add one line, and its numbers to TensorBoard."""
        kind = "step" if isinstance(record, StepRecord) else "evaluation"
        row = {"kind": kind, **_flat(record)}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in _scalars(row, "train" if kind == "step" else "held_out"):
                self._board.add_scalar(name, value, record.step)

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        self._file.flush()
        if self._board is not None:
            self._board.flush()

    def __enter__(self) -> RecordBook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class NoRecords(RecordBook):
    """The book of a rank that writes none."""

    def __init__(self) -> None:
        """Opens nothing."""

    @property
    def has_board(self) -> bool:
        return True

    def write(self, record: StepRecord | EvaluationRecord) -> None:
        """Written by the first rank."""

    def flush(self) -> None:
        """Nothing to hand over."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a `train.jsonl` as dictionaries, oldest first."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _flat(record: StepRecord | EvaluationRecord) -> dict[str, Any]:
    if isinstance(record, StepRecord):
        return {name: value for name, value in asdict(record).items() if value is not None}
    told = asdict(record.evaluation)
    return {"step": record.step, **told, "bits": record.evaluation.bits}


def _scalars(row: Mapping[str, Any], prefix: str) -> list[tuple[str, float]]:
    """The numbers of a row under TensorBoard's names, such as `train/loss` and `train/moe_1/dropped`."""
    scalars = [(f"{prefix}/{name}", value) for name, value in row.items() if isinstance(value, float)]
    for layer, load in row["load"].items():
        scalars += [(f"{prefix}/{layer}/{name}", value) for name, value in load.items()]
    if "stage" in row:  # drawn as a line: one while the teacher speaks
        scalars.append((f"{prefix}/stage", float(row["stage"] == "distill")))
    return scalars


def _lines_until(path: Path, step: int) -> list[str]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # The last line may be cut off, if the machine went down while it was written.
    whole = [line for line in lines if line.endswith("\n")]
    return [line for line in whole if json.loads(line)["step"] <= step]


def _open_board(folder: Path, step: int) -> Any:
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
