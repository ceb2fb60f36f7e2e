"""A vocabulary dealt out to ranks is the whole one: values, gradients, and nothing as large is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import _register_process_group, _unregister_process_group
from torch.library import opcheck

from moec.errors import OperatorError
from moec.ir.mesh import TENSOR, Mesh
from moec.ir.placement import Split
from moec.runtime.ops import vocabulary
from moec.runtime.simulated import run_ranks
from moec.testing.tolerances import error_of
from tests.runtime.ranks import run_processes

ops = torch.ops.moec
# Even, uneven, a rank with a single word, ranks with no word at all.
SIZES = [(8, 2), (7, 2), (7, 3), (9, 4), (5, 4)]
IGNORED = -100


def part(whole: Tensor, rank: int, ranks: int, dim: int) -> Tensor:
    """The words of a rank: a leaf."""
    spans = Split(dim, TENSOR, ranks, (whole.shape[dim],)).spans(rank) or [(0, 0)]
    ((start, stop),) = spans
    return whole.narrow(dim, start, stop - start).clone().requires_grad_()


def pulled(function: Callable[[Tensor], Tensor], leaf: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """What the function gives, and the gradient of its leaf."""
    out = function(leaf)
    (gradient,) = torch.autograd.grad(out, leaf, cotangent)
    return out.detach(), gradient


def assert_transposed(
    whole: Tensor, dim: int, ranks: int, dense: Callable[[Tensor], Tensor], local: Callable[[Tensor], Tensor]
) -> None:
    """Every rank has the dense result, and the gradients of the parts make up that of the whole, where
    every rank has another cotangent."""
    shape = (ranks, *dense(whole).shape)
    cotangents = torch.randn(shape, dtype=torch.float64)
    needed, gradient = pulled(dense, whole.clone().requires_grad_(), cotangents.sum(0))

    def body(rank: int) -> tuple[Tensor, Tensor]:
        return pulled(local, part(whole, rank, ranks, dim), cotangents[rank])

    found = run_ranks(Mesh(tensor=ranks), body)
    for out, _ in found:
        assert error_of(out, needed) <= 1e-12
    assert error_of(torch.cat([grad for _, grad in found], dim), gradient) <= 1e-12


@pytest.mark.parametrize(("words", "ranks"), SIZES)
@pytest.mark.parametrize("padding", [-1, 2])
def test_embedding(words: int, ranks: int, padding: int) -> None:
    tokens = torch.tensor([[0, words - 1, 2], [2, 3, 0]])

    def local(weight: Tensor) -> Tensor:
        rows = ops.embedding_part(tokens, weight, words, TENSOR, padding)
        reduced = torch.ops._c10d_functional.all_reduce(rows, "sum", TENSOR)
        return torch.ops._c10d_functional.wait_tensor(reduced)

    def dense(weight: Tensor) -> Tensor:
        return torch.ops.aten.embedding(weight, tokens, padding)

    assert_transposed(torch.randn(words, 4, dtype=torch.float64), 0, ranks, dense, local)


@pytest.mark.parametrize(("words", "ranks"), SIZES)
def test_loss(words: int, ranks: int) -> None:
    targets = torch.tensor([0, words - 1, IGNORED, 2, words // 2])
    assert_transposed(
        torch.randn(5, words, dtype=torch.float64) * 30, 1, ranks,
        lambda logits: F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none"),
        lambda logits: ops.cross_entropy_part(logits, targets, words, IGNORED, TENSOR),
    )  # fmt: skip


@pytest.mark.parametrize(("words", "ranks"), SIZES)
def test_logits(words: int, ranks: int) -> None:
    assert_transposed(
        torch.randn(2, 3, words, dtype=torch.float64), 2, ranks, torch.clone,
        lambda logits: ops.gather_vocabulary(logits, words, TENSOR),
    )  # fmt: skip


@pytest.mark.parametrize(("blocks", "ranks"), [((6,), 2), ((4, 8), 4), ((3, 3, 6), 3)])
@pytest.mark.parametrize("dim", [0, 1])
def test_part(blocks: tuple[int, ...], ranks: int, dim: int) -> None:
    whole = torch.randn(*((sum(blocks), 2) if dim == 0 else (2, sum(blocks))), dtype=torch.float64)
    split = Split(dim, TENSOR, ranks, blocks)

    def body(rank: int) -> tuple[Tensor, Tensor]:
        leaf = whole.clone().requires_grad_()
        size = split.size(rank)
        cotangent = torch.ones(size, 2) if dim == 0 else torch.ones(2, size)
        return pulled(lambda x: ops.part(x, dim, blocks, ranks, TENSOR), leaf, cotangent.double())

    found = run_ranks(Mesh(tensor=ranks), body)
    for rank, (out, _) in enumerate(found):
        taken = torch.cat([torch.arange(*span) for span in split.spans(rank)])
        assert torch.equal(out, whole.index_select(dim, taken))
    assert torch.equal(sum(grad for _, grad in found), torch.ones_like(whole))


def _over_gloo(rank: int) -> list[Tensor]:
    whole, targets = torch.arange(21, dtype=torch.float64).view(3, 7).cos(), torch.tensor([6, 0, 4])
    losses, gradient = pulled(
        lambda logits: ops.cross_entropy_part(logits, targets, 7, IGNORED, TENSOR),
        part(whole, rank, 2, 1),
        torch.full((3,), rank + 1.0, dtype=torch.float64),
    )
    gathered, summed = pulled(
        lambda logits: ops.gather_vocabulary(logits, 7, TENSOR), part(whole, rank, 2, 1), whole * (rank + 1)
    )
    return [losses, gradient, gathered, summed]


def test_processes_do_what_threads_do() -> None:
    mesh = Mesh(tensor=2)
    pairs = zip(run_processes(mesh, _over_gloo), run_ranks(mesh, _over_gloo), strict=True)
    for found, needed in pairs:
        assert all(map(torch.equal, found, needed))


def test_no_tokens() -> None:
    def body(rank: int) -> tuple[Tensor, Tensor]:
        logits = torch.zeros(0, 3, requires_grad=True)
        targets = torch.zeros(0, dtype=torch.long)
        rows = ops.embedding_part(targets.view(0, 4), torch.ones(3, 2), 6, TENSOR)
        return rows, pulled(
            lambda x: ops.cross_entropy_part(x, targets, 6, IGNORED, TENSOR), logits, torch.zeros(0)
        )[1]

    for rows, gradient in run_ranks(Mesh(tensor=2), body):
        assert rows.shape == (0, 4, 2)
        assert gradient.shape == (0, 3)


def test_losses_are_summed_in_float32() -> None:
    logits = torch.randn(4, 6, dtype=torch.bfloat16)
    targets = torch.tensor([0, 5, 3, 1])
    needed = F.cross_entropy(logits.float(), targets, reduction="none")

    def body(rank: int) -> tuple[Tensor, Tensor]:
        leaf = part(logits, rank, 2, 1)
        return pulled(lambda x: ops.cross_entropy_part(x, targets, 6, IGNORED, TENSOR), leaf, torch.ones(4))

    for losses, gradient in run_ranks(Mesh(tensor=2), body):
        assert losses.dtype == torch.float32
        assert gradient.dtype == torch.bfloat16
        assert error_of(losses, needed) <= 1e-6


def test_the_loss_sends_three_numbers_a_position_and_one_back(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, sent = torch.tensor([1, 5, 3]), []
    reduced = vocabulary.all_reduced

    def counted(x: Tensor, axis: str, how: str = "sum") -> Tensor:
        sent.append(x.numel())
        return reduced(x, axis, how)

    def body(rank: int) -> None:
        leaf = torch.randn(3, 100, requires_grad=True)
        ops.cross_entropy_part(leaf, targets, 200, IGNORED, TENSOR).sum().backward()

    monkeypatch.setattr(vocabulary, "all_reduced", counted)
    run_ranks(Mesh(tensor=2), body)
    assert sent == [3, 3, 3, 3] * 2


def raised(function: Callable[[], object]) -> str:
    """The message of the error that both ranks get."""
    with pytest.raises(OperatorError) as caught:
        run_ranks(Mesh(tensor=2), lambda rank: function())
    return str(caught.value)


def test_messages() -> None:
    weight, none = torch.ones(3, 2), torch.zeros(2, 3)
    said = raised(lambda: ops.embedding_part(torch.tensor([6]), weight, 6, TENSOR))
    assert "embedding_part" in said
    assert "0 up to 5" in said
    said = raised(lambda: ops.cross_entropy_part(none, torch.tensor([0, 9]), 6, IGNORED, TENSOR))
    assert "cross_entropy_part" in said
    assert "0 up to 5" in said
    said = raised(lambda: ops.gather_vocabulary(none, 9, TENSOR))
    assert "3 words of 9" in said
    assert "multiples of 2" in raised(lambda: ops.part(torch.ones(3), 0, [3], 2, TENSOR))
    with pytest.raises(OperatorError, match="no process group"):
        ops.gather_vocabulary(none, 3, TENSOR)


@pytest.fixture
def alone() -> Iterator[None]:
    """A tensor axis of one rank, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    _register_process_group(TENSOR, group)
    yield
    _unregister_process_group(TENSOR)
    dist.destroy_process_group()


def test_opcheck(alone: None) -> None:
    tokens, logits = torch.tensor([[0, 4, 2]]), torch.randn(2, 5, requires_grad=True)
    targets, grad = torch.tensor([0, 4]), torch.randn(2)
    total = logits.detach().logsumexp(1)
    opcheck(ops.embedding_part.default, (tokens, torch.randn(5, 3, requires_grad=True), 5, TENSOR, 2))
    opcheck(ops.embedding_part_back.default, (torch.randn(1, 3, 3), tokens, 5, 5, TENSOR, -1))
    opcheck(ops.cross_entropy_part_totals.default, (logits, targets, 5, IGNORED, TENSOR))
    opcheck(ops.cross_entropy_part_back.default, (grad, logits.detach(), targets, total, 5, IGNORED, TENSOR))
    opcheck(ops.gather_vocabulary.default, (logits, 5, TENSOR))
    opcheck(ops.sum_vocabulary.default, (logits.detach(), 5, TENSOR))
    opcheck(ops.part.default, (logits, 1, [2, 3], 1, TENSOR))
    opcheck(ops.part_back.default, (logits.detach(), 1, [2, 3], 1, TENSOR))
