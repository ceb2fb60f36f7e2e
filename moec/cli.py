"""The command line: `moec compile | show | explain | train | distill | generate | bisect | plans`, and the
commands of `moec.cli_costs`.

Here stand the words: names, options, help. What a command does is in `moec.commands`, imported when it runs,
so that `moec --help` is quick. A user's mistake ends in four lines (where, found, needed, nearest) and status
2.
"""

from __future__ import annotations

from typing import Annotated

import typer

from moec.cli_costs import costs
from moec.commands.group import Commands
from moec.commands.options import (
    Alpha,
    Batch,
    Data,
    Disable,
    Json,
    LearningRate,
    Lessons,
    MaxRestarts,
    Meta,
    Model,
    PlanName,
    Ranks,
    Resume,
    RunFolder,
    Saved,
    Seed,
    Sequence,
    Steps,
    Stop,
    StudentName,
    StudentPlan,
    Teacher,
    Temperature,
    Tokenizer,
    Trust,
)

EPILOG = (
    "A model is a function that returns an nn.Module: examples/gpt.py:small. A plan is a TOML file, or the "
    "name of a shipped one: moec plans. Begin with: moec show examples/gpt.py:small --plan pr_moe"
)


app = typer.Typer(
    cls=Commands,
    help="Turn an ordinary dense GPT into a sparse one, and see every step.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from moec import __version__

        print(f"moec {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("compile")
def compile_(
    model: Model,
    plan: PlanName = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="DIR", help="Save the program in this folder.")
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            "--verify", help="Prove each pass in fp64: full, off, or auto (where it takes seconds)."
        ),
    ] = None,
    disable: Disable = None,
    meta: Meta = False,
    as_json: Json = False,
) -> None:
    """Compile a model by a plan, prove each pass, and save the program.

    moec compile examples/gpt.py:small --plan pr_moe --out small-moe
    """
    from moec.commands.compile import run

    run(model, plan, out, verify, disable or (), meta, as_json)


@app.command()
def show(
    model: Saved,
    plan: PlanName = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", "-s", help="After this pass, or at this stage: captured, structured, …"),
    ] = None,
    ledger: Annotated[bool, typer.Option("--ledger", help="Every matrix product and its fate.")] = False,
    origins: Annotated[bool, typer.Option("--origins", help="Where every parameter came from.")] = False,
    certificates: Annotated[
        bool, typer.Option("--certificates", help="What was proved of every pass.")
    ] = False,
    html: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="Write a page: before and after of every pass."),
    ] = None,
    explorer: Annotated[
        str | None,
        typer.Option("--model-explorer", metavar="FILE", help="Write graphs for Google's model-explorer."),
    ] = None,
    meta: Meta = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Print a program as Python that runs; or its ledger, its origins, its certificates; or as a page.

    moec show examples/gpt.py:small --plan moe --stage structured
    moec show examples/gpt.py:small --plan moe --html moe.html
    """
    from moec.commands.read import show_program

    show_program(
        model, plan, stage=stage, ledger=ledger, origins=origins, certificates=certificates,
        html=html, explorer=explorer, meta=meta, trust=trust, as_json=as_json,
    )  # fmt: skip


@app.command()
def explain(
    model: Saved,
    about: Annotated[
        str,
        typer.Argument(
            metavar="[PART]", help="A layer's number, a region (moe_3), a weight, a module, a glob."
        ),
    ] = "",
    plan: PlanName = None,
    meta: Meta = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Say for each matrix product what was done, and why not otherwise.

    moec explain examples/gpt.py:small moe_1 --plan pr_moe
    """
    from moec.commands.read import explain_program

    explain_program(model, about, plan, meta=meta, trust=trust, as_json=as_json)


