"""Writing into a cache, against loops over rows and positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moec.runtime.ops  # noqa: F401
from moec.errors import OperatorError


def _by_loops(cache: Tensor, new: Tensor, at: Tensor, dim: int) -> Tensor:
    written, each = cache.clone(), cache.shape[0] // at.shape[0]
    for row in range(cache.shape[0]):
        for number, position in enumerate(at[row // each].tolist()):
            written[row].select(dim - 1, position).copy_(new[row].select(dim - 1, number))
    return written


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("new", [1, 5])
def test_each_row_is_written_at_its_own_positions(rows: int, each: int, dim: int, new: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = [rows * each, 7, 7, 4]
    cache = torch.randn(shape, generator=generator)
    shape[dim] = new
    values = torch.randn(shape, generator=generator)
    at = torch.arange(new) + torch.tensor([[2], [0], [1]])[:rows]
    expected = _by_loops(cache, values, at, dim)
    torch.ops.moec.remember(cache, values, at, dim)
    assert torch.equal(cache, expected)


def test_a_view_of_a_larger_cache_is_written_in_place() -> None:
    whole = torch.zeros(4, 2, 9, 3)
    part = whole.narrow(0, 1, 1).narrow(2, 0, 6)
    torch.ops.moec.remember(part, torch.ones(1, 2, 2, 3), torch.tensor([[3, 4]]), 2)
    assert whole.sum() == 12
    assert whole[1, :, 3:5].eq(1).all()


def test_values_of_another_dtype_are_refused() -> None:
    with pytest.raises(OperatorError, match=r"values of torch\.float64"):
        torch.ops.moec.remember(torch.zeros(1, 4, 2), torch.zeros(1, 1, 2).double(), torch.tensor([[0]]), 1)
