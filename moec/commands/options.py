"""The words that several commands share: arguments and options, each with its help."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL_HELP = (
    "file.py:factory (arguments after a question mark: gpt.py:small?layers=2), hf:config.json or hf:folder, "
    "or the folder of a saved program."
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Saved = Annotated[str, typer.Argument(metavar="MODEL|DIR", help=MODEL_HELP)]
PlanName = Annotated[
    str | None,
    typer.Option("--plan", "-p", help="A TOML file, or a shipped plan (moec plans); left out: dense."),
]
Meta = Annotated[
    bool, typer.Option("--meta", help="Build the model without memory: shapes and counts, no values.")
]
Trust = Annotated[bool, typer.Option("--trust", help="Accept a saved program that was edited by hand.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Disable = Annotated[
    list[str] | None, typer.Option("--disable", metavar="PASS", help="Leave a pass out; may be repeated.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", metavar="FILE", help="A tokenizer.json; left out: that of the saved program, or bytes."
    ),
]

# of the commands that train

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        metavar="PATH",
        help="Text file, folder or glob; repeatable. Left out: Python's library.",
    ),
]
RunFolder = Annotated[
    str, typer.Option("--out", "-o", metavar="RUN", help="Checkpoints, records and the program.")
]
Steps = Annotated[int | None, typer.Option(help="Steps; warm-up is chosen anew for them.")]
Batch = Annotated[int | None, typer.Option(help="Sequences in a step.")]
Sequence = Annotated[int | None, typer.Option(help="Tokens in a sequence.")]
LearningRate = Annotated[
    float | None, typer.Option("--lr", help="Highest learning rate; the lowest is a tenth of it.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of batches, dropout and routing noise.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in RUN.")]
Ranks = Annotated[
    int | None, typer.Option("--nproc", metavar="N", min=1, help="Train on N ranks, started here.")
]
MaxRestarts = Annotated[
    int, typer.Option(min=0, help="With --nproc: how often to start again when a rank is lost.")
]

# of the commands that foresee costs

PhaseName = Annotated[
    str, typer.Option("--phase", help="A training step, a forward run, or a step of decode: their names.")
]
RankBatch = Annotated[int | None, typer.Option("--batch", min=1, help="B: sequences of one rank.")]
RankSequence = Annotated[int | None, typer.Option("--sequence", min=1, help="S: tokens of a sequence.")]
Past = Annotated[
    int | None, typer.Option("--past", min=1, help="L: positions that the cache has, for decode.")
]
World = Annotated[
    int | None, typer.Option("--ranks", metavar="N", min=1, help="Ranks; left out: as the plan says.")
]
HardwareName = Annotated[
    str | None,
    typer.Option("--hardware", metavar="FILE|NAME", help="A TOML file, or a shipped one: a100x8."),
]

# of a distillation

Teacher = Annotated[
    str, typer.Argument(metavar="TEACHER", help="The folder of a trained program: RUN/program.")
]
StudentPlan = Annotated[
    str | None,
    typer.Option("--plan", "-p", help="A TOML file, or a shipped plan, with student and distill tables."),
]
StudentName = Annotated[
    str | None,
    typer.Option(
        "--student",
        metavar="MODEL|DIR",
        help="Teach this model or saved program, in place of a cut of the teacher.",
    ),
]
Alpha = Annotated[float | None, typer.Option(help="Weight of the teacher's term in the loss.")]
Temperature = Annotated[
    float | None, typer.Option(help="Softens both distributions before they are compared.")
]
Stop = Annotated[
    float | None, typer.Option(help="Fraction of the steps after which only the task loss remains.")
]
Lessons = Annotated[
    str | None,
    typer.Option(
        "--lessons",
        metavar="DIR",
        help="Keep what the teacher says in this folder, computed once, for this run and others.",
    ),
]
