"""Numbers come to the ranks that need them, each once, and as they were; what is sent is what is foretold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moec.ir.mesh import TENSOR, WORLD, Mesh
from moec.ir.placement import Split
from moec.plan import Distill
from moec.runtime.distillation.handover import handed_over, move, traffic_of_move
from moec.runtime.distillation.lesson import Lesson, TopWords
from moec.runtime.distillation.spread import Box, Parcels, Spread
from moec.runtime.ops.sent import Kind, Sent
from moec.runtime.ranks import Ranks
from moec.runtime.simulated import run_ranks
from moec.runtime.traffic import count_traffic

LENGTH = 3


def spread(data: int, tensor: int, words: int | None = None) -> Spread:
    """On data × tensor ranks, with so many words dealt out, or with whatever is last whole on each."""
    return Spread(Mesh(data, tensor), None if words is None else Split(2, TENSOR, tensor, (words,)))


def part(whole: Tensor, box: Box) -> Tensor:
    return whole[slice(*box.rows), :, slice(*box.words)].contiguous()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Spread, Spread, int, int]:
    """Two ways for a batch to lie on the same ranks, a number of sequences and one of words."""
    world, width = draw(st.sampled_from((1, 2, 3, 4, 6, 8))), draw(st.integers(1, 11))
    made = []
    for _ in range(2):
        tensor = draw(st.sampled_from([size for size in range(1, world + 1) if world % size == 0]))
        made.append(spread(world // tensor, tensor, width if tensor > 1 and draw(st.booleans()) else None))
    return made[0], made[1], draw(st.integers(0, 9)), width


@given(cases())
def test_what_arrives_is_what_was_and_what_is_sent_is_foretold(case: tuple[Spread, Spread, int, int]) -> None:
    have, need, sequences, width = case
    whole = torch.randn(sequences, LENGTH, width)
    held = [have.box(rank, sequences, width) for rank in range(have.mesh.world)]
    needed = [need.box(rank, sequences, width) for rank in range(need.mesh.world)]

    def body(rank: int) -> int:
        parcels = Parcels(have, need, rank, sequences, width)
        with count_traffic() as traffic:
            got = move(part(whole, held[rank]), parcels)
        assert torch.equal(got, part(whole, needed[rank]))
        assert traffic.total == traffic_of_move(parcels, LENGTH, 4)
        return traffic.total.bytes

    sent = sum(run_ranks(have.mesh, body))
    missing = [
        sum((r, w) not in _pairs(mine) for r, w in _pairs(box))
        for box, mine in zip(needed, held, strict=True)
    ]
    assert sent == 4 * LENGTH * sum(missing), "a rank is sent what it has not, once, and nothing else"


def _pairs(box: Box) -> set[tuple[int, int]]:
    return {(row, word) for row in range(*box.rows) for word in range(*box.words)}


def test_by_hand() -> None:
    """Four data ranks with two sequences each, five words; then two data ranks whose words are 3 and 2."""
    have, need = spread(4, 1), spread(2, 2, 5)
    parcels = [Parcels(have, need, rank, 8, 5) for rank in range(4)]
    assert parcels[1].held(1) == Box((2, 4), (0, 5))
    assert parcels[1].needed(1) == Box((0, 4), (3, 5))
    assert parcels[1].sent[:2] == [Box((2, 4), (0, 3)), Box((2, 4), (3, 5))]
    assert [box.size for box in parcels[1].sent] == [6, 4, 0, 0]
    assert [traffic_of_move(one, LENGTH, 2) for one in parcels] == [
        Sent(1, 1, 2 * LENGTH * 2 * 2), Sent(1, 1, 2 * LENGTH * 3 * 2),
        Sent(1, 1, 2 * LENGTH * 2 * 2), Sent(1, 1, 2 * LENGTH * 3 * 2),
    ]  # fmt: skip


def test_holders_of_the_same_take_turns() -> None:
    """The words of two tensor groups are whole on each rank; then every rank needs all sequences."""
    have, need = spread(2, 2), spread(1, 4)
    sent = [traffic_of_move(Parcels(have, need, rank, 2, 5), LENGTH, 4) for rank in range(4)]
    assert sent == [Sent(1, 1, LENGTH * 5 * 4)] * 4


@pytest.mark.parametrize("top", [False, True], ids=["all words", "likeliest words"])
def test_a_lesson(top: bool) -> None:
    """Logits or likeliest words, and hidden states, each in one exchange over all ranks."""
    have, need = spread(2, 1), spread(1, 2, 7)
    logits, states = torch.randn(3, LENGTH, 7), torch.randn(3, LENGTH, 4).bfloat16()
    top_words = TopWords(torch.randint(7, (3, LENGTH, 2)), torch.randn(3, LENGTH, 2))

    def body(rank: int) -> Lesson:
        rows = slice(*have.box(rank, 3, 7).rows)
        told = TopWords(top_words.words[rows], top_words.log_shares[rows]) if top else logits[rows]
        lesson = Lesson(told, Distill(), {1: states[rows]})
        with count_traffic() as traffic:
            handed = handed_over(lesson, 3, have, need, Ranks(need.mesh, rank))
        calls = traffic.sent[Kind("forward", WORLD, "all_to_all_single")].calls
        assert calls == traffic.total.calls == 2 + top
        return handed

    for rank, found in enumerate(run_ranks(need.mesh, body)):
        assert torch.equal(found.hidden[1], states)
        if isinstance(found.told, TopWords):
            assert torch.equal(found.told.words, top_words.words)
            assert torch.equal(found.told.log_shares, top_words.log_shares)
        else:
            assert torch.equal(found.told, logits[..., 4 * rank : 4 + 3 * rank])


def test_nothing_is_sent_where_everything_is_there() -> None:
    """A teacher that each of four ranks holds whole, and words that two of them share."""
    have, need = spread(2, 2), spread(2, 2, 7)
    whole = torch.randn(4, LENGTH, 7)

    def body(rank: int) -> None:
        parcels = Parcels(have, need, rank, 4, 7)
        given_ = part(whole, parcels.held(rank))
        with count_traffic() as traffic:
            got = move(given_, parcels)
        assert not traffic.sent
        assert got.untyped_storage().data_ptr() == given_.untyped_storage().data_ptr()

    run_ranks(have.mesh, body)
    assert not have.is_like(need)
    assert have.is_like(spread(2, 2))
    assert spread(1, 2, 7).is_like(spread(1, 2, 7))
    assert not spread(4, 1).is_like(have)
