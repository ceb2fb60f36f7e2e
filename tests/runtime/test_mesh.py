"""Groups of processes under the names of axes, ranks that disagree, and jobs that cannot begin."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moec.errors import MeshError, OperatorError
from moec.ir.mesh import ExpertAxes, Mesh
from moec.runtime.mesh import agree, connected, registered
from moec.runtime.ops.groups import group_of
from moec.runtime.rendezvous import meet
from moec.runtime.simulated import run_ranks
from tests.runtime.collectives import every_collective
from tests.runtime.ranks import free_port, run_processes, set_rendezvous

FOUR = Mesh(data=2, tensor=2, node=2, layers=(("moe_1", ExpertAxes(1, 4)), ("moe_3", ExpertAxes(1, 2, 2))))


def test_two_processes_and_two_threads_give_the_same_bits() -> None:
    mesh = Mesh(data=2)
    threads, processes = run_ranks(mesh, random_numbers), run_processes(mesh, random_numbers)
    assert_same_bits(threads, processes)
    assert threads[0]["grad"].abs().sum() > 0


def test_four_processes_and_four_threads_give_the_same_bits() -> None:
    """Whole numbers: with more than two ranks gloo adds in another order, and these sums are exact."""
    assert_same_bits(run_ranks(FOUR, whole_numbers), run_processes(FOUR, whole_numbers))


def random_numbers(rank: int) -> dict[str, torch.Tensor]:
    """The same on a rank that is a process and on one that is a thread."""
    torch.manual_seed(100 + rank)
    return every_collective("data", rank, torch.randn(4, 3))


def whole_numbers(rank: int) -> dict[str, torch.Tensor]:
    """Every collective along every axis, and what the groups are."""
    found: dict[str, torch.Tensor] = {}
    for axis in ("world", "data", "tensor", "expert_4", "expert_4_inside", "expert_4_between", "slice_2x2"):
        torch.manual_seed(100 + rank)
        made = every_collective(axis, rank, torch.randint(-3, 4, (4, 3)).float())
        found |= {f"{axis}: {name}": value for name, value in made.items()}
        ranks = torch.ops._c10d_functional.all_gather_into_tensor(
            torch.tensor([rank]), group_of(axis).size(), axis
        )
        assert tuple(torch.ops._c10d_functional.wait_tensor(ranks).tolist()) == FOUR.group(axis, rank)
    return found


def assert_same_bits(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> None:
    """The same tensors under the same names on every rank, equal to the last bit."""
    assert [row.keys() for row in left] == [row.keys() for row in right]
    for rank, (mine, theirs) in enumerate(zip(left, right, strict=True)):
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), (rank, name)


def test_ranks_that_disagree_are_named_on_every_rank() -> None:
    for said in (run_ranks(Mesh(data=4), disagreement), run_processes(Mesh(data=4), disagreement)):
        assert len(set(said)) == 1
        assert "ranks 2, 3 with another plan: beta 2" in said[0]
        assert "that of rank 0 on every rank: alpha" in said[0]


def disagreement(rank: int) -> str:
    """What rank `rank` is told about plans that differ, after data that do not."""
    agree("data", "the same everywhere")
    agree("empty", "")
    try:
        agree("plan", "alpha" if rank < 2 else "beta 2" if rank == 2 else "gamma, which is longer")
    except MeshError as error:
        return str(error)
    return "nothing"


def test_names_are_free_again_and_can_be_used_again() -> None:
    run_processes(Mesh(data=2), meet_others)


def meet_others(rank: int) -> None:
    """One mesh at a time; the groups of another job that is left are gone, its processes are not."""
    with pytest.raises(MeshError, match="connected ranks already"), connected(Mesh(tensor=2)):
        pass
    assert group_of("data") is group_of("world")  # one group where the ranks are the same
    with pytest.raises(OperatorError, match="'tensor'"):
        group_of("tensor")  # an axis of one rank


def test_a_job_that_torch_has_begun_is_taken_and_left_as_it_is(rendezvous: Any) -> None:
    rendezvous(0, 1, free_port())
    dist.init_process_group("gloo")
    try:
        for _ in range(2):
            with connected(Mesh()) as rank:
                assert rank == 0
                agree("plan", "anything")
            with pytest.raises(OperatorError, match="'world'"):
                group_of("world")
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_one_rank_needs_nobody() -> None:
    with connected(Mesh()) as rank:
        assert rank == 0
        assert not dist.is_initialized()
        agree("plan", "anything")


@pytest.fixture
def rendezvous(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Environment variables of a rendezvous, undone afterwards."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return set_rendezvous


def refusal(mesh: Mesh, **options: Any) -> str:
    """What `connected` says when it refuses."""
    with pytest.raises(MeshError) as caught, connected(mesh, **options):
        pass
    assert not dist.is_initialized()
    return str(caught.value)


def test_no_rendezvous(rendezvous: Any) -> None:
    said = refusal(Mesh(data=4))
    assert "no RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment" in said
    assert "torchrun --nproc-per-node" in said
    os.environ["RANK"] = "0"
    assert "no WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in refusal(Mesh())


def test_a_port_in_use(rendezvous: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        rendezvous(0, 2, taken.getsockname()[1])
        said = refusal(Mesh(data=2))
    assert "the port is in use" in said
    assert str(taken) not in said


def test_nobody_answers(rendezvous: Any) -> None:
    rendezvous(1, 2, free_port())
    with pytest.raises(MeshError, match=r"rank 1, rendezvous at 127\.0\.0\.1"):
        meet(patience=timedelta(seconds=2))


def test_a_mesh_that_does_not_fit_says_which_would(rendezvous: Any) -> None:
    rendezvous(0, 6, free_port())
    said = refusal(Mesh(data=2, tensor=4))
    assert "6 ranks" in said
    assert "8 ranks: data 2 × tensor 4" in said
    assert "data 3 × tensor 2; tensor, expert and slice can be 1, 2, 3, 6 here" in said


def test_a_torch_without_gradients_of_collectives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    with pytest.raises(MeshError, match="all_reduce has no gradient"), registered({}):
        pass
