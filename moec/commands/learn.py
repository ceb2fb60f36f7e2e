"""`moec train`: a program learns a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from moec.commands.asked import Run, require_right_folder, training_settings
from moec.commands.programs import program_of, shown_path
from moec.commands.screen import show, show_json, show_next
from moec.commands.tokenizer import open_tokenizer, record_tokenizer
from moec.errors import TrainError
from moec.models import is_saved_program
from moec.plan import Plan, Train
from moec.program import Program
from moec.runtime.data import load_text
from moec.runtime.train import Trainer, TrainResult


def train(run: Run) -> int:
    """Train in this process, save the trained program in `out/program`; gives the exit status."""
    require_right_folder(run)
    training_settings(Plan.resolve(run.plan).train, run.changed)  # mistakes here need no capture
    program = program_of(run.model, run.plan, trust=run.trust)
    plan = (program.plan or Plan()).fitted(program.source.max_positions)
    settings = training_settings(plan.train, run.changed)
    require_room(program, settings)
    words = open_tokenizer(run.tokenizer, program.source.tokenizer)
    data = load_text(*run.data, sequence=settings.sequence, vocabulary=words)
    console = Console(stderr=run.as_json)
    warn_of_no_teacher(run, program.plan, console)
    trainer = Trainer(program, settings, data, run.out, plan=program.plan, console=console)
    result = trainer.run(resume=run.resume)
    if not result.interrupted:
        record_tokenizer(program, words)
        program.eval().save(run.program)
    return finish(run, result)


def warn_of_no_teacher(run: Run, plan: Plan | None, console: Console) -> None:
    """Say that `[distill]` is left aside where a model is trained by a plan that has one."""
    if plan is not None and plan.distill is not None and not is_saved_program(run.model):
        told = "the plan's [distill] needs a teacher (moec distill TEACHER): the loss is the task's alone"
        console.print(told, markup=False, highlight=False, soft_wrap=True)


def finish(run: Run, result: TrainResult, facts: Mapping[str, Any] | None = None) -> int:
    """Say what came of it, the `facts` too, and name the next commands; gives the exit status."""
    if result.interrupted:
        show_next({"go on where it stopped": ["moec", *replace(run, resume=True).words()]})
        return 130
    _report(run, result, facts or {})
    return 0


def require_room(program: Program, settings: Train) -> None:
    """Refuse sequences longer than the model has positions for."""
    limit = program.source.max_positions
    if limit is not None and settings.sequence > limit:
        found = f"sequences of {settings.sequence} tokens"
        raise TrainError(
            "train.sequence", found, f"at most {limit}, the model's limit", f"--sequence {limit}"
        )


def _report(run: Run, result: TrainResult, facts: Mapping[str, Any]) -> None:
    final, saved = result.final, shown_path(run.program)
    told = {
        "steps": result.step, "held_out_loss": final.loss if final else None, "program": saved,
        "tokens_per_second": round(result.tokens_per_second), "checkpoint": str(result.checkpoint), **facts,
    }  # fmt: skip
    if run.as_json:
        show_json(told)
        return
    show(f"{result.step} steps, {result.tokens_per_second:,.0f} tokens/s; saved in {saved}")
    show_next(
        {
            "let it write": ["moec", "generate", saved, "--prompt", "The", "--temperature", "0.8"],
            "read what was trained": ["moec", "show", saved],
            "what each part became": ["moec", "explain", saved],
            "the curves": ["tensorboard", "--logdir", run.out],
        }
    )
