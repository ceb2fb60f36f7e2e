"""What the ranks of a job tell one another: sums, verdicts, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import ArtifactError, MoecError, TrainError
from moec.ir.mesh import Mesh
from moec.runtime.ranks import ALONE, Ranks, ranks_of
from moec.runtime.simulated import run_ranks
from tests.runtime.tiny import TinyProgram

T = TypeVar("T")
MESH = Mesh(data=3)


def on_ranks(function: Callable[[Ranks], T], mesh: Mesh = MESH) -> list[T]:
    return run_ranks(mesh, lambda rank: function(Ranks(mesh, rank)))


def test_records_come_in_the_order_of_ranks() -> None:
    def told(ranks: Ranks) -> list[object]:
        return ranks.gather({"rank": ranks.rank, "text": "é" * ranks.rank, "none": None})

    expected = [{"rank": rank, "text": "é" * rank, "none": None} for rank in range(3)]
    assert on_ranks(told) == [expected] * 3
    assert ALONE.gather([1, "a"]) == [[1, "a"]]


def test_sums_are_exact_and_verdicts_are_shared() -> None:
    def told(ranks: Ranks) -> tuple[float, float, bool, bool]:
        term = torch.tensor(2.0**-40 if ranks.rank else 1.0)
        sums = ranks.sums({"a": term, "b": torch.tensor(1.0)})
        return float(sums["a"]), float(sums["b"]), ranks.any(ranks.rank == 2), ranks.any(False)

    assert on_ranks(told) == [(1.0 + 2.0**-39, 3.0, True, False)] * 3


@given(st.integers(0, 11), st.integers(1, 4), st.integers(1, 3))
def test_the_stretches_are_the_batch(size: int, data: int, tensor: int) -> None:
    mesh = Mesh(data, tensor)
    tokens = torch.arange(size * 2).view(size, 2)
    seen = [Ranks(mesh, rank).stretch((tokens, -tokens)) for rank in range(mesh.world)]
    assert torch.equal(torch.cat([seen[rank][0] for rank in range(0, mesh.world, tensor)]), tokens)
    for rank, (mine, targets) in enumerate(seen):
        assert torch.equal(targets, -mine)
        assert torch.equal(mine, seen[rank - rank % tensor][0])


def failing(ranks: Ranks, at: int, error: Exception) -> Exception:
    """What rank `ranks` gets when rank `at` fails with `error`."""

    def fail_together() -> None:
        with ranks.together():
            if ranks.rank == at:
                raise error

    with pytest.raises((MoecError, OSError)) as caught:
        fail_together()
    return caught.value


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    error = ArtifactError("a file", "nothing", "something", "elsewhere")
    told = on_ranks(lambda ranks: failing(ranks, 1, error))
    assert [(type(other), str(other)) for other in told] == [(ArtifactError, str(error))] * 3


def test_a_foreign_error_names_the_rank() -> None:
    error = OSError("disk full")
    first, second, own = on_ranks(lambda ranks: failing(ranks, 2, error))
    assert own is error
    for other in (first, second):
        assert isinstance(other, TrainError)
        assert (other.where, other.found) == ("rank 2", "OSError: disk full")


def test_ranks_that_differ_are_named() -> None:
    def differing(ranks: Ranks) -> str:
        ranks.require_alike({"plan": "same", "data": "same"})
        with pytest.raises(TrainError) as caught:
            ranks.require_alike({"plan": "same", "data": "other" if ranks.rank == 2 else "same"})
        return caught.value.found

    assert on_ranks(differing) == ["another data on rank 2: other"] * 3


def test_a_whole_program_is_alone() -> None:
    ranks = ranks_of(TinyProgram())
    assert (ranks.world, ranks.rank, ranks.is_first) == (1, 0, True)
    with pytest.raises(OSError, match="own"), ranks.together():
        raise OSError("own")
