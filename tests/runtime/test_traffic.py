"""What is counted is what was sent, to the byte; what the graph says is what is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from examples.gpt import GPT, GPTConfig
from moec.cost.rank.counted_traffic import compared, predict_traffic
from moec.ir.mesh import Mesh
from moec.runtime.ops.sent import Kind, Sent, Traffic, summed
from moec.runtime.simulated import run_ranks
from moec.runtime.traffic import count_traffic
from tests.runtime.collectives import C10D, every_collective, wait
from tests.runtime.ranks import run_processes


def traffic_of(mesh: Mesh, function: Callable[[int], object]) -> list[Traffic]:
    """What each rank is counted to send while `function` runs."""

    def counted(rank: int) -> Traffic:
        with count_traffic() as traffic:
            function(rank)
        return traffic

    return run_ranks(mesh, counted)


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
    for traffic in traffic_of(Mesh(data=4), lambda rank: wait(function(torch.ones(4, 2)))):
        assert list(traffic.sent.values()) == [sent]


def test_rows_for_nobody_and_for_oneself_are_not_sent() -> None:
    def uneven(rank: int) -> None:
        sizes = [[5, 0, 2], [0, 7, 0], [2, 0, 0]]
        wait(C10D.all_to_all_single(torch.ones(sum(sizes[rank]), 3), sizes[rank], sizes[rank], "data"))

    found = [traffic.total for traffic in traffic_of(Mesh(data=3), uneven)]
    assert found == [Sent(1, 1, 2 * 12), Sent(1, 0, 0), Sent(1, 1, 2 * 12)]


def test_only_the_root_of_a_broadcast_sends() -> None:
    found = traffic_of(Mesh(data=3), lambda rank: wait(C10D.broadcast(torch.ones(5), 1, "data")))
    assert [traffic.total for traffic in found] == [Sent(1), Sent(1, 2, 40), Sent(1)]


def test_inside_a_kernel_and_in_both_directions() -> None:
    """`moec.exchange` calls a collective in its kernel, and another in the kernel of its gradient."""

    def exchange(rank: int) -> None:
        rows = torch.ones(3, 2, requires_grad=True)
        sizes = [([1, 2], [1, 3]), ([3, 0], [2, 0])][rank]
        send, receive = map(torch.tensor, sizes)
        got = wait(torch.ops.moec.exchange(rows, send, receive, "data"))
        got.sum().backward()

    first, second = traffic_of(Mesh(data=2), exchange)
    there, back = Kind("forward", "data", "moec.exchange"), Kind("backward", "data", "moec.exchange")
    assert first.sent == {there: Sent(1, 1, 2 * 8), back: Sent(1, 1, 3 * 8)}
    assert second.sent == {there: Sent(1, 1, 3 * 8), back: Sent(1, 1, 2 * 8)}


def test_processes_are_counted_as_threads_are() -> None:
    assert run_processes(Mesh(data=2), everything) == run_ranks(Mesh(data=2), everything)


def everything(rank: int) -> list[list[object]]:
    """The traffic of every collective and of an operator that communicates inside, forward and backward."""
    with count_traffic() as traffic:
        every_collective("data", rank, torch.ones(4, 3))
        x = torch.ones(5, 2, requires_grad=True)
        torch.ops.moec.unshare(torch.ops.moec.share(x, "data"), 5, "data").sum().backward()
    assert traffic.total.bytes > 0
    return traffic.to_json()


def test_traffic_as_plain_data_and_in_sum() -> None:
    both = traffic_of(Mesh(data=2), lambda rank: wait(C10D.all_reduce(torch.ones(3), "sum", "data")))
    assert Traffic.of_json(both[0].to_json()).sent == both[0].sent
    assert summed(both).total == Sent(2, 4, 2 * 12)
    assert both[0].to_json() == [["forward", "data", "all_reduce", 1, 2, 12]]


def small(**sizes: int) -> nn.Module:
    """A GPT with the numbers of a test."""
    config = {"vocab": 50, "seq": 16, "layers": 2, "width": 16, "heads": 4} | sizes
    return GPT(GPTConfig(**config, dropout=0.0))


PLANS: dict[str, dict[str, Any]] = {
    "flat": {"experts": 4, "top_k": 2, "capacity_factor": 1.0},
    "dropless": {"experts": 6, "top_k": 1},
    "pyramid": {"experts": 2, "override": [{"layers": "-1:", "experts": 8}]},
}
MESHES = [
    ("flat", 4, {"expert": 4}),
    ("flat", 4, {"expert": 4, "tensor": 2, "all_to_all": "coordinated"}),
    ("flat", 4, {"expert": 2, "slice": 2, "tensor": 2, "all_to_all": "flat"}),
    ("dropless", 6, {"expert": 6, "node": 3, "all_to_all": "hierarchical"}),
    ("dropless", 6, {"expert": 3, "slice": 2}),
    ("pyramid", 8, {"expert": 8, "node": 4, "tensor": 2, "all_to_all": "hierarchical"}),
]


@pytest.mark.parametrize(("plan", "world", "parallel"), MESHES)
def test_the_graph_says_what_is_counted(plan: str, world: int, parallel: dict[str, object]) -> None:
    """Every rank, every kind of traffic, both directions, with batches that are not equally long."""
    settings = {"moe": {"layers": "1::2", **PLANS[plan]}, "parallel": parallel}
    model = small(layers=4 if plan == "pyramid" else 2)
    program = moec.compile(model, settings, world=world, verify="off")
    mesh = program.layout.mesh
    tokens = torch.randint(50, (2 * mesh.data + 1, 5)).tensor_split(mesh.data)
    own = [tokens[mesh.coordinate("data", rank)] for rank in range(world)]
    locals_ = [program.partition(rank) for rank in range(world)]

    def run(rank: int) -> None:
        logits, terms = locals_[rank].run(own[rank])
        (logits.sum() + terms["balance"] + terms["z"]).backward()

    counted = traffic_of(mesh, run)
    sizes = [(part.shape[0], part.shape[1]) for part in own]
    predicted = predict_traffic(locals_[0].graph, mesh, sizes, [one.routed for one in counted])
    assert [compared(*pair) for pair in zip(counted, predicted, strict=True)] == [[]] * world
    directions = {kind.direction for kind in summed(counted).sent}
    assert directions == {"forward", "backward"}
    # A table that is wrong is seen: the exchanges it leads to are not those that were counted.
    wrong = [[table.roll(1) for table in one.routed] for one in counted]
    different = predict_traffic(locals_[0].graph, mesh, sizes, wrong)
    assert any(compared(*pair) for pair in zip(counted, different, strict=True))
