"""First weights of experts, made from the dense feed-forward's: copy, noise, partial, split, fresh.

Every function takes the dense matrix as [out, in] (a bias as [out]) and returns it with a leading expert
axis. On `meta` only shapes are made.

Sources: sparse upcycling, arXiv 2212.05055 (copy, noise); drop-upcycling, arXiv 2502.19261 (partial);
MoEfication, arXiv 2110.01786 (split).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.ir import Origin
from moec.plan import LayerSettings


@dataclass(frozen=True)
class HiddenAxis:
    """Where the hidden units run through one tensor: along `dim`, `blocks` times; None when they do not."""

    dim: int
    blocks: int = 1


@dataclass(frozen=True)
class ExpertInit:
    """Makes expert weights for one layer. `hidden`: hidden units F; `generator`: where new numbers come
    from."""

    settings: LayerSettings
    hidden: int
    generator: torch.Generator

    def origin(self, source: str | None, dense: Tensor, axis: HiddenAxis | None, transposed: bool) -> Origin:
        """How this tensor will have been made."""
        how = self.settings.init
        if how == "split" and axis is None:
            how = "copy"
        dim, blocks = (axis.dim, axis.blocks) if axis is not None else (0, 1)
        return Origin(source, how, transposed and dense.dim() == 2, self.settings.experts, dim, blocks)

    def make(self, dense: Tensor, origin: Origin, axis: HiddenAxis | None) -> Tensor:
        """The expert tensor [E, …] for `dense`."""
        if origin.how == "split":
            return origin.deal(dense)
        copies = dense.unsqueeze(0).repeat(origin.experts, *[1] * dense.dim())
        if dense.is_meta or origin.how == "copy":
            return copies
        if origin.how == "noise":
            return copies + self._drawn(copies) * (self.settings.init_noise * _std(dense))
        if origin.how == "fresh":
            return self._like(copies, dense)
        return copies if axis is None else self._partly(copies, dense, axis)

    def _partly(self, copies: Tensor, dense: Tensor, axis: HiddenAxis) -> Tensor:
        """Each expert draws its own share of hidden units anew, the same units in every tensor of the
        layer."""
        renewed = self.renewed_units()
        mask = renewed.repeat(1, axis.blocks) if self._in_runs(dense, axis) else _each(renewed, dense, axis)
        shape = [copies.shape[0], *[1] * dense.dim()]
        shape[1 + axis.dim] = dense.shape[axis.dim]
        return torch.where(mask.reshape(shape).to(dense.device), self._like(copies, dense), copies)

    def _in_runs(self, dense: Tensor, axis: HiddenAxis) -> bool:
        return dense.shape[axis.dim] == self.hidden * axis.blocks

    def renewed_units(self) -> Tensor:
        """bool [E, F]: which hidden units each expert draws anew; depends on the layer's seed alone."""
        generator = torch.Generator().manual_seed(self.generator.initial_seed() + 1)
        count = round(self.settings.init_ratio * self.hidden)
        order = torch.rand(self.settings.experts, self.hidden, generator=generator).argsort(-1)
        return order < count

    def _like(self, copies: Tensor, dense: Tensor) -> Tensor:
        """New numbers with the mean and spread of the dense tensor, in every place."""
        return self._drawn(copies) * _std(dense) + dense.detach().double().mean().to(dense.dtype)

    def _drawn(self, like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=self.generator, dtype=torch.float32)
        return drawn.to(device=like.device, dtype=like.dtype)


def _each(renewed: Tensor, dense: Tensor, axis: HiddenAxis) -> Tensor:
    """Each unit's rows stand together: repeat the mask for each of them."""
    return renewed.repeat_interleave(dense.shape[axis.dim] // renewed.shape[1], dim=1)


def _std(dense: Tensor) -> Tensor:
    value = dense.detach().double()
    return (
        (value.std() if value.numel() > 1 else torch.zeros((), dtype=torch.float64))
        .to(dense.dtype)
        .to(dense.device)
    )
