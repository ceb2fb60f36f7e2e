"""Ranks that are threads: results, turns, random numbers, and every way of not doing the same thing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.errors import MeshError, OperatorError
from moec.ir.mesh import ExpertAxes, Mesh
from moec.runtime.ops.groups import axis_rank, axis_size, group_of
from moec.runtime.simulated import run_ranks
from tests.runtime.collectives import C10D, every_collective, wait


@given(data=st.integers(1, 4), tensor=st.integers(1, 3), expert=st.integers(1, 12))
@settings(max_examples=15)
def test_groups_are_those_of_the_mesh(data: int, tensor: int, expert: int) -> None:
    world = data * tensor
    expert = expert if world % expert == 0 else 1
    mesh = Mesh(data, tensor, node=4, layers=(("moe_1", ExpertAxes(world // expert, expert)),))

    def places(rank: int) -> None:
        for axis, size in mesh.axes().items():
            if size > 1:
                assert axis_size(axis) == size
                assert axis_rank(axis) == mesh.coordinate(axis, rank)
                ranks = wait(C10D.all_gather_into_tensor(torch.tensor([rank]), size, axis))
                assert tuple(ranks.tolist()) == mesh.group(axis, rank)
            else:
                with pytest.raises(OperatorError):
                    group_of(axis)

    run_ranks(mesh, places)


def test_collectives_and_gradients_are_what_they_should_be() -> None:
    """Against the same sums written down for all ranks at once, with autograd through plain torch."""
    x_R43 = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    found = run_ranks(Mesh(data=3), lambda rank: every_collective("data", rank, x_R43[rank].detach()))
    total = (x_R43 * 2).sum(0)
    everyone = (total * x_R43).flatten(0, 1)
    scattered = (3 * everyone * everyone).unflatten(0, (3, 4))
    rows = [(x[:1] * x).sum(0) for x in x_R43]
    moved = [torch.stack([rows[j] for j in range(3) for _ in range((i + j) % 3)]) for i in range(3)]
    (scattered.sum() + sum((rows * rows).sum() for rows in moved)).backward()
    assert x_R43.grad is not None
    for rank, made in enumerate(found):
        expected = {
            "total": total, "everyone": everyone, "scattered": scattered[rank], "moved": moved[rank],
            "grad": x_R43.grad[rank], "first": x_R43[0], "largest": x_R43.amax(0),
        }  # fmt: skip
        for name, value in expected.items():
            torch.testing.assert_close(made[name], value.detach(), rtol=1e-12, atol=1e-12, msg=name)


def test_sixty_four_ranks() -> None:
    mesh = Mesh(data=16, tensor=4, node=8, layers=(("moe_1", ExpertAxes(2, 32)),))

    def several(rank: int) -> Tensor:
        x = torch.full((3,), float(rank), requires_grad=True)
        for axis in ("data", "tensor", "expert_32", "expert_data_32", "world"):
            wait(C10D.all_reduce(x, "sum", axis)).sum().backward()
        assert x.grad is not None
        return x.grad

    grads = run_ranks(mesh, several)
    assert all(torch.equal(grad, torch.full((3,), 16.0 + 4 + 32 + 2 + 64)) for grad in grads)


def test_calls_of_torch_distributed_with_a_group() -> None:
    def calls(rank: int) -> list[Any]:
        group = group_of("world")
        x = torch.full((2,), float(rank + 1))
        work = dist.all_reduce(x, group=group, async_op=True)
        work.wait()
        parts = [torch.empty(1) for _ in range(3)]
        dist.all_gather(parts, torch.tensor([float(rank)]), group=group)
        box = torch.empty(6)
        dist.all_to_all_single(box, torch.arange(6.0) + 10 * rank, group=group)
        root = torch.tensor([rank])
        dist.broadcast(root, group=group, group_src=2)
        dist.barrier(group=group)
        average = torch.tensor([float(rank)])
        dist.all_reduce(average, dist.ReduceOp.AVG, group=group)
        return [x.tolist(), [part.item() for part in parts], box.tolist(), root.item(), average.item()]

    found = run_ranks(Mesh(data=3), calls)
    assert found[1] == [[6.0, 6.0], [0.0, 1.0, 2.0], [2.0, 3.0, 12.0, 13.0, 22.0, 23.0], 2, 1.0]


def test_the_thread_has_the_callers_modes() -> None:
    def modes(rank: int) -> tuple[bool, bool, bool]:
        wait(C10D.all_reduce(torch.ones(2), "sum", "data"))
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    mesh = Mesh(data=2)
    assert run_ranks(mesh, modes) == [(True, False, False)] * 2
    with torch.no_grad():
        assert run_ranks(mesh, modes) == [(False, False, False)] * 2
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert run_ranks(mesh, modes) == [(False, True, True)] * 2


def test_each_rank_draws_what_a_process_of_its_own_would() -> None:
    def draws(rank: int) -> Tensor:
        first = torch.rand(2)
        if rank == 1:
            torch.manual_seed(7)
        wait(C10D.all_reduce(torch.ones(1), "sum", "data"))
        return torch.cat([first, torch.rand(2)])

    torch.manual_seed(3)
    alone = torch.rand(4)
    torch.manual_seed(3)
    found = run_ranks(Mesh(data=3), draws)
    after = torch.rand(4)
    torch.manual_seed(7)
    reseeded = torch.cat([alone[:2], torch.rand(2)])
    assert [row.tolist() for row in found] == [alone.tolist(), reseeded.tolist(), alone.tolist()]
    assert torch.equal(after, alone)  # the caller's state is where it was


def sum_of(size: int, axis: str = "data") -> Tensor:
    """An all_reduce of a vector of `size`."""
    return wait(C10D.all_reduce(torch.ones(size), "sum", axis))


def gather_of(size: int) -> Tensor:
    """An all_gather of a vector of `size` over two ranks."""
    return wait(C10D.all_gather_into_tensor(torch.ones(size), 2, "data"))


def uneven(rank: int) -> Tensor:
    """Rank 0 sends three rows to rank 1, which expects two."""
    sends, receives = ([1, 3], [1, 0]) if rank == 0 else ([0, 1], [2, 1])
    return wait(C10D.all_to_all_single(torch.ones(sum(sends), 2), receives, sends, "data"))


def missing_row(rank: int) -> Tensor:
    """Four rows, and sizes for three."""
    return wait(C10D.all_to_all_single(torch.ones(4), [2, 2], [2, 1], "data"))


def other_axis_first(rank: int) -> None:
    """Each of two ranks waits for the other along another axis."""
    for axis in ("data", "world") if rank else ("world", "data"):
        sum_of(2, axis)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda rank: sum_of(2 + rank), ["rank 1, axis data", "[3], SUM) where rank 0 has", "[2], SUM)"]),
        (lambda rank: gather_of(2) if rank else sum_of(2), ["all_gather", "where rank 0 has all_reduce"]),
        (lambda rank: sum_of(2) if rank else None, ["waits for rank 0 to enter all_reduce", "rank 0 ended"]),
        (uneven, ["rank 0, axis data, all_to_all", "3 rows for rank 1, which expects 2"]),
        (other_axis_first, ["rank 0 waits for rank 1", "axis world", "rank 1 waits for rank 0", "axis data"]),
        (missing_row, ["cut into [2, 1]"]),
    ],
)  # fmt: skip
def test_ranks_that_do_not_do_the_same(function: Callable[[int], Any], words: list[str]) -> None:
    with pytest.raises(MeshError) as caught:
        run_ranks(Mesh(data=2), function)
    for word in words:
        assert word in str(caught.value)
    assert_as_found()


def assert_as_found() -> None:
    """The process is fit for another simulation, and for groups of its own."""
    with pytest.raises(OperatorError):
        group_of("data")
    assert run_ranks(Mesh(data=2), lambda rank: sum_of(1).item()) == [2.0, 2.0]


def test_a_rank_that_misses_the_backward() -> None:
    def backward(rank: int) -> None:
        total = wait(C10D.all_reduce(torch.ones(2, requires_grad=True), "sum", "data"))
        if rank != 1:
            total.sum().backward()

    with pytest.raises(MeshError, match="rank 1 to enter all_reduce"):
        run_ranks(Mesh(data=3), backward)
    assert_as_found()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_exception_of_a_rank_is_raised_and_frees_the_others(direction: str) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ZeroDivisionError("in the backward")

    cleaned = []

    def fails(rank: int) -> None:
        x = torch.ones(2, requires_grad=True)
        if rank == 2 and direction == "forward":
            raise ZeroDivisionError("in the forward")
        try:
            total = wait(C10D.all_reduce(Fails.apply(x) if rank == 2 else x * 1, "sum", "data"))
            total.sum().backward()
            sum_of(3)
        finally:
            cleaned.append(rank)

    with pytest.raises(ZeroDivisionError, match=direction) as caught:
        run_ranks(Mesh(data=4), fails)
    assert caught.value.__notes__ == ["in rank 2"]
    assert set(cleaned) >= {0, 1, 3} - ({3} if direction == "forward" else set())
    assert_as_found()


def test_a_clean_up_that_communicates_does_not_hang() -> None:
    def tries_again(rank: int) -> None:
        try:
            if rank == 0:
                raise ValueError("first")
            sum_of(2)
        finally:
            sum_of(2)

    with pytest.raises(ValueError, match="first"):
        run_ranks(Mesh(data=3), tries_again, timeout=20)


def test_a_rank_that_does_not_come_back_is_named() -> None:
    def sleeps(rank: int) -> None:
        if rank == 1:
            time.sleep(3)
        sum_of(2)

    with pytest.raises(MeshError, match=r"rank 1\n  found   still running after 0.5 s"):
        run_ranks(Mesh(data=2), sleeps, timeout=0.5)
    assert_as_found()


def test_one_simulation_at_a_time() -> None:
    with pytest.raises(MeshError, match="one at a time"):
        run_ranks(Mesh(data=2), lambda rank: run_ranks(Mesh(data=2), lambda inner: inner))
    assert_as_found()


def test_one_rank_is_a_simulation_too() -> None:
    assert run_ranks(Mesh(), lambda rank: rank + 1) == [1]
