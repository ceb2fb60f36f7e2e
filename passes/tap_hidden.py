"""Return hidden states, too: what leaves some of the layers.

before:  return logits                     # or  return logits, {"balance": …, "z": …, "counts": …}
after:   return logits, {"hidden": {1: x_4, 3: x_8}}             # beside what was there

A hidden state is the residual stream after a layer, x [B, S, D]: the exit of its block (`blocks.py`). Ranks
hold the whole of it, of their own tokens.

Assumes: a program whose residual stream can be cut after each of the layers.
Contract: exact; no other result changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moec.errors import PassError
from moec.ir import Check, Pass, Program
from moec.ir.compare import EXACT, error_of
from moec.ir.graphs import output
from moec.ir.results import results_of, tapped_layers

from .blocks import blocks_of
from .by_hand import Pair

STAGES = ("structured", "sparse", "placed", "partitioned")


@dataclass(frozen=True)
class TapHidden(Pass):
    """Adds `"hidden": {layer: x [B, S, D]}` to what a program returns, for the `layers` that are named."""

    layers: tuple[int, ...]

    def requires(self, program: Program) -> None:
        if program.stage not in STAGES:
            needed = f"one at stage {', '.join(STAGES[:-1])} or {STAGES[-1]}"
            nearest = "the program it was made from" if program.stage == "fused" else ""
            raise PassError(self.name, f"a {program.stage} program", needed, nearest)
        if tapped_layers(program.graph):
            found = f"a program that gives the hidden states of {list(tapped_layers(program.graph))}"
            raise PassError(self.name, found, "the program it was made from")
        count = len(blocks_of(program.graph))
        for layer in self.layers:
            if type(layer) is not int or not 0 <= layer < count:
                raise PassError(self.name, f"layer {layer!r}", f"a layer from 0 to {count - 1}")
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise PassError(self.name, f"layers {list(self.layers)}", "one layer or several, each once")

    def apply(self, program: Program) -> Program:
        found = blocks_of(program.graph)
        states = {layer: found[layer].exit for layer in self.layers}
        end = output(program.graph.graph)
        logits, terms = results_of(end.args[0])
        end.args = ((logits, {**terms, "hidden": states}),)
        program.graph.recompile()
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """The terms are what they were, and the hidden states what those layers gave before."""
        pair, found_blocks = Pair.of(before, after), blocks_of(before.graph)
        exits = {layer: found_blocks[layer].exit.name for layer in self.layers}
        recorder = _Recorder(pair.before, frozenset(exits.values()))
        with torch.no_grad():
            terms = results_of(recorder.run(pair.tokens))[1]
            found = results_of(pair.after(pair.tokens))[1]
        states = found.pop("hidden")
        found |= {f"hidden states of layer {layer}": states[layer] for layer in exits}
        needed = terms | {f"hidden states of layer {layer}": recorder.seen[at] for layer, at in exits.items()}
        return [
            Check(name, error_of(found[name], value), EXACT)
            for name, value in needed.items()
            if isinstance(value, Tensor)
        ]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of the nodes that are named."""

    def __init__(self, module: fx.GraphModule, names: frozenset[str]) -> None:
        super().__init__(module)
        self.names, self.seen = names, dict[str, Tensor]()

    def run_node(self, node: fx.Node) -> Any:
        """As of torch, remembering what was asked for."""
        value = super().run_node(node)
        if node.name in self.names:
            self.seen[node.name] = value
        return value
