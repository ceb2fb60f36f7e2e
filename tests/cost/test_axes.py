"""What is read off one lowering holds on other numbers of ranks: the same expressions, other numbers."""

from __future__ import annotations

import re
from typing import Any

import pytest

import moec
from moec.cost import Cost
from moec.program import Program
from moec.testing.parts.attention import AttentionRecipe
from moec.testing.parts.feed_forward import FeedForwardRecipe
from moec.testing.recipe import DecoderRecipe

MODEL = DecoderRecipe(
    vocab=48,
    d_model=16,
    num_layers=2,
    attention=AttentionRecipe(num_heads=8, num_kv_heads=8, head_dim=4),
    ffn=FeedForwardRecipe(hidden=48),
)
MOE = {"experts": 8, "layers": "1::2", "top_k": 2, "residual": "learned"}
# Two arrangements with the same axes, of other lengths.
PAIRS = [
    ({"data": 1, "tensor": 2}, {"data": 1, "tensor": 4}),
    ({"data": 4, "expert": 2}, {"data": 8, "expert": 4}),
    ({"data": 2, "tensor": 2, "expert": 2, "slice": 2}, {"data": 4, "tensor": 4, "expert": 4, "slice": 4}),
    ({"data": 4, "tensor": 2, "expert": 2, "slice": 2}, {"data": 4, "tensor": 4, "expert": 4, "slice": 2}),
]


def cost(parallel: dict[str, Any], phase: Any = "training", **moe: Any) -> Cost:
    plan = {"moe": MOE | moe, "parallel": {"node": 16, **parallel}, "compile": {"verify": "off"}}
    program = moec.compile(MODEL.build(device="meta"), plan=plan)
    assert isinstance(program, Program)
    return program.cost(phase)


def kind(axis: str) -> str:
    """`expert` of `expert_4x2`."""
    return re.sub(r"_\d+(x\d+)*", "", axis)


def amounts(found: Cost, numbers: dict[str, int]) -> list[tuple[Any, ...]]:
    """Of every operation, everything that is an amount."""
    told = []
    for one in found.operations:
        sent = [amount for each in (*one.sends, *one.sends_back) for amount in (each.messages, each.bytes)]
        both = (one.forward, one.backward)
        work = [getattr(each, what) for each in both for what in ("flops", "read", "written")]
        given = (found.number(amount, B=4, S=6, **numbers) for amount in (*work, *sent, one.saved))
        told.append((kind(one.name), *given))
    return told


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_another_number_of_ranks(first: dict[str, int], second: dict[str, int]) -> None:
    here, there = cost(first), cost(second)
    ranks = {kind(str(axis)): count for axis, count in there.axes.items()}
    numbers = {str(axis): ranks[kind(str(axis))] for axis in here.axes}
    assert amounts(here, numbers) == amounts(there, {})
