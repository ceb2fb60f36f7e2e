"""A mask or bias over pairs of positions, in as few numbers as say the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shown:
    """A value [1, …, L, L]. `kind`: `plain` (all earlier positions alike, `fill`), `key` (by the position
    seen, `numbers` […, L]), `distance` (by how far back it is, [L, …]), `full` ([L, …, L], by both).
    `hidden`: the number (or False) of later positions."""

    kind: str
    numbers: Tensor | None
    hidden: float | bool
    fill: float | bool = 0.0


def shown(value: Tensor, hides: bool) -> Shown:
    """`value` [1, …, L, L] as one of four kinds; `hides`: it is a mask, one number above the diagonal."""
    length = value.shape[-1]
    hidden = value[..., 0, -1].flatten()[0].item()
    if not hides:
        return Shown("full", value[0].movedim(-2, 0).contiguous(), hidden)
    seen = torch.ones(length, length, dtype=torch.bool, device=value.device).tril()
    last = value[..., -1, :]
    if _as_seen(value, last[..., None, :].expand_as(value), seen):
        first = last.flatten()[0]
        if bool((last == first).all()) and first.item() in (0, 1):  # exact in every dtype
            return Shown("plain", None, hidden, first.item())
        return Shown("key", last, hidden)
    back = last.flip(-1)
    steps = torch.arange(length, device=value.device)
    if _as_seen(value, back[..., (steps[:, None] - steps).clamp(min=0)], seen):
        return Shown("distance", back[0].movedim(-1, 0).contiguous(), hidden)
    return Shown("full", value[0].movedim(-2, 0).contiguous(), hidden)


def _as_seen(value: Tensor, other: Tensor, seen: Tensor) -> bool:
    return torch.equal(value[..., seen], other[..., seen])
