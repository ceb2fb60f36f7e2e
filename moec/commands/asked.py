"""What a command that trains was asked for: its words, read and written again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moec.errors import PlanError, TrainError
from moec.models import MANIFEST
from moec.plan import Train
from moec.plan.section import Section
from moec.runtime.checkpoint import latest_checkpoint

S = TypeVar("S", bound=Section)
Words = list[str]

# Settings whose default is computed from another one: when that one is given anew, so is the default.
FOLLOWS = {"steps": "warmup", "lr": "min_lr"}


@dataclass(frozen=True)
class Run:
    """What `moec train` is asked for; `changed` are the settings given on the command line."""

    model: str
    plan: str | None
    data: Sequence[str]
    tokenizer: str | None
    out: str
    resume: bool
    changed: Mapping[str, Any]
    trust: bool
    as_json: bool
    nproc: int | None = None
    max_restarts: int = 0

    command = "train"  # its name; no field

    @property
    def program(self) -> Path:
        """Where the trained program is saved."""
        return Path(self.out) / "program"

    def words(self) -> Words:
        """The words of the command line that ask for this, after `moec`."""
        counts = {"nproc": self.nproc, "max-restarts": self.max_restarts or None}
        switches = {"--resume": self.resume, "--trust": self.trust, "--json": self.as_json}
        return [
            *(self.command, self.model),
            *options(plan=self.plan or None, **self._own(), tokenizer=self.tokenizer),
            *(word for path in self.data for word in ("--data", path)),
            *options(**self.changed, out=self.out, **counts),
            *(word for word, on in switches.items() if on),
        ]

    def _own(self) -> Mapping[str, Any]:
        """Options that this command alone has."""
        return {}


@dataclass(frozen=True)
class Distillation(Run):
    """What `moec distill` is asked for: `model` is the teacher.

    `student`: a program or a model to be taught, in place of a cut of the teacher; `lessons`: a folder with
    what the teacher says; `taught` are the settings of `[distill]` given on the command line.
    """

    student: str | None = None
    lessons: str | None = None
    taught: Mapping[str, Any] = field(default_factory=dict)

    command = "distill"

    @property
    def start(self) -> Path:
        """Where the student is saved before it learns anything: a resumed run begins with its structure."""
        return Path(self.out) / "student"

    def _own(self) -> Mapping[str, Any]:
        return {"student": self.student, "lessons": self.lessons, **self.taught}


def options(**values: Any) -> Words:
    """`--steps 4`, and so on; what is None is left out."""
    return [word for key, value in values.items() if value is not None for word in (f"--{key}", str(value))]


def training_settings(given: Train, changed: Mapping[str, Any]) -> Train:
    """`given` with `changed` laid over it; raises `PlanError` when the outcome does not hold together."""
    followers = {follower for key, follower in FOLLOWS.items() if key in changed}
    return laid_over(given, changed, followers)


def laid_over(given: S, changed: Mapping[str, Any], but: Collection[str] = ()) -> S:
    """`given` with `changed` laid over it, and the values of `but` left to their defaults.

    Raises `PlanError`; a value that was typed is named as it was typed.
    """
    values = {key: getattr(given, key) for key in given.model_fields_set - set(but)}
    try:
        return type(given)(**{**values, **changed})
    except PlanError as error:
        key = error.where.removeprefix(f"{type(given).__name__}: ")
        where = f"--{key}" if key in changed else error.where
        raise PlanError(where, error.found, error.needed, error.nearest) from error


def require_right_folder(run: Run) -> None:
    """Refuse to begin where another run or a program is, and to go on where no run is."""
    if (Path(run.out) / MANIFEST).is_file():
        raise TrainError(run.out, "the folder of a saved program", "a folder for the run", "another --out")
    latest = latest_checkpoint(Path(run.out))
    if latest is not None and not run.resume:
        raise TrainError(
            run.out, f"a run that came to {latest.name}", "another --out, or --resume to go on with it"
        )
    if latest is None and run.resume:
        raise TrainError(run.out, "no checkpoint", "the --out of an earlier run, or no --resume")
