"""`moec::gate`: `router`, `route` and `assign` in one.

    gate(x [T,D], router [E,D], bias [E]?, top_k, gate, noise, capacity_factor, eval_capacity_factor,
         min_capacity, random, training)
        -> scores [T,E], weights [T,K], experts [T,K] i64, order [N] i64, counts [E] i64

Every result is what the three operators give one after the other, random draws included. Differentiable in
`x` and `router`, through scores and weights. A device that has a kernel of its own registers it for `gate`
(and for `gate_backward`) with `registry.LIBRARY.impl` under the device's key; it takes precedence over the
one here, which calls the three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.runtime.ops.assign import check_assign
from moec.runtime.ops.registry import define, differentiate, wide
from moec.runtime.ops.route import check_route, route_backward
from moec.runtime.ops.router import check_router, router_dtype, router_work
from moec.runtime.ops.work import NOTHING, Call, Price, Work, price

Gated = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def gate_by_parts(
    x: Tensor, router: Tensor, bias: Tensor | None, top_k: int, gate: str, noise: str,
    capacity_factor: float, eval_capacity_factor: float, min_capacity: int, random: bool, training: bool,
) -> Gated:  # fmt: skip
    """The three operators, one after the other."""
    ops = torch.ops.moec
    scores_TE = ops.router.default(x, router)
    weights_TK, experts_TK = ops.route.default(scores_TE, bias, top_k, gate, noise, training)
    limits = (capacity_factor, eval_capacity_factor, min_capacity, random, training)
    order_N, counts_E = ops.assign.default(experts_TK, router.shape[0], *limits)
    return scores_TE, weights_TK, experts_TK, order_N, counts_E


def _fake(
    x: Tensor, router: Tensor, bias: Tensor | None, top_k: int, gate: str, noise: str,
    capacity_factor: float, eval_capacity_factor: float, min_capacity: int, random: bool, training: bool,
) -> Gated:  # fmt: skip
    check_router(x, router)
    tokens, experts = x.shape[0], router.shape[0]
    scores_TE = x.new_empty(tokens, experts, dtype=router_dtype(x, router))
    check_route(scores_TE, bias, top_k, gate, noise)
    experts_TK = x.new_empty(tokens, top_k, dtype=torch.int64)
    check_assign(experts_TK, experts, capacity_factor, eval_capacity_factor, min_capacity)
    weights_TK = x.new_empty(tokens, top_k, dtype=wide(scores_TE.dtype))
    return (
        scores_TE,
        weights_TK,
        experts_TK,
        x.new_empty(tokens * top_k, dtype=torch.int64),
        x.new_empty(experts, dtype=torch.int64),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Gated) -> None:
    scores_TE, weights_TK, experts_TK, order_N, counts_E = output
    ctx.save_for_backward(inputs[0], inputs[1], scores_TE, weights_TK, experts_TK)
    ctx.gate = inputs[4]
    ctx.mark_non_differentiable(experts_TK, order_N, counts_E)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, to_scores: Tensor | None, to_weights: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if to_scores is None and to_weights is None:
        return (None,) * 11
    to_x, to_router = torch.ops.moec.gate_backward(to_scores, to_weights, *ctx.saved_tensors, ctx.gate)
    return to_x, to_router, *[None] * 9


def _gate_backward(
    grad_scores: Tensor | None, grad_weights: Tensor | None, x: Tensor, router: Tensor, scores: Tensor,
    weights: Tensor, experts: Tensor, gate: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_TE = grad_scores
    if grad_weights is not None:
        through_TE = route_backward(scores, weights, experts, grad_weights, gate)
        grad_TE = through_TE if grad_TE is None else grad_TE + through_TE
    if grad_TE is None:
        return torch.zeros_like(x), torch.zeros_like(router)
    to_x, to_router = torch.ops.moec.router_backward.default(grad_TE, x, router)
    return to_x, to_router


def _fake_backward(
    grad_scores: Tensor | None, grad_weights: Tensor | None, x: Tensor, router: Tensor, scores: Tensor,
    weights: Tensor, experts: Tensor, gate: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), router.new_empty(router.shape)


define(
    "gate(Tensor x, Tensor router, Tensor? bias, int top_k, str gate, str noise, float capacity_factor,"
    " float eval_capacity_factor, int min_capacity, bool random, bool training)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    gate_by_parts,
    _fake,
    random=True,
)
define(
    "gate_backward(Tensor? grad_scores, Tensor? grad_weights, Tensor x, Tensor router, Tensor scores,"
    " Tensor weights, Tensor experts, str gate) -> (Tensor, Tensor)",
    _gate_backward,
    _fake_backward,
)
differentiate("gate", _setup, _backward)


def _price(call: Call) -> Price:
    """The product, and the results of all three: `scores` is read again to choose."""
    product, back = router_work(call, "router")
    forward = Work(product.products, product.read, call.result_bytes())
    wanted = call.needs_grad("x") or call.needs_grad("router")
    kept = call.result_bytes(0) + call.result_bytes(1) + call.result_bytes(2)
    backward = Work(back.products, back.read + kept, back.written)
    return Price(forward, backward if wanted else NOTHING)


price("gate", _price)
price("gate_backward", lambda call: Price(router_work(call, "router")[1]))
