"""Small students and teachers, in one process or on simulated ranks of two meshes, and what was learned."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from examples.gpt import GPT, GPTConfig
from moec import teaching
from moec.api import place
from moec.ir.mesh import Mesh
from moec.local_program import LocalProgram
from moec.plan import Distill, Parallel, Train
from moec.program import Program
from moec.runtime.batch_loss import BatchLoss
from moec.runtime.data import IGNORED, Batch
from moec.runtime.distillation.teacher import Teacher
from moec.runtime.simulated import run_ranks
from moec.runtime.step import OptimizerStep
from moec.runtime.trainable import Trainable

VOCABULARY = 127  # a prime, so ranks have unequal numbers of words; the letters of a text are below it
SPARSE: dict[str, Any] = {
    "layers": "all", "experts": 2, "top_k": 2, "residual": "learned",
    "override": [{"layers": "-1:", "experts": 4}],
}  # fmt: skip


def student_of(world: int = 1, **parallel: Any) -> Program:
    """One layer; placed on `world` ranks when there are several, and then not to be trained itself."""
    return _placed(1, False, world, json.dumps(parallel)) if world > 1 else copy.deepcopy(_compiled(1, False))


def teacher_of(world: int = 1, *, dropless: bool = False, **parallel: Any) -> Program:
    """Two layers of other weights, whose capacity is limited in eval mode too, unless it is dropless."""
    return _placed(2, dropless, world, json.dumps(parallel)) if world > 1 else _compiled(2, dropless)


@functools.cache
def _compiled(layers: int, dropless: bool) -> Program:
    torch.manual_seed(layers)
    model = GPT(GPTConfig(vocab=VOCABULARY, seq=8, layers=layers, width=24, heads=4, dropout=0.0)).double()
    for value in model.parameters():
        value.data.add_(0.2 * torch.randn_like(value))  # far from the even distribution
    limits = {"capacity_factor": 1.0, "eval_capacity_factor": 0.75, "min_capacity": 1}
    sparse = SPARSE if dropless else {**SPARSE, **limits}
    return moec.compile(model, {"moe": sparse, "compile": {"verify": "off"}})


@functools.cache
def _placed(layers: int, dropless: bool, world: int, parallel: str) -> Program:
    whole = _compiled(layers, dropless).fork()
    whole.plan = whole.plan.model_copy(update={"parallel": Parallel(**json.loads(parallel))})
    return place(Program.of(whole), world)


@functools.cache
def _part_of_teacher(teacher: Program, rank: int) -> LocalProgram:
    """Teachers do not change: a part is made once for all tests."""
    return teacher.partition(rank).named("teacher")


def uneven_batches(number: int, size: int) -> list[Batch]:
    """Batches in which some sequences have hardly any target that counts."""
    draw = torch.Generator().manual_seed(3)
    made = []
    for _ in range(number):
        tokens, targets = torch.randint(VOCABULARY, (2, size, 8), generator=draw)
        share = torch.rand(size, 1, generator=draw)
        targets[torch.rand(size, 8, generator=draw) < share.square()] = IGNORED
        made.append((tokens, targets))
    return made


@dataclass
class Taught:
    """The losses and gradient norms of some steps with a teacher, and the parameters afterwards, whole."""

    losses: list[BatchLoss]
    norms: list[float]
    parameters: dict[str, Tensor]

    def assert_like(self, expected: Taught, tolerance: float = 1e-10) -> None:
        """Everything, relative to its scale; parameters to ten times as much, since AdamW divides gradients
        by their own size, those that are rounding for the most part too."""
        for name in ("loss", "task", "balance", "kl", "hidden"):
            found, needed = ([getattr(loss, name) or 0.0 for loss in run.losses] for run in (self, expected))
            assert found == pytest.approx(needed, rel=tolerance), name
        assert self.norms == pytest.approx(expected.norms, rel=tolerance)
        assert self.parameters.keys() == expected.parameters.keys()
        for name, value in expected.parameters.items():
            error = (self.parameters[name] - value).abs().max() / value.abs().max().clamp_min(1e-3)
            assert float(error) <= 10 * tolerance, f"{name}: {float(error):.1e}"


def learn(student: Trainable, teacher: Teacher, settings: Train, batches: Sequence[Batch]) -> Taught:
    """A step for each batch."""
    step = OptimizerStep(student, settings)
    student.train()
    told = [step.take(batch, settings.lr, teacher.lesson) for batch in batches]
    parameters = {name: value.detach().clone() for name, value in student.named_parameters()}
    return Taught([loss for loss, _ in told], [norm for _, norm in told], parameters)


def learn_alone(distill: Distill, settings: Train, batches: Sequence[Batch], teacher: Program) -> Taught:
    """In one process."""
    student = student_of()
    return learn(student, teaching.teacher_of(teacher, student, distill), settings, batches)


def learn_on_ranks(
    student: Program, teacher: Program, distill: Distill, settings: Train, batches: Sequence[Batch]
) -> Taught:
    """On all ranks of a placed student: the teacher on its own mesh, or whole on every rank. Checks that
    ranks tell the same, and joins the weights."""
    assert student.layout is not None
    mesh = student.layout.mesh

    def body(rank: int) -> tuple[Taught, LocalProgram]:
        local = student.partition(rank)
        return learn(local, told_by(teacher, local, distill), settings, batches), local

    ranks = run_ranks(joined_mesh(student, teacher), body)
    first, local = ranks[0]
    places, shapes = local.placements(), local.whole_shapes()
    coordinates = [mesh.coordinates(rank) for rank in range(mesh.world)]
    wholes = {}
    for name in first.parameters:
        parts = [(at, told.parameters[name]) for at, (told, _) in zip(coordinates, ranks, strict=True)]
        wholes[name] = places[name].whole(shapes[name], parts)
    for told, _ in ranks:
        assert (told.losses[-1].loss, told.losses[-1].kl) == (first.losses[-1].loss, first.losses[-1].kl)
    return Taught(first.losses, first.norms, wholes)


def joined_mesh(student: Program, teacher: Program) -> Mesh:
    """What both are connected by; a teacher without a layout is whole on every rank."""
    assert student.layout is not None
    mesh = student.layout.mesh
    return mesh if teacher.layout is None else mesh.joined(teacher.layout.mesh.named("teacher"))


def told_by(teacher: Program, student: LocalProgram, distill: Distill) -> Teacher:
    """What speaks to one rank's student: a program that is placed, or one that every rank holds whole."""
    part = teacher if teacher.layout is None else _part_of_teacher(teacher, student.rank)
    return teaching.teacher_of(part, student, distill)
