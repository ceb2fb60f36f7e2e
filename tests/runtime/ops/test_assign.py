"""What `moec::assign` promises: a permutation, grouped, fair by (choice, token), bounded by capacity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.runtime.ops import reference
from moec.runtime.ops.assign import expert_capacity
from tests.runtime.ops.cases import Case, cases

assign = torch.ops.moec.assign


def chosen(case: Case) -> torch.Tensor:
    return reference.route(case.scores(), case.bias(), case.top_k, case.gate, "none", False)[1]


@given(cases(), st.booleans())
def test_order_is_a_permutation_grouped_by_expert(case: Case, random: bool) -> None:
    experts = chosen(case)
    order, counts = assign(experts, case.experts, case.factor, 0.0, 1, random, True)
    kept = int(counts.sum())
    assert sorted(order.tolist()) == list(range(case.tokens * case.top_k))
    turns = torch.arange(case.experts).repeat_interleave(counts)
    assert torch.equal(experts.flatten()[order[:kept]], turns)


@given(cases())
def test_room_for_all_is_the_same_as_dropless(case: Case) -> None:
    experts = chosen(case)
    roomy = assign(experts, case.experts, float(case.experts), 0.0, 1, False, True)
    dropless = assign(experts, case.experts, 0.0, 0.0, 1, False, True)
    assert all(torch.equal(left, right) for left, right in zip(roomy, dropless, strict=True))


def test_first_choices_come_before_second_choices() -> None:
    # Three tokens, capacity 2: expert 1 is token 0's second choice and everyone else's first.
    experts = torch.tensor([[0, 1], [1, 2], [1, 0]])
    order, counts = assign(experts, 3, 1.0, 0.0, 0, False, True)
    assert counts.tolist() == [2, 2, 1]
    assert order.tolist() == [0, 5, 2, 4, 3, 1]  # slot 1, (token 0, second choice), is the one dropped


def test_random_selection_drops_every_token_alike() -> None:
    experts = torch.zeros(40, 1, dtype=torch.int64)
    kept = torch.zeros(40)
    for _ in range(400):
        order, counts = assign(experts, 2, 0.5, 0.0, 1, True, True)
        assert counts.tolist() == [10, 0]
        kept[order[:10]] += 1
    # Each is kept with probability 1/4: 100 times of 400, standard deviation 8.7.
    assert (kept - 100).abs().max() < 45


def test_random_selection_and_factor_follow_training() -> None:
    experts = torch.zeros(8, 1, dtype=torch.int64)
    for _ in range(5):
        order, counts = assign(experts, 2, 0.25, 1.0, 1, True, False)
        assert counts.tolist() == [4, 0]
        assert order.tolist() == list(range(8))
    assert assign(experts, 2, 0.25, 1.0, 1, True, True)[1].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor", "minimum", "capacity"),
    [
        (16, 1, 4, 1.0, 4, 4),
        (17, 1, 4, 1.0, 4, 5),
        (16, 2, 4, 1.25, 4, 10),
        (10, 1, 1, 1.1, 0, 10),
        (100, 1, 10, 1.1, 0, 11),  # 100 * 1.1 / 10 is 11.000000000000002 in floating point
        (8, 1, 64, 1.0, 4, 4),
        (3, 1, 64, 1.0, 4, 3),
    ],
)
def test_capacity(tokens: int, top_k: int, experts: int, factor: float, minimum: int, capacity: int) -> None:
    assert expert_capacity(tokens, top_k, experts, factor, minimum) == capacity


def test_no_token_at_all() -> None:
    order, counts = assign(torch.zeros(0, 2, dtype=torch.int64), 3, 1.0, 0.0, 4, False, True)
    assert order.shape == (0,)
    assert counts.tolist() == [0, 0, 0]
