"""The first place where two programs that should compute the same part ways."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from moec.ir import Program
from moec.ir.compare import EXACT, GRADIENT_FLOOR, Observation, comparisons, error_of, observe
from moec.ir.retarget import in_dtype
from moec.passes.runner import proof_tokens
from moec.values import Index, Value, parted, record_values


@dataclass(frozen=True)
class Difference:
    """Where two programs part. `kind`: `value`, `gradient`, `check` (a pass's own, or a stage's), or `crash`.

    `site`: the region (`moe_1`), or the user's module; `tensor`: what differs there; `before` and `after`:
    the two in words; `source`: the user's line; `error`: relative to the scale of the reference, infinite
    when there is nothing to compare.
    """

    kind: str
    site: str
    tensor: str
    error: float = math.inf
    before: str = ""
    after: str = ""
    source: str = ""

    def __str__(self) -> str:
        off = f", off by {self.error:.1e} of its scale" if math.isfinite(self.error) else ""
        rows = [("site", self.site), ("line", self.source), ("before", self.before), ("after", self.after)]
        told = [f"  {label:<8}{text}" for label, text in rows if text]
        return "\n".join([f"{self.kind} {self.tensor}{off}", *told])


def first_difference(before: Program, after: Program, tokens: Tensor | None = None) -> Difference | None:
    """The first value, or else the last gradient, in which `after` is not `before`; None when they are the
    same.

    Both run in fp64 and evaluation mode on `tokens` i64 [B, S] (left out: the small batch that proofs use).
    Values are matched by what they say, so renamed, merged and moved ones are no difference. Gradients flow
    from the loss to the input: the last parameter in program order that disagrees stands nearest to the
    fault.
    """
    batch = proof_tokens(before) if tokens is None else tokens
    needed = observe(before.graph, before.origins, batch)
    found = observe(after.graph, after.origins, batch)
    logits, gradients = comparisons(needed, found)
    if not logits.holds:
        return _first_value(before, after, batch, logits.error)
    return None if gradients.holds else _last_gradient(before, after, needed, found)


def _first_value(before: Program, after: Program, tokens: Tensor, error: float) -> Difference:
    old, new = (record_values(in_dtype(program.graph, torch.float64), tokens) for program in (before, after))
    lost, novel = parted(old, Index(new)), parted(new, Index(old))
    if not lost or not novel:
        return Difference("value", "root", "logits", error)
    gone = lost[0]
    came = next((value for value in novel if value.tensor.numel() == gone.tensor.numel()), novel[0])
    same_size = came.tensor.numel() == gone.tensor.numel()
    off = error_of(came.tensor.reshape(-1), gone.tensor.reshape(-1)) if same_size else math.inf
    source = novel[0].source or gone.source
    return Difference("value", _site(novel[0], gone), came.name, off, str(gone), str(came), source)


def _site(came: Value, gone: Value) -> str:
    """The region that either value stands in, or else the user's module."""
    named = [value.site for value in (came, gone) if value.site != "root"]
    named += [value.path for value in (came, gone) if value.path]
    return (named or ["root"])[0]


def _last_gradient(before: Program, after: Program, needed: Observation, found: Observation) -> Difference:
    floor = GRADIENT_FLOOR * max(float(g.abs().max()) for g in needed.gradients.values() if g.numel())
    errors = {
        name: error_of(found.gradients[name], gradient, floor) if name in found.gradients else math.inf
        for name, gradient in needed.gradients.items()
    }
    wrong = [name for name in _in_order(before) if not errors.get(name, 0.0) <= EXACT]
    name = wrong[-1]
    now = after.origins.of_source(name)
    told = ", ".join(now) if now else "no parameter of the program comes from it any more"
    site = next((place.split(".")[0] for place in now if place != name), name.rpartition(".")[0])
    return Difference("gradient", site, name, errors[name], after=told)


def _in_order(program: Program) -> list[str]:
    """The user's names of the parameters by first use, regions opened where they are called."""
    root = program.graph
    names: list[str] = []
    for node in root.graph.nodes:
        if node.op == "get_attr":
            names.append(str(node.target))
        elif node.op == "call_module":
            module = root.get_submodule(str(node.target))
            assert isinstance(module, fx.GraphModule)
            names += [f"{node.target}.{read.target}" for read in module.graph.nodes if read.op == "get_attr"]
    sources = (program.origins[name].source for name in names if name in program.origins)
    return list(dict.fromkeys(source for source in sources if source))
