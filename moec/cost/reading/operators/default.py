"""An operator without a formula of its own reads its operands and writes its results."""

from __future__ import annotations

from moec.cost.reading.call import GraphCall
from moec.runtime.ops.work import Price, Work


def default_price(call: GraphCall) -> Price:
    """Each operand is read once and each result written once.

    Backward reads what arrives and the values that autograd keeps, and writes the gradients that are wanted.
    """
    read = sum(call.bytes(name) for name in call.operands)
    forward = Work((), read, call.result_bytes())
    wanted = [name for name in call.operands if call.needs_grad(name)]
    if not wanted:
        return Price(forward)
    values = [*call.inputs, *call.results]
    kept = sum(values[place].bytes for place in call.answer.kept)
    extra = sum(itemsize * numel(values) for itemsize, numel in call.answer.extra)
    written = sum(call.bytes(name) for name in wanted)
    return Price(forward, Work((), kept + extra + call.result_bytes(), written))
