"""Formulas of torch's operators; one without a formula reads its operands and writes its results."""

from __future__ import annotations

from moec.runtime.ops.linear import linear_price
from moec.runtime.ops.work import NOTHING, PRICES, Call, Formula, Price, Work

from .attention import attention
from .products import PRODUCTS


def price_of(operator: str) -> Formula | None:
    """The formula of an operator (`aten::linear`), or None where it has none of its own."""
    return ATEN.get(operator) or PRICES.get(operator)


def embedding(call: Call) -> Price:
    """Rows are looked up; the gradient of the table is written whole."""
    return _looked_up(call, "weight", "indices")


def index_select(call: Call) -> Price:
    """As many rows are read as are given."""
    return _looked_up(call, "self", "index")


def index(call: Call) -> Price:
    """As many elements are read as are given."""
    return _looked_up(call, "self", "indices")


def _looked_up(call: Call, table: str, places: str) -> Price:
    out = call.result_bytes()
    forward = Work((), out + call.bytes(places), out)
    if not call.needs_grad(table):
        return Price(forward)
    return Price(forward, Work((), out + call.bytes(places), call.bytes(table) + out))


def filled(call: Call) -> Price:
    """Written, and nothing read: the operand says a shape alone."""
    return Price(Work((), 0, call.result_bytes()))


def summed(call: Call) -> Price:
    """Backward spreads what arrives: nothing but that is read."""
    name = "self" if "self" in call.operands else "input"
    forward = Work((), call.bytes(name), call.result_bytes())
    if not call.needs_grad(name):
        return Price(forward)
    return Price(forward, Work((), call.result_bytes(), call.bytes(name)))


def cat(call: Call) -> Price:
    """Copied; the gradients are views of what arrives."""
    return Price(Work((), call.bytes("tensors"), call.result_bytes()))


def pieces(call: Call) -> Price:
    """Views of one value; backward puts their gradients together again."""
    wanted = call.needs_grad("self") if "self" in call.operands else call.needs_grad("input")
    given = call.bytes("self" if "self" in call.operands else "input")
    return Price(NOTHING, Work((), call.result_bytes(), given) if wanted else NOTHING)


def nothing(call: Call) -> Price:
    """A number or a mark: nothing is computed."""
    return Price(NOTHING)


ATEN: dict[str, Formula] = {
    "aten::linear": linear_price,
    "aten::scaled_dot_product_attention": attention,  # type: ignore[dict-item]
    "aten::embedding": embedding,
    "aten::index_select": index_select,
    "aten::gather": index_select,
    "aten::index": index,
    "aten::cat": cat,
    "aten::sum": summed,
    "aten::mean": summed,
    "aten::sym_size": nothing,
    **{f"aten::{name}": pieces for name in ["chunk", "split", "split_with_sizes", "slice", "select"]},
    **{
        f"aten::{name}": filled
        for name in ["zeros_like", "ones_like", "full_like", "empty_like", "new_zeros"]
    },
    **PRODUCTS,
}
