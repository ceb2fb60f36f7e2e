"""Let the table of products multiply, where it knows better than torch.

before:  h = linear(x, self.up.weight, self.up.bias)
after:   h = moec.linear(x, self.up.weight, self.up.bias)

`moec.linear` is the same function; forward and both gradients go to the library that was measured to be the
fastest for their shapes (`moec.runtime.ops.products`). On a CPU in float32 that is oneDNN where torch takes
MKL. Where torch's choice is as good the product stays, and the reason is noted.

Assumes: every pass that looks for `linear` has run.
Contract: exact (products are reassociated).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.ir import Check, Pass, Program
from moec.ir.graphs import graph_modules
from moec.ir.patterns import arguments_of, is_call, tensor
from moec.runtime.ops.packed import DTYPES
from moec.runtime.ops.products import choices

from .fusion_notes import note_fusions
from .prove_fusion import prove_fusion

LINEAR = torch.ops.aten.linear.default
OURS = torch.ops.moec.linear.default
SMALLEST_WEIGHT = 1 << 14


@dataclass(frozen=True)
class ChooseProducts(Pass):
    """See the module. `packed`: weights will be packed (`moec.runtime.ops.packed`), which `moec.linear` alone
    finds, so products in bfloat16 are rewritten too."""

    packed: bool = False

    def apply(self, program: Program) -> Program:
        findings = []
        for name, module in graph_modules(program.graph):
            for node in [node for node in module.graph.nodes if is_call(node, LINEAR)]:
                reason = self._declined(node)
                if not reason:
                    node.args, node.kwargs = arguments_of(node), {}
                    node.target = OURS
                findings.append((name or "root", reason or self._chosen(node)))
            module.recompile()
        note_fusions(program, self.name, dict.fromkeys(findings))
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """Every result and gradient, in both modes."""
        return prove_fusion(before, after)

    def _chosen(self, node: fx.Node) -> str:
        """By which kernel the product is now computed."""
        weight = tensor(node.args[1])
        assert weight is not None
        width, depth = weight.shape
        kernels = choices(width, depth, weight.dtype, packed=self.packed)
        return f"linear {depth} → {width} by the table of products, moec.linear ({kernels})"

    def _declined(self, node: fx.Node) -> str:
        """Why a product stays torch's own; empty when it does not."""
        weight = tensor(node.args[1])
        if weight is None or weight.dim() != 2:
            return "linear stays: its weight is no matrix"
        if weight.device.type not in ("cpu", "meta"):
            return f"linear stays: {weight.device.type} has a library of its own"
        if weight.dtype not in (DTYPES if self.packed else (torch.float32,)):
            return f"linear stays: in {_word(weight)} torch's own product is as fast"
        if weight.numel() < SMALLEST_WEIGHT:
            return f"linear stays: fewer than {SMALLEST_WEIGHT:,} weights"
        return ""


def _word(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
