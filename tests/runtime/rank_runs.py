"""A small sparse GPT, trained whole or by the simulated ranks of a mesh, and what came of it."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import moec
from examples.gpt import GPT, GPTConfig
from moec.plan import Train
from moec.program import Program
from moec.runtime.data import Batch, TextData
from moec.runtime.simulated import run_ranks
from moec.runtime.step import OptimizerStep
from moec.runtime.train import Trainer, TrainResult
from moec.runtime.trainable import LocalTrainable, Trainable
from tests.runtime.tiny import tiny_settings

VOCABULARY = 256
PYRAMID: dict[str, Any] = {
    "layers": "all", "experts": 2, "top_k": 2, "residual": "learned",
    "override": [{"layers": "-1:", "experts": 4}],
}  # fmt: skip


def compiled(
    described: dict[str, Any], world: int = 1, *, dtype: torch.dtype = torch.float64, dropout: float = 0.0
) -> Program:
    """A GPT of two layers and some thousand weights, the same at every call, as `described`; placed on
    `world` ranks when there are several, and then not to be trained itself."""
    parallel = described["parallel"] if world > 1 else {}
    program = _compiled(json.dumps({**described, "parallel": parallel}), world, dtype, dropout)
    return copy.deepcopy(program) if world == 1 else program


@functools.cache
def _compiled(described: str, world: int, dtype: torch.dtype, dropout: float) -> Program:
    config = GPTConfig(vocab=VOCABULARY, seq=8, layers=2, width=24, heads=3, dropout=dropout)
    with torch.random.fork_rng():  # what a caller draws next is the same whether this was kept or not
        torch.manual_seed(0)
        return moec.compile(GPT(config).to(dtype), json.loads(described), world=world if world > 1 else None)


def plan(moe: dict[str, Any] | None = None, **parallel: Any) -> dict[str, Any]:
    """A plan with the expert layers `moe` (the pyramid when left out)."""
    return {"moe": moe or PYRAMID, "parallel": parallel, "compile": {"verify": "off"}}


@dataclass
class Steps:
    """Loss and gradient norm of some steps, and the parameters after them, whole."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]


def random_batches(number: int, size: int) -> list[Batch]:
    """Batches of sequences that the small GPT can read."""
    draw = torch.Generator().manual_seed(1)
    made = torch.randint(VOCABULARY, (number, 2, size, 8), generator=draw)
    return [(tokens, targets) for tokens, targets in made]


def take_steps(program: Trainable, settings: Train, batches: Sequence[Batch]) -> Steps:
    """A step for each batch, on the whole program or on a part of it."""
    step = OptimizerStep(program, settings)
    program.train()
    told = [step.take(batch, settings.lr) for batch in batches]
    losses, norms = [loss.loss for loss, _ in told], [norm for _, norm in told]
    return Steps(losses, norms, {name: value.detach().clone() for name, value in program.named_parameters()})


def take_steps_on_ranks(placed: Program, settings: Train, batches: Sequence[Batch]) -> Steps:
    """The same on all ranks of a placed program; checks that they tell the same, and joins the weights."""
    assert placed.layout is not None
    mesh = placed.layout.mesh

    def body(rank: int) -> tuple[Steps, LocalTrainable]:
        local = placed.partition(rank)
        return take_steps(local, settings, batches), local

    ranks = run_ranks(mesh, body)
    (first, local), *others = ranks
    for steps, _ in others:
        assert (steps.losses, steps.norms) == (first.losses, first.norms)
    places, shapes = local.placements(), local.whole_shapes()
    coordinates = [mesh.coordinates(rank) for rank in range(mesh.world)]
    wholes = {}
    for name in first.parameters:
        parts = [
            (where, steps.parameters[name]) for where, (steps, _) in zip(coordinates, ranks, strict=True)
        ]
        wholes[name] = places[name].whole(shapes[name], parts)
        for where, part in parts:  # holders of the same part have the same bits
            assert torch.equal(places[name].local(wholes[name], where), part), name
    return Steps(first.losses, first.norms, wholes)


def train(
    program: Trainable, data: TextData, folder: Path, *, resume: bool = False, stop_at: int | None = None,
    **changes: object,
) -> TrainResult:  # fmt: skip
    """A run of the trainer, without a screen."""
    settings = tiny_settings(**{"batch": 6, "accumulate": 2, "keep": 9, **changes})
    trainer = Trainer(program, settings, data, folder, console=Console(quiet=True))
    return trainer.run(resume=resume, stop_at=stop_at)


def train_on(
    world: int, described: dict[str, Any], data: TextData, folder: Path, *,
    weights: torch.dtype = torch.float64, dropout: float = 0.0, **how: Any,
) -> list[TrainResult]:  # fmt: skip
    """The trainer's result on each of `world` simulated ranks, or of one process."""
    program = compiled(described, world, dtype=weights, dropout=dropout)
    if world == 1:
        return [train(program, data, folder, **how)]
    assert program.layout is not None
    return run_ranks(program.layout.mesh, lambda rank: train(program.partition(rank), data, folder, **how))
