"""`moec::router`: the scores of each expert for each token, never narrower than float32.

    router(x [T,D], weight [E,D]) -> scores [T,E]

x is widened, the product is taken and the scores are returned in float32 (float64 for float64 x or weight),
under
autocast too: rounding scores to bfloat16 moves tokens between experts. No bias (DeepSpeed-MoE's gate has
none).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.runtime.ops.registry import define, demand, differentiate, wide
from moec.runtime.ops.work import NOTHING, Call, Price, Product, Work, price


def check_router(x: Tensor, weight: Tensor) -> None:
    """Raise an `OperatorError` for arguments that `moec::router` cannot mean anything by."""
    demand(x.dim() == 2, "router", f"x with {x.dim()} dimensions", "x [T, D]")
    fits = weight.dim() == 2 and weight.shape[1] == x.shape[1]
    demand(fits, "router", f"weight {list(weight.shape)}", f"weight [E, {x.shape[1]}]")


def router_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the scores."""
    return torch.promote_types(wide(x.dtype), weight.dtype)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`; written to `out`, which autocast leaves alone."""
    out = torch.empty(left.shape[0], right.shape[1], dtype=dtype, device=left.device)
    return torch.mm(left.to(dtype), right.to(dtype), out=out)


def _router(x: Tensor, weight: Tensor) -> Tensor:
    check_router(x, weight)
    return _product(x, weight.t(), router_dtype(x, weight))


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    check_router(x, weight)
    return x.new_empty(x.shape[0], weight.shape[0], dtype=router_dtype(x, weight))


def _router_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = grad.dtype
    return _product(grad, weight, dtype).to(x.dtype), _product(grad.t(), x, dtype).to(weight.dtype)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
    to_x, to_weight = torch.ops.moec.router_backward(grad_TE, *ctx.saved_tensors)
    return to_x, to_weight


define("router(Tensor x, Tensor weight) -> Tensor", _router, _fake)
define(
    "router_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    _router_backward,
    _fake_backward,
)
differentiate("router", _setup, _backward)


def router_work(call: Call, weight: str = "weight") -> tuple[Work, Work]:
    """Forward and backward of the product with `weight`; backward computes both gradients, wanted or not."""
    tokens, depth = call.shape("x")
    experts = call.shape(weight)[0]
    operands = call.bytes("x") + call.bytes(weight)
    scores = tokens * experts * max(4, call.itemsize("x"), call.itemsize(weight))
    back = (Product(tokens, depth, experts), Product(experts, depth, tokens))
    return (
        Work((Product(tokens, experts, depth),), operands, scores),
        Work(back, scores + operands, operands, 2),
    )


def _price(call: Call) -> Price:
    forward, backward = router_work(call)
    wanted = call.needs_grad("x") or call.needs_grad("weight")
    return Price(forward, backward if wanted else NOTHING)


price("router", _price)
price("router_backward", lambda call: Price(router_work(call)[1]))
