"""Where the dense part lies: what is dealt out, what stays whole and why, what the user got wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.errors import PassError, PlanError
from moec.ir import Program, regions
from moec.ir.graphs import output
from moec.ir.mesh import DATA, TENSOR, Mesh
from moec.ir.placement import Layout, Placement, Split
from moec.passes.place_dense import PlaceDense, logits_split
from moec.testing import DecoderRecipe
from moec.testing.parts.attention import AttentionRecipe
from moec.testing.parts.feed_forward import FeedForwardRecipe
from tests.passes.tensor_ranks import RUNNER, placed, program_of, structured


def decoder(**fields: object) -> Program:
    """The program of a decoder of two layers."""
    return program_of(DecoderRecipe(**{"num_layers": 2, **fields}))


def notes(program: Program) -> list[str]:
    """What the ledger says stays whole."""
    start = "whole on every tensor rank: "
    return [note.removeprefix(start) for note in program.ledger.notes if note.startswith(start)]


def layout_of(program: Program) -> Layout:
    assert program.layout is not None
    return program.layout


def test_everything_that_can_be_dealt_out() -> None:
    program = placed(decoder(ffn=FeedForwardRecipe(hidden=16), head_bias=True), 2)
    layout = layout_of(program)
    shown = {name: str(placement) for name, placement in layout.placements.items() if "1." not in name}
    assert shown == {
        "attention_0.q.weight": "dim 0 over tensor; held alike along data",
        "attention_0.q.bias": "dim 0 over tensor; held alike along data",
        "attention_0.k.weight": "dim 0 over tensor; held alike along data",
        "attention_0.k.bias": "dim 0 over tensor; held alike along data",
        "attention_0.v.weight": "dim 0 over tensor; held alike along data",
        "attention_0.v.bias": "dim 0 over tensor; held alike along data",
        "attention_0.out.weight": "dim 1 over tensor; held alike along data",
        "ffn_0.up.weight": "dim 0 over tensor; held alike along data",
        "ffn_0.up.bias": "dim 0 over tensor; held alike along data",
        "ffn_0.down.weight": "dim 1 over tensor; held alike along data",
        "model.wte.weight": "dim 0 over tensor; held alike along data",
        "model.lm_head.weight": "dim 0 over tensor; held alike along data",
        "model.lm_head.bias": "dim 0 over tensor; held alike along data",
    }
    assert layout.shapes["model.wte.weight"] == (23, 8)
    assert notes(program) == []


def test_what_is_printed_beside_values() -> None:
    program = placed(decoder(), 2)
    (region, *_) = regions(program.graph, "attention").values()
    said = {node.name: node.meta["placement"] for node in region.graph.nodes if "placement" in node.meta}
    assert said["q"] == "dim 2 over tensor"
    assert said["o"] == "dim 1 over tensor"
    assert said[output(region.graph).args[0].name] == "sum over tensor"
    assert output(program.graph.graph).args[0].meta["placement"] == "dim 2 over tensor"


def test_one_tensor_rank_leaves_everything_whole() -> None:
    program = placed(decoder(), 1)
    assert layout_of(program).placements == {}
    assert logits_split(program) is None


def test_other_placements_stay() -> None:
    program = decoder().fork()
    there = {"moe_7.up.weight": Placement((Split(0, "expert_2", 2, (4,)),), "expert_data_2")}
    program.layout = Layout(Mesh(1, 2), there, {"moe_7.up.weight": (4, 3, 3)})
    layout = layout_of(RUNNER.run(program, [PlaceDense()]))
    assert layout.placements["moe_7.up.weight"] == there["moe_7.up.weight"]
    assert layout.shapes["moe_7.up.weight"] == (4, 3, 3)
    assert layout.of("ffn_0.up.weight").holders == DATA


def test_what_cannot_be_dealt_out_evenly_is_noted_with_its_reason() -> None:
    program = placed(
        decoder(
            attention=AttentionRecipe(num_heads=4, num_kv_heads=4), ffn=FeedForwardRecipe(hidden=16)
        ), 3,
    )  # fmt: skip
    assert notes(program) == [
        "attention_0, attention_1: 3 ranks do not divide its 4 heads, grouped by keys",
        "ffn_0, ffn_1: 3 ranks do not divide its 16 hidden units",
    ]
    assert not any(name.startswith(("attention", "ffn")) for name in layout_of(program).placements)


def test_more_ranks_than_heads() -> None:
    program = decoder(attention=AttentionRecipe(num_heads=6, num_kv_heads=3))
    with pytest.raises(PlanError) as caught:
        placed(program, 8)
    assert "8 for 6 attention heads" in str(caught.value)
    assert "1, 2, 3, 6" in str(caught.value)


def test_without_a_mesh() -> None:
    with pytest.raises(PassError, match="a program without a mesh"):
        RUNNER.run(decoder(), [PlaceDense()])


@pytest.mark.parametrize("tied", ["module", "functional"])
def test_tied_words_lie_together(tied: str) -> None:
    layout = layout_of(placed(decoder(tied=tied), 2))
    words = [name for name in layout.placements if "wte" in name or "lm_head" in name]
    assert words
    assert {layout.placements[name].splits for name in words} == {(Split(0, TENSOR, 2, (23,)),)}


@pytest.mark.parametrize("share", ["ffn", "block"])
def test_shared_layers_lie_alike(share: str) -> None:
    layout = layout_of(placed(decoder(share=share), 2))
    assert layout.of("ffn_0.up.weight") == layout.of("ffn_1.up.weight") != Placement()


class Words(nn.Module):
    """Embedding and head around one feed-forward, spelled in unusual ways."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.table = nn.Parameter(torch.randn(7, 4))
        self.head = self.table if "tied" in change else nn.Parameter(torch.randn(7, 4))
        self.scales = nn.Parameter(torch.randn(7))
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        table = self.table * 2.0 if self.change == "computed" else self.table
        x = F.embedding(tokens, table)
        x = x + self.down(F.gelu(self.up(x)))
        logits = F.linear(x, self.head)
        if self.change in ("scales", "scales, tied"):
            return logits * self.scales
        if self.change == "softmax":
            return logits.log_softmax(-1)
        if self.change == "read twice, tied":
            return logits * self.table.mean()
        return logits.float() / 2.0 if self.change == "pointwise" else logits


def words(change: str) -> Program:
    return placed(structured(Words(change)), 2)


REASONS = {
    "computed": ("embedding", "the weight of `x` is computed"),
    "scales": ("the head", "behind the head, reads another value for each word"),
    "softmax": ("the head", "stands between the head and the logits"),
}


@pytest.mark.parametrize("change", REASONS)
def test_words_that_stay_whole(change: str) -> None:
    program = words(change)
    (note,) = notes(program)
    assert REASONS[change][1] in note
    assert (logits_split(program) is None) == (change != "computed")


@pytest.mark.parametrize("change", ["scales, tied", "read twice, tied"])
def test_tied_words_stay_whole_together(change: str) -> None:
    program = words(change)
    assert logits_split(program) is None
    assert not any("table" in name or "head" in name for name in layout_of(program).placements)
    assert any("is needed in another way elsewhere" in note for note in notes(program))


def test_pointwise_steps_behind_the_head() -> None:
    assert logits_split(words("pointwise")) == Split(0, TENSOR, 2, (7,))
