"""Two graphs on the same tokens: the error of their logits, and of the gradient of every source parameter.

Both run in fp64 (`in_dtype`), so that an exact rewrite differs by rounding only. Errors are relative to
the scale of the reference; a gradient's scale is at least a tenth of the largest gradient, since some (a
key's bias) are zero but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .certificate import Check
from .origins import Origins
from .retarget import in_dtype

EXACT = 1e-10
GRADIENT_FLOOR = 0.1


@dataclass(frozen=True)
class Observation:
    """What one graph does on one batch of tokens: logits, and gradients by the user's parameter names."""

    logits: Tensor
    gradients: Mapping[str, Tensor]


def observe(root: fx.GraphModule, origins: Origins, tokens: Tensor) -> Observation:
    """Run `root` in fp64, evaluation mode, forward and backward from a fixed random cotangent."""
    wide = in_dtype(root, torch.float64).eval()
    for value in wide.parameters():
        value.requires_grad_(True)
    with torch.enable_grad():
        out = wide(tokens)
        logits = out[0] if isinstance(out, tuple) else out
        cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        if logits.requires_grad:
            (logits * cotangent.to(logits.device)).sum().backward()
    return Observation(logits.detach(), source_gradients(wide, origins))


def source_gradients(root: fx.GraphModule, origins: Origins) -> dict[str, Tensor]:
    """Gradients of `root`'s parameters, pulled back to the user's parameters by the chain rule.

    Copies are added up, slices put together, transposed ones turned back; a weight read in two places
    counts once.
    """
    sums: dict[str, Tensor] = {}
    for name, value in root.named_parameters():
        origin = origins.get(name)
        if origin is not None and origin.source is not None:
            dense = origin.pull_back(value.grad if value.grad is not None else torch.zeros_like(value))
            sums[origin.source] = sums[origin.source] + dense if origin.source in sums else dense
    return sums


def comparisons(needed: Observation, found: Observation, *, gradients: bool = True) -> list[Check]:
    """The checks `logits` and `gradients` (worst parameter named)."""
    checks = [Check("logits", error_of(found.logits, needed.logits), EXACT)]
    if gradients:
        error, worst = worst_gradient(needed.gradients, found.gradients)
        checks.append(Check("gradients", error, EXACT, worst=worst))
    return checks


def worst_gradient(needed: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest error among gradients, and whose it is; their scale is at least a tenth of the largest."""
    floor = GRADIENT_FLOOR * max((float(g.abs().max()) for g in needed.values() if g.numel()), default=0.0)
    worst, name = 0.0, ""
    for key, gradient in needed.items():
        error = error_of(found[key], gradient, floor) if key in found else float("inf")
        if not error <= worst:
            worst, name = error, key
    return worst, name


def gradients_of(outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the outputs; zeros for leaves that nothing depends on."""
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros((), dtype=torch.float64)
    for name in sorted(outputs):
        weight = torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64)
        total = total.to(outputs[name].device) + (outputs[name] * weight.to(outputs[name].device)).sum()
    if not total.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    drawn = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), drawn, strict=True)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in pairs}


def error_of(found: Tensor, needed: Tensor, floor: float = 0.0) -> float:
    """max |found - needed| / max(|needed|, floor); infinite for a NaN or another shape."""
    if found.shape != needed.shape:
        return float("inf")
    if not needed.numel() or (found.dtype == needed.dtype and torch.equal(found, needed)):
        return 0.0
    gap = (found - needed).abs().masked_fill(found == needed, 0.0).nan_to_num(nan=float("inf"))
    finite = needed.abs()[needed.isfinite()]
    scale = max(float(finite.max()) if finite.numel() else 0.0, floor)
    return float(gap.max()) / (scale or 1.0)
