"""The commands that compare and foresee, `moec diff | cost | plot | plan | calibrate`; `moec.cli` has all."""

from __future__ import annotations

from typing import Annotated

import typer

from moec.commands.options import (
    MODEL_HELP,
    HardwareName,
    Json,
    Meta,
    Past,
    PhaseName,
    PlanName,
    RankBatch,
    RankSequence,
    Saved,
    Trust,
    World,
)

costs = typer.Typer()


@costs.command()
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


@costs.command()
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


@costs.command()
def plot(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|DIR|RUN", help=f"The folder of a training, or {MODEL_HELP}")
    ],
    hardware: HardwareName = None,
    over: Annotated[
        str | None,
        typer.Option(help="What grows: ranks, batch, sequence, or past (of decode). Left out: batch."),
    ] = None,
    of: Annotated[
        str | None,
        typer.Option(
            help="latency, or throughput in tokens a second. Of a training: experts (all of these), load, "
            "dropped, entropy or traffic. Left out: throughput, or experts."
        ),
    ] = None,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="The picture: .png, .svg or .pdf.")
    ] = "plot.png",
    plan: Annotated[
        list[str] | None,
        typer.Option("--plan", "-p", help="A TOML file, a shipped plan, or dense; may be repeated."),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", metavar="LAYER", help="Of a training: 3, moe_3 or a glob; may be repeated."),
    ] = None,
    phase: Annotated[
        str | None, typer.Option(help="training, forward or decode. Left out: training.")
    ] = None,
    batch: RankBatch = None,
    sequence: RankSequence = None,
    past: Past = None,
    ranks: World = None,
    low: Annotated[int | None, typer.Option("--from", metavar="N", min=1, help="Where it begins.")] = None,
    high: Annotated[int | None, typer.Option("--to", metavar="N", min=1, help="Where it ends.")] = None,
) -> None:
    """Draw what plans will take on hardware, as ranks, batch or length grow; or what experts did in a
    training.

    moec plot examples/gpt.py:small -p dense -p moe --hardware a100x8 --sequence 64 --out plot.svg

    moec plot run --out experts.png
    """
    from moec.commands.foreseen import Asked
    from moec.commands.plot import Plotted, require_model
    from moec.commands.plot import plot as draw_plot
    from moec.commands.plot_run import means_run, plot_run

    if means_run(model, of):
        foreign = {
            "--hardware": hardware, "--over": over, "--plan": plan, "--phase": phase, "--batch": batch,
            "--sequence": sequence, "--past": past, "--ranks": ranks, "--from": low, "--to": high,
        }  # fmt: skip
        plot_run(model, of or "experts", out, layers or (), foreign)
        return
    require_model(model, layers)
    asked = Asked(phase or "training", batch, sequence, past, ranks, hardware)
    plotted = Plotted(over or "batch", of or "throughput", out, low, high)
    draw_plot(model, plan or ["dense"], asked, plotted)


@costs.command()
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


@costs.command()
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
    """Measure this machine, as a hardware file for `moec cost` and `moec plan`; takes about four minutes.

    moec calibrate --out this.toml
    """
    from moec.commands.calibrate import run_calibrate

    run_calibrate(out, threads, ranks, quick)
