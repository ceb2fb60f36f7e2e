"""The proof of fresh weights: their numbers are measured, and the program is run to see what norms do.

The rules that say what a weight is for are not asked again: a norm whose scale was taken for a shift, or
whose `1 + w` was overlooked, is seen where the program runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from moec.ir import Check, Program
from moec.ir.compare import EXACT, error_of
from moec.ir.graphs import named_weights
from moec.ir.retarget import in_dtype

from .first_draws import Draw, frozen
from .runner import proof_tokens

aten = torch.ops.aten
STANDARD_ERRORS = 6.0  # by chance, once in 10^9 tensors


def prove_fresh(before: Program, after: Program, draws: Mapping[str, Draw]) -> list[Check]:
    """Nothing shared with before, as many weights as before, numbers as drawn, norms without effect."""
    if any(p.is_meta for p in after.parameters()):
        return []
    old, new = dict(named_weights(before.graph)), dict(named_weights(after.graph))
    held = {value.data_ptr() for value in old.values() if value.numel()}
    shared = [name for name in draws if new[name].numel() and new[name].data_ptr() in held]
    moved = [name for name in old.keys() - draws.keys() if not torch.equal(old[name], new[name])]
    ties = len({id(value) for value in new.values()}) - len({id(value) for value in old.values()})
    checks = [
        _none("weights still shared with the program before", shared),
        _none("weights changed that were to stay", moved),
        Check("number of separate weights", float(abs(ties)), 0.0),
        *_numbers(draws, new),
        _none("experts that are alike", [n for n in draws if draws[n].std and _alike(after, n, new[n])]),
    ]
    # A norm with frozen weights does what it did.
    return checks if frozen(after) else [*checks, _bare_norms(after)]


def _none(what: str, names: list[str]) -> Check:
    return Check(what, float(len(names)), 0.0, worst=names[0] if names else "")


def _numbers(draws: Mapping[str, Draw], new: Mapping[str, Tensor]) -> list[Check]:
    off = {name: _deviation(new[name], draw) for name, draw in draws.items()}
    worst = max(off, key=lambda name: off[name])
    return [Check("drawn numbers, in standard errors,", off[worst], STANDARD_ERRORS, worst=worst)]


def _deviation(value: Tensor, draw: Draw) -> float:
    """How far mean and spread are from those of the draw, in standard errors; constants have to be exact."""
    if not draw.std:
        return 0.0 if bool((value == draw.value).all()) else math.inf
    drawn = value.detach().double()[value != 0] / draw.std  # a row of padding was not drawn
    count = drawn.numel()
    if not count:
        return math.inf
    # Wilson and Hilferty, 1931: the cube root of chi² / n is close to normal, also for few numbers.
    spread = 2 / (9 * count)
    root = float(drawn.square().mean()) ** (1 / 3)
    return max(abs(float(drawn.mean())) * count**0.5, abs(root - (1 - spread)) / spread**0.5)


def _alike(program: Program, name: str, value: Tensor) -> bool:
    """Whether two neighbouring experts have the same numbers."""
    experts = program.origins[name].experts if name in program.origins else 0
    return experts > 1 and any(torch.equal(a, b) for a, b in pairwise(value))


def _bare_norms(program: Program) -> Check:
    wide = in_dtype(program.graph, torch.float64).eval()
    seen: dict[str, float] = {}
    with torch.no_grad():
        _Norms(wide, seen).run(proof_tokens(program))
    worst = max(seen, key=lambda name: seen[name], default="")
    return Check("norms against norms without weights", seen.get(worst, 0.0), EXACT, worst=worst)


class _Norms(fx.Interpreter):
    """Runs a graph and its regions, and compares each norm with one that has no weights."""

    def __init__(self, module: nn.Module, seen: dict[str, float], owner: str = "") -> None:
        super().__init__(module)
        self.seen, self.owner = seen, owner

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; a norm's is compared on the way."""
        value = super().run_node(n)
        if n.target in (aten.layer_norm.default, aten.rms_norm.default):
            args, _ = self.fetch_args_kwargs_from_env(n)
            rest = args[4:5] if n.target is aten.layer_norm.default else args[3:4]
            nothing = (None, None) if n.target is aten.layer_norm.default else (None,)
            bare = n.target(*args[:2], *nothing, *rest)
            self.seen[f"{self.owner}{n.name}"] = error_of(value, bare)
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A region, looked into likewise."""
        region = self.module.get_submodule(str(target))
        return _Norms(region, self.seen, f"{target}: ").run(*args)
