"""The dense part on the ranks of a tensor group does what it does in one process, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import moec.runtime.ops  # noqa: F401
from moec.errors import PlanError
from moec.ir import regions
from moec.ir.graphs import named_weights
from moec.passes import lower_dense
from moec.testing import DecoderRecipe, assert_golden, decoders
from moec.testing.parts.attention import AttentionRecipe
from moec.testing.parts.feed_forward import FeedForwardRecipe
from tests.capture.families import FAMILIES, VOCABULARY
from tests.passes.tensor_ranks import assert_same_on_ranks, lowered, placed, program_of, structured

GOLDEN = Path(__file__).parents[1] / "golden"
GROUPED = DecoderRecipe(
    vocab=9, num_layers=1, d_model=8, positions="rotary_half",
    attention=AttentionRecipe(num_heads=4, num_kv_heads=2, qkv="split", bias=False),
    ffn=FeedForwardRecipe(hidden=6, gating="fused", activation="silu"), norm=DecoderRecipe().norm,
)  # fmt: skip


@settings(max_examples=settings.default.max_examples // 10)
@given(decoders(), st.sampled_from((2, 3, 4)))
def test_any_decoder(recipe: DecoderRecipe, ranks: int) -> None:
    recipe = replace(recipe.without_dropout(), num_layers=min(recipe.num_layers, 2))
    if recipe.computes_in_float32:
        return  # rounded to fp32 inside: the order of a sum shows
    program = program_of(recipe)
    if ranks > recipe.attention.num_heads:
        with pytest.raises(PlanError, match="attention heads"):
            placed(program, ranks)
        ranks = recipe.attention.num_heads
    if ranks > 1:
        assert_same_on_ranks(program, ranks, recipe.tokens(length=6))


# What a random decoder seldom has all of: every part dealt out, in one spelling each.
SPELLINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "fused in blocks": (2, {"qkv": "split", "num_heads": 4, "num_kv_heads": 2}),
    "fused by head": (3, {"qkv": "heads", "num_heads": 3, "num_kv_heads": 3}),
    "fused by group": (3, {"qkv": "groups", "num_heads": 6, "num_kv_heads": 3}),
    "fused, viewed": (4, {"qkv": "view", "num_heads": 4, "num_kv_heads": 4}),
    "norms of heads": (2, {"qk_norm": DecoderRecipe().norm}),
    "repeated by hand": (2, {"num_heads": 4, "kind": "eager_where", "softcap": 5.0, "repeat": "expand"}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_part_dealt_out(spelling: str) -> None:
    ranks, fields = SPELLINGS[spelling]
    ffn = FeedForwardRecipe(hidden=12, gating="fused", fused="stride" if ranks == 3 else "chunk")
    recipe = DecoderRecipe(num_layers=1, attention=AttentionRecipe(**fields), ffn=ffn, tied="module")
    made = assert_same_on_ranks(program_of(recipe), ranks, recipe.tokens(length=5))
    assert not [note for note in made.ledger.notes if "tensor rank" in note]


def test_a_bias_for_each_head_is_cut_where_it_is_read() -> None:
    recipe = DecoderRecipe(
        num_layers=2, positions="alibi", block="parallel_one_norm",
        attention=AttentionRecipe(num_heads=4, num_kv_heads=4, kind="sdpa_bias"),
    )  # fmt: skip
    made = assert_same_on_ranks(program_of(recipe), 2, recipe.tokens(length=5))
    (region, *_) = regions(lowered(made, 1).graph, "attention").values()
    (part,) = (n for n in region.graph.nodes if n.target is torch.ops.moec.part.default)
    assert part.args[1:] == (0, [4], 2, "tensor")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom", "phi3", "falcon_new"])
def test_hugging_face(family: str) -> None:
    tokens = torch.randint(VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    tokens[0, 0] = 0  # the padding word, which is not learned
    made = assert_same_on_ranks(structured(FAMILIES[family]()), 2, tokens)
    assert not [note for note in made.ledger.notes if "tensor rank" in note]


@pytest.mark.golden
def test_text() -> None:
    assert_golden(lowered(placed(program_of(GROUPED), 2), 0).text(), GOLDEN / "text_tensor_rank.txt")


def test_only_weights_differ_between_ranks() -> None:
    program = placed(program_of(replace(GROUPED, vocab=8)), 2)
    first, second = (lowered(program, rank) for rank in range(2))
    assert first.text() == second.text()
    up = "ffn_0.up.weight"
    whole, parts = (
        dict(named_weights(program.graph))[up],
        [dict(named_weights(p.graph))[up] for p in (first, second)],
    )
    gates, ups = whole.chunk(2)
    for rank, part in enumerate(parts):
        assert torch.equal(part, torch.cat([gates.chunk(2)[rank], ups.chunk(2)[rank]]))


def test_the_input_is_untouched() -> None:
    program = placed(program_of(GROUPED), 2)
    text, weights = program.text(), {n: v.clone() for n, v in named_weights(program.graph)}
    local = lowered(program, 1)
    next(local.parameters()).data.zero_()
    assert program.text() == text
    assert all(torch.equal(weights[name], value) for name, value in named_weights(program.graph))


def test_a_program_without_tensor_ranks_stays() -> None:
    program = placed(program_of(GROUPED), 1)
    assert lowered(program, 0).text() == program.text()


# deliberately broken


def _no_sum(part: fx.Node) -> fx.Node:
    return part


def _two_biases(product: fx.Node) -> None:
    lower_dense._summed(product)


BROKEN: dict[str, tuple[str, Callable[..., Any]]] = {
    "parts that are not added up": ("_summed", _no_sum),
    "a bias from every rank": ("_add_up", _two_biases),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_lowering_is_caught(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_dense, *BROKEN[how])
    with pytest.raises(AssertionError):
        assert_same_on_ranks(program_of(replace(GROUPED, tied="module")), 2, GROUPED.tokens(length=4))


class Padded(nn.Module):
    """Looks words up as `nn.Embedding` does with a padding word, and a weight scaled for every unit."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=3)
        self.up, self.slopes, self.down = nn.Linear(4, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        h = torch.relu(self.up(x)) * self.slopes
        return nn.functional.linear(x + self.down(h), self.table.weight)


def test_padding_and_weights_of_hidden_units() -> None:
    tokens = torch.tensor([[3, 1, 6, 3], [0, 5, 2, 4]])
    made = assert_same_on_ranks(structured(Padded()), 3, tokens)
    assert made.layout is not None
    assert str(made.layout.of("ffn_0.slopes")).startswith("dim 0 over tensor")
