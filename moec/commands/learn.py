"""`moec train`: a program learns a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moec.commands.programs import program_of, shown_path
from moec.commands.screen import show, show_json, show_next
from moec.errors import TrainError
from moec.models import is_saved_program
from moec.plan import Plan, Train
from moec.program import Program
from moec.runtime.checkpoint import latest_checkpoint
from moec.runtime.data import load_text
from moec.runtime.train import Trainer, TrainResult

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


def train(run: Run) -> int:
    """Train in this process, save the trained program in `out/program`; gives the exit status."""
    require_right_folder(run)
    settings = training_settings(Plan.resolve(run.plan).train, run.changed)  # mistakes here need no capture
    program = program_of(run.model, run.plan, trust=run.trust)
    if is_saved_program(run.model) and program.plan is not None:
        settings = training_settings(program.plan.train, run.changed)
    require_room(program, settings)
    data = load_text(*run.data, sequence=settings.sequence, vocabulary=run.tokenizer or "bytes")
    console = Console(stderr=run.as_json)
    trainer = Trainer(program, settings, data, run.out, plan=program.plan, console=console)
    result = trainer.run(resume=run.resume)
    if not result.interrupted:
        program.eval().save(Path(run.out) / "program")
    return finish(run, result)


def finish(run: Run, result: TrainResult) -> int:
    """Say what came of it and name the next commands; gives the exit status."""
    if result.interrupted:
        show_next({"go on where it stopped": ["moec", *words(replace(run, resume=True))]})
        return 130
    _report(run, result, shown_path(Path(run.out) / "program"))
    return 0


def training_settings(given: Train, changed: Mapping[str, Any]) -> Train:
    """`given` with `changed` laid over it; raises `PlanError` when the outcome does not hold together."""
    values = {key: getattr(given, key) for key in given.model_fields_set}
    for key, follower in FOLLOWS.items():
        if key in changed:
            values.pop(follower, None)
    return Train(**{**values, **changed})


def require_right_folder(run: Run) -> None:
    """Refuse to begin where another run is, and to go on where none is."""
    latest = latest_checkpoint(Path(run.out))
    if latest is not None and not run.resume:
        raise TrainError(
            run.out, f"a run that came to {latest.name}", "another --out, or --resume to go on with it"
        )
    if latest is None and run.resume:
        raise TrainError(run.out, "no checkpoint", "the --out of an earlier run, or no --resume")


def require_room(program: Program, settings: Train) -> None:
    """Refuse sequences longer than the model has positions for."""
    limit = program.source.max_positions
    if limit is not None and settings.sequence > limit:
        found = f"sequences of {settings.sequence} tokens"
        raise TrainError(
            "train.sequence", found, f"at most {limit}, the model's limit", f"--sequence {limit}"
        )


def words(run: Run) -> list[str]:
    """The words of the command line that ask for `run`, after `moec`."""
    plan = ["--plan", run.plan] if run.plan else []
    data = [word for path in run.data for word in ("--data", path)]
    tokenizer = ["--tokenizer", run.tokenizer] if run.tokenizer else []
    changed = [word for key, value in run.changed.items() for word in (f"--{key}", str(value))]
    flags = {"--nproc": run.nproc, "--max-restarts": run.max_restarts or None}
    counts = [word for key, value in flags.items() if value is not None for word in (key, str(value))]
    switches = {"--resume": run.resume, "--trust": run.trust, "--json": run.as_json}
    given = [word for word, on in switches.items() if on]
    return ["train", run.model, *plan, *data, *tokenizer, *changed, "--out", run.out, *counts, *given]


def _report(run: Run, result: TrainResult, saved: str) -> None:
    final = result.final
    facts = {
        "steps": result.step, "held_out_loss": final.loss if final else None, "program": saved,
        "tokens_per_second": round(result.tokens_per_second), "checkpoint": str(result.checkpoint),
    }  # fmt: skip
    if run.as_json:
        show_json(facts)
        return
    show(f"{result.step} steps, {result.tokens_per_second:,.0f} tokens/s; saved in {saved}")
    tokenizer = ["--tokenizer", run.tokenizer] if run.tokenizer else []
    show_next(
        {
            "let it write": [
                "moec",
                "generate",
                saved,
                "--prompt",
                "The",
                "--temperature",
                "0.8",
                *tokenizer,
            ],
            "read what was trained": ["moec", "show", saved],
            "what each part became": ["moec", "explain", saved],
            "the curves": ["tensorboard", "--logdir", run.out],
        }
    )
