"""Let attention share keys and values among groups of heads, instead of repeating them beforehand.

before:  k = flatten(expand(unsqueeze(k, -3), [-1, -1, 4, -1, -1]), -4, -3); v likewise
         y = scaled_dot_product_attention(q, k, v)
after:   y = scaled_dot_product_attention(q, k, v, enable_gqa=True)

Assumes: `spell_attention` ran. Heads are repeated in place (`k0 k0 k1 k1`), or there is one head for all.
Contract: exact.
Source:  Ainslie et al., arXiv 2305.13245.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moec.ir import Pass, Program
from moec.ir.graphs import drop_unused
from moec.ir.patterns import argument, for_each, is_call, tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class GroupHeads(Pass):
    """See the module."""

    def apply(self, program: Program) -> Program:
        for_each(program.graph.graph, _rewrite)
        drop_unused(program.graph)
        return program


def _rewrite(node: fx.Node) -> None:
    if not is_call(node, aten.scaled_dot_product_attention.default):
        return
    q, k, v = node.args[:3]
    few_k, few_v = _before_repeating(k), _before_repeating(v)
    if few_k is None or few_v is None or node.kwargs.get("enable_gqa"):
        return
    heads, few = _heads(q), _heads(few_k)
    if tensor(q).dim() == 4 and few == _heads(few_v) and heads % few == 0 and _heads(k) == heads:  # type: ignore[union-attr]
        node.args = (q, few_k, few_v, *node.args[3:])
        node.kwargs = {**node.kwargs, "enable_gqa": True}


def _heads(value: Any) -> int:
    return int(tensor(value).shape[-3])  # type: ignore[union-attr]


def _before_repeating(value: Any) -> fx.Node | None:
    """The keys or values [B, few, S, d] that `value` [B, many, S, d] repeats."""
    if is_call(value, aten.flatten.using_ints) and tuple(value.args[1:3]) == (-4, -3):
        return _before_expanding(value.args[0])
    if is_call(value, aten.repeat_interleave.self_int) and argument(value, 2, "dim") in (1, -3):
        return value.args[0]
    one_head = is_call(value, aten.expand.default) and _heads(value.args[0]) == 1
    others_stay = one_head and all(size == -1 for i, size in enumerate(value.args[1]) if i != 1)
    return value.args[0] if others_stay and _rank(value.args[0]) == 4 else None


def _rank(value: Any) -> int:
    known = tensor(value)
    return known.dim() if known is not None else 0


def _before_expanding(value: Any) -> fx.Node | None:
    """`x` of `expand(unsqueeze(x, -3), [-1, -1, n, -1, -1])`."""
    if not is_call(value, aten.expand.default) or not is_call(value.args[0], aten.unsqueeze.default):
        return None
    sizes, wide = list(value.args[1]), value.args[0]
    inserted = int(wide.args[1]) % max(_rank(wide), 1) == _rank(wide) - 3
    return (
        wide.args[0] if inserted and [i for i, s in enumerate(sizes) if s != -1] == [len(sizes) - 3] else None
    )
