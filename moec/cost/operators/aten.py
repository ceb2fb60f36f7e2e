"""Formulas of torch's operators."""

from __future__ import annotations

import math

from moec.runtime.ops.work import NOTHING, PRICES, Call, Formula, Price, Product, Work


def price_of(operator: str) -> Formula | None:
    """The formula of an operator (`aten::linear`), or None where it has none of its own."""
    return ATEN.get(operator) or PRICES.get(operator)


def linear(call: Call) -> Price:
    """x [..., D] times weight [F, D] transposed."""
    *rows, depth = call.shape("input")
    width, size = call.shape("weight")[0], math.prod(rows)
    grad_input, grad_weight = call.needs_grad("input"), call.needs_grad("weight")
    forward = Work(
        (Product(size, width, depth),),
        call.bytes("input") + call.bytes("weight") + call.bytes("bias"),
        call.result_bytes(),
    )
    backward = NOTHING
    if grad_input:
        backward += Work(
            (Product(size, depth, width),), call.result_bytes() + call.bytes("weight"), call.bytes("input")
        )
    if grad_weight:
        backward += Work(
            (Product(width, depth, size),), call.result_bytes() + call.bytes("input"), call.bytes("weight")
        )
    if call.has("bias") and call.needs_grad("bias"):
        backward += Work((), call.result_bytes(), call.bytes("bias"))
    kept = (("input",) if grad_weight else ()) + (("weight",) if grad_input else ())
    return Price(forward, backward, shared=kept)


def attention(call: Call) -> Price:
    """softmax(q kᵀ) v over all pairs; backward computes the scores again."""
    *batch, length, depth = call.shape("query")
    keys, out = call.shape("key")[-2], call.shape("value")[-1]
    count = math.prod(batch)
    rows = count * length
    scores, values = Product(rows, keys, depth, count), Product(rows, out, keys, count)
    operands = call.bytes("query") + call.bytes("key") + call.bytes("value")
    forward = Work((scores, values), operands + call.bytes("attn_mask"), call.result_bytes())
    if not call.needs_grad("query"):
        return Price(forward)
    back: tuple[Product, ...] = (
        scores,
        Product(rows, keys, out, count),
        Product(count * keys, out, length, count),
    )
    back += (Product(rows, depth, keys, count), Product(count * keys, depth, length, count))
    statistics = 4 * rows
    return Price(
        forward,
        Work(back, operands + 2 * call.result_bytes() + statistics, operands),
        call.result_bytes() + statistics,
        ("query", "key", "value"),
    )


def view(call: Call) -> Price:
    """Nothing is computed or copied."""
    return Price(NOTHING)


def pieces(call: Call) -> Price:
    """Views of one value; backward puts their gradients together again."""
    wanted = call.needs_grad("self")
    return Price(NOTHING, Work((), call.result_bytes(), call.bytes("self")) if wanted else NOTHING)


_VIEWS = "flatten unflatten transpose unsqueeze squeeze view view_as permute t detach reshape sym_size"
_PIECES = "chunk split split_with_sizes slice select expand"

ATEN: dict[str, Formula] = {
    "aten::linear": linear,
    "aten::scaled_dot_product_attention": attention,
    **{f"aten::{name}": view for name in _VIEWS.split()},
    **{f"aten::{name}": pieces for name in _PIECES.split()},
}
