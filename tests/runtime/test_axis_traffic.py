"""What goes along an axis is counted at its process group, to the byte, as at the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moec.ir.mesh import Mesh
from moec.runtime.axis_traffic import counted_axes, sent_by
from moec.runtime.ops.groups import group_of
from moec.runtime.ops.sent import Sent
from moec.runtime.simulated import run_ranks
from moec.runtime.traffic import count_traffic
from tests.runtime.collectives import C10D, every_collective, wait
from tests.runtime.ranks import run_processes

MESH = Mesh(data=4)


@pytest.mark.parametrize(
    ("function", "sent"),
    [
        (lambda x: C10D.all_reduce(x, "sum", "data"), Sent(1, 6, 2 * 3 * 8)),  # 4 stretches of 8 bytes
        (lambda x: C10D.all_gather_into_tensor(x, 4, "data"), Sent(1, 3, 3 * 32)),
        (lambda x: C10D.reduce_scatter_tensor(x, "sum", 4, "data"), Sent(1, 3, 3 * 8)),
        (lambda x: C10D.all_to_all_single(x, [1] * 4, [1] * 4, "data"), Sent(1, 3, 3 * 8)),
    ],
)
def test_a_collective_by_hand(function: Callable[[Tensor], Tensor], sent: Sent) -> None:
    def counted(_: int) -> dict[str, Sent]:
        with counted_axes(["data", "world"]) as found:
            wait(function(torch.ones(4, 2)))
        return found

    assert run_ranks(MESH, counted) == [{"data": sent, "world": Sent()}] * 4


def test_rows_for_oneself_are_not_sent_and_only_the_root_broadcasts() -> None:
    def counted(rank: int) -> list[Sent]:
        sizes = [[5, 0, 2], [0, 7, 0], [2, 0, 0]]
        with counted_axes(["data"]) as uneven:
            wait(C10D.all_to_all_single(torch.ones(sum(sizes[rank]), 3), sizes[rank], sizes[rank], "data"))
        with counted_axes(["data"]) as broadcast:
            wait(C10D.broadcast(torch.ones(5), 1, "data"))
        return [uneven["data"], broadcast["data"]]

    assert run_ranks(Mesh(data=3), counted) == [
        [Sent(1, 1, 2 * 12), Sent(1)], [Sent(1), Sent(1, 2, 40)], [Sent(1, 1, 2 * 12), Sent(1)]
    ]  # fmt: skip


X = torch.ones(6, 2)  # 48 bytes


@pytest.mark.parametrize(
    ("method", "given", "sent"),
    [
        ("allreduce_coalesced", ([X, X],), Sent(2, 4, 2 * 48)),
        ("allgather", ([[X, X]], [X]), Sent(1, 1, 48)),
        ("reduce_scatter", ([X], [[X, X]]), Sent(1, 1, 48)),
        ("alltoall", ([X, X], [X, X[:1]]), Sent(1, 1, 8)),
        ("alltoall_base", (X, X, [], []), Sent(1, 1, 24)),
        ("all_to_all_single", (X[:0], X[:0], [0, 0], [0, 0]), Sent(1)),
        ("broadcast", ([X], None), Sent(1, 1, 48)),
        ("send", ([X], 1, 0), Sent(1, 1, 48)),
        ("recv", ([X], 1, 0), Sent()),
        ("barrier", (), Sent()),
    ],
)
def test_every_way_to_ask_a_group(method: str, given: tuple[Any, ...], sent: Sent) -> None:
    def asked(_: int) -> Sent:
        return sent_by(group_of("data"), method, given)

    assert run_ranks(Mesh(data=2), asked)[0] == sent


def both(rank: int) -> dict[str, list[int]]:
    """By axis: messages and bytes as counted at groups, and as counted at operators."""
    with count_traffic() as traffic, counted_axes(["data"]) as found:
        every_collective("data", rank, torch.ones(4, 3))
    at_operators = traffic.total
    at_groups = found["data"]
    return {
        "groups": [at_groups.messages, at_groups.bytes],
        "operators": [at_operators.messages, at_operators.bytes],
    }


def test_groups_and_operators_say_the_same_in_processes_too() -> None:
    told = run_processes(Mesh(data=2), both)
    assert told == run_ranks(Mesh(data=2), both)
    for row in told:
        assert row["groups"] == row["operators"]
        assert row["groups"][1] > 0


def test_groups_are_as_before_afterwards() -> None:
    def same(_: int) -> bool:
        before = group_of("data")
        with counted_axes(["data"]), counted_axes(["data"]):
            assert isinstance(group_of("data"), dist.ProcessGroup)
        return group_of("data") is before

    assert run_ranks(Mesh(data=2), same) == [True, True]
