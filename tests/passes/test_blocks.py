"""Where the layers of a program begin and end: on every form of block, with and without the user's names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import moec
from moec.errors import PassError
from moec.ir.graphs import graph_modules
from moec.passes.blocks import blocks_of
from moec.testing.decoders import BLOCKS
from moec.testing.recipe import DecoderRecipe

TINY = DecoderRecipe()


def compiled(recipe: DecoderRecipe, plan: object = None) -> moec.Program:
    return moec.compile(recipe.build(), plan, verify="off")


def ends(program: moec.Program) -> list[tuple[str, str]]:
    return [(block.entry.name, block.exit.name) for block in blocks_of(program.graph)]


def forget_paths(root: fx.GraphModule) -> None:
    """As a program that was captured from an `fx.GraphModule`: no module paths, neither of values nor of
    regions."""
    for _, module in graph_modules(root):
        region = module.meta.get("region")
        if region is not None:
            module.meta["region"] = replace(region, path="")
        for node in module.graph.nodes:
            node.meta.pop("path", None)


@pytest.mark.parametrize(
    ("form", "share"), [*((form, "none") for form in BLOCKS), ("pre", "ffn"), ("post", "block")]
)
def test_every_form_of_block(form: str, share: str) -> None:
    """Three layers are three blocks that hang together, named or not."""
    program = compiled(replace(TINY, block=form, share=share, num_layers=3))
    blocks = blocks_of(program.graph)
    assert [block.path for block in blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [block.regions for block in blocks] == [(f"attention_{i}", f"ffn_{i}") for i in range(3)]
    assert [block.entry for block in blocks[1:]] == [block.exit for block in blocks[:-1]]
    named = ends(program)
    assert named[0][0] == "x"
    last = {"post": "n"}.get(form, "x_2b")
    assert named[-1][1] == last, "norms after the last block are none of its own"
    forget_paths(program.graph)
    assert ends(program) == named


@pytest.mark.parametrize("form", ["pre", "post", "parallel_one_norm"])
def test_one_and_two_layers(form: str) -> None:
    one, two = (ends(compiled(replace(TINY, block=form, num_layers=n))) for n in (1, 2))
    assert (len(one), len(two)) == (1, 2)
    assert two[0][0] == one[0][0] == "x"
    assert two[1][1] == {"post": "n"}.get(form, "x_1b")


def test_experts_and_what_stands_beside_them_are_one_block() -> None:
    plan = {"moe": {"layers": "1::2", "experts": 4, "residual": "learned", "z_loss": 0.1}}
    blocks = blocks_of(compiled(replace(TINY, num_layers=4), plan).graph)
    assert [block.regions for block in blocks[:2]] == [
        ("attention_0", "ffn_0"),
        ("attention_1", "ffn_1", "moe_1", "mix_1"),
    ]
    assert [node.name for node in blocks[1].nodes][-1] == blocks[1].exit.name == "x_1b"


class Macaron(nn.Module):
    """Half a feed-forward, attention, half a feed-forward; the embedding is added again before each layer."""

    def __init__(self, layers: int, again: bool = False, links: bool = False) -> None:
        super().__init__()
        self.e = nn.Embedding(11, 8)
        self.parts = nn.ModuleList(nn.ModuleDict(self._part()) for _ in range(layers))
        self.head, self.again, self.links = nn.Linear(8, 11), again, links

    @staticmethod
    def _part() -> dict[str, nn.Module]:
        return {
            "up": nn.Linear(8, 16), "down": nn.Linear(16, 8), "qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8),
            "wide": nn.Linear(8, 16), "narrow": nn.Linear(16, 8),
        }  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        first = x = self.e(tokens)
        kept = None
        for part in self.parts:
            x = x + 0.5 * first if self.again else x
            x = x + part["down"](F.gelu(part["up"](x)))
            q, k, v = part["qkv"](x).chunk(3, -1)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            kept = a if kept is None else kept
            x = x + part["out"](a)
            x = x + part["narrow"](F.gelu(part["wide"](x))) + (kept.mean() if self.links else 0.0)
        return self.head(x)


@pytest.mark.parametrize("again", [False, True])
def test_macaron(again: bool) -> None:
    """The period is three; what every layer adds again belongs to the layer that adds it."""
    program = moec.compile(Macaron(3, again), verify="off")
    blocks = blocks_of(program.graph)
    assert [block.path for block in blocks] == ["parts.0", "parts.1", "parts.2"]
    assert all(len(block.regions) == 3 for block in blocks)
    assert [str(block.exit.target) for block in blocks] == ["aten.add.Tensor"] * 3
    reads = {source.name for source in blocks[1].nodes[0].all_input_nodes}
    assert blocks[0].exit.name in reads


def test_blocks_need_a_stream() -> None:
    captured = compiled(TINY).stages["canonical"]
    with pytest.raises(PassError, match="no attention and no feed-forward that is a region"):
        blocks_of(captured)


def test_nothing_is_changed() -> None:
    program = compiled(replace(TINY, num_layers=2))
    text, code = program.text(), str(program.graph.graph)
    blocks_of(program.graph)
    assert (program.text(), str(program.graph.graph)) == (text, code)
    assert torch.equal(*(program.eval()(TINY.tokens()) for _ in range(2)))
