"""Names: what a person would call a value, alike in every layer, and never two values by one name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import fx

import moec
from moec.capture import capture
from moec.ir import regions
from moec.ir.graphs import graph_modules
from moec.passes.names import Names, rename
from moec.passes.position_names import position_word
from moec.testing import NAMED, DecoderRecipe, decoders
from tests.capture.families import FAMILIES

sys.path.append(str(Path(__file__).parents[2] / "examples"))


def structured(name: str) -> moec.Program:
    """A named recipe's program."""
    return moec.compile(NAMED[name].build(device="meta"))


def test_names_are_handed_out_once() -> None:
    names = Names(["x", "h_1"])
    assert [names.take("x"), names.take("x"), names.take("h"), names.take("h")] == ["x_1", "x_2", "h", "h_2"]
    assert [names.take("n", 3) for _ in range(3)] == ["n_3", "n_3b", "n_3c"]
    assert [names.letter("e") for _ in range(3)] == ["e", "e_b", "e_c"]


def test_renaming_may_swap_names() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.neg, (x,), name="a")
    b = graph.call_function(torch.abs, (a,), name="b")
    graph.output(b)
    module = fx.GraphModule(torch.nn.Module(), graph)
    before = module(torch.tensor([-2.0, 3.0]))
    rename(module, {x: "a", a: "b", b: "x"})
    assert [node.name for node in module.graph.nodes][:3] == ["a", "b", "x"]
    assert torch.equal(module(torch.tensor([-2.0, 3.0])), before)


@settings(max_examples=max(8, settings().max_examples // 8))
@given(decoders(interfaces=("logits",)))
def test_no_two_values_share_a_name_and_layers_are_alike(recipe: DecoderRecipe) -> None:
    program = moec.compile(recipe.build(device="meta"))
    for _, module in graph_modules(program.graph):
        names = [node.name for node in module.graph.nodes]
        assert len(names) == len(set(names))
    for kind in ("attention", "ffn"):
        texts = {_skeleton(module) for module in regions(program.graph, kind).values()}
        assert len(texts) == 1


def _skeleton(module: fx.GraphModule) -> str:
    """A region as text, weights by their names in the region."""
    return "\n".join(f"{n.name} {n.op} {n.target} {n.args} {n.kwargs}" for n in module.graph.nodes)


def test_a_parameter_called_like_a_value_does_no_harm() -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = torch.nn.Parameter(torch.randn(7, 8))
            self.n_0, self.logits = (
                torch.nn.Parameter(torch.randn(8, 8)),
                torch.nn.Parameter(torch.randn(7, 8)),
            )

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = torch.nn.functional.embedding(tokens, self.x)
            x = x + torch.nn.functional.gelu(x @ self.n_0) @ self.n_0
            return x @ self.logits.t()

    model, tokens = Named(), torch.randint(7, (2, 5))
    assert torch.allclose(moec.compile(model, verify="full")(tokens), model(tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "nano_gpt",
            ["q, k, v = split_with_sizes(qkv, [8, 8, 8], dim=-1)", "x = e + p", "h_1 = gelu(h)"],
        ),
        (
            "llama_like",
            ["gate = linear(x, self.gate.weight)", "h = silu(gate)", "a_1 = self.attention_1("],
        ),
        ("phi3_like", ["gate, up = chunk(", "out = linear("]),
        (
            "gemma_like",
            ["s_1 = s / 50.0", "p = softmax(", "o = p @ v", "attention_0(self, x, cos_, sin_, mask)"],
        ),
        ("bloom_like", ["def attention_0(self, x, mask)", "bias"]),
    ],
)
def test_what_a_person_reads(name: str, lines: list[str]) -> None:
    text = str(structured(name))
    missing = [line for line in lines if line not in text]
    assert not missing, text


def test_what_crosses_from_positions_is_named_by_what_it_is() -> None:
    program = moec.compile(FAMILIES["mistral"](), verify="off")
    words = {position_word(program.graph, node) for node in program.graph.graph.nodes} - {None}
    assert words == {"cos", "sin", "mask"}
    assert "mask" in str(program)


def test_the_example_reads_like_a_book() -> None:
    gpt = pytest.importorskip("gpt", reason="examples/ is not there")
    config = gpt.GPTConfig(vocab=32, seq=16, layers=4, width=16, heads=2, dropout=0.1)
    text = str(moec.compile(gpt.GPT(config), verify="off"))
    for line in (
        "def attention_0(self, x):", "o = scaled_dot_product_attention(q, k, v, is_causal=True)",
        "attention_1 = attention_2 = attention_3 = attention_0", "p = self.positions(tokens)",
        "a_2 = self.attention_2(n_2)", "x_3b = x_3 + d_3b", "logits = linear(n, self.token_embedding.weight)",
    ):  # fmt: skip
        assert line in text, line


def test_captured_stages_keep_their_own_names() -> None:
    program = capture(NAMED["nano_gpt"].build())
    before = str(program.graph.graph)
    moec.compile(NAMED["nano_gpt"].build(), verify="off")
    assert str(program.graph.graph) == before
