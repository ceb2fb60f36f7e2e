"""Every way to arrange four ranks gives the same training: `python -m benchmarks.meshes`.

The demo's model and plan (four heads instead of three, so that tensor 4 has one each) learn Python's standard
library for some steps in one process, and on the simulated ranks of every mesh: data × tensor of the dense
part times expert × slice of the expert layers. Prints, for each, how far its loss curve, its gradient norms
and its last held-out loss are from those of one process, and after how many steps its experts first had
other numbers of rows: a token that is on the edge between two experts may be sent to the other one because of
rounding, and from there on the curves are those of two trainings. In fp64, the default, none is.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

import moec
from examples.gpt import GPT, GPTConfig
from moec.plan import Parallel, Plan, Train
from moec.runtime.data import TextData, load_text
from moec.runtime.simulated import run_ranks
from moec.runtime.train import Trainer, TrainResult
from moec.runtime.trainable import Trainable

WORLD = 4
PLAN = Path(__file__).parent.parent / "examples/pr_moe.toml"


def meshes(world: int) -> Iterator[Parallel]:
    """Every `[parallel]` table that has the ranks of `world` filled."""
    divisors = [number for number in range(1, world + 1) if world % number == 0]
    for tensor in divisors:
        for expert in divisors:
            for part in divisors:
                if world % (expert * part) == 0:
                    yield Parallel(tensor=tensor, expert=expert, slice=part)


def demo_model(dtype: torch.dtype) -> GPT:
    """The same weights at every call."""
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab=256, seq=64, layers=4, width=96, heads=4, dropout=0.0)).to(dtype)


def described(parallel: Parallel) -> Plan:
    """The demo's plan on another mesh."""
    plan = Plan.from_toml(PLAN)
    unproved = plan.compile.model_copy(update={"verify": "off"})
    return plan.model_copy(update={"parallel": parallel, "compile": unproved})


def run(program: Trainable, settings: Train, data: TextData, folder: Path) -> TrainResult:
    """A run of the trainer, without a screen."""
    return Trainer(program, settings, data, folder, console=Console(quiet=True)).run()


def run_on(model: GPT, parallel: Parallel, settings: Train, data: TextData, folder: Path) -> TrainResult:
    """The same on the simulated ranks of a mesh; what the first rank tells, as all do."""
    placed = moec.compile(model, described(parallel), world=WORLD)
    assert placed.layout is not None
    return run_ranks(
        placed.layout.mesh, lambda rank: run(placed.partition(rank), settings, data, folder), timeout=3600
    )[0]


def distances(found: TrainResult, expected: TrainResult) -> tuple[float, float, float]:
    """Largest relative differences of losses and of gradient norms, and that of the held-out loss."""
    pairs = list(zip(found.history, expected.history, strict=True))
    losses = max(abs(a.loss - b.loss) / b.loss for a, b in pairs)
    norms = max(abs(a.grad_norm - b.grad_norm) / b.grad_norm for a, b in pairs)
    assert found.final is not None
    assert expected.final is not None
    return losses, norms, abs(found.final.loss - expected.final.loss) / expected.final.loss


def steps_alike(found: TrainResult, expected: TrainResult) -> int:
    """After how many steps some expert first had another number of rows."""
    pairs = list(zip(found.history, expected.history, strict=True))
    return next((step for step, (a, b) in enumerate(pairs) if a.load != b.load), len(pairs))


def main() -> None:
    """Print the table; fails when a loss curve is further than 1e-5 from that of one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    asked = parser.parse_args()
    model = demo_model(getattr(torch, asked.dtype))
    torch.set_num_threads(1)
    settings = Train(steps=asked.steps, batch=asked.batch, sequence=64, eval_batches=2, lr=2e-3)
    data = load_text(sequence=64)
    worst = 0.0
    show = Console(highlight=False, soft_wrap=True).print
    show("| data × tensor | expert × slice | losses | gradient norms | held-out loss | steps alike |")
    show("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        alone = run(moec.compile(model, described(Parallel())), settings, data, Path(folder, "one"))
        for parallel in meshes(WORLD):
            name = f"{WORLD // parallel.tensor} × {parallel.tensor}", f"{parallel.expert} × {parallel.slice}"
            found = run_on(model, parallel, settings, data, Path(folder, *name))
            told = distances(found, alone)
            row = [*name, *(f"{distance:.1e}" for distance in told), str(steps_alike(found, alone))]
            show(f"| {' | '.join(row)} |")
            worst = max(worst, told[0])
    show(f"one process: loss {alone.history[0].loss:.4f} → {alone.history[-1].loss:.4f}")
    if worst > 1e-5:
        raise SystemExit(f"a loss curve is {worst:.1e} from that of one process; 1e-5 is allowed")


if __name__ == "__main__":
    main()
