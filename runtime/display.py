"""Training on the screen: a bar in a terminal, plain lines in a file or pipe."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moec.runtime.records import EvaluationRecord, RecordBook, StepRecord


class TrainingDisplay:
    """Shows loss, balance, tokens per second and the time left, over the steps from `first` to `last`.

    In a run with a teacher it shows the task loss, how far the student is from the teacher, and the stage.
    """

    def __init__(self, console: Console, first: int, last: int, log_every: int) -> None:
        self._console, self._last, self._log_every = console, last, log_every
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=last, completed=first, told="")

    def start(self, book: RecordBook) -> None:
        """Say where the records go."""
        if not book.has_board:
            self.note(f"no TensorBoard (pip install 'moec[tensorboard]'): records go to {book.path} alone")
        elif not book.has_pictures:
            self.note("no matplotlib (pip install 'moec[plot]'): TensorBoard gets no pictures of the experts")

    def step(self, record: StepRecord) -> None:
        """Move the bar; without a terminal, print a line every `log_every` steps and for the last one."""
        self._bar.update(self._task, completed=record.step, told=_told(record, brief=True))
        if not self._console.is_terminal and (
            record.step % self._log_every == 0 or record.step == self._last
        ):
            told = _told(record, brief=False)
            self._console.print(f"step {record.step}/{self._last}  {told}", highlight=False)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Print the held-out loss."""
        told = record.evaluation
        self.note(f"step {record.step}  held-out loss {told.loss:.4f}  ({told.bits:.3f} bits per token)")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> TrainingDisplay:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def _told(record: StepRecord, brief: bool) -> str:
    """The numbers of a step in a line; `brief`: what fits beside a bar in a terminal of 80 columns."""
    speed, balance = f"{record.tokens_per_second:,.0f} tokens/s", f"balance {record.balance:.4f}"
    if record.stage is None:
        return f"loss {record.loss:.3f}  {balance}  {speed}"
    far = {"kl": record.kl, "hidden": record.hidden}
    teacher = [f"{name} {value:.3f}" for name, value in far.items() if value is not None]
    stage = f"stage {record.stage}"
    if brief:
        stage, balance = "distill" if record.stage == "distill" else "task alone", ""
    return "  ".join(part for part in (stage, f"task {record.task:.3f}", *teacher, balance, speed) if part)
