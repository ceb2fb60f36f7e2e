"""Every operator against its plain reference: values and gradients, float64, float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moec.runtime.ops import reference
from moec.testing.same_function import assert_same_function
from tests.runtime.ops.cases import Case, cases

ops = torch.ops.moec
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def precise(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """`function` in float64, its result rounded once to `dtype`: adding up one row at a time in bfloat16
    would make the reference the less exact of the two."""

    def call(*inputs: Tensor | None) -> Tensor:
        return function(*(value if value is None else value.double() for value in inputs)).to(dtype)

    return call


@given(cases(dtypes=DTYPES), st.sampled_from(("none", "rsample")), st.booleans())
def test_route(case: Case, noise: str, training: bool) -> None:
    options = (case.bias(), case.top_k, case.gate, noise, training)
    # The scores go out too, so that gradients have a scale where the gate's own are zero but for rounding.
    assert_same_function(
        lambda scores: (*reference.route(scores, *options), scores),
        lambda scores: (*ops.route(scores, *options), scores),
        [case.scores()],
    )


@given(cases(), st.integers(0, 4), st.booleans(), st.booleans(), st.sampled_from((0.0, 0.7)))
def test_assign(case: Case, minimum: int, random: bool, training: bool, eval_factor: float) -> None:
    _, experts = reference.route(case.scores(), case.bias(), case.top_k, case.gate, "none", False)
    options = (case.experts, case.factor, eval_factor, minimum, random, training)
    assert_same_function(
        lambda experts: reference.assign(experts, *options),
        lambda experts: ops.assign(experts, *options),
        [experts],
    )


@given(cases(dtypes=DTYPES), st.booleans())
def test_jitter(case: Case, training: bool) -> None:
    assert_same_function(
        lambda x: reference.jitter(x, 0.1, training), lambda x: ops.jitter(x, 0.1, training), [case.x()]
    )


@given(cases(dtypes=DTYPES))
def test_dispatch(case: Case) -> None:
    *_, order, _ = case.routed()
    assert_same_function(
        precise(lambda x: reference.dispatch(x, order, case.top_k), case.dtype),
        lambda x: ops.dispatch(x, order, case.top_k),
        [case.x()],
    )


@given(cases(dtypes=DTYPES))
def test_grouped_linear(case: Case) -> None:
    *_, counts = case.routed()
    bias = case.expert_bias()
    inputs = [case.rows(case.depth), case.weight(), *([] if bias is None else [bias])]

    def needed(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.grouped_linear(rows, weight, bias, counts)

    def found(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.grouped_linear(rows, weight, bias, counts)

    assert_same_function(precise(needed, case.dtype), found, inputs)


@given(cases(dtypes=DTYPES))
def test_grouped_outer_and_sum(case: Case) -> None:
    *_, counts = case.routed()
    left, right = case.rows(case.width), case.rows(case.depth)
    assert_same_function(
        lambda left, right: (
            reference.grouped_outer(left, right, counts),
            reference.grouped_sum(left, counts),
        ),
        lambda left, right: (ops.grouped_outer(left, right, counts), ops.grouped_sum(left, counts)),
        [left, right],
        gradients=False,
    )


@given(cases(dtypes=DTYPES))
def test_combine(case: Case) -> None:
    weights, _, order, counts = case.routed()
    assert_same_function(
        precise(lambda rows, weights: reference.combine(rows, weights, order, counts), case.dtype),
        lambda rows, weights: ops.combine(rows, weights, order, counts),
        [case.rows(case.depth), weights],
    )


@given(cases(dtypes=DTYPES))
def test_losses(case: Case) -> None:
    _, experts, *_ = case.routed()
    assert_same_function(
        lambda scores: (reference.balance_loss(scores, experts), reference.z_loss(scores)),
        lambda scores: (ops.balance_loss(scores, experts), ops.z_loss(scores)),
        [case.scores()],
    )


@given(cases())
def test_the_whole_layer(case: Case) -> None:
    """Nine operators in a row, as `lift_experts` writes them, dropped slots included."""

    def layer(library: object, x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        call = library if library is reference else ops
        scores = x @ router.t()
        weights, experts = call.route(scores, None, case.top_k, case.gate, "none", True)
        order, counts = call.assign(experts, case.experts, case.factor, 0.0, 1, False, True)
        rows = call.dispatch(x, order, case.top_k)
        hidden = torch.nn.functional.gelu(call.grouped_linear(rows, up, None, counts))
        out = call.grouped_linear(hidden, down, None, counts)
        y = call.combine(out, weights, order, counts)
        return y, call.balance_loss(scores, experts), call.z_loss(scores), counts

    inputs = [case.x(), case.draw(case.experts, case.depth, salt=8), case.weight(), case.weight().mT]
    assert_same_function(
        lambda *tensors: layer(reference, *tensors), lambda *tensors: layer(ops, *tensors), inputs
    )
