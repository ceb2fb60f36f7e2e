"""Where experts lie: how far each layer spreads, what a bad mesh is told, and what is printed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moec
from examples.gpt import GPT, GPTConfig
from moec import PlanError, Program

PYRAMID = {"layers": "1::2", "experts": 4, "override": [{"layers": "-1:", "experts": 8}]}


def compiled(world: int, parallel: dict[str, Any], vocabulary: int = 31) -> Program:
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab=vocabulary, seq=16, layers=4, width=24, heads=4, dropout=0.0))
    return moec.compile(model, {"moe": PYRAMID, "parallel": parallel}, world=world, verify="off")


@pytest.mark.parametrize(
    ("world", "parallel", "needed"),
    [
        (8, {"expert": 8}, [(2, 4, 1), (1, 8, 1)]),
        (8, {"expert": 2}, [(4, 2, 1), (4, 2, 1)]),
        (16, {"expert": 8, "slice": 2}, [(2, 4, 2), (1, 8, 2)]),
        (6, {"expert": 6}, [(3, 2, 1), (3, 2, 1)]),
        (64, {"expert": 64}, [(16, 4, 1), (8, 8, 1)]),
    ],
)
def test_each_layer_spreads_as_far_as_it_can(
    world: int, parallel: dict[str, Any], needed: list[tuple[int, int, int]]
) -> None:
    layout = compiled(world, parallel).layout
    assert layout is not None
    assert [(axes.data, axes.expert, axes.slice) for _, axes in layout.mesh.layers] == needed


def test_the_ledger_says_where_a_layer_spreads_less_than_the_plan_allows() -> None:
    notes = compiled(6, {"expert": 6}).ledger.notes
    assert "moe_3: its 8 experts spread over 2 ranks: 6 of 6 would be uneven" in notes


def test_a_sliced_expert_and_what_its_slices_share() -> None:
    layout = compiled(4, {"expert": 2, "slice": 2}).layout
    assert layout is not None
    up, bias = layout.of("moe_1.up.weight"), layout.of("moe_1.down.bias")
    assert [(s.dim, s.axis) for s in up.splits] == [(0, "expert_2x2"), (1, "slice_2x2")]
    assert up.holders == "expert_data_2x2"
    assert [(s.dim, s.axis) for s in bias.splits] == [(0, "expert_2x2")]
    assert bias.holders == "expert_alike_2x2"  # both slices hold it, and each adds its half


@pytest.mark.parametrize(
    ("world", "parallel", "words"),
    [
        (6, {"tensor": 4}, ["tensor = 4 on 6 ranks", "1, 2, 3, 6"]),
        (4, {"data": 3, "tensor": 2}, ["data = 3 × tensor = 2 on 4 ranks", "data = 2"]),
        (4, {"slice": 3}, ["slice = 3 on 4 ranks", "1, 2, 4"]),
        (10, {"slice": 10}, ["slice = 10 of experts with 96 hidden units", "1, 2, 3, 4, 6, 8"]),
        (8, {"tensor": 8}, ["tensor = 8", "4 attention heads", "1, 2, 4"]),
    ],
)
def test_a_mesh_that_does_not_fit_is_told_what_would(
    world: int, parallel: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(PlanError) as caught:
        compiled(world, parallel)
    assert "[parallel]" in caught.value.where
    for word in words:
        assert word in str(caught.value)


def test_placements_are_printed() -> None:
    text = compiled(4, {"expert": 4}).text()
    assert "# 4 ranks: data 4 × tensor 1\n" in text
    assert "#   up.weight: dim 0 over expert_4; held alike along expert_data_4\n" in text
    assert "· rows over expert_4\n" in text


def test_a_rank_that_is_not_there() -> None:
    with pytest.raises(moec.PassError, match="a rank from 0 to 3"):
        compiled(4, {"expert": 4}).partition(4)


def test_every_rank_has_the_same_text() -> None:
    program = compiled(4, {"expert": 4, "tensor": 2}, vocabulary=32)  # 31 words: 16 and 15
    first, last = program.partition(0), program.partition(3)
    assert first.text() == last.text()
    assert first.num_parameters() == last.num_parameters() < program.num_parameters()


@pytest.mark.parametrize("world", [0, "4", 2.0, True])
def test_a_world_is_a_number_of_ranks(world: Any) -> None:
    with pytest.raises(PlanError, match="a whole number of ranks"):
        compiled(world, {})


def test_a_program_that_is_not_placed_has_one_rank() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=31, seq=16, layers=4, width=24, heads=4, dropout=0.0))
    program = moec.compile(model, {"moe": PYRAMID}, world=1, verify="off")
    tokens = torch.randint(31, (2, 9))
    local = program.partition(0)
    assert program.layout is None
    assert torch.equal(local(tokens), program(tokens))
    torch.testing.assert_close(local.loss(tokens), program.loss(tokens), rtol=1e-6, atol=0)
    with pytest.raises(moec.PassError, match="a rank from 0 to 0"):
        program.partition(1)
