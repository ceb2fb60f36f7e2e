"""Break an operator on purpose, and see that the comparison with the reference notices."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moec.runtime.ops import assign, combine, dispatch, grouped_linear, products, reference, route
from moec.runtime.ops.buffers import Block, KeptBuffers
from moec.testing.same_function import assert_same_function
from tests.runtime.ops.cases import Case

ops = torch.ops.moec


def check_route(gate: str, biased: bool = True) -> None:
    case = Case(crowd="ties")
    options = (case.draw(5) if biased else None, 2, gate, "none", True)
    assert_same_function(
        lambda scores: reference.route(scores, *options),
        lambda scores: ops.route(scores, *options),
        [case.scores()],
    )


def check_assign() -> None:
    case = Case(factor=0.7, crowd="one expert")
    _, experts, *_ = case.routed()
    assert_same_function(
        lambda experts: reference.assign(experts, 5, 0.7, 0.0, 1, False, True),
        lambda experts: ops.assign(experts, 5, 0.7, 0.0, 1, False, True),
        [experts],
    )


def check_rows() -> None:
    case = Case(factor=0.7, crowd="one expert")
    weights, _, order, counts = case.routed()

    def layer(library: Any, x: Tensor, weights: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = library.grouped_linear(library.dispatch(x, order, 2), weight, bias, counts)
        # Dropped rows are filled, as a region's pointwise operators may do.
        return library.combine(rows.cos(), weights, order, counts)

    inputs = [case.x(), weights, case.weight(), case.draw(5, 11)]
    assert_same_function(lambda *t: layer(reference, *t), lambda *t: layer(ops, *t), inputs)


def check_buffers() -> None:
    buffers = KeptBuffers(smallest=1)
    held = buffers.empty((8,), torch.float32, torch.device("cpu"))
    assert buffers.empty((8,), torch.float32, torch.device("cpu")).data_ptr() != held.data_ptr()


original: dict[str, Callable[..., Any]] = {
    "spans": grouped_linear.spans,
    "multiply": products.multiply,
    "largest": route._largest,
    "capacity": assign.expert_capacity,
}


def probability_for_all(scores: Tensor, experts: Tensor, gate: str) -> Tensor:
    return scores.softmax(-1).gather(1, experts)


def last_of_ties(selection: Tensor, top_k: int) -> Tensor:
    return selection.shape[1] - 1 - original["largest"](selection.flip(1), top_k)


def only_the_chosen(scores: Tensor, w: Tensor, experts: Tensor, grad: Tensor, gate: str) -> Tensor:
    return torch.zeros_like(scores).scatter_add(1, experts, w * grad)


def detached(scores: Tensor, w: Tensor, experts: Tensor, grad: Tensor, gate: str) -> Tensor:
    return torch.zeros_like(scores)


def next_expert(counts: Tensor, num_rows: int) -> Any:
    return ((expert % 4 + 1, start, count) for expert, start, count in original["spans"](counts, num_rows))


def without_bias(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    original["multiply"](x, w, None, out)


def one_more(*sizes: Any) -> int:
    return int(original["capacity"](*sizes)) + 1


MUTATIONS: dict[str, tuple[ModuleType | type, str, Any, Callable[[], None]]] = {
    "gate not normalised": (route, "_weigh", probability_for_all, lambda: check_route("normalized")),
    "ties to the last": (route, "_largest", last_of_ties, lambda: check_route("probability", False)),
    "softmax gradient not centred": (
        route,
        "_through_softmax",
        only_the_chosen,
        lambda: check_route("probability"),
    ),
    "gradient detached": (route, "_through_chosen", detached, lambda: check_route("sigmoid")),
    "bias on the weights": (route, "_selection", lambda s, b, g: s, lambda: check_route("normalized")),
    "capacity one more": (assign, "expert_capacity", one_more, check_assign),
    "nothing dropped": (assign, "expert_capacity", lambda t, *_: t, check_assign),
    "wrong expert": (grouped_linear, "spans", next_expert, check_rows),
    "bias dropped": (grouped_linear, "multiply", without_bias, check_rows),
    "order not inverted": (combine, "invert", lambda order: order, check_rows),
    "gradient order not inverted": (dispatch, "invert", lambda order: order, check_rows),
    "token of another slot": (combine, "token_of", lambda order, k: order // k // 2, check_rows),
    "held memory reused": (Block, "is_idle", lambda self: True, check_buffers),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, replacement, check = MUTATIONS[name]
    check()
    monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(AssertionError):
        check()
