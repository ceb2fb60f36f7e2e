"""Parts of a weight: each element is on exactly the ranks it should be on, and parts make the whole again."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.ir.mesh import ExpertAxes, Mesh
from moec.ir.placement import Layout, Placement, Split

MESH = Mesh(3, 4, 8, (("moe_0", ExpertAxes(2, 3, 2)),))


@st.composite
def placed_weights(draw: st.DrawFn) -> tuple[torch.Tensor, Placement]:
    """A weight whose elements are their own numbers, split along none, one or two dims.

    By expert and slice, or by tensor rank: never by both, those axes run through each other.
    """
    splits, shape = [], []
    axes = draw(st.sampled_from(((("expert_3x2", 3), ("slice_3x2", 2)), (("tensor", 4),))))
    for dim, (axis, ranks) in enumerate(axes):
        blocks = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
        shape.append(sum(blocks))
        if draw(st.booleans()):
            splits.append(Split(dim, axis, ranks, blocks))
    return torch.arange(math.prod(shape)).view(shape), Placement(tuple(splits))


@given(placed_weights())
def test_parts_are_the_pieces_and_make_the_whole(pair: tuple[torch.Tensor, Placement]) -> None:
    whole, placement = pair
    parts: list[tuple[Any, torch.Tensor]] = []
    for rank in range(MESH.world):
        at = MESH.coordinates(rank)
        part = placement.local(whole, at)
        assert tuple(part.shape) == placement.local_shape(whole.shape, at)
        seen = 0
        for piece in placement.pieces(whole.shape, at):
            local = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.size, strict=True))
            box = tuple(slice(a, a + n) for a, n in zip(piece.whole, piece.size, strict=True))
            assert torch.equal(part[local], whole[box])
            seen += part[local].numel()
        assert seen == part.numel()
        parts.append((at, part))
    assert torch.equal(placement.whole(whole.shape, parts), whole)


@given(placed_weights())
def test_every_element_is_held_equally_often(pair: tuple[torch.Tensor, Placement]) -> None:
    whole, placement = pair
    held = torch.cat([placement.local(whole, MESH.coordinates(r)).reshape(-1) for r in range(MESH.world)])
    ranks = 1
    for split in placement.splits:
        ranks *= split.ranks
    assert held.bincount(minlength=whole.numel()).unique().tolist() == [MESH.world // ranks]


def test_a_split_cuts_each_block() -> None:
    split = Split(0, "tensor", 2, (4, 2, 2))  # q, and the k and v that fewer heads share
    assert split.spans(0) == [(0, 2), (4, 5), (6, 7)]
    assert split.spans(1) == [(2, 4), (5, 6), (7, 8)]


def test_json_gives_the_same_layout() -> None:
    placement = Placement(
        (Split(0, "expert_3x2", 3, (6,)), Split(1, "slice_3x2", 2, (4, 4))), "expert_data_3x2"
    )
    layout = Layout(MESH, {"moe_0.up.weight": placement}, {"moe_0.up.weight": (6, 8, 5)})
    assert Layout.of_json(layout.to_json()) == layout