@app.command()
def train(
    model: Saved,
    plan: PlanName = None,
    data: Data = None,
    tokenizer: Tokenizer = None,
    out: RunFolder = "run",
    steps: Steps = None,
    batch: Batch = None,
    sequence: Sequence = None,
    lr: LearningRate = None,
    seed: Seed = None,
    resume: Resume = False,
    nproc: Ranks = None,
    max_restarts: MaxRestarts = 0,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Train a program on text; Ctrl-C saves, --resume goes on bit for bit.

    The plan's train table says how; options given here come before it. RUN/program is the trained
    program. On several ranks: --nproc N, or torchrun -m moec train.

    moec train examples/gpt.py:small --plan pr_moe --data corpus/ --steps 500 --out run
    """
    from moec.commands.asked import Run
    from moec.commands.ranks import train_anywhere

    changed = _given(steps=steps, batch=batch, sequence=sequence, lr=lr, seed=seed)
    run = Run(model, plan, data or (), tokenizer, out, resume, changed, trust, as_json, nproc, max_restarts)
    raise typer.Exit(train_anywhere(run))


@app.command()
def distill(
    teacher: Teacher,
    plan: StudentPlan = None,
    student: StudentName = None,
    data: Data = None,
    tokenizer: Tokenizer = None,
    out: RunFolder = "student",
    alpha: Alpha = None,
    temperature: Temperature = None,
    stop: Stop = None,
    lessons: Lessons = None,
    steps: Steps = None,
    batch: Batch = None,
    sequence: Sequence = None,
    lr: LearningRate = None,
    seed: Seed = None,
    resume: Resume = False,
    nproc: Ranks = None,
    max_restarts: MaxRestarts = 0,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Teach a shallower student what a trained program knows; Ctrl-C saves, --resume goes on bit for bit.

    The plan's student table says which layers of the teacher it keeps, its distill table how the teacher
    counts and until when, its train table all else. RUN/program is the trained student; RUN/student is
    what it began as.

    moec distill run/program --plan student.toml --data corpus/ --out student
    """
    from moec.commands.asked import Distillation
    from moec.commands.distill_ranks import distill_anywhere

    changed = _given(steps=steps, batch=batch, sequence=sequence, lr=lr, seed=seed)
    taught = _given(alpha=alpha, temperature=temperature, stop=stop)
    run = Distillation(
        teacher, plan, data or (), tokenizer, out, resume, changed, trust, as_json, nproc, max_restarts,
        student=student, lessons=lessons, taught=taught,
    )  # fmt: skip
    raise typer.Exit(distill_anywhere(run))


def _given(**values: object) -> dict[str, object]:
    """Those that were typed."""
    return {key: value for key, value in values.items() if value is not None}


@app.command()
def generate(
    model: Saved,
    prompt: Annotated[str, typer.Option("--prompt", help="How the text begins; - reads standard input.")],
    plan: PlanName = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", metavar="N", help="Left out: 200, or what there is room for."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens that have this probability together.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that stand in the text already become less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End after this text; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
    keep: Annotated[
        int | None,
        typer.Option(metavar="N", help="When the model's positions are full, go on from the last N tokens."),
    ] = None,
    tokenizer: Tokenizer = None,
    nproc: Annotated[
        int | None,
        typer.Option("--nproc", metavar="N", min=1, help="Generate on N ranks, started here."),
    ] = None,
    trust: Trust = False,
) -> None:
    """Let a program go on from a prompt; the text is shown as it comes.

    It ends with the end of a text (the vocabulary's separator), with a --stop, or when N tokens are written.
    On several ranks: --nproc N, or torchrun -m moec generate.

    moec generate run/program --prompt "def " --temperature 0.8
    """
    from moec.commands.write import Writing
    from moec.commands.write_ranks import write_anywhere
    from moec.runtime.generation.request import Options

    options = Options(
        temperature=temperature, top_k=top_k, top_p=top_p,
        repetition_penalty=repetition_penalty, seed=seed, keep=keep,
    )  # fmt: skip
    asked = Writing(model, plan, prompt, max_new_tokens, stop or (), tokenizer, trust, options, nproc)
    raise typer.Exit(write_anywhere(asked))


@app.command()
def bisect(
    model: Model,
    plan: PlanName = None,
    disable: Disable = None,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="DIR", help="Where the script is written.")
    ] = ".",
    as_json: Json = False,
) -> None:
    """Name the first pass that breaks its contract, and where; write a script that shows it.

    Leaves with status 1 when a pass is broken.

    moec bisect examples/gpt.py:small --plan pr_moe
    """
    from moec.commands.find import run

    raise typer.Exit(run(model, plan, disable or (), out, as_json))


@app.command()
def plans(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one.")] = None,
    as_json: Json = False,
) -> None:
    """List the plans that come with moec, or print one to start from.

    moec plans pr_moe > my_plan.toml
    """
    from moec.commands.read import show_plans

    show_plans(name, as_json)


app.registered_commands.extend(costs.registered_commands)


def main() -> None:
    """The console script `moec`."""
    app(prog_name="moec")
