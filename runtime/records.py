"""What training writes down: a record per step and per evaluation, as JSON lines and for TensorBoard.

A line of `train.jsonl` is a step, an evaluation, or what experts, routers and ranks did in a step
(`observed`; left out where there was nothing to see). TensorBoard has the same numbers: `train/…` and
`held_out/…`, `router_entropy/moe_1` in nats, `traffic_bytes/data` and `traffic_messages/data`, and a
histogram `load_over_mean/moe_1` of the experts' rows, 1 being the mean. After evaluations it gets the picture
that `moec plot RUN` draws, `experts`, which takes at most a thirtieth of the time (`pictures/board.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

import torch

from moec.runtime.balance import Load
from moec.runtime.evaluate import Evaluation
from moec.runtime.observed import Observed
from moec.runtime.pictures.board import BoardPictures
from moec.runtime.pictures.style import can_draw


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


Record = StepRecord | EvaluationRecord | Observed


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
        drawn = self._board is not None and can_draw()
        self._pictures = BoardPictures(self._board, folder) if drawn else None

    @property
    def has_board(self) -> bool:
        """Whether TensorBoard is installed and written to."""
        return self._board is not None

    @property
    def has_pictures(self) -> bool:
        """Whether TensorBoard gets pictures too: matplotlib is installed."""
        return self._pictures is not None

    def write(self, record: Record) -> None:
        """Add one line, and what it says to TensorBoard; nothing where nothing was observed."""
        if isinstance(record, Observed) and record.is_empty:
            return
        row = {"kind": _KINDS[type(record)], **_flat(record)}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._board is not None:
            _show(self._board, row)
        if self._pictures is not None and isinstance(record, EvaluationRecord) and record.evaluation.counts:
            self._pictures.show(record.step)

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

    @property
    def has_pictures(self) -> bool:
        return True

    def write(self, record: Record) -> None:
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


_KINDS = {StepRecord: "step", EvaluationRecord: "evaluation", Observed: "observed"}


def _flat(record: Record) -> dict[str, Any]:
    if not isinstance(record, EvaluationRecord):
        return {name: value for name, value in asdict(record).items() if value is not None}
    told = asdict(record.evaluation)
    return {"step": record.step, **told, "bits": record.evaluation.bits}


def _show(board: Any, row: Mapping[str, Any]) -> None:
    """Hand a row to TensorBoard."""
    if row["kind"] == "observed":
        for layer, counts in row["counts"].items():
            mean = max(sum(counts), 1) / len(counts)
            shares = torch.tensor([count / mean for count in counts])
            board.add_histogram(f"load_over_mean/{layer}", shares, row["step"])
    for name, value in _observed_scalars(row) if row["kind"] == "observed" else _scalars(row):
        board.add_scalar(name, value, row["step"])


def _observed_scalars(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    scalars = [(f"router_entropy/{layer}", value) for layer, value in row["router_entropy"].items()]
    for axis, sending in row["traffic"].items():
        scalars += [(f"traffic_{amount}/{axis}", float(value)) for amount, value in sending.items()]
    return scalars


def _scalars(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The numbers of a row under TensorBoard's names, such as `train/loss` and `train/moe_1/dropped`."""
    prefix = "train" if row["kind"] == "step" else "held_out"
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
