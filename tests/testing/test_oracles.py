"""The oracle against cases with a known answer, and against the operators and their reference."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import moec.runtime.ops  # noqa: F401 (registers torch.ops.moec)
from moec.ir.expert_oracle import Gate, choose, keep_within_capacity
from moec.testing import feed_forwards, moe_oracle
from moec.testing.parts.feed_forward import FeedForward, FeedForwardRecipe
from moec.testing.recipe import fill_parameters

GATES: tuple[Gate, ...] = ("probability", "normalized", "straight-through", "sigmoid")


def _ffn(recipe: FeedForwardRecipe, seed: int, d_model: int = 5) -> FeedForward:
    module = FeedForward(recipe, d_model)
    fill_parameters(module, seed)
    return module.double().eval()


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}


def _draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@given(
    recipe=feed_forwards(),
    experts=st.integers(1, 4),
    gate=st.sampled_from(("normalized", "straight-through", "sigmoid")),
    residual=st.sampled_from(("none", "learned")),
    data=st.data(),
)
def test_copies_under_weights_that_sum_to_one_are_the_feed_forward(
    recipe: FeedForwardRecipe, experts: int, gate: Gate, residual: str, data: st.DataObject
) -> None:
    ffn, x, top_k = _ffn(recipe, 1), _draw(2, 3, 5), data.draw(st.integers(1, experts))
    states = [_state(ffn) for _ in range(experts)]
    answer = moe_oracle(
        ffn, states, x, _draw(experts, 5, seed=2), top_k=top_k, gate=gate,
        residual="learned" if residual == "learned" else "none",
        dense_state=_state(ffn), mix=(_draw(2, 5, seed=3), _draw(2, seed=4)),
    )  # fmt: skip
    torch.testing.assert_close(answer.y, ffn(x), rtol=1e-12, atol=1e-12)


def test_a_probability_gate_is_not_the_feed_forward() -> None:
    ffn, x = _ffn(FeedForwardRecipe(7), 1), _draw(6, 5)
    states = [_state(ffn) for _ in range(3)]
    y = moe_oracle(ffn, states, x, _draw(3, 5, seed=2), top_k=1, gate="probability").y
    assert ((y - ffn(x)).abs().amax() / ffn(x).abs().amax()) > 1e-2


def test_one_token_by_hand() -> None:
    """Two experts that scale by 10 and 100; scores log 3 and log 1, so probabilities ¾ and ¼."""
    x, router = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[3.0], [1.0]]).double().log()
    states = [{"s": torch.tensor(10.0)}, {"s": torch.tensor(100.0)}]
    expected = {"probability": 10 * 0.75 + 100 * 0.25, "normalized": 32.5, "straight-through": 32.5}
    for gate, y in expected.items():
        answer = moe_oracle(
            lambda s, rows: s["s"] * rows, states, x, router, top_k=2, gate=gate, residual="sum",  # type: ignore[arg-type]
            dense_state={"s": torch.tensor(1000.0)},
        )  # fmt: skip
        assert answer.y.item() == pytest.approx(1000 + y)
    only = moe_oracle(lambda s, rows: s["s"] * rows, states, x, router, top_k=1, gate="probability")
    assert only.y.item() == pytest.approx(7.5)
    assert only.balance.item() == pytest.approx(2 * 0.75)
    assert only.z.item() == pytest.approx(torch.log(torch.tensor(4.0)).item() ** 2)
    sigmoid = moe_oracle(lambda s, rows: s["s"] * rows, states, x, router, top_k=2, gate="sigmoid")
    assert sigmoid.weights.flatten().tolist() == pytest.approx([0.6, 0.4])  # ¾ and ½, over their sum


def test_straight_through_trains_the_router_where_normalized_cannot() -> None:
    ffn, x = _ffn(FeedForwardRecipe(7), 1), _draw(6, 5)
    states = [_state(_ffn(FeedForwardRecipe(7), seed)) for seed in (1, 2, 3)]
    for gate, trains in (("straight-through", True), ("normalized", False)):
        router = _draw(3, 5, seed=2)
        moe_oracle(ffn, states, x, router, top_k=1, gate=gate).y.square().sum().backward()  # type: ignore[arg-type]
        assert router.grad is not None
        assert bool(router.grad.abs().amax() > 1e-6) is trains


def test_ties_go_to_the_lower_index_and_a_bias_only_chooses() -> None:
    assert choose(torch.zeros(4), 2, "normalized") == [0, 1]
    assert choose(torch.tensor([1.0, 3.0, 3.0]), 2, "probability") == [1, 2]
    assert choose(torch.zeros(3), 1, "sigmoid", torch.tensor([0.0, 0.0, 0.1])) == [2]


def test_first_choices_are_seated_before_any_second() -> None:
    choices = [[0, 1], [1, 0], [0, 1]]
    assert keep_within_capacity(choices, 2, 0.5, 0) == {(0, 0), (1, 0), (2, 0), (0, 1)}
    assert len(keep_within_capacity(choices, 2, 0.5, 3)) == 6
    assert len(keep_within_capacity(choices, 2, 0.0, 0)) == 6
    assert len(keep_within_capacity([[0]] * 10, 1, 1.1, 0)) == 10


@given(
    tokens=st.integers(1, 9),
    experts=st.integers(1, 5),
    gate=st.sampled_from(GATES),
    factor=st.sampled_from((0.0, 0.5, 1.0, 1.25)),
    with_bias=st.booleans(),
    data=st.data(),
)
def test_the_operators_agree_forward_and_backward(
    tokens: int, experts: int, gate: Gate, factor: float, with_bias: bool, data: st.DataObject
) -> None:
    """route → assign → dispatch → grouped_linear → combine is the oracle of a linear expert."""
    top_k = data.draw(st.integers(1, experts))
    x, router, weight = _draw(tokens, 5), _draw(experts, 5, seed=1), _draw(experts, 5, 5, seed=2)
    bias = _draw(experts, seed=3).detach() if with_bias else None
    options = {"top_k": top_k, "gate": gate, "bias": bias, "capacity_factor": factor, "min_capacity": 1}
    states = [{"w": w} for w in weight]
    oracle = moe_oracle(lambda s, rows: rows @ s["w"].T, states, x, router, **options)  # type: ignore[arg-type]
    ops = torch.ops.moec
    scores = x @ router.T
    weights, chosen = ops.route(scores, bias, top_k, gate, "none", False)
    order, counts = ops.assign(chosen, experts, factor, factor, 1, False, False)
    y = ops.combine(
        ops.grouped_linear(ops.dispatch(x, order, top_k), weight, None, counts), weights, order, counts
    )
    assert torch.equal(chosen, oracle.experts)
    assert torch.equal(counts, oracle.counts)
    assert len(oracle.dropped) == tokens * top_k - int(counts.sum())
    found = [y, weights, ops.balance_loss(scores, chosen), ops.z_loss(scores)]
    needed = [oracle.y, oracle.weights, oracle.balance, oracle.z]
    for left, right in zip(found, needed, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12, check_dtype=False)
    leaves = (x, router, weight)
    pairs = zip(_pull_back(found, leaves), _pull_back(needed, leaves), strict=True)
    for left, right in pairs:
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


def _pull_back(values: list[Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    total = sum((_draw(*v.shape, seed=9).detach() * v).sum() for v in values)
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, leaves)


def test_what_a_residual_needs_is_asked_for() -> None:
    ffn, x = _ffn(FeedForwardRecipe(7), 1), _draw(2, 5)
    state = _state(copy.deepcopy(ffn))
    with pytest.raises(ValueError, match="needs dense_state and mix"):
        moe_oracle(ffn, [state], x, _draw(1, 5), top_k=1, gate="normalized", residual="learned")
