"""The trainer: steps, evaluations, checkpoints and records in the right order.

Everything it needs is handed in, everything it makes lies in `out_dir`:

    out_dir/step-00000200/    a checkpoint (see `checkpoint.py`)
    out_dir/train.jsonl       a line per logged step and per evaluation, and what experts did (`records.py`)
    out_dir/tensorboard/      the same for TensorBoard, where it is installed

A run that was stopped and resumed takes the same steps, bit for bit, as one that was not: batches are a
function of the position in the data, and the checkpoint holds everything else (see `snapshot.py`). With a
teacher that is how long it was waited for, and which one it was.

The parts of a program that the ranks of a job hold train together: every rank runs a trainer with the same
settings and data, the first writes the records and shows the progress, and each writes what it holds into the
checkpoints. A job may go on with the checkpoint of another mesh, or of one process, and the other way round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moec.errors import ArtifactError, TrainError
from moec.plan import Plan, Train
from moec.runtime.balance import loads_of, on_host
from moec.runtime.checkpoint import latest_checkpoint, read_manifest, require_whole_files, save_checkpoint
from moec.runtime.data import TextData
from moec.runtime.display import TrainingDisplay
from moec.runtime.distillation.stages import Ending
from moec.runtime.distillation.teaching import Teaching
from moec.runtime.evaluate import Evaluation, evaluate
from moec.runtime.interrupt import Interrupt
from moec.runtime.observed import Observed, Observer
from moec.runtime.records import EvaluationRecord, NoRecords, RecordBook, StepRecord
from moec.runtime.rng import borrowed_rng, seed_of
from moec.runtime.same_run import require_same_run
from moec.runtime.schedule import learning_rate
from moec.runtime.snapshot import restore_random, restore_snapshot, take_snapshot
from moec.runtime.step import Lessons, OptimizerStep
from moec.runtime.trainable import Trainable, in_mode


@dataclass
class TrainResult:
    """What a run did: a record of every step it took and of every evaluation, oldest first.

    `step` counts all steps taken, those before a resumption included; `interrupted` says that Ctrl-C or
    SIGTERM ended the run; `checkpoint` is the last one written; `silent` says when and why a teacher fell
    silent, None where it spoke to the end.
    """

    step: int = 0
    history: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    interrupted: bool = False
    checkpoint: Path | None = None
    silent: Ending | None = None

    @property
    def tokens_per_second(self) -> float:
        """The median over the steps of this run; 0 when it took none."""
        return statistics.median([record.tokens_per_second for record in self.history] or [0.0])

    @property
    def final(self) -> Evaluation | None:
        """The last evaluation."""
        return self.evaluations[-1].evaluation if self.evaluations else None


class Trainer:
    """Trains `program` in place on `data` as `settings` say.

    `teaching`: a teacher that is listened to until its last stage; it is let go then, and the steps that
    follow are those of a trainer without one. `plan` is only stored in checkpoints, for whoever finds them.
    `console` shows progress; pass `Console(quiet=True)` for silence. A sequence length other than that of
    `data`, or data outside the program's vocabulary, is an error here, before anything is written.
    """

    def __init__(
        self,
        program: Trainable,
        settings: Train,
        data: TextData,
        out_dir: str | Path,
        *,
        plan: Plan | None = None,
        console: Console | None = None,
        teaching: Teaching | None = None,
    ) -> None:
        if settings.sequence != data.sequence:
            found = f"sequence = {settings.sequence}, and data cut into {data.sequence}"
            raise TrainError("settings", found, f"load_text(…, sequence={settings.sequence})")
        if teaching is not None:
            teaching.require_fitting(settings)
        self.program, self.settings, self.data = program, settings, data
        self._stepper = OptimizerStep(program, settings)
        self._ranks = self._stepper.ranks
        self.out_dir, self.plan, self.teaching = Path(out_dir), plan, teaching
        self.console = (console or Console()) if self._ranks.is_first else Console(quiet=True)
        self._result = TrainResult()
        self._position, self._saved_step = 0, -1
        facts = {**self._identity(), "settings": settings.model_dump_json()}
        self._ranks.require_alike({name: str(value) for name, value in facts.items()})
        self._require_fitting_data()

    @property
    def step(self) -> int:
        """How many steps were taken, those before a resumption included."""
        return self._result.step

    def run(self, *, resume: bool = False, stop_at: int | None = None) -> TrainResult:
        """Train to the end of `settings.steps`, or to `stop_at` steps; gives what this call did.

        With `resume`, go on from the newest checkpoint in `out_dir`, which must have one; without, `out_dir`
        must have none. The run ends with an evaluation and a checkpoint, also when interrupted, but not when
        it fails: `TrainError` on a loss or gradient that is not finite leaves the last checkpoint as it is.
        The caller's random state is untouched.
        """
        last = min(self.settings.steps, stop_at or self.settings.steps)
        with borrowed_rng(self._ranks.device), in_mode(self.program, training=True):
            self._result = self._resumed() if resume else self._fresh()
            first = self._result.step
            with (
                Interrupt() as interrupt,
                self._open_book(first) as book,
                TrainingDisplay(self.console, first, last, self.settings.log_every) as display,
            ):
                display.start(book)
                self._train(last, interrupt, book, display)
        return self._result

    def _train(self, last: int, interrupt: Interrupt, book: RecordBook, display: TrainingDisplay) -> None:
        result = self._result
        self._end_teaching(display)
        while result.step < last and not self._ranks.any(interrupt.requested):
            logged = self._is_due(self.settings.log_every, after=1) or result.step + 1 == last
            record, observed = self._step(Observer(self.program, self._ranks) if logged else None)
            result.history.append(record)
            display.step(record)
            if logged:
                book.write(record)
            if observed is not None:
                book.write(observed)
            # Evaluated first: a checkpoint holds what the evaluation of its step meant for the teacher.
            if self._is_due(self.settings.eval_every) or result.step == last:
                self._evaluate(book, display)
            if self._is_due(self.settings.save_every) or result.step == last:
                self._save(book)
            self._end_teaching(display)
        result.interrupted = result.step < last
        if result.interrupted:
            self._save(book)
            display.note(f"interrupted after step {result.step}; saved {result.checkpoint}")

    def _open_book(self, step: int) -> RecordBook:
        with self._ranks.together():
            return RecordBook(self.out_dir, step) if self._ranks.is_first else NoRecords()

    def _is_due(self, every: int, after: int = 0) -> bool:
        """Whether it is time for what is done every so many steps: now, or `after` further steps."""
        return every > 0 and (self._result.step + after) % every == 0

    def _step(self, observer: Observer | None) -> tuple[StepRecord, Observed | None]:
        began = time.perf_counter()
        settings, result = self.settings, self._result
        batch = self.data.train_batch(settings.seed, self._position, settings.batch)
        rate, lessons = learning_rate(result.step, settings), self._lessons()
        try:
            with nullcontext() if observer is None else observer.step():
                loss, norm = self._stepper.take(batch, rate, lessons, observer)
        except TrainError as error:
            raise self._with_last_good(error) from error
        result.step += 1
        self._position += settings.batch
        num_tokens, counts = batch[0].numel(), on_host(loss.counts)
        record = StepRecord(
            step=result.step,
            loss=loss.loss,
            task=loss.task,
            balance=loss.balance,
            z=loss.z,
            lr=rate,
            grad_norm=norm,
            tokens_per_second=num_tokens / (time.perf_counter() - began),
            load=loads_of(counts, self.program.moe_settings(), num_tokens),
            kl=loss.kl,
            hidden=loss.hidden,
            **self._stage(taught=lessons is not None),
        )
        return record, None if observer is None else observer.observed(result.step, counts)

    def _stage(self, taught: bool) -> dict[str, Any]:
        """What the record of a step says of the teacher."""
        if self.teaching is None:
            return {}
        distill = self.teaching.distill
        weights = {"alpha": distill.alpha, "temperature": distill.temperature} if taught else {}
        return {"stage": "distill" if taught else "task", **weights}

    def _lessons(self) -> Lessons | None:
        """What asks the teacher, while it speaks."""
        teaching, position = self.teaching, self._position
        if teaching is None or not teaching.speaks(self._result.step):
            return None
        return lambda part, first: teaching.lesson(part, position + first)

    def _evaluate(self, book: RecordBook, display: TrainingDisplay) -> None:
        settings = self.settings
        evaluation = evaluate(self.program, self.data, settings, batches=settings.eval_batches)
        record = EvaluationRecord(self._result.step, evaluation)
        self._result.evaluations.append(record)
        if self.teaching is not None and self._is_due(settings.eval_every):  # not where a call of `run` ends
            self.teaching.stages.observe(record.step, evaluation.loss)
        book.write(record)
        display.evaluation(record)

    def _begin_teaching(self, step: int, stages: Mapping[str, Any] | None = None) -> None:
        """Open the teacher, if it has a say in the steps after `step`; before draws and weights are set."""
        if self.teaching is not None:
            self.teaching.begin(self.program, step, stages)

    def _end_teaching(self, display: TrainingDisplay) -> None:
        """Let the teacher go once it has said its last, and say so."""
        result = self._result
        if self.teaching is None or result.silent is not None:
            return
        result.silent = self.teaching.ending(result.step)
        if result.silent is not None:
            at = result.silent
            display.note(f"the teacher is silent after step {at.step} ({at.why}): the task loss alone")

    def _fresh(self) -> TrainResult:
        with self._ranks.together():
            latest = latest_checkpoint(self.out_dir)
            if latest is not None:
                found = f"checkpoints of another run, up to {latest.name}"
                raise TrainError(str(self.out_dir), found, "an empty folder, or resume=True")
        self._begin_teaching(0)
        self._seed_draws()
        self._position, self._saved_step = 0, -1
        return TrainResult()

    def _resumed(self) -> TrainResult:
        with self._ranks.together():
            latest = latest_checkpoint(self.out_dir)
            if latest is None:
                where, needed = str(self.out_dir), "a folder of an earlier run, or resume=False"
                raise ArtifactError(where, "no checkpoint", needed)
            manifest = read_manifest(latest)
        step, record = manifest["step"], manifest["record"]
        self._ranks.require_alike({"checkpoint": f"{latest} ({manifest['digest']})"})
        require_whole_files(latest, manifest, self._ranks)
        with self._ranks.together():
            require_same_run(str(latest), record, self._identity())
        self._begin_teaching(step, record.get("stages"))
        with self._ranks.together():
            restore_snapshot(latest, self.program, self._stepper.optimizer, self._stepper.holding)
            if record.get("mesh") == self._mesh():
                restore_random(latest, self._stepper.holding)
            else:
                self._seed_draws(step)
        self._position, self._saved_step = record["position"], step
        return TrainResult(step=step, checkpoint=latest)

    def _seed_draws(self, step: int = 0) -> None:
        """Ranks that see the same tokens draw the same; a mesh that was never at `step` starts afresh."""
        torch.manual_seed(seed_of(seed_of(self.settings.seed, self._ranks.place_in_data), step << 32))

    def _save(self, book: RecordBook) -> None:
        result, stepper = self._result, self._stepper
        if self._saved_step == result.step:
            return
        book.flush()
        try:
            tensors = take_snapshot(self.program, stepper.optimizer, stepper.holding)
        except TrainError as error:
            raise self._with_last_good(error) from error
        record = {"position": self._position, **self._identity(), **self._remarks()}
        if self.teaching is not None:
            record["stages"] = self.teaching.record()
        keep = self.settings.keep
        result.checkpoint = save_checkpoint(self.out_dir, result.step, tensors, record, keep, self._ranks)
        self._saved_step = result.step

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for a resumed run to be the same run; see `require_same_run`."""
        settings = self.program.moe_settings()
        return {
            "program": self.program.fingerprint(),
            "mesh": self._mesh(),
            "layers": {name: layer.model_dump(mode="json") for name, layer in settings.items()},
            "data": self.data.fingerprint,
            "seed": self.settings.seed,
            **({} if self.teaching is None else self.teaching.identity()),
        }

    def _mesh(self) -> dict[str, object] | None:
        """The mesh as a checkpoint records it; None for one process."""
        mesh = self._ranks.mesh
        return mesh.to_json() if mesh.world > 1 else None

    def _remarks(self) -> dict[str, Any]:
        """What is good to know about a checkpoint, and not needed to resume."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "plan": None if self.plan is None else self.plan.to_toml(),
            "vocabulary": self.data.vocabulary.name,
            "torch": torch.__version__,
        }

    def _with_last_good(self, error: TrainError) -> TrainError:
        saved = self._result.checkpoint
        last = f"the last good checkpoint is {saved}" if saved else "no checkpoint was written yet"
        where = f"{error.where}, after {self._result.step} steps"
        nearest = f"{error.nearest}; {last}" if error.nearest else last
        return TrainError(where, error.found, error.needed, nearest)

    def _require_fitting_data(self) -> None:
        tokens = torch.zeros(1, self.settings.sequence, dtype=torch.long, device=self._ranks.device)
        with torch.no_grad(), in_mode(self.program, training=False), borrowed_rng(self._ranks.device):
            self.data.require_vocabulary(self.program(tokens).shape[-1])
