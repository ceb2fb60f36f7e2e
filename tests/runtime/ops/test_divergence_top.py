"""The divergence from a teacher's likeliest words and all others together: what a plain loop in fp64 says."""

from __future__ import annotations

import itertools
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
from moec.runtime.distillation.losses import Words
from moec.runtime.distillation.top_words import top_words
from moec.runtime.ops import logits as logits_module
from moec.runtime.simulated import run_ranks
from moec.runtime.traffic import count_traffic
from moec.testing.tolerances import error_of, tolerance_of
from tests.runtime.ops.test_divergence import masked
from tests.runtime.ops.test_vocabulary import SIZES, assert_transposed, part, pulled
from tests.runtime.ranks import run_processes

ops = torch.ops.moec
INF = torch.inf
F64 = torch.float64


def told_of(teacher: Tensor, words: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The likeliest words and their log shares."""
    log_shares, chosen = (teacher / temperature).log_softmax(1).topk(words)
    return chosen, log_shares


def oracle(
    logits: Tensor, words: Tensor, log_shares: Tensor, temperature: float = 1.0, reverse: bool = False
) -> Tensor:
    """The definition, a position and a word at a time; differentiable in the logits."""
    made = []
    for z, chosen, told in zip(logits.double(), words.tolist(), log_shares.double(), strict=True):
        shares = (z / temperature).softmax(0)
        others = [word for word in range(len(z)) if word not in chosen]
        q = [shares[word] for word in chosen] + ([shares[others].sum()] if others else [])
        p = [*told.exp()] + ([1.0 - told.exp().sum()] if others else [])
        pairs = zip(q, p, strict=True) if reverse else zip(p, q, strict=True)
        made.append(sum((a * (a.log() - b.log()) for a, b in pairs if a > 0), z.new_zeros(())))
    return torch.stack(made) if made else logits.double().sum(1)


@given(
    st.sampled_from((0, 1, 2, 5)), st.sampled_from((1, 2, 5, 13, 31)), st.integers(1, 31),
    st.sampled_from((0.5, 1.0, 2.5, 40.0)), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_like_the_oracle(
    rows: int, num_words: int, words: int, temperature: float, reverse: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits, teacher = torch.randn(2, rows, num_words, generator=draw, dtype=F64)
    told = told_of(teacher, min(words, num_words), temperature)
    cotangent = torch.linspace(-1.0, 2.0, rows, dtype=F64)
    found, needed = (
        pulled(function, logits.clone().requires_grad_(), cotangent)
        for function in (
            lambda z: ops.divergence_top(z, *told, num_words, temperature, reverse, ""),
            lambda z: oracle(z, *told, temperature, reverse),
        )
    )
    for one, other in zip(found, needed, strict=True):
        assert error_of(one, other, floor=1.0 / temperature) <= 1e-11


@pytest.mark.parametrize("reverse", [False, True])
def test_with_all_words_it_is_the_divergence(reverse: bool) -> None:
    logits, teacher = torch.randn(2, 6, 11, dtype=F64)
    whole, top = (
        pulled(function, logits.clone().requires_grad_(), torch.ones(6, dtype=F64))
        for function in (
            lambda z: ops.divergence(z, teacher, 11, 1.5, reverse, ""),
            lambda z: ops.divergence_top(z, *told_of(teacher, 11, 1.5), 11, 1.5, reverse, ""),
        )
    )
    assert error_of(top[0], whole[0]) <= 1e-12
    assert error_of(top[1], whole[1]) <= 1e-12


def test_more_words_tell_more_and_never_more_than_all() -> None:
    logits, teacher = torch.randn(2, 6, 11, dtype=F64)
    costs = [ops.divergence_top(logits, *told_of(teacher, k), 11, 1.0, False, "") for k in range(1, 12)]
    for fewer, more in itertools.pairwise(costs):  # the log sum inequality
        assert (fewer <= more + 1e-12).all()


@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
def test_dtypes(student: torch.dtype, reverse: bool) -> None:
    logits, teacher = torch.randn(9, 101).mul(4).to(student), torch.randn(9, 101).mul(4)
    words, log_shares = told_of(teacher, 5, 2.0)
    leaf, ones = logits.clone().requires_grad_(), torch.ones(9)
    made, gradient = pulled(
        lambda z: ops.divergence_top(z, words, log_shares, 101, 2.0, reverse, ""), leaf, ones
    )
    needed, slope = pulled(
        lambda z: oracle(z, words, log_shares, 2.0, reverse), logits.double().requires_grad_(), ones.double()
    )
    assert (made.dtype, gradient.dtype) == (torch.float32, student)
    assert error_of(made, needed) <= tolerance_of(torch.float32)
    assert error_of(gradient, slope) <= tolerance_of(student)


def test_the_rest_of_a_student_may_be_as_small_as_it_likes() -> None:
    # Two hundred between the words that are told and the others: exp(-200) is no float32.
    logits = torch.tensor([[300.0, 299.0, 100.0, 99.0]], requires_grad=True)
    shares = torch.tensor([[0.6, 0.3]])
    words = torch.tensor([[0, 1]])
    made, gradient = pulled(
        lambda z: ops.divergence_top(z, words, shares.log(), 4, 1.0, False, ""), logits, torch.ones(1)
    )
    needed, slope = pulled(
        lambda z: oracle(z, words, shares.log()), logits.detach().double().requires_grad_(),
        torch.ones(1, dtype=F64),
    )  # fmt: skip
    assert float(made) > 15
    assert error_of(made, needed) <= 1e-6
    assert error_of(gradient, slope) <= 1e-6


@pytest.mark.parametrize("reverse", [False, True])
def test_a_rest_that_was_lost_in_rounding_is_not_infinitely_far(reverse: bool) -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    log_shares = torch.tensor([[0.7, 0.3]]).expand(3, 2).log() + 1e-7  # more than one together
    made, gradient = pulled(
        lambda z: ops.divergence_top(z, torch.tensor([[0, 1]] * 3), log_shares, 5, 1.0, reverse, ""),
        logits, torch.ones(3),
    )  # fmt: skip
    assert made.isfinite().all()
    assert made.max() < 20
    assert gradient.isfinite().all()


@pytest.mark.parametrize("reverse", [False, True])
def test_words_that_both_leave_out(reverse: bool) -> None:
    logits, teacher = torch.randn(2, 4, 6, dtype=F64)
    both = masked(logits, 1, 5), masked(teacher, 1, 5)
    kept = [0, 2, 3, 4]
    ones = torch.ones(4, dtype=F64)
    for words in (2, 4, 5):  # fewer than are left, all that are left, some that are not
        some, few = (
            dealt(told_of(both[1], words), 6, reverse, 1.0, ""),
            told_of(teacher[:, kept], min(words, 4)),
        )
        made, gradient = pulled(some, both[0].clone().requires_grad_(), ones)
        needed, slope = pulled(dealt(few, 4, reverse, 1.0, ""), logits[:, kept].requires_grad_(), ones)
        assert error_of(made, needed) <= 1e-12
        assert error_of(gradient[:, kept], slope) <= 1e-12
        assert not gradient[:, [1, 5]].any()


def test_words_that_the_student_leaves_out() -> None:
    logits, teacher = torch.randn(2, 4, 6, dtype=F64)
    words, log_shares = told_of(teacher, 2)
    none = logits.scatter(1, words[:, :1], -INF)
    assert ops.divergence_top(none, words, log_shares, 6, 1.0, False, "").isposinf().all()
    found = ops.divergence_top(none, words, log_shares, 6, 1.0, True, "")
    assert error_of(found, oracle(none, words, log_shares, reverse=True)) <= 1e-12
    neither = logits.scatter(1, words, -INF)
    found = ops.divergence_top(neither, words, log_shares, 6, 1.0, True, "")
    assert error_of(found, -(1 - log_shares.exp().sum(1)).log()) <= 1e-12


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse: bool) -> None:
    logits = torch.randn(3, 5, dtype=F64, requires_grad=True)
    told = told_of(torch.randn(3, 5, dtype=F64), 2, 1.3)
    assert torch.autograd.gradcheck(
        lambda z: ops.divergence_top(z, *told, 5, 1.3, reverse, ""), logits, atol=1e-9
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_are_worked_on_in_chunks(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, teacher = torch.randn(2, 40, 7, dtype=F64)
    told, ones = told_of(teacher, 3), torch.ones(40, dtype=F64)

    def cost(z: Tensor) -> Tensor:
        return ops.divergence_top(z, *told, 7, 1.0, reverse, "")

    whole = pulled(cost, logits.clone().requires_grad_(), ones)
    monkeypatch.setattr(logits_module, "_CHUNK_ON_CPU", 50)
    for one, other in zip(pulled(cost, logits.clone().requires_grad_(), ones), whole, strict=True):
        assert error_of(one, other) <= 1e-14


def dealt(
    told: tuple[Tensor, Tensor], num_words: int, reverse: bool, temperature: float, axis: str = TENSOR
) -> Callable[[Tensor], Tensor]:
    """The operator as each rank calls it: all words, its own logits."""
    return lambda leaf: ops.divergence_top(leaf, *told, num_words, temperature, reverse, axis)


@pytest.mark.parametrize(("num_words", "ranks"), [*SIZES, (1, 2), (1, 4), (13, 4)])
@pytest.mark.parametrize("reverse", [False, True])
def test_ranks(num_words: int, ranks: int, reverse: bool) -> None:
    logits, teacher = torch.randn(2, 5, num_words, dtype=F64) * 2
    for words, temperature in ((1, 1.0), (min(3, num_words), 7.0), (num_words, 2.0)):
        told = told_of(teacher, words, temperature)
        assert_transposed(
            logits, 1, ranks,
            partial(oracle, words=told[0], log_shares=told[1], temperature=temperature, reverse=reverse),
            dealt(told, num_words, reverse, temperature),
        )  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True])
def test_a_rank_whose_words_are_all_left_out(reverse: bool) -> None:
    logits, teacher = torch.randn(2, 3, 8, dtype=F64)
    logits, teacher = masked(logits, 0, 1, 2, 3), masked(teacher, 0, 1, 2, 3)
    told, grad = told_of(teacher, 3, 2.0), torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    needed, slope = pulled(
        lambda z: ops.divergence_top(z, *told, 8, 2.0, reverse, ""), logits.clone().requires_grad_(), 2 * grad
    )
    found = run_ranks(
        Mesh(tensor=2), lambda rank: pulled(dealt(told, 8, reverse, 2.0), part(logits, rank, 2, 1), grad)
    )
    for made, _ in found:
        assert error_of(made, needed) <= 1e-12
    assert error_of(torch.cat([gradient for _, gradient in found], 1), slope) <= 1e-12


def test_ranks_send_vectors_and_never_logits() -> None:
    told = told_of(torch.randn(3, 200), 8)

    def body(rank: int) -> dict[str, int]:
        leaf = torch.randn(3, 100, requires_grad=True)
        with count_traffic() as traffic:
            ops.divergence_top(leaf, *told, 200, 1.0, False, TENSOR).sum().backward()
        return {f"{kind.direction} {kind.operator}": sent.bytes for kind, sent in traffic.sent.items()}

    # An all_reduce of n bytes on two ranks sends n.
    vector = 3 * 4
    needed = {"forward moec.divergence_top_totals": 5 * vector, "backward moec.divergence_top_back": vector}
    assert run_ranks(Mesh(tensor=2), body) == [needed, needed]


def test_messages() -> None:
    logits, words, shares = torch.ones(2, 3), torch.tensor([[0], [2]]), torch.zeros(2, 1)

    def said(*changed: object) -> str:
        with pytest.raises(OperatorError) as caught:
            ops.divergence_top(*changed)
        return str(caught.value)

    assert "log_shares [2, 2]" in said(logits, words, torch.zeros(2, 2), 3, 1.0, False, "")
    assert "3 words of 4" in said(logits, words, shares, 4, 1.0, False, "")
    assert "0 up to 2" in said(logits, words + 1, shares, 3, 1.0, False, "")
    assert "1 to 3" in said(logits, words.expand(2, 4), shares.expand(2, 4), 3, 1.0, False, "")
    assert "temperature -1" in said(logits, words, shares, 3, -1.0, False, "")


@pytest.mark.parametrize("reverse", [False, True])
def test_opcheck(reverse: bool) -> None:
    logits, told = torch.randn(3, 5, requires_grad=True), told_of(torch.randn(3, 5), 2, 1.5)
    how = (5, 1.5, reverse, "")
    opcheck(ops.divergence_top_totals.default, (logits, *told, *how))
    rest = ops.divergence_top_totals(logits.detach(), *told, *how)
    opcheck(ops.divergence_top_back.default, (torch.randn(3), logits.detach(), *told, *rest, *how))


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    told = told_of(torch.randn(3, 5), 2)

    def cost(logits: Tensor) -> Tensor:
        return ops.divergence_top(logits * 2, *told, 5, 1.0, False, "").mean()

    compiled = torch.compile(cost, fullgraph=True, backend="aot_eager")
    leaf = torch.randn(3, 5, requires_grad=True)
    needed, found = (torch.autograd.grad(f(leaf), leaf)[0] for f in (cost, compiled))
    assert torch.equal(found, needed)


def _over_gloo(rank: int) -> list[Tensor]:
    """Both divergences and the words they go by, of a vocabulary of seven, four on the first rank."""
    logits, teacher = torch.arange(42, dtype=F64).view(2, 3, 7).cos()
    own = part(teacher, rank, 2, 1).detach()
    told = top_words(own, 3, 1.5, Words(7, TENSOR))
    grad = torch.full((3,), rank + 1.0, dtype=F64)
    whole = pulled(lambda z: ops.divergence(z, own, 7, 1.5, False, TENSOR), part(logits, rank, 2, 1), grad)
    top = pulled(dealt((told.words, told.log_shares), 7, True, 1.5), part(logits, rank, 2, 1), grad)
    return [*whole, *top, told.words, told.log_shares]


def test_processes_do_what_threads_do() -> None:
    mesh = Mesh(tensor=2)
    pairs = zip(run_processes(mesh, _over_gloo), run_ranks(mesh, _over_gloo), strict=True)
    for found, needed in pairs:
        assert all(map(torch.equal, found, needed))
