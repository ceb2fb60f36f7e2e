"""What may stand in a graph at each stage; checked whenever a pass completes one.

captured → canonical → structured → sparse → placed → partitioned (→ fused, → cached)
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from moec.errors import VerifyError, nearest

from .graphs import graph_modules
from .region import region_of

STAGES = ("captured", "canonical", "structured", "sparse", "placed", "partitioned", "fused", "cached")

aten = torch.ops.aten
# Spellings that `canonical` has replaced by one of their own.
REPLACED = {
    aten.addmm.default: "linear", aten.view.default: "reshape, flatten or unflatten", aten.numpy_T.default:
    "t", aten.contiguous.default: "nothing", aten.alias.default: "nothing", aten.type_as.default: "to",
}  # fmt: skip
SIZES = {
    getattr(operator, n)
    for n in [
        "add",
        "sub",
        "mul",
        "floordiv",
        "mod",
        "neg",
        "getitem",
        "truediv",
        "pow",
        "lt",
        "le",
        "gt",
        "ge",
        "eq",
        "ne",
    ]
}


def check_stage(root: fx.GraphModule, stage: str) -> None:
    """Raise `VerifyError`, naming the node, when something stands in `root` that `stage` does not allow."""
    if stage not in STAGES:
        raise VerifyError(
            f"stage '{stage}'", "no such stage", f"one of {', '.join(STAGES)}", nearest(stage, STAGES)
        )
    for rule in RULES.get(stage, ()):
        for name, module in graph_modules(root):
            for node in module.graph.nodes:
                problem = rule(module, node)
                if problem:
                    where = f"stage {stage}, {name or 'root'}: {node.name}"
                    raise VerifyError(where, f"{node.op} {node.target}", problem)


def _known_calls(module: fx.GraphModule, node: fx.Node) -> str:
    if (
        node.op == "call_function"
        and not isinstance(node.target, torch._ops.OpOverload)
        and node.target not in SIZES
    ):
        return "operators of torch.ops, or arithmetic on sizes"
    return "no call_method" if node.op == "call_method" else ""


def _no_writes(module: fx.GraphModule, node: fx.Node) -> str:
    target = node.target
    writes = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    return "no in-place operators" if writes else ""


def _writes_caches_only(module: fx.GraphModule, node: fx.Node) -> str:
    return "" if node.target is torch.ops.moec.remember.default else _no_writes(module, node)


def _one_spelling(module: fx.GraphModule, node: fx.Node) -> str:
    bare = node.target in REPLACED and node.op == "call_function"
    if node.target is aten.addmm.default and bare:
        return ""  # an addmm of values, not of a weight, has no other spelling
    return f"the one spelling: {REPLACED[node.target]}" if bare else ""  # type: ignore[index]


def _calls_regions(module: fx.GraphModule, node: fx.Node) -> str:
    if node.op != "call_module":
        return ""
    return (
        ""
        if region_of(module.get_submodule(str(node.target))) is not None
        else "sub-modules that are regions"
    )


Rule = Callable[[fx.GraphModule, fx.Node], str]
CANONICAL: tuple[Rule, ...] = (_known_calls, _no_writes, _one_spelling)
RULES: dict[str, tuple[Rule, ...]] = {
    "captured": (_known_calls,),
    "canonical": CANONICAL,
    "structured": (*CANONICAL, _calls_regions),
    "sparse": (*CANONICAL, _calls_regions),
    "placed": (*CANONICAL, _calls_regions),
    "partitioned": (*CANONICAL, _calls_regions),
    "cached": (_known_calls, _writes_caches_only, _one_spelling, _calls_regions),
    "fused": (_known_calls, _writes_caches_only, _one_spelling, _calls_regions),
}
