"""Products of one value joined: one weight, no memory twice, and what stays apart says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import moec
from moec.decoder import Decoder
from moec.errors import VerifyError
from moec.ir import regions
from moec.passes.fuse_qkv import FuseQkv
from moec.passes.pipeline import fused_decoder
from moec.passes.runner import Runner
from moec.testing import DecoderRecipe
from moec.testing.parts.attention import AttentionRecipe
from moec.testing.parts.feed_forward import FeedForwardRecipe
from moec.testing.same_function import compare

aten = torch.ops.aten
RECIPE = DecoderRecipe(
    num_layers=2, positions="rotary_half", attention=AttentionRecipe(qkv="separate", bias=True),
    ffn=FeedForwardRecipe(hidden=8, gating="separate", activation="silu"),
)  # fmt: skip


def program(recipe: DecoderRecipe = RECIPE) -> moec.Program:
    return moec.compile(recipe.build(0, torch.float64), verify="off").eval()


def step(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Logits of all positions of `tokens`, in one step."""
    rows, length = tokens.shape
    cache = decoder.new_cache(rows, length)
    past = torch.zeros(rows, dtype=torch.int64)
    return decoder.step(tokens, past, torch.arange(length).expand(rows, -1), cache, length)


def memory(*graphs: fx.GraphModule) -> int:
    """Bytes of all blocks that parameters and joined weights lie in."""
    held = [t for graph in graphs for name, t in graph.state_dict(keep_vars=True).items()]
    joined = [b for graph in graphs for n, b in graph.named_buffers() if n.endswith((".weight", ".bias"))]
    blocks = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*held, *joined]}
    return sum(blocks.values())


def linears(module: fx.GraphModule) -> int:
    return sum(node.target is aten.linear.default for node in module.graph.nodes)


def test_one_product_and_no_memory_twice() -> None:
    whole, tokens = program(), RECIPE.tokens(1, 2, 7)
    needed, before = whole(tokens), memory(whole.graph)
    decoder = whole.decoder(16)
    assert linears(regions(decoder.fused.graph, "attention")["attention_0"]) == 2
    assert linears(regions(decoder.fused.graph, "ffn")["ffn_0"]) == 2
    assert memory(whole.graph, decoder.fused.graph) == before
    assert torch.equal(whole(tokens), needed)
    compare({"logits": step(decoder, tokens)}, {"logits": needed}, 1e-10)


def test_the_parameters_stay_themselves() -> None:
    """Names, identity and values; what training writes is seen by the decoder, and gradients still come."""
    whole, tokens = program(), RECIPE.tokens(1, 2, 7)
    known, values = dict(whole.named_parameters()), {n: p.clone() for n, p in whole.named_parameters()}
    decoder = whole.decoder(16)
    assert all(whole.get_parameter(n) is p for n, p in torch.nn.Module.named_parameters(whole))
    assert all(p is known[n] and torch.equal(p, values[n]) for n, p in whole.named_parameters())
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    whole.loss(tokens).backward()
    optimizer.step()
    assert not torch.equal(whole.state_dict()["blocks.0.attn.q.weight"], values["blocks.0.attn.q.weight"])
    compare({"logits": step(decoder, tokens)}, {"logits": whole(tokens)}, 1e-10)


def test_a_second_decoder_finds_them_joined() -> None:
    whole, tokens = program(), RECIPE.tokens(1, 2, 7)
    first = Decoder(whole, 16)
    held = memory(whole.graph, first.fused.graph)
    second = Decoder(whole, 32)
    assert memory(whole.graph, first.fused.graph, second.fused.graph) == held
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(1.1)
    for decoder in (first, second):
        compare({"logits": step(decoder, tokens)}, {"logits": whole(tokens)}, 1e-10)


def test_layers_that_share_their_weights_share_the_joined_one() -> None:
    whole = program(replace(RECIPE, share="block"))
    decoder = whole.decoder(16)
    blocks = [
        module.get_buffer("q_k_v.weight") for module in regions(decoder.fused.graph, "attention").values()
    ]
    assert len({id(block) for block in blocks}) == 1


def test_saved_after_it_was_joined(tmp_path: Path) -> None:
    """Side by side in memory is not over each other: a program that has decoded is saved as before."""
    whole, tokens = program(), RECIPE.tokens(1, 2, 7)
    whole.decoder(16)
    again = moec.load(whole.save(tmp_path / "program")).eval()
    assert torch.equal(again(tokens), whole(tokens))


def test_every_pass_is_proved() -> None:
    derived = program().decoder(16).program
    larger = Runner(verify="full").run(derived.fork(), fused_decoder())
    verdicts = {c.rewrite: c.verdict for c in larger.certificates}
    assert verdicts["fuse_qkv"] == verdicts["settle_training"] == "proved"


def test_joined_in_another_order_is_caught() -> None:
    class Turned(FuseQkv):
        def apply(self, program: Any) -> Any:
            done = super().apply(program)
            for module in regions(done.graph, "attention").values():
                for node in module.graph.nodes:
                    if node.target is aten.split_with_sizes.default:
                        q, k, _ = node.users
                        q.update_arg(1, 1)
                        k.update_arg(1, 0)
                module.recompile()
            return done

    with pytest.raises(VerifyError, match="pass turned"):
        Runner(verify="full").run(program().decoder(16).program, [Turned()])


@pytest.mark.parametrize(
    ("hidden", "width", "says"),
    [(7, 8, "has 56 bytes, not a multiple of 64"), (8, 8, "gate, up in one product")],
)
def test_notes(hidden: int, width: int, says: str) -> None:
    recipe = replace(RECIPE, d_model=width, ffn=replace(RECIPE.ffn, hidden=hidden, bias=True))
    notes = program(recipe).decoder(16).fused.ledger.notes
    assert any(note.startswith("fuse_qkv: ffn_0, ffn_1") and says in note for note in notes)
