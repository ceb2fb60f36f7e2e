"""Which hidden unit each row of an up product belongs to, found by evaluation.

Between the up products and the down product stand pointwise operators and views, so every output of an up product
reaches exactly one hidden unit; which one depends on the spelling (a fused gate and up may be two halves, or
interleaved). Instead of knowing the spellings, ask the gradient: with cotangents that spell the binary digits of
the unit's number, `log2(F)` backward passes read every row's unit at once.

Legend: U outputs of an up product, F hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Inner = Callable[[Sequence[Tensor]], Tensor]


def units_of_rows(inner: Inner, widths: Sequence[int], hidden: int) -> list[Tensor] | None:
    """For each up product, the hidden unit i64 [U] of each of its outputs; None when some output has not one.

    `inner`: outputs of the up products [1, U] → input of the down product [1, F], in fp64.
    """
    found: list[Tensor] | None = None
    for attempt in range(4):
        sample = _sample(widths, attempt)
        units = _read(inner, sample, hidden)
        if units is None:
            return None
        found = units if found is None else [torch.maximum(a, b) for a, b in zip(found, units, strict=True)]
        if all(bool((u >= 0).all()) for u in found):
            return found
    return None


def _sample(widths: Sequence[int], attempt: int) -> list[Tensor]:
    """Mostly positive values, where no usual non-linearity is flat; later attempts move elsewhere."""
    generator = torch.Generator().manual_seed(attempt)
    low = (0.3, -1.0, 0.05, -3.0)[attempt]
    drawn = [torch.rand(1, width, generator=generator, dtype=torch.float64) + low for width in widths]
    return [value.requires_grad_() for value in drawn]


def _read(inner: Inner, sample: list[Tensor], hidden: int) -> list[Tensor] | None:
    """Unit numbers, -1 where the gradient vanished at this sample; None when a row reaches several units."""
    with torch.enable_grad():
        out = inner(sample)
    if out.shape[-1] != hidden:
        return None
    unit = torch.arange(hidden)
    whole = _pull(out, torch.ones(1, hidden, dtype=torch.float64), sample)
    numbers = [torch.zeros(value.shape[-1], dtype=torch.long) for value in sample]
    for digit in range(max(1, (hidden - 1).bit_length())):
        code = ((unit >> digit) & 1).to(torch.float64)[None]
        for number, part, total in zip(numbers, _pull(out, code, sample), whole, strict=True):
            share = part[0] / total[0]
            seen = total[0].abs() > 1e-12
            if bool((((share - share.round()).abs() > 1e-9) | (share < -0.5) | (share > 1.5))[seen].any()):
                return None
            number += torch.where(seen, share.round(), 0).long() << digit
    return [torch.where(total[0].abs() > 1e-12, n, -1) for n, total in zip(numbers, whole, strict=True)]


def _pull(out: Tensor, cotangent: Tensor, sample: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(out, sample, cotangent.expand_as(out), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, sample, strict=True)]


def blocks_of(units: Tensor, hidden: int) -> int | None:
    """How the units run through the rows: 1 (in order, or each unit's rows together), m (m times over), or None."""
    width = units.numel()
    if width % hidden:
        return None
    times = width // hidden
    if torch.equal(units, torch.arange(hidden).repeat_interleave(times)):
        return 1
    return times if torch.equal(units, torch.arange(hidden).repeat(times)) else None
