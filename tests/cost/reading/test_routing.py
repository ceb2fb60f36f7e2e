"""Expected loads of experts: balanced and skewed, against routers that draw at random."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.cost import Hardware, predict
from moec.cost.reading.routing import Expected, Routing, Zipf, cut_off, fullest
from moec.cost.reading.rows import Table
from moec.cost.symbols import symbol
from moec.errors import CostError
from tests.cost.whole_steps import compiled

TRIALS = 400


def table(routing: Routing, tokens: int, top_k: int, experts: int, **more: float) -> Table:
    """The table of one rank with `tokens` tokens."""
    assert isinstance(routing, Expected)
    return Table(sympy.Integer(tokens * top_k), sympy.Integer(tokens), top_k, experts, routing, **more)


def drawn(scores: Callable[[], Tensor], top_k: int) -> tuple[float, Tensor]:
    """Of many draws: how many experts are touched in the mean, and the mean rows of each [E]."""
    touched, rows = 0, torch.zeros((), dtype=torch.int64)
    for _ in range(TRIALS):
        values = scores()
        _, experts = torch.ops.moec.route(values, None, top_k, "normalized", "none", False)
        counts = torch.bincount(experts.flatten(), minlength=values.shape[1])
        touched, rows = touched + int((counts > 0).sum()), rows + counts
    return touched / TRIALS, rows / TRIALS


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 8), (3, 2, 8), (16, 2, 8), (12, 1, 32)])
def test_experts_touched_by_scores_of_no_preference(tokens: int, top_k: int, experts: int) -> None:
    """E (1 - (1 - K/E)^T), for the router itself on random scores."""
    found, _ = drawn(lambda: torch.randn(tokens, experts), top_k)
    load = table(Routing.balanced(), tokens, top_k, experts).load
    assert load.touched == pytest.approx(experts * (1 - (1 - top_k / experts) ** tokens))
    assert float(load.touched) == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_touched_by_scores_with_a_preference(top_k: int) -> None:
    """Given the shares of the rows, which scores lead to is not asked."""
    tokens, experts = 12, 8
    bias = torch.linspace(2.0, -2.0, experts)
    found, rows = drawn(lambda: torch.randn(tokens, experts) + bias, top_k)
    load = table(Routing.skewed((rows / rows.sum()).tolist()), tokens, top_k, experts).load
    assert float(load.touched) == pytest.approx(found, rel=0.05)
    balanced = table(Routing.balanced(), tokens, top_k, experts).load
    assert float(balanced.touched) > found + 0.3


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_rows_that_find_a_place(factor: float) -> None:
    """At most the mean, and less only as the counts fluctuate about a capacity."""
    tokens, experts = 512, 4
    program = compiled({"moe": {"experts": experts, "top_k": 1, "capacity_factor": factor, "layers": [0]}})
    products = [one for one in program.cost().operations if one.operator == "moec::grouped_linear"]
    rows = float(products[0].forward.products[0].m.subs({symbol("B"): 1, symbol("S"): tokens}))
    kept = 0
    for _ in range(TRIALS // 4):
        chosen = torch.randn(tokens, experts).topk(1).indices
        _, counts = torch.ops.moec.assign(chosen, experts, factor, factor, 4, False, True)
        kept += int(counts.sum())
    mean = tokens / experts
    assert rows == min(1.0, factor) * tokens
    assert rows - experts * 0.5 * math.sqrt(mean) <= kept / (TRIALS // 4) <= rows + 1e-9


def test_the_fullest_rank() -> None:
    """The experts of one rank follow each other; the letter of the axis may be any number that divides."""
    ranks = symbol("expert_4")
    routing = Routing.skewed([4, 2, 1, 1])
    arrived = table(routing, 100, 1, 4).arrived(ranks)
    for number, share in ((1, 1.0), (2, 0.75), (4, 0.5)):
        assert float(arrived.rows.subs({ranks: number})) == pytest.approx(100 * number * share)
        touched = float(arrived.load.touched.subs({ranks: number}))
        assert touched == pytest.approx(4 / number, rel=1e-3)  # hundreds of tokens touch them all
    assert fullest([0.1, 0.2, 0.4, 0.3], 2) == (0.4, 0.3)


def test_hottest_is_a_multiple_of_the_mean_and_at_most_all() -> None:
    ranks = symbol("expert_4")
    arrived = table(Routing.skewed(hottest=1.5), 100, 1, 8).arrived(ranks)
    assert arrived.rows.subs({ranks: 4}) == 150
    assert arrived.rows.subs({ranks: 1}) == 100
    assert table(Routing.skewed(hottest=1.0), 100, 1, 8).arrived(ranks).rows.subs({ranks: 4}) == 100


def test_capacity_holds_back_the_hottest() -> None:
    """No expert takes more than its share of places."""
    full = table(Routing.skewed(hottest=2.0), 100, 1, 4, capacity=1.25 / 4).arrived(sympy.Integer(4))
    assert float(full.rows) == pytest.approx(125)


@settings(max_examples=40)
@given(st.integers(1, 16), st.integers(1, 4), st.floats(0, 3))
def test_zipf_is_a_routing(experts: int, top_k: int, exponent: float) -> None:
    """Shares that add up to one, fall, and that one token can choose."""
    top_k = min(top_k, experts)
    routing = Routing.skewed(zipf=exponent)
    assert isinstance(routing, Expected)
    shares = routing.shares(experts, top_k)
    assert shares is not None
    assert sum(shares) == pytest.approx(1)
    assert max(shares) * top_k <= 1 + 1e-9
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(shares))


def test_the_steepest_zipf_gives_what_is_cut_off_to_the_others() -> None:
    """Of powers too small for a float64."""
    assert Zipf(1e6).shares(4, 1) == pytest.approx((1.0, 0.0, 0.0, 0.0))
    assert Zipf(1e6).shares(4, 2) == pytest.approx((0.5, 0.5 / 3, 0.5 / 3, 0.5 / 3))


def test_what_is_cut_off_goes_to_the_others() -> None:
    assert cut_off([8, 1, 1], 0.5) == pytest.approx((0.5, 0.25, 0.25))
    assert cut_off([1, 1], 0.5) == pytest.approx((0.5, 0.5))


def test_a_skew_costs_the_program_time() -> None:
    """More rows on the fullest rank: more work there, as many as arrive."""
    program = compiled({"moe": {"experts": 4, "top_k": 2, "layers": "-1:"}, "parallel": {"expert": 2}}, 2)
    at = {"B": 2, "S": 8}
    even = program.cost("forward")
    skewed = program.cost("forward", Routing.skewed(hottest=1.5))
    experts = [sum(one.forward.flops for one in cost.operations if one.kind == "experts")
               for cost in (even, skewed)]  # fmt: skip
    assert even.number(experts[1], **at) == 1.5 * even.number(experts[0], **at)


def test_shares_decide_how_long_it_takes() -> None:
    """The fullest rank of as many as the axis has is the one that is waited for."""
    program = compiled({"moe": {"experts": 4, "top_k": 2, "layers": "-1:"}, "parallel": {"expert": 2}}, 2)
    even, skewed = (
        program.cost("forward", routing) for routing in (None, Routing.skewed([0.5, 0.25, 0.125, 0.125]))
    )
    at = {"B": 2, "S": 8}
    assert skewed.number(skewed.flops, **at) > even.number(even.flops, **at)
    hardware, at = Hardware.shipped("a100"), {"B": 64, "S": 512}
    times = [predict(cost, hardware, **at).by("kind")["experts"] for cost in (even, skewed)]
    assert times[0] < times[1]


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({}, "nothing"),
        ({"zipf": 1.0, "hottest": 2.0}, "zipf and hottest"),
        ({"hottest": 0.5}, "at least 1.0"),
        ({"zipf": -1.0}, "at least 0.0"),
        ({"zipf": float("nan")}, "zipf = nan"),
        ({"hottest": float("inf")}, "hottest = inf"),
        ({"shares": [1.0, float("nan")]}, "none below 0"),
        ({"shares": [0.5, -0.5]}, "none below 0"),
        ({"shares": []}, "none below 0"),
    ],
)
def test_what_is_no_routing(how: dict[str, float], what: str) -> None:
    with pytest.raises(CostError, match=what):
        Routing.skewed(**how)  # type: ignore[arg-type]


def test_shares_that_do_not_fit_a_layer() -> None:
    program = compiled({"moe": {"experts": 4, "top_k": 2, "layers": "-1:"}})
    with pytest.raises(CostError, match="shares of 3 experts"):
        program.cost("forward", Routing.skewed([1, 1, 1]))
    with pytest.raises(CostError, match="no token chooses an expert twice"):
        program.cost("forward", Routing.skewed([6, 1, 1, 1]))
