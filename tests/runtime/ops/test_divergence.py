"""The divergence of a student's words from a teacher's is what a plain loop in fp64 says, on any ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import moec.runtime.ops  # noqa: F401
from moec.errors import OperatorError
from moec.ir.mesh import TENSOR, Mesh
from moec.runtime.ops import logits as logits_module
from moec.runtime.ops.groups import axis_rank
from moec.runtime.simulated import run_ranks
from moec.runtime.traffic import count_traffic
from moec.testing.tolerances import error_of, tolerance_of
from tests.runtime.ops.test_vocabulary import SIZES, assert_transposed, part, pulled

ops = torch.ops.moec
INF = torch.inf


def oracle(logits: Tensor, teacher: Tensor, temperature: float = 1.0, reverse: bool = False) -> Tensor:
    """The definition, a position at a time; differentiable."""
    rows = [_row(z, y, temperature, reverse) for z, y in zip(logits.double(), teacher.double(), strict=True)]
    return torch.stack(rows) if rows else logits.double().sum(1)


def _row(z: Tensor, y: Tensor, temperature: float, reverse: bool) -> Tensor:
    q, p = (side / temperature - (side / temperature).logsumexp(0) for side in (z, y))
    first, second = (q, p) if reverse else (p, q)
    total = z.new_zeros(())
    for word in range(len(z)):
        if first[word] > -INF:
            total = total + first[word].exp() * (first[word] - second[word])
    return total


def assert_like_oracle(
    logits: Tensor, teacher: Tensor, temperature: float = 1.0, reverse: bool = False
) -> None:
    """Values and gradients; relative to the scale of each."""
    leaf = logits.clone().requires_grad_()
    cotangent = torch.linspace(-1.0, 2.0, len(logits), dtype=torch.float64)
    made = ops.divergence(leaf, teacher, logits.shape[1], temperature, reverse, "")
    (gradient,) = torch.autograd.grad(made, leaf, cotangent.to(made.dtype))
    needed, slope = pulled(
        lambda z: oracle(z, teacher, temperature, reverse), logits.double().requires_grad_(), cotangent
    )
    assert made.dtype == torch.promote_types(torch.promote_types(logits.dtype, teacher.dtype), torch.float32)
    # A divergence is a difference of logarithms of shares, whose size rounding goes by.
    size = math.log(logits.shape[1]) + 1.0
    assert error_of(made, needed, floor=size) <= tolerance_of(made.dtype)
    assert error_of(gradient, slope, floor=1.0 / temperature) <= tolerance_of(logits.dtype)


@given(
    st.sampled_from((0, 1, 2, 7)), st.sampled_from((1, 2, 5, 13, 31)), st.sampled_from((0.1, 1.0, 2.5, 40.0)),
    st.booleans(), st.sampled_from((0.1, 3.0, 100.0)), st.integers(0, 99),
)  # fmt: skip
def test_like_the_oracle(
    rows: int, words: int, temperature: float, reverse: bool, scale: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, rows, words, generator=draw, dtype=torch.float64) * scale
    assert_like_oracle(logits, teacher, temperature, reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_loop_of_plain_numbers(reverse: bool) -> None:
    logits, teacher, temperature = [0.3, -1.2, 2.0], [1.0, 0.5, -0.7], 1.7
    q, p = ([math.exp(x / temperature) for x in side] for side in (logits, teacher))
    q, p = ([x / math.fsum(side) for x in side] for side in (q, p))
    first, second = (q, p) if reverse else (p, q)
    needed = math.fsum(a * math.log(a / b) for a, b in zip(first, second, strict=True))
    one = [torch.tensor([side], dtype=torch.float64) for side in (logits, teacher)]
    assert float(ops.divergence(*one, 3, temperature, reverse, "")) == pytest.approx(needed, rel=1e-13)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rows", [4, 300])
def test_rows_are_worked_on_in_chunks(rows: int, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_module, "_CHUNK_ON_CPU", 100)
    logits, teacher = torch.randn(2, rows, 7, dtype=torch.float64)
    assert [len(range(300)[at]) for at in logits_module.row_chunks(torch.empty(300, 7))][:2] == [14, 14]
    assert_like_oracle(logits, teacher, 1.5, reverse)


NARROW = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("student", NARROW)
@pytest.mark.parametrize("teacher", NARROW)
@pytest.mark.parametrize("reverse", [False, True])
def test_dtypes(student: torch.dtype, teacher: torch.dtype, reverse: bool) -> None:
    logits, told = torch.randn(9, 101).mul(4).to(student), torch.randn(9, 101).mul(4).to(teacher)
    assert_like_oracle(logits, told, 1.0, reverse)
    assert_like_oracle(logits, told, 2.0, reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 1000.0])
def test_large_logits(temperature: float, reverse: bool) -> None:
    logits, teacher = torch.randn(6, 53) * 2, torch.randn(6, 53) * 2
    assert_like_oracle(logits * 5000, teacher * 5000, temperature, reverse)
    # What all words have in common costs no digits: 2^13 + x is exact for x in steps of 2^-10.
    near = [(side * 1024).round() / 1024 for side in (logits, teacher)]
    assert_like_oracle(near[0] + 8192, near[1] - 8192, temperature, reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_equal_logits_cost_nothing(reverse: bool) -> None:
    logits = torch.randn(5, 999).mul(8).requires_grad_()
    made = ops.divergence(logits, logits.detach() + 3, 999, 2.0, reverse, "")
    assert made.abs().max() <= 1e-5
    assert torch.autograd.grad(made.sum(), logits)[0].abs().max() <= 1e-6


def masked(logits: Tensor, *words: int) -> Tensor:
    return logits.index_fill(1, torch.tensor(words), -INF)


@pytest.mark.parametrize("reverse", [False, True])
def test_words_that_both_leave_out(reverse: bool) -> None:
    logits, teacher = torch.randn(2, 4, 6, dtype=torch.float64)
    leaf = masked(logits, 1, 5).requires_grad_()
    made, gradient = pulled(
        lambda z: ops.divergence(z, masked(teacher, 1, 5), 6, 1.0, reverse, ""), leaf, torch.ones(4).double()
    )
    kept = [0, 2, 3, 4]
    needed, slope = pulled(
        lambda z: oracle(z, teacher[:, kept], 1.0, reverse), logits[:, kept].requires_grad_(),
        torch.ones(4).double(),
    )  # fmt: skip
    assert error_of(made, needed) <= 1e-12
    assert error_of(gradient[:, kept], slope) <= 1e-12
    assert not gradient[:, [1, 5]].any()


def test_words_that_one_leaves_out() -> None:
    logits, teacher = torch.randn(2, 4, 6, dtype=torch.float64)
    some = masked(teacher, 2), masked(logits, 2)
    told = oracle(logits, some[0]), oracle(some[1], teacher, reverse=True)
    assert error_of(ops.divergence(logits, some[0], 6, 1.0, False, ""), told[0]) <= 1e-12
    assert error_of(ops.divergence(some[1], teacher, 6, 1.0, True, ""), told[1]) <= 1e-12
    assert ops.divergence(logits, some[0], 6, 1.0, True, "").isposinf().all()
    assert ops.divergence(some[1], teacher, 6, 1.0, False, "").isposinf().all()
    one = torch.cat([teacher[:1], torch.full((1, 6), -INF), teacher[2:]])
    assert ops.divergence(logits, one, 6, 1.0, False, "").isnan().tolist() == [False, True, False, False]
    # The rows beside such a row have their own gradient all the same.
    leaf = torch.cat([some[1][:1], logits[1:]]).requires_grad_()
    _, gradient = pulled(
        lambda z: ops.divergence(z, teacher, 6, 1.0, False, ""), leaf, torch.ones(4).double()
    )
    assert error_of(gradient[1:], (logits.softmax(1) - teacher.softmax(1))[1:]) <= 1e-12


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse: bool) -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: ops.divergence(z, teacher, 5, 1.3, reverse, ""), logits, atol=1e-9
    )


def dealt(teacher: Tensor, ranks: int, reverse: bool, temperature: float) -> Callable[[Tensor], Tensor]:
    """The operator as each rank calls it."""

    def local(leaf: Tensor) -> Tensor:
        told = part(teacher, axis_rank(TENSOR), ranks, 1).detach()
        return ops.divergence(leaf, told, teacher.shape[1], temperature, reverse, TENSOR)

    return local


@pytest.mark.parametrize(("words", "ranks"), [*SIZES, (1, 2), (1, 4), (13, 4)])
@pytest.mark.parametrize("reverse", [False, True])
def test_ranks(words: int, ranks: int, reverse: bool) -> None:
    logits, teacher = torch.randn(2, 5, words, dtype=torch.float64) * 4
    for temperature in (1.0, 7.0):
        assert_transposed(
            logits, 1, ranks, partial(oracle, teacher=teacher, temperature=temperature, reverse=reverse),
            dealt(teacher, ranks, reverse, temperature),
        )  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True])
def test_a_rank_whose_words_are_all_left_out(reverse: bool) -> None:
    logits, teacher = torch.randn(2, 3, 8, dtype=torch.float64)
    logits, teacher = masked(logits, 0, 1, 2, 3), masked(teacher, 0, 1, 2, 3)
    single = logits.clone().requires_grad_()
    grad = torch.tensor([1.0, 2.0, 3.0]).double()
    needed, slope = pulled(lambda z: ops.divergence(z, teacher, 8, 2.0, reverse, ""), single, 2 * grad)
    found = run_ranks(
        Mesh(tensor=2),
        lambda rank: pulled(dealt(teacher, 2, reverse, 2.0), part(logits, rank, 2, 1), grad),
    )
    for made, _ in found:
        assert error_of(made, needed) <= 1e-12
    assert error_of(torch.cat([gradient for _, gradient in found], 1), slope) <= 1e-12


@pytest.mark.parametrize("reverse", [False, True])
def test_ranks_meet_words_that_one_side_leaves_out(reverse: bool) -> None:
    logits, teacher = torch.randn(2, 3, 8, dtype=torch.float64)
    for student, told in ((masked(logits, 4, 5, 6, 7), teacher), (logits, masked(teacher, 4, 5, 6, 7))):
        needed = ops.divergence(student, told, 8, 1.0, reverse, "")

        def body(rank: int, student: Tensor = student, told: Tensor = told) -> Tensor:
            return dealt(told, 2, reverse, 1.0)(part(student, rank, 2, 1))

        for made in run_ranks(Mesh(tensor=2), body):
            assert error_of(made, needed) <= 1e-12


def test_ranks_send_vectors_and_never_logits() -> None:
    def body(rank: int) -> dict[str, int]:
        leaf = torch.randn(3, 100, requires_grad=True)
        with count_traffic() as traffic:
            ops.divergence(leaf, torch.randn(3, 100), 200, 1.0, False, TENSOR).sum().backward()
        return {f"{kind.direction} {kind.operator}": sent.bytes for kind, sent in traffic.sent.items()}

    # An all_reduce of n bytes on two ranks sends n.
    vector = 3 * 4
    needed = {"forward moec.divergence_totals": 5 * vector, "backward moec.divergence_back": vector}
    assert run_ranks(Mesh(tensor=2), body) == [needed, needed]


def test_no_rows() -> None:
    leaf = torch.zeros(0, 3, requires_grad=True)
    made, gradient = pulled(
        lambda z: ops.divergence(z, torch.zeros(0, 3), 3, 1.0, False, ""), leaf, torch.zeros(0)
    )
    assert (made.shape, gradient.shape) == ((0,), (0, 3))
    none, local = torch.zeros(0, 6), dealt(torch.zeros(0, 6), 2, True, 1.0)
    for made, gradient in run_ranks(
        Mesh(tensor=2), lambda rank: pulled(local, part(none, rank, 2, 1), torch.zeros(0))
    ):
        assert (made.shape, gradient.shape) == ((0,), (0, 3))


def test_messages() -> None:
    with pytest.raises(OperatorError, match=r"teacher \[2, 4\]"):
        ops.divergence(torch.ones(2, 3), torch.ones(2, 4), 3, 1.0, False, "")
    with pytest.raises(OperatorError, match="3 words of 4"):
        ops.divergence(torch.ones(2, 3), torch.ones(2, 3), 4, 1.0, False, "")
    with pytest.raises(OperatorError, match="temperature 0"):
        ops.divergence(torch.ones(2, 3), torch.ones(2, 3), 3, 0.0, False, "")


@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck(reverse: bool) -> None:
    logits, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5).bfloat16()
    how = (5, 1.5, reverse, "")
    opcheck(ops.divergence_totals.default, (logits, teacher, *how))
    rows, shares = ops.divergence_totals(logits.detach(), teacher, *how)
    opcheck(ops.divergence_back.default, (torch.randn(3), logits.detach(), teacher, rows, shares, *how))


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()

    def cost(logits: Tensor, teacher: Tensor) -> Tensor:
        return ops.divergence(logits * 2, teacher, 5, 1.5, False, "").mean()

    compiled = torch.compile(cost, fullgraph=True, backend="aot_eager")
    leaf, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    needed, found = (torch.autograd.grad(f(leaf, teacher), leaf)[0] for f in (cost, compiled))
    assert torch.equal(found, needed)
