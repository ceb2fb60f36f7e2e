"""What torch's flop counter is told of `moec::` operators, against plain products, expert by expert."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.flop_counter import FlopCounterMode

import moec.runtime.ops.flop_formulas  # noqa: F401 - registers the formulas

COUNTS = torch.tensor([3, 0, 5, 2])
D, F = 7, 5


def counted(run: Callable[[], Tensor]) -> tuple[int, int]:
    """FLOPs forward and backward."""
    with FlopCounterMode(display=False) as forward:
        result = run()
    with FlopCounterMode(display=False) as backward:
        result.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def drawn(*shape: int, learns: bool = True) -> Tensor:
    return torch.randn(*shape, requires_grad=learns)


def by_expert(rows: Tensor, *matrices: Tensor) -> Tensor:
    """Each expert's rows through its matrices, by torch's own products."""
    parts = []
    for expert, part in enumerate(rows.split(COUNTS.tolist())):
        for matrix in matrices:
            part = part @ matrix[expert].T
        parts.append(part)
    return torch.cat(parts)


@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)])
def test_grouped_linear(learns: tuple[bool, bool]) -> None:
    rows, weight = drawn(10, D, learns=learns[0]), drawn(4, F, D, learns=learns[1])
    told = counted(lambda: torch.ops.moec.grouped_linear(rows, weight, None, COUNTS))
    assert told == counted(lambda: by_expert(rows, weight))


def test_rows_without_a_place_are_not_multiplied() -> None:
    rows, weight = drawn(14, D), drawn(4, F, D)
    told = counted(lambda: torch.ops.moec.grouped_linear(rows, weight, None, COUNTS))
    assert told == counted(lambda: by_expert(rows[:10], weight))


def test_rows_whose_number_is_data_are_told_by_their_letter() -> None:
    """A program that is lowered while somebody counts has sizes without numbers."""
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes):
        rows = shapes.create_unbacked_symint()
        torch._check(rows >= 0)
        with FlopCounterMode(display=False) as counter:
            given = torch.empty(rows, D), torch.empty(4, F, D), None, torch.empty(4, dtype=torch.int64)
            torch.ops.moec.grouped_linear(*given)
    assert str(counter.get_total_flops()) == str(2 * F * D * rows)


@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)])
def test_moe_ffn(learns: tuple[bool, bool]) -> None:
    x, weights = drawn(5, D, learns=learns[0]), torch.rand(5, 2)
    up, down = drawn(4, F, D, learns=learns[1]), drawn(4, D, F, learns=learns[1])
    order = torch.randperm(10)
    told = counted(
        lambda: torch.ops.moec.moe_ffn(
            x, weights, order, COUNTS, [up, down], [None, None], "lambda h: silu(h)"
        )
    )
    assert told == counted(lambda: by_expert(x[order // 2], up, down))


@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)])
def test_linear(learns: tuple[bool, bool]) -> None:
    x, weight = drawn(2, 3, D, learns=learns[0]), drawn(F, D, learns=learns[1])
    told = counted(lambda: torch.ops.moec.linear(x, weight, None))
    assert told == counted(lambda: torch.nn.functional.linear(x, weight))


def test_router_and_gate() -> None:
    x, weight = drawn(6, D), drawn(4, D)
    plain = counted(lambda: x @ weight.T)
    assert counted(lambda: torch.ops.moec.router(x, weight)) == plain
    settings = (2, "normalized", "none", 0.0, 0.0, 4, False, True)
    assert counted(lambda: torch.ops.moec.gate(x, weight, None, *settings)[0]) == plain


def test_without_numbers_every_row_counts() -> None:
    rows, weight = torch.empty(10, D, device="meta"), torch.empty(4, F, D, device="meta")
    with FlopCounterMode(display=False) as counter:
        torch.ops.moec.grouped_linear(rows, weight, None, COUNTS.to("meta"))
    assert counter.get_total_flops() == 2 * 10 * D * F
