"""What follows the gradients once a step: their norm, AdamW, and copies into flat buffers and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from moec.cost.machine.measured import Line

from .clock import Stopwatch

COPY = "aten::copy_"
# Beside what they send: gradients are laid end to end, and stretches of weights put together.
LAID_OUT = ("_c10d_functional::reduce_scatter_tensor", "_c10d_functional::all_gather_into_tensor")
ALL_REDUCE = "_c10d_functional::all_reduce"  # its copy is a part of the message that is measured
_NOTHING, _DIRECTIONS = Line(bytes=[0.0], seconds=[0.0]), ("forward", "backward", "inference")
TENSORS = 12  # of a group: the number that two or three layers have
SIZES: Sequence[int] = (12 << 10, 384 << 10, 3 << 20, 24 << 20, 96 << 20)
QUICK: Sequence[int] = (12 << 10, 1 << 20)


@torch.no_grad()
def measure_optimizer(watch: Stopwatch, sizes: Sequence[int]) -> dict[str, dict[str, Line]]:
    """Lines by the bytes that `moec.cost.step.update` reads and writes; `sizes`: of the weights."""
    names = ("aten::linalg_vector_norm", "aten::_fused_adamw_", COPY)
    times: dict[str, list[float]] = {name: [] for name in names}
    for size in sizes:
        weights = [nn.Parameter(torch.randn(size // 4 // TENSORS)) for _ in range(TENSORS)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        adamw = torch.optim.AdamW(weights, fused=True)
        times[names[0]].append(watch.least(partial(nn.utils.get_total_norm, gradients)))
        times[names[1]].append(watch.least(adamw.step))
        flat = torch.empty(sum(each.numel() for each in gradients))
        times[COPY].append(watch.least(partial(_lay_out, flat, gradients)))
    moved = {names[0]: 1.0, names[1]: 7.0, COPY: 2.0}
    found = {
        name: {"forward": Line(bytes=[moved[name] * size for size in sizes], seconds=seconds)}
        for name, seconds in times.items()
    }
    return found | dict.fromkeys(LAID_OUT, found[COPY]) | {ALL_REDUCE: dict.fromkeys(_DIRECTIONS, _NOTHING)}


def _lay_out(flat: Tensor, gradients: Sequence[Tensor]) -> None:
    parts = flat.split([each.numel() for each in gradients])
    for part, each in zip(parts, gradients, strict=True):
        part.copy_(each)
