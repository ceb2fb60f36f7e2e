"""One training step on one of several ranks: forward, backward, and the gradients summed over the ranks.

Every contender's step is made here, and all sum their gradients by the same code, so that what differs is
what the libraries do. The loss of a rank is its share: the sum over its tokens by the number of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers_ranks import is_expert
from moec.ir.mesh import WORLD
from moec.local_program import LocalProgram
from moec.program import Program
from moec.runtime.ops.groups import group_of

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """The tokens and targets of all ranks, i64 [B, S]; each rank takes its stretch."""

    tokens: Tensor
    targets: Tensor

    @property
    def here(self) -> Batch:
        """The stretch of this rank."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        return Batch(self.tokens.chunk(ranks)[rank], self.targets.chunk(ranks)[rank])


@dataclass
class Step:
    """A training step that can be repeated; `run()` leaves the loss of all ranks' tokens and the gradients.

    `shared`: the parameters that every rank holds, whose gradients are summed.
    """

    loss: Callable[[], Tensor]
    parameters: dict[str, nn.Parameter]
    shared: list[nn.Parameter]
    last: Tensor | None = None

    def __call__(self) -> None:
        """Forward, backward, reduction; from gradients that are None, as `zero_grad` leaves them."""
        for parameter in self.parameters.values():
            parameter.grad = None
        loss = self.loss()
        loss.backward()
        self.last = loss.detach()
        sum_gradients(self.shared)

    def gradients(self) -> Gradients:
        """Run once; the gradients by name, those of a split parameter put together."""
        self()
        found = {name: parameter.grad for name, parameter in self.parameters.items()}
        return {name: _whole(grad).clone() for name, grad in found.items() if grad is not None}

    def total(self) -> float:
        """The loss of the last run, over all ranks."""
        assert self.last is not None
        total = self.last.clone()
        dist.all_reduce(total)
        return float(total)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over all ranks, in one message; they become views of one buffer."""
    having = [parameter for parameter in parameters if parameter.grad is not None]
    if not having:
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in having if parameter.grad is not None])
    dist.all_reduce(flat)
    parts = flat.split([parameter.numel() for parameter in having])
    for parameter, part in zip(having, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def step_of_program(local: LocalProgram, batch: Batch) -> Step:
    """The step of moec's local program; what it sums follows from its placements."""
    placements, parameters = local.placements(), dict(local.named_parameters())
    axes = local.layout.mesh.axes()
    held = {name: placements[name].holders for name in parameters}
    several = {axis for axis in held.values() if axes[axis] > 1}
    if any(group_of(axis).size() != dist.get_world_size() for axis in several):
        raise ValueError(f"gradients are summed over {', '.join(sorted(several))}, not only over {WORLD}")
    here = batch.here

    def loss() -> Tensor:
        share: Tensor = local.loss_terms(here.tokens, here.targets)["loss"]
        return share

    return Step(loss, parameters, [parameters[name] for name, axis in held.items() if axis in several])


def step_of_model(model: nn.Module, batch: Batch, reduced: bool = False) -> Step:
    """The step of a peer's model, which gives logits or an output that has them.

    `reduced`: the model itself leaves means over the ranks in the gradients; its loss is then the mean over
    the rank's own tokens.
    """
    here, parameters = batch.here, dict(model.named_parameters())
    count = here.targets.numel() if reduced else batch.targets.numel()

    def loss() -> Tensor:
        out: Any = model(here.tokens)
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        return F.cross_entropy(logits.flatten(0, 1), here.targets.flatten(), reduction="sum") / count

    shared = [] if reduced else [parameter for parameter in parameters.values() if not is_expert(parameter)]
    return Step(loss, parameters, shared)


def gradient_error(step: Step, local: LocalProgram, program: Program, batch: Batch) -> float:
    """The largest error of a gradient of ours against the single-process program on all ranks' tokens.

    Relative to the largest gradient of the same parameter; the largest over parameters and ranks.
    """
    for parameter in program.parameters():
        parameter.grad = None
    program.loss_terms(batch.tokens, batch.targets)["loss"].backward()
    placements, coordinates = local.placements(), local.layout.mesh.coordinates(local.rank)
    expected = {
        name: placements[name].local(parameter.grad, coordinates)
        for name, parameter in program.named_parameters()
        if parameter.grad is not None
    }
    return difference(step.gradients(), expected)


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest relative difference over the names that both have, and over the ranks."""
    names = found.keys() & expected.keys()
    if not names:
        raise ValueError("no parameter of the same name to compare")
    largest = torch.tensor(0.0)
    for name in names:
        scale = expected[name].abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        largest = largest.maximum((found[name] - expected[name]).abs().max() / scale)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def _whole(grad: Tensor) -> Tensor:
    whole = getattr(grad, "full_tensor", None)
    return whole() if whole is not None else grad
