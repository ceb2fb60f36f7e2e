"""A matrix product with weights, in the spellings people use.

The weights live either in a sub-module of their owner (`up.weight`) or on the owner itself (`up_w`), and are
stored as [out, in] or [in, out]. `ProjectionNames` is the ground truth: which names a spelling gives rise to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Spelling = Literal["module", "functional", "t", "transpose", "addmm", "matmul", "einsum"]
SPELLINGS: tuple[Spelling, ...] = ("module", "functional", "t", "transpose", "addmm", "matmul", "einsum")
_IN_SUBMODULE = ("module", "addmm")
_STORED_IN_OUT = ("addmm", "matmul")


@dataclass(frozen=True)
class ProjectionNames:
    """Where one projection's parameters stand: dotted names from the model's root, and the layout."""

    weight: str
    bias: str | None
    layout: Literal["out_in", "in_out"]


class Affine(nn.Module):
    """`addmm` over flattened rows with a weight of shape [in, out], as GPT-2's code has it."""

    def __init__(self, num_in: int, num_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_in, num_out))
        self.bias = nn.Parameter(torch.zeros(num_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        rows = x.reshape(-1, x.size(-1))
        out = torch.mm(rows, self.weight) if self.bias is None else torch.addmm(self.bias, rows, self.weight)
        return out.view(*x.shape[:-1], self.weight.size(-1))


def add_projection(
    owner: nn.Module, name: str, num_in: int, num_out: int, *, bias: bool, spelling: Spelling
) -> None:
    """Give `owner` the parameters of one projection, unset (a recipe fills every parameter from a seed)."""
    if spelling == "module":
        owner.add_module(name, nn.Linear(num_in, num_out, bias=bias))
    elif spelling == "addmm":
        owner.add_module(name, Affine(num_in, num_out, bias))
    else:
        shape = (num_in, num_out) if spelling in _STORED_IN_OUT else (num_out, num_in)
        owner.register_parameter(f"{name}_w", nn.Parameter(torch.zeros(shape)))
        if bias:
            owner.register_parameter(f"{name}_b", nn.Parameter(torch.zeros(num_out)))


def project(owner: nn.Module, name: str, x: Tensor, *, bias: bool, spelling: Spelling) -> Tensor:
    """Apply the projection `name` of `owner` to x [..., in]; returns [..., out]."""
    if spelling in _IN_SUBMODULE:
        return owner.get_submodule(name)(x)
    # Not `get_parameter`, which refuses the plain tensors that `torch.func.functional_call` puts in place.
    weight: Tensor = getattr(owner, f"{name}_w")
    shift: Tensor | None = getattr(owner, f"{name}_b") if bias else None
    if spelling == "functional":
        return F.linear(x, weight, shift)
    out = _product(x, weight, spelling)
    return out if shift is None else out + shift


def _product(x: Tensor, weight: Tensor, spelling: Spelling) -> Tensor:
    if spelling == "t":
        return x @ weight.T
    if spelling == "transpose":
        return torch.matmul(x, weight.transpose(0, 1))
    if spelling == "einsum":
        return torch.einsum("...i,oi->...o", x, weight)
    return torch.matmul(x, weight)


def projection_names(prefix: str, name: str, *, bias: bool, spelling: Spelling) -> ProjectionNames:
    """The names `add_projection` makes for an owner at the dotted path `prefix` ('' for the root)."""
    stem = f"{prefix}.{name}" if prefix else name
    weight, shift = (".weight", ".bias") if spelling in _IN_SUBMODULE else ("_w", "_b")
    layout: Literal["out_in", "in_out"] = "in_out" if spelling in _STORED_IN_OUT else "out_in"
    return ProjectionNames(stem + weight, stem + shift if bias else None, layout)
