"""The demo's PR-MoE on several ranks: in one process, on 2 ranks and on 4, with the same losses.

`make demo-ranks` runs it. This file is also what each rank runs (`train_part`): a training script on ranks is
these lines and no more.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import moec
from examples import demo_ranks_screen as screen
from examples import gpt
from examples.demo import PLAN, new_folder
from moec.cost.rank.counted_traffic import predict_traffic
from moec.local_program import LocalProgram
from moec.plan import Plan
from moec.runtime.data import TextData, load_text
from moec.runtime.evaluate import evaluate
from moec.runtime.launch import launch, place_of
from moec.runtime.mesh import connected
from moec.runtime.ranks import ranks_of
from moec.runtime.records import read_records
from moec.runtime.traffic import count_traffic
from moec.runtime.train import Trainer

#: How far apart the losses may be, of their size. Ranks add in another order, so the demo computes in double
#: precision: in single, a router that hesitates between two experts may take the other one.
CLOSE = 1e-9

Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps, on each number of ranks.")]
Out = Annotated[Path, typer.Option(help="Each run makes a new folder in this one.")]
Text = Annotated[Path | None, typer.Option(help="Text to train on; left out: Python's library.")]
Worlds = Annotated[list[int], typer.Option("--ranks", min=2, help="Numbers of ranks; repeatable.")]


def demo(
    steps: Steps = 20,
    out: Out = Path("runs/demo-ranks"),
    text: Text = None,
    ranks: Worlds = [2, 4],  # noqa: B006
) -> None:
    """Train in one process, then on ranks of this machine; show what each rank holds, computes and sends."""
    console, began = screen.open_console(), time.perf_counter()
    torch.set_num_threads(1)
    folder = new_folder(out)
    screen.title(console, "In one process", f"examples/gpt.py by examples/{PLAN.name}, {steps} steps")
    losses = {1: in_one_process(folder / "1", steps, text, console)}
    for world in ranks:
        losses[world] = on_ranks(console, folder / str(world), world, steps, text)
    screen.title(console, "The same losses", "train.jsonl of each run")
    furthest = screen.losses(console, losses)
    if furthest > CLOSE:
        raise RuntimeError(f"losses on ranks are {furthest:.1e} of their size apart, more than {CLOSE:.0e}")
    console.print(f"\nAll of this took {time.perf_counter() - began:.0f} seconds.", highlight=False)


def plan_for(world: int, steps: int) -> Plan:
    """The demo's plan for `world` ranks: the experts spread over all of them."""
    plan = Plan.from_toml(PLAN).model_dump(exclude_unset=True, mode="json")
    plan["parallel"], plan["compile"] = {"expert": world}, {"dtype": "fp64"}
    plan["train"] |= {"steps": steps, "warmup": steps // 10, "log_every": 1, "eval_every": 0, "save_every": 0}
    return Plan.model_validate(plan)


def compile_for(world: int, steps: int) -> moec.Program:
    """The demo's model, the same on every call, placed on `world` ranks."""
    torch.manual_seed(0)
    return moec.compile(gpt.small(), plan_for(world, steps), world=world, verify="off")


def text_of(path: Path | None, plan: Plan) -> TextData:
    """What is trained on."""
    return load_text(*([path] if path else []), sequence=plan.train.sequence)


def in_one_process(folder: Path, steps: int, text: Path | None, console: Console) -> list[float]:
    """Train as ever; gives the loss of each step."""
    program = compile_for(1, steps)
    assert program.plan is not None
    settings = program.plan.train
    Trainer(program, settings, text_of(text, program.plan), folder, console=console).run()
    return losses_of(folder)


def on_ranks(console: Console, folder: Path, world: int, steps: int, text: Path | None) -> list[float]:
    """Start `world` processes of this file, and show what they report; gives the loss of each step."""
    program = compile_for(world, steps)
    assert program.layout is not None
    screen.title(
        console, f"On {world} ranks", "program.layout.mesh, and program.partition(rank): what each runs"
    )
    screen.mesh(console, program.layout.mesh)
    if world == 2:
        screen.layer(console, program.partition(0).text(), "1")
    screen.title(console, f"Training on {world} ranks", "rank 0 shows the progress of all")
    words = [str(folder), str(steps), *([str(text)] if text else [])]
    status = launch(["-m", "examples.demo_ranks", *words], world)
    if status:
        raise typer.Exit(status)
    report = json.loads((folder / "report.json").read_text())
    screen.title(console, "Who computed what", "rows of the held-out text, by the rank that holds the expert")
    screen.load(console, program.layout.mesh, report["counts"])
    screen.title(
        console, "What was sent", "by all ranks together, in one forward and backward of the last batch"
    )
    screen.traffic(console, report["counted"], report["predicted"])
    return losses_of(folder)


def train_part(folder: Path, steps: int, text: Path | None = None) -> None:
    """What one rank does: compile, take its part, find the others, train; rank 0 writes the report."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    program = compile_for(world, steps)
    local = program.partition(rank)
    assert local.layout is not None
    assert local.plan is not None
    data = text_of(text, local.plan)
    with connected(local.layout.mesh):
        Trainer(local, local.plan.train, data, folder).run()
        report = measure(local, data)
    if rank == 0:
        (folder / "report.json").write_text(json.dumps(report))


def measure(local: LocalProgram, data: TextData) -> dict[str, Any]:
    """The load of the experts, and the traffic of one batch as it was counted and as the graph says."""
    assert local.plan is not None
    settings, ranks = local.plan.train, ranks_of(local)
    evaluation = evaluate(local, data, settings, batches=4)
    tokens, _ = ranks.stretch(
        data.train_batch(settings.seed, settings.steps * settings.batch, settings.batch)
    )
    with count_traffic() as traffic:
        logits, terms = local.run(tokens)
        (logits.sum() + terms["balance"]).backward()
    told = ranks.gather([traffic.to_json(), [rows.tolist() for rows in traffic.routed], list(tokens.shape)])
    routed = [[torch.tensor(rows) for rows in tables] for _, tables, _ in told]
    predicted = predict_traffic(local.graph, ranks.mesh, [tuple(shape) for *_, shape in told], routed)
    return {
        "counts": evaluation.counts,
        "counted": [counted for counted, *_ in told],
        "predicted": [one.to_json() for one in predicted],
    }


def losses_of(folder: Path) -> list[float]:
    """The loss of each step of a run."""
    return [row["loss"] for row in read_records(folder / "train.jsonl") if row["kind"] == "step"]


if __name__ == "__main__":
    if place_of(os.environ) is None:
        typer.run(demo)
    else:
        given = sys.argv[1:]
        train_part(Path(given[0]), int(given[1]), *map(Path, given[2:]))
