"""Whole optimizer steps on simulated ranks: what was sent and what lay in memory, beside what is foretold."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import moec
from examples.gpt import GPT, GPTConfig
from moec.cost import Cost
from moec.cost.reading.routing import Routing
from moec.plan import Train
from moec.program import Program
from moec.runtime.ops.sent import Traffic
from moec.runtime.simulated import run_ranks
from moec.runtime.step import OptimizerStep
from moec.runtime.traffic import count_traffic

VOCABULARY, LENGTH = 65, 6


@dataclass(frozen=True)
class Taken:
    """One rank after its second step. Bytes: `parameters` of all storages that hold any, `gradients` before
    they are summed, `arrived` after that, `optimizer` of AdamW's state. `size`: batch and sequence of a part.
    """

    local: Program
    traffic: Traffic
    size: tuple[int, int]
    parameters: int
    gradients: int
    arrived: int
    optimizer: int

    def cost(self, settings: Train, routing: Routing | None = None) -> Cost:
        """What is foretold of this rank."""
        return self.local.cost("training", routing, train=settings)

    @property
    def letters(self) -> dict[str, int]:
        """Batch and sequence of a part by their letters."""
        return {"B": self.size[0], "S": self.size[1]}


def settings_of(**changes: Any) -> Train:
    """Settings of a short run; seven sequences, so that ranks have not as many as each other."""
    return Train(**{"steps": 4, "warmup": 1, "batch": 7, "sequence": LENGTH, **changes})


@functools.cache
def _compiled(described: str, world: int, options: str) -> Program:
    torch.manual_seed(0)
    config = {"vocab": VOCABULARY, "seq": 8, "layers": 2, "width": 12, "heads": 2, "dropout": 0.0}
    model = GPT(GPTConfig(**{**config, **json.loads(options)}))
    return moec.compile(model, json.loads(described), world=world if world > 1 else None, verify="off")


def compiled(plan: dict[str, Any], world: int = 1, **options: int) -> Program:
    """A small GPT as `plan` says on `world` ranks; the same object for the same words, not to be trained."""
    return _compiled(json.dumps(plan), world, json.dumps(options))


def take_steps(program: Program, settings: Train) -> list[Taken]:
    """Each rank of `program` takes a step, and then one that is counted."""
    if program.layout is None:
        return [take_step(copy.deepcopy(program), settings)]
    return run_ranks(program.layout.mesh, lambda rank: take_step(program.partition(rank), settings))


def counted(ranks: Iterable[Taken]) -> Routing:
    """The routing that the ranks counted."""
    return Routing.counted([one.traffic.routed for one in ranks])


def take_step(local: Program, settings: Train) -> Taken:
    """One rank takes a step, and then one that is counted."""
    step = OptimizerStep(local.train(), settings)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (settings.batch, LENGTH + 1), generator=draw)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    step.take(batch, settings.lr)
    with count_traffic() as traffic:
        step.take(batch, settings.lr)
    own = step.ranks.stretch((batch[0].chunk(settings.accumulate)[0],) * 2)[0]
    step.gradients(batch)
    gradients = sum(p.grad.nbytes for p in local.parameters() if p.grad is not None)
    step.optimizer.reduce()
    updated = [p for group in step.optimizer.adamw.param_groups for p in group["params"]]
    arrived = sum(p.grad.nbytes for p in updated)
    step.optimizer.free()
    state = [value for held in step.optimizer.adamw.state.values() for value in held.values()]
    parameters = _storages(local.parameters())
    return Taken(
        local, traffic, (own.shape[0], own.shape[1]), parameters, gradients, arrived,
        sum(value.nbytes for value in state if isinstance(value, Tensor)),
    )  # fmt: skip


def _storages(tensors: Iterable[Tensor]) -> int:
    """The bytes of all storages that the tensors lie in, each once."""
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(held.values())
