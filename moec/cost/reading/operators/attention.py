"""Attention: softmax(q kᵀ) v, by a kernel that computes scores again or by one product after the other.

Torch has both (`flash` and its likes, and `math`), and what it takes depends on dtype, dropout, masks and
heads. Which one is asked of torch, with small tensors like those of the call.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, fx

from moec.cost.reading.call import GraphCall
from moec.cost.reading.samples import SMALL, Samples, meant
from moec.cost.reading.value import values_of
from moec.ir.patterns import arguments_of
from moec.runtime.ops.work import Amount, Price, Product, Work

Attention = Literal["flash", "math"]
_MATH = 0  # torch.nn.attention.SDPBackend.MATH


def attention(call: GraphCall) -> Price:
    """Scores and values over all pairs; `flash` backward computes the scores again."""
    products = _Products(call)
    operands = call.bytes("query") + call.bytes("key") + call.bytes("value")
    read, out = operands + call.bytes("attn_mask"), call.result_bytes()
    if call.attention == "math":
        return _by_products(call, products)
    forward = Work((products.scores, products.values), read, out)
    if mask := _mask_as_numbers(call):
        forward += Work((), mask, mask)
    if not any(call.needs_grad(name) for name in ("query", "key", "value")):
        return Price(forward, shared=())
    statistics = 4 * products.rows if call.itemsize("query") <= 4 else 8 * products.rows
    back = (products.scores, products.to_weights, products.to_values, products.to_query, products.to_key)
    backward = Work(back, read + 2 * out + statistics, operands)
    masks = () if mask else ("attn_mask",)
    return Price(forward, backward, statistics + mask, ("query", "key", "value", *masks, 0))


def _mask_as_numbers(call: GraphCall) -> Amount:
    """Bytes of the copy that torch makes of a mask that says yes or no; 0 where there is none."""
    if not any(value.dtype == torch.bool for value in call.values("attn_mask")):
        return 0
    return call.bytes("attn_mask") * call.itemsize("query")


class _Products:
    """The products of one call: `rows` queries of all heads."""

    def __init__(self, call: GraphCall) -> None:
        *batch, length, depth = call.shape("query")
        keys, out = call.shape("key")[-2], call.shape("value")[-1]
        count = math.prod(batch)
        self.rows, self.pairs = count * length, count * length * keys
        self.scores, self.values = (
            Product(self.rows, keys, depth, count),
            Product(self.rows, out, keys, count),
        )
        self.to_weights, self.to_values = (
            Product(self.rows, keys, out, count),
            Product(count * keys, out, length, count),
        )
        self.to_query, self.to_key = (
            Product(self.rows, depth, keys, count),
            Product(count * keys, depth, length, count),
        )


def _by_products(call: GraphCall, products: _Products) -> Price:
    """Scores are written, read and written by softmax, and read; backward has them twice more."""
    pairs = products.pairs * call.itemsize("query")
    operands = call.bytes("query") + call.bytes("key") + call.bytes("value")
    read, out = operands + call.bytes("attn_mask"), call.result_bytes()
    forward = Work((products.scores, products.values), read + 3 * pairs, out + 3 * pairs, 6)
    back: list[Product] = []
    for name, others in (("query", [products.to_query]), ("key", [products.to_key])):
        back += others if call.needs_grad(name) else []
    back += [products.to_values] if call.needs_grad("value") else []
    if any(call.needs_grad(name) for name in ("query", "key", "attn_mask")):
        back.insert(0, products.to_weights)
    if not back:
        return Price(forward)
    return Price(forward, Work(tuple(back), operands + out + 4 * pairs, operands + 3 * pairs, 6))


def chosen(node: fx.Node, known: dict[fx.Node, Any], device: str) -> Attention:
    """What torch takes for the call `node` on `device`; where there is no memory (`meta`), as on a GPU.

    There flash or one of its likes (`efficient`, `cudnn`) runs, which torch counts alike.
    """
    if device == "meta":
        return "flash"
    small = Samples(SMALL)

    def sample(other: fx.Node) -> Any:
        value = meant(other, known[other])
        if isinstance(value, Tensor):
            learns = any(one.needs_grad for one in values_of(known[other]))
            return small.tensor(value, learns).to(device)
        return small.size(value) if isinstance(value, torch.SymInt) else value

    with torch.no_grad():
        query, key, value, mask, dropout, causal, scale, grouped = fx.map_arg(arguments_of(node), sample)
        choice = torch._fused_sdp_choice(
            query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped
        )
    return "math" if choice == _MATH else "flash"
