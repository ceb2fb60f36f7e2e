"""AdamW over the weights of a job: on every rank, over the part of them that it updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moec.errors import TrainError
from moec.plan import Train
from moec.runtime.groups import parameter_groups
from moec.runtime.holding import Holding
from moec.runtime.shards import Dealt, Held, Slot, Whole
from moec.runtime.trainable import Trainable

STEPS = "step"  # AdamW's count of a parameter's steps: the one value of its state without a shape


class Optimizer:
    """AdamW over `program`, whose weights it changes in place, together with the other ranks of its job.

    On several ranks, parameters become views of flat buffers (see `shards.py`). The methods of one step are
    `reduce`, `norm`, `scale`, `step` and, whatever happened, `free`. Raises `TrainError` unless every
    parameter is fp32 or fp64.

    Fused: for 35M parameters, nearly all of experts, one update took 11 ms fused, 50 ms in a loop and 78 ms
    with `foreach` (2 cores, fp32), as it reads and writes every array once.
    """

    def __init__(self, program: Trainable, settings: Train, holding: Holding) -> None:
        groups = _groups(program, settings, holding)
        self._ranks = holding.ranks
        self._held = [_held(group, holding) for group in groups]
        rows = [{**group, "params": held.updated} for group, held in zip(groups, self._held, strict=True)]
        self.adamw = torch.optim.AdamW(rows, lr=settings.lr, betas=settings.betas, fused=True)
        self._is_first_step = True

    def reduce(self) -> None:
        """Sum the gradients over the ranks that hold the same weights; each is left with those it updates.

        A parameter without a gradient is skipped in one process, and has none on any of several ranks, which
        is an error: `TrainError` in their first step.
        """
        if self._ranks.world == 1:
            return
        if self._is_first_step:
            self._require_gradients()
        for parameter in (p for held in self._held if isinstance(held, Whole) for p in held.parameters):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for held in self._held:
            held.start_reduction()
        for held in self._held:
            held.end_reduction()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The norm of the whole gradient, a scalar that is the same on every rank."""
        gradients = [p.grad for p in self._updated() if p.grad is not None]
        if self._ranks.world == 1:
            return nn.utils.get_total_norm(gradients)
        squares = [torch.linalg.vector_norm(grad, dtype=torch.float64).square() for grad in gradients]
        return self._ranks.sums({"square": torch.stack(squares).sum()})["square"].sqrt()

    def scale(self, clip: float, norm: Tensor) -> None:
        """Scale the gradients, whose norm is `norm`, down to the norm `clip` if they exceed it."""
        nn.utils.clip_grads_with_norm_(self._updated(), clip, norm)

    def step(self, rate: float) -> None:
        """Change the weights by the gradients, at learning rate `rate`."""
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        for held in self._held:
            held.join()
        torch.clear_autocast_cache()  # bf16 copies of the old weights outlive an autocast around the trainer
        self._is_first_step = False

    def free(self) -> None:
        """Let go of all gradients.

        Freed, not zeroed. Zeroing is a pass over every gradient, and the next backward then reads and adds
        where it could have written: 35M parameters in 16 experts took 251 ms a step freed and 262 ms zeroed,
        68M in 32 experts 202 and 215 ms. What zeroing is good for, not asking the system for fresh pages, the
        operators do for the large gradients (`ops/buffers.py`: without, 285 ms in the second case).
        """
        self.adamw.zero_grad(set_to_none=True)
        for parameter in (p for held in self._held for p in held.parameters):
            parameter.grad = None

    def worst_gradient(self) -> str:
        """The parameter whose gradient is to blame for a norm that is not finite."""
        norms = [(-1.0, "")]  # of a rank that updates nothing
        for slot in self.slots():
            if slot.owner.grad is not None:
                norm = float(slot.of(slot.owner.grad).norm())
                norms.append((math.inf if math.isnan(norm) else norm, slot.name))
        worst: list[list[Any]] = self._ranks.gather(max(norms))
        return str(max(worst)[1])

    def slots(self) -> Iterator[Slot]:
        """Which elements of which parameters this rank updates."""
        for held in self._held:
            yield from held.slots()

    def state(self, names: Collection[str]) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter, key, value) of what AdamW keeps for the parameters among `names`.

        Values have the shape of the parameter, or none. Every rank must ask, and go through all of them.
        """
        for held in self._held:
            keys = {key for owner in held.updated for key in self.adamw.state.get(owner, {})}
            for key in sorted(keys):
                for name, value in held.in_whole(key, self.adamw, names):
                    yield name, key, value

    def restore(self, keys: Mapping[str, Collection[str]], read: Callable[[str, str], Tensor]) -> None:
        """Replace what AdamW keeps: `keys` of each parameter, as `read(parameter, key)` gives them.

        `read` gives a fresh tensor of the shape of the parameter on this rank, or of none. It is called for
        the parameters that this rank updates alone. A parameter that never had a gradient has no state.
        """
        self.adamw.state.clear()
        for slot in self.slots():
            state = self.adamw.state[slot.owner]
            for key in keys.get(slot.name, ()):
                value = read(slot.name, key)
                in_full = slot.stop - slot.start == slot.owner.numel() and value.shape == slot.owner.shape
                if key == STEPS or in_full:
                    state[key] = value
                else:
                    filled = state.setdefault(key, torch.zeros_like(slot.owner))
                    slot.of(filled).copy_(value.view(-1)[slot.start : slot.stop])

    def _updated(self) -> list[nn.Parameter]:
        return [parameter for group in self.adamw.param_groups for parameter in group["params"]]

    def _require_gradients(self) -> None:
        flags = {
            name: torch.tensor(float(parameter.grad is not None), device=parameter.device)
            for held in self._held
            for name, parameter in zip(held.names, held.parameters, strict=True)
        }
        for name, flag in self._ranks.sums(flags).items():
            if not flag:
                needed = "parameters that the loss depends on, or frozen ones"
                raise TrainError(name, "no gradient on any rank", needed, "parameter.requires_grad_(False)")


def _groups(program: Trainable, settings: Train, holding: Holding) -> list[dict[str, Any]]:
    """`parameter_groups`, each cut by the axis of holders and the dtype; checked."""
    groups = parameter_groups(program, settings.weight_decay)
    if not groups:
        raise TrainError("optimizer", "no parameter that requires a gradient", "at least one")
    for group in groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter.dtype not in (torch.float32, torch.float64):
                found = f"parameters in {str(parameter.dtype).removeprefix('torch.')}"
                raise TrainError(name, found, "fp32 master weights", "program.float() with dtype = 'bf16'")
    return groups if holding.ranks.world == 1 else [cut for group in groups for cut in _cut(group, holding)]


def _cut(group: dict[str, Any], holding: Holding) -> list[dict[str, Any]]:
    kinds: dict[tuple[str, str], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in zip(group["names"], group["params"], strict=True):
        kinds.setdefault((holding.holders(name)[0], str(parameter.dtype)), []).append((name, parameter))
    return [
        {**group, "names": [name for name, _ in members], "params": [parameter for _, parameter in members]}
        for members in kinds.values()
    ]


def _held(group: dict[str, Any], holding: Holding) -> Held:
    axis, ranks, place = holding.holders(group["names"][0])
    if ranks == 1:
        return Whole(group["names"], group["params"])
    return Dealt(group["names"], group["params"], axis, ranks, place)
