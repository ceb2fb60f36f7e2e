"""Products by the table: the same function, and what stays torch's own."""

from __future__ import annotations

import torch
from torch import fx

import moec
from examples.gpt import GPT, GPTConfig
from moec.ir import Program
from moec.ir.graphs import graph_modules
from moec.passes.choose_products import LINEAR, OURS, ChooseProducts
from moec.passes.pack_weights import PackWeights
from moec.passes.runner import Runner
from moec.runtime.ops.packed import PACKED
from moec.testing.tolerances import error_of, tolerance_of


def program(dtype: torch.dtype = torch.float32, width: int = 128) -> Program:
    model = GPT(GPTConfig(vocab=61, seq=64, layers=1, width=width, heads=4, dropout=0.0)).to(dtype)
    return moec.compile(model, plan=None)


def chosen(made: Program, packed: bool = False) -> Program:
    return Runner(verify="full").run(made.fork(), [ChooseProducts(packed)])


def calls(made: Program, target: object) -> list[fx.Node]:
    return [n for _, module in graph_modules(made.graph) for n in module.graph.nodes if n.target is target]


def test_the_same_function_and_the_same_gradients() -> None:
    before = program()
    after = chosen(before)
    assert len(calls(after, OURS)) == 4
    assert len(calls(before, LINEAR)) == 5
    tokens = torch.randint(0, 61, (3, 64))
    found, needed = after.graph(tokens), before.graph(tokens)
    assert error_of(found, needed) <= tolerance_of(torch.float32)
    grads = [torch.autograd.grad(out.square().sum(), list(p.parameters()))
             for out, p in ((found, after), (needed, before))]  # fmt: skip
    for left, right in zip(*grads, strict=True):
        assert error_of(left, right) <= tolerance_of(torch.float32)
    assert list(after.state_dict()) == list(before.state_dict())


def test_what_stays_says_why() -> None:
    after = chosen(program())
    assert any("fewer than 16,384 weights" in note for note in after.ledger.notes)  # the head: 61 x 128
    chosen_notes = [note for note in after.ledger.notes if "by the table of products" in note]
    assert any("linear 128 → 512" in note and "2: mm turned" in note for note in chosen_notes)
    half = chosen(program(torch.bfloat16))
    assert not calls(half, OURS)
    assert any("in bfloat16 torch's own product is as fast" in note for note in half.ledger.notes)


def test_packed_weights_are_for_bfloat16_too() -> None:
    assert len(calls(chosen(program(torch.bfloat16), packed=True), OURS)) == 4


def test_packed_weights_are_found_and_forgotten_when_written_to() -> None:
    before = program()
    after = Runner(verify="off").run(before.fork(), [ChooseProducts(packed=True), PackWeights()])
    weights = [node.args[1] for node in calls(after, OURS)]
    assert len(weights) == 4
    assert any("4 weights, 0.8 MB held twice" in note for note in after.ledger.notes)
    held = [p for p in after.parameters() if PACKED.find(p) is not None]
    assert len(held) == 4
    tokens = torch.randint(0, 61, (1, 2))
    with torch.no_grad():
        assert error_of(after.graph(tokens), before.graph(tokens)) <= tolerance_of(torch.float32)
        held[0].mul_(2)
        assert error_of(after.graph(tokens), before.graph(tokens)) <= tolerance_of(torch.float32)
    assert PACKED.find(held[0]) is None


def test_the_fused_stage_has_it_and_the_source_is_untouched() -> None:
    before = program()
    text = str(before)
    after = before.fused()
    assert "moec.linear" in str(after)
    assert str(before) == text
    assert "choose_products" in [certificate.rewrite for certificate in after.certificates]
