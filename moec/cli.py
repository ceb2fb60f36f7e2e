"""The command line: `moec compile | show | diff | explain | train | distill | generate | bisect | plans`.

Here stand the words: names, options, help. What a command does is in `moec.commands`, imported when it runs,
so that `moec --help` is quick. A user's mistake ends in four lines (where, found, needed, nearest) and status
2.
"""

from __future__ import annotations

from typing import Annotated

import typer

from moec.commands.group import Commands
from moec.commands.options import (
    Alpha,
    Batch,
    Data,
    Disable,
    HardwareName,
    Json,
    LearningRate,
    Lessons,
    MaxRestarts,
    Meta,
    Model,
    Past,
    PhaseName,
    PlanName,
    RankBatch,
    Ranks,
    RankSequence,
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
    World,
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
    meta: Meta = False,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Print a program as Python that runs; or its ledger, its origins, its certificates.

    moec show examples/gpt.py:small --plan moe --stage structured
    """
    from moec.commands.read import show_program

    show_program(
        model, plan, stage=stage, ledger=ledger, origins=origins, certificates=certificates,
        meta=meta, trust=trust, as_json=as_json,
    )  # fmt: skip


@app.command()
def diff(
    model: Saved,
    before: Annotated[
        str, typer.Argument(metavar="A", help="A stage or a pass: structured, lift_experts, …; or a plan.")
    ],
    after: Annotated[
        str | None,
        typer.Argument(metavar="B", help="Another one; left out: the program as it is. Or another plan."),
    ] = None,
    plan: PlanName = None,
    meta: Meta = False,
    phase: PhaseName = "training",
    batch: RankBatch = None,
    sequence: RankSequence = None,
    past: Past = None,
    ranks: World = None,
    hardware: HardwareName = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Print what changed between two stages, alike changes once; or set two plans side by side.

    Of plans (files, shipped ones, or dense): structure, parameters, costs of one rank, and seconds with
    --hardware. The options from --phase to --hardware, and --json, are for plans.

    moec diff examples/gpt.py:small structured sparse --plan pr_moe
    """
    from moec.commands.compare import diff_plans, plans_meant
    from moec.commands.foreseen import Asked
    from moec.commands.read import diff_program

    plans = plans_meant(before, after, plan)
    if plans is None:
        diff_program(model, before, after, plan, meta, trust)
        return
    diff_plans(model, plans, Asked(phase, batch, sequence, past, ranks, hardware), as_json=as_json)


@app.command()
def cost(
    model: Saved,
    plan: PlanName = None,
    phase: PhaseName = "training",
    by: Annotated[str, typer.Option(help="kind, layer, region, operator or axis.")] = "kind",
    batch: RankBatch = None,
    sequence: RankSequence = None,
    past: Past = None,
    ranks: World = None,
    hardware: HardwareName = None,
    trust: Trust = False,
    as_json: Json = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="Print a LaTeX table and nothing else.")] = False,
) -> None:
    """Say what a program costs one rank: FLOPs, bytes, kernels, what it sends; with --hardware, seconds.

    Nothing runs and nothing is allocated. Without sizes the amounts are formulas.

    moec cost examples/gpt.py:small --plan pr_moe --batch 8 --sequence 64 --hardware a100x8
    """
    from moec.commands.cost import show_cost
    from moec.commands.foreseen import Asked

    asked = Asked(phase, batch, sequence, past, ranks, hardware)
    show_cost(model, plan, asked, by, trust=trust, as_json=as_json, as_latex=as_latex)


@app.command()
def plot(
    model: Saved,
    hardware: HardwareName = None,
    over: Annotated[
        str, typer.Option(help="What grows: ranks, batch, sequence, or past (of decode).")
    ] = "batch",
    of: Annotated[str, typer.Option(help="latency, or throughput in tokens a second.")] = "throughput",
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="The picture: .png, .svg or .pdf.")
    ] = "plot.png",
    plan: Annotated[
        list[str] | None,
        typer.Option("--plan", "-p", help="A TOML file, a shipped plan, or dense; may be repeated."),
    ] = None,
    phase: PhaseName = "training",
    batch: RankBatch = None,
    sequence: RankSequence = None,
    past: Past = None,
    ranks: World = None,
    low: Annotated[int | None, typer.Option("--from", metavar="N", min=1, help="Where it begins.")] = None,
    high: Annotated[int | None, typer.Option("--to", metavar="N", min=1, help="Where it ends.")] = None,
) -> None:
    """Draw what plans will take on hardware, as ranks, batch or length grow by doubling.

    moec plot examples/gpt.py:small -p dense -p moe --hardware a100x8 --sequence 64 --out plot.svg
    """
    from moec.commands.foreseen import Asked
    from moec.commands.plot import Plotted
    from moec.commands.plot import plot as draw_plot

    asked = Asked(phase, batch, sequence, past, ranks, hardware)
    draw_plot(model, plan or ["dense"], asked, Plotted(over, of, out, low, high))


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
def plan(
    model: Saved,
    cluster: Annotated[
        str, typer.Option("--cluster", "-c", metavar="FILE|NAME", help="Hardware: a file, or a100x256.")
    ],
    plan: PlanName = None,
    objective: Annotated[
        str, typer.Option(help="Shortest token (latency), most tokens (throughput), or training step.")
    ] = "latency",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences on all ranks together; left out: one a rank.")
    ] = None,
    sequence: RankSequence = None,
    past: Past = None,
    ranks: World = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="A rank may hold: 38GB; left out: all there is.")
    ] = None,
    captured: Annotated[bool, typer.Option(help="Started as a whole, as a CUDA graph is.")] = False,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 5,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="FILE", help="Write the best plan here.")
    ] = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Search for the fastest arrangement of ranks within their memory, and say why the others lost.

    The plan given says what becomes sparse; what its parallel table fixes stays. Nothing is run.

    moec plan examples/gpt.py:small --plan moe --cluster a100x8 --batch 64 --out best.toml
    """
    from moec.commands.plan import Wanted, run

    wanted = Wanted(cluster, objective, batch, sequence, past, ranks, max_memory, captured)
    run(model, plan, wanted, out=out, top=top, trust=trust, as_json=as_json)


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


@app.command()
def calibrate(
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="The hardware file to write.")
    ] = "this.toml",
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process.")] = 1,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes that send to each other; 1: messages are not measured.")
    ] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="A rough file in seconds, to try things with.")
    ] = False,
) -> None:
    """Measure this machine, as a hardware file for `moec cost` and `moec plan`; takes about two minutes.

    moec calibrate --out this.toml
    """
    from moec.commands.calibrate import run_calibrate

    run_calibrate(out, threads, ranks, quick)


def main() -> None:
    """The console script `moec`."""
    app(prog_name="moec")
