"""The distance between hidden states, against one that is written position by position."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moec.errors import TrainError
from moec.plan import Distill
from moec.runtime.distillation.lesson import Lesson
from moec.runtime.distillation.losses import hidden_loss
from moec.testing.tolerances import tolerance_of


def lesson(hidden: dict[int, Tensor]) -> Lesson:
    return Lesson(torch.zeros(0), Distill(hidden=1.0), hidden)


def distance(student: dict[int, Tensor], teacher: dict[int, Tensor], counted_BS: Tensor) -> Tensor:
    return hidden_loss(student, lesson(teacher), counted_BS, counted_BS.sum())


def by_hand(student: dict[int, Tensor], teacher: dict[int, Tensor], counted_BS: Tensor) -> Tensor:
    """Position by position, in fp64."""
    layers = []
    for layer, said_BSD in teacher.items():
        rows = []
        for row, column in counted_BS.nonzero().tolist():
            ours, theirs = (side[row, column].double() for side in (student[layer], said_BSD))
            if theirs.any():
                rows.append(((ours - theirs) ** 2).sum() / (theirs**2).sum())
        layers.append(sum(rows, torch.zeros((), dtype=torch.float64)) / counted_BS.sum())
    return sum(layers, torch.zeros((), dtype=torch.float64)) / len(layers)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(
    seed=st.integers(0, 99), B=st.integers(1, 3), S=st.integers(1, 5), D=st.sampled_from((1, 2, 3, 7)),
    layers=st.sets(st.integers(0, 9), min_size=1, max_size=3), silent=st.booleans(),
    dtypes=st.sampled_from([(torch.float64, torch.float64), (torch.float64, torch.float32),
                            (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]),
)  # fmt: skip
def test_value_and_gradient(
    seed: int, B: int, S: int, D: int, layers: set[int], silent: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    student = {n: drawn(seed + n, B, S, D, dtype=dtypes[0]).requires_grad_() for n in layers}
    teacher = {n: drawn(seed + n + 50, B, S, D, dtype=dtypes[1]) for n in layers}
    counted_BS = drawn(seed + 100, B, S) > -0.3
    counted_BS[-1, -1] = True
    if silent:
        teacher[min(layers)][0, 0] = 0.0
    found, needed = (how(student, teacher, counted_BS) for how in (distance, by_hand))
    computed = torch.promote_types(torch.float32, torch.promote_types(*dtypes))
    assert found.dtype == computed
    torch.testing.assert_close(found.double(), needed, rtol=tolerance_of(computed), atol=0.0)
    sides = list(student.values())
    gradients = [torch.autograd.grad(value, sides, allow_unused=True) for value in (found, needed)]
    for mine, other in zip(*gradients, strict=True):
        assert mine is not None
        plain = torch.zeros_like(mine) if other is None else other
        torch.testing.assert_close(mine, plain, rtol=10 * tolerance_of(dtypes[0]), atol=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_size_does_not_matter(size: float) -> None:
    """Squares of these numbers are not numbers of fp32."""
    student, teacher = drawn(0, 1, 4, 3), drawn(1, 1, 4, 3)
    counted_BS = torch.ones(1, 4, dtype=torch.bool)
    scaled = {0: (student * size).float()}, {0: (teacher * size).float()}
    needed = float(by_hand({0: student}, {0: teacher}, counted_BS))
    assert float(distance(*scaled, counted_BS)) == pytest.approx(needed, rel=1e-5)


def test_a_silent_teacher_leaves_no_gradient() -> None:
    """Zero where the student is zero too, and where it is not."""
    student = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]]])
    value = distance({0: student}, {0: teacher}, torch.ones(1, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value, student)
    assert float(value.detach()) == pytest.approx((1 + 1) / 4 / 3)
    assert gradient.tolist() == [[[0.0, 0.0], [0.0, 0.0], pytest.approx([-2 / 4 / 3, 2 / 4 / 3])]]


def test_positions_that_do_not_count_are_never_looked_at() -> None:
    student = drawn(0, 2, 3, 5).requires_grad_()
    counted_BS = torch.tensor([[True, False, True], [False, False, True]])
    teacher = drawn(1, 2, 3, 5)
    others = teacher.masked_fill(~counted_BS[..., None], math.nan)
    values = [distance({0: student}, {0: said}, counted_BS) for said in (teacher, others)]
    gradients = [torch.autograd.grad(value, student)[0] for value in values]
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    assert not gradients[0][~counted_BS].any()


def test_no_position_of_this_rank_counts() -> None:
    """Others' do: this rank's share is zero, and so is its gradient."""
    student = drawn(0, 2, 3, 5).requires_grad_()
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    value = hidden_loss({0: student}, lesson({0: drawn(1, 2, 3, 5)}), nothing, torch.tensor(4))
    assert float(value.detach()) == 0.0
    assert not torch.autograd.grad(value, student)[0].any()


def test_what_is_not_finite_is_not_hidden() -> None:
    teacher = drawn(1, 1, 2, 3)
    teacher[0, 1, 0] = math.inf
    assert not distance({0: drawn(0, 1, 2, 3)}, {0: teacher}, torch.ones(1, 2, dtype=torch.bool)).isfinite()


def test_other_widths_are_refused() -> None:
    with pytest.raises(TrainError, match=r"layer 2\n.*\[1, 2, 3\] of the student, \[1, 2, 1\] of"):
        distance({2: drawn(0, 1, 2, 3)}, {2: drawn(0, 1, 2, 1)}, torch.ones(1, 2, dtype=torch.bool))
