"""Keep the weights of products a second time, in the order in which a CPU reads them fastest.

before:  y = moec.linear(x, self.up.weight, None)         # reads `up.weight` as it lies
after:   the same text; `moec.linear` and `moec.moe_ffn` find a packed copy of each weight

A step of a decoder is a reading of weights, and with few rows packed ones are read up to twice as fast. It
takes their memory again. What is written to afterwards is no longer packed; the program has to be made again.

Assumes: `fuse_moe_ffn` and `choose_products` have run; the weights are loaded.
Contract: exact (products are reassociated).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.ir import Pass, Program
from moec.ir.graphs import graph_modules
from moec.ir.patterns import argument, is_call
from moec.runtime.ops.packed import PACKED, can_pack

from .choose_products import OURS
from .fuse_mix import MOE_FFN
from .fusion_notes import note_fusions


@dataclass(frozen=True)
class PackWeights(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        findings, seen, num_bytes = [], set(), 0
        for name, module in graph_modules(program.graph):
            for weight in _weights(module):
                if id(weight) not in seen and can_pack(weight) and PACKED.keep(weight):
                    num_bytes += weight.nbytes
                    seen.add(id(weight))
                    findings.append((name or "root", "weights packed for the CPU"))
        findings.append(("in all", f"{len(seen)} weights, {num_bytes / 1e6:.1f} MB held twice"))
        note_fusions(program, self.name, dict.fromkeys(findings))
        return program


def _weights(module: fx.GraphModule) -> Iterator[Tensor]:
    """The weights that products of this graph read, as the module holds them."""
    for node in module.graph.nodes:
        if is_call(node, OURS):
            yield from _held(module, [argument(node, 1, "weight")])
        elif is_call(node, MOE_FFN):
            yield from _held(module, argument(node, 4, "matrices"))


def _held(module: fx.GraphModule, nodes: list[fx.Node]) -> Iterator[Tensor]:
    for node in nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(module.get_submodule(owner), name)
            if isinstance(value, Tensor):
                yield value
