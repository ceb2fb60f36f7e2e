"""What `moec::route` promises beyond its reference: ties, extremes, sums, noise, dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.runtime.ops.route import GATES
from tests.runtime.ops.cases import Case, cases

route = torch.ops.moec.route
SUM_TO_ONE = ("normalized", "straight-through", "sigmoid")


@given(st.integers(1, 130), st.data(), st.sampled_from((torch.float64, torch.float32, torch.bfloat16)))
def test_all_equal_scores_choose_the_first_experts_in_order(
    experts: int, data: st.DataObject, dtype: torch.dtype
) -> None:
    top_k = data.draw(st.integers(1, experts))
    scores = torch.full((3, experts), 0.37, dtype=dtype)
    for bias in (None, torch.zeros(experts, dtype=dtype)):
        _, chosen = route(scores, bias, top_k, "normalized", "none", False)
        assert chosen.tolist() == [list(range(top_k))] * 3


@given(cases())
def test_a_token_is_routed_alike_alone_and_in_a_batch(case: Case) -> None:
    scores = case.scores()
    _, together = route(scores, None, case.top_k, case.gate, "none", False)
    alone = [route(row[None], None, case.top_k, case.gate, "none", False)[1] for row in scores]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_extreme_scores_give_finite_weights_and_gradients(gate: str, top_k: int) -> None:
    scores = torch.tensor([[-900.0, -1000, -950, -2000, -901], [900.0, 1000, 950, 0, 901], [0.0, 0, 0, 0, 0]])
    scores.requires_grad_()
    weights, chosen = route(scores, None, top_k, gate, "none", True)
    weights.sum().backward()
    assert scores.grad is not None
    assert weights.isfinite().all()
    assert scores.grad.isfinite().all()
    # The largest score comes first even where softmax and sigmoid round their values to the same number.
    assert chosen[:, 0].tolist() == [0, 1, 0]


@given(cases(), st.sampled_from(SUM_TO_ONE))
def test_weights_of_a_token_sum_to_one(case: Case, gate: str) -> None:
    weights, _ = route(case.scores(), case.bias(), case.top_k, gate, "none", True)
    torch.testing.assert_close(weights.sum(1), torch.ones(case.tokens, dtype=case.dtype), rtol=0, atol=1e-14)


@pytest.mark.parametrize("gate", SUM_TO_ONE)
def test_the_weight_of_a_single_choice_is_exactly_one(gate: str) -> None:
    weights, _ = route(50 * torch.randn(999, 7), None, 1, gate, "none", True)
    assert torch.equal(weights, torch.ones(999, 1))


def test_straight_through_trains_the_router_where_normalized_cannot() -> None:
    gradients = {}
    for gate in ("normalized", "straight-through"):
        scores = Case(dtype=torch.float64).scores().requires_grad_()
        weights, _ = route(scores, None, 1, gate, "none", True)
        (gradients[gate],) = torch.autograd.grad(weights.sum(), scores)
    assert gradients["normalized"].abs().max() == 0
    assert gradients["straight-through"].abs().max() > 0.1


def test_bias_moves_the_choice_and_never_the_weights() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64)
    weights, chosen = route(scores, bias, 1, "probability", "none", False)
    assert chosen.item() == 2
    assert weights.item() == scores.softmax(-1)[0, 2].item()


def test_bias_gets_no_gradient() -> None:
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    scores = Case().scores().requires_grad_()
    weights, _ = route(scores, bias, 2, "normalized", "none", True)
    weights.square().sum().backward()
    assert bias.grad is None


def test_noise_explores_in_training_only() -> None:
    scores = torch.tensor([[1.0, 0.5, 0.0, -1.0]]).repeat(20_000, 1)
    calm = route(scores, None, 1, "probability", "rsample", False)[1]
    assert calm.unique().tolist() == [0]
    weights, noisy = route(scores, None, 1, "probability", "rsample", True)
    frequencies = noisy.flatten().bincount(minlength=4) / 20_000
    # Gumbel noise makes the largest a sample from the softmax; 0.02 is more than five standard deviations.
    assert (frequencies - scores[0].softmax(-1)).abs().max() < 0.02
    assert torch.equal(weights, scores.softmax(-1).gather(1, noisy))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_at_least_float32_and_gradients_keep_the_dtype(dtype: torch.dtype) -> None:
    scores = Case(dtype=dtype).scores().requires_grad_()
    weights, _ = route(scores, None, 2, "normalized", "none", True)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    weights.square().sum().backward()
    assert scores.grad is not None
    assert scores.grad.dtype == dtype
