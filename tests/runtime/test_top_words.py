"""The likeliest words of a teacher: those of a plain sort, wherever the vocabulary lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moec.errors import OperatorError
from moec.ir.mesh import TENSOR, Mesh
from moec.runtime.distillation.lesson import TopWords
from moec.runtime.distillation.losses import Words
from moec.runtime.distillation.top_words import top_words
from moec.runtime.ops import logits as logits_module
from moec.runtime.simulated import run_ranks
from moec.testing.tolerances import error_of
from tests.runtime.ops.test_vocabulary import SIZES, part

INF = torch.inf
FLOAT = 1e-6  # shares are told in float32


def oracle(logits_NV: Tensor, k: int, temperature: float) -> tuple[list[list[int]], Tensor]:
    """Words sorted by share, then by number, and the logarithms of their shares."""
    log_shares = (logits_NV.double() / temperature).log_softmax(1)
    words = []
    for row in logits_NV.tolist():
        words.append(
            sorted(range(len(row)), key=[(-share, word) for word, share in enumerate(row)].__getitem__)[:k]
        )
    return words, log_shares.gather(1, torch.tensor(words).view(len(words), k))


@given(
    st.integers(0, 5), st.integers(1, 23), st.integers(1, 23), st.sampled_from((0.5, 1.0, 9.0)),
    st.sampled_from((0.3, 1.0, 1000.0)), st.integers(0, 99),
)  # fmt: skip
def test_like_a_sort(rows: int, number: int, k: int, temperature: float, coarse: float, seed: int) -> None:
    k = min(k, number)
    draw = torch.Generator().manual_seed(seed)
    # Coarse steps: many words are equally likely.
    logits = (torch.randn(rows, number, generator=draw, dtype=torch.float64) * coarse).round() / coarse
    told = top_words(logits, k, temperature, Words(number))
    words, log_shares = oracle(logits, k, temperature)
    assert told.words.tolist() == words
    assert error_of(told.log_shares, log_shares, floor=1.0) <= FLOAT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_shapes(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 1001).mul(3).to(dtype)  # of so many narrow numbers some are equal
    told = top_words(logits, 37, 2.0, Words(1001))
    words, log_shares = oracle(logits.flatten(0, 1), 37, 2.0)
    assert (told.words.shape, told.log_shares.dtype) == ((2, 3, 37), torch.float32)
    assert told.words.flatten(0, 1).tolist() == words
    assert error_of(told.log_shares.flatten(0, 1), log_shares) <= FLOAT


def test_rows_are_worked_on_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(30, 7)
    whole = top_words(logits, 3, 1.0, Words(7))
    monkeypatch.setattr(logits_module, "_CHUNK_ON_CPU", 50)
    parts = top_words(logits, 3, 1.0, Words(7))
    assert torch.equal(parts.words, whole.words)
    assert torch.equal(parts.log_shares, whole.log_shares)


def test_words_that_are_left_out() -> None:
    told = top_words(torch.tensor([[0.0, -INF, 2.0, -INF]]), 3, 1.0, Words(4))
    assert told.words.tolist() == [[2, 0, 1]]
    assert told.log_shares[0, 2] == -INF
    assert float(told.log_shares[0, :2].exp().sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(("number", "ranks"), [*SIZES, (1, 2), (13, 4)])
@pytest.mark.parametrize("coarse", [1.0, 1000.0])
def test_ranks(number: int, ranks: int, coarse: float) -> None:
    logits = (torch.randn(5, number, dtype=torch.float64) * coarse).round() / coarse
    if number > 1:
        logits[0, : -(-number // ranks)] = -INF  # nothing on the first rank
    for k in {1, min(3, number), number}:
        whole = top_words(logits, k, 1.5, Words(number))

        def body(rank: int, k: int = k) -> TopWords:
            own = part(logits, rank, ranks, 1).detach()
            return top_words(own, k, 1.5, Words(number, TENSOR))

        for told in run_ranks(Mesh(tensor=ranks), body):
            likely = whole.log_shares > -INF  # which of the words without a share are named does not matter
            assert torch.equal(told.words[likely], whole.words[likely])
            assert error_of(told.log_shares, whole.log_shares) <= FLOAT


def test_messages() -> None:
    with pytest.raises(OperatorError, match="1 to 3, the words there are"):
        top_words(torch.ones(2, 3), 4, 1.0, Words(3))
    with pytest.raises(OperatorError, match="3 words of 4"):
        top_words(torch.ones(2, 3), 1, 1.0, Words(4))
