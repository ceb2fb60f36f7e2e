"""Where a rank is, which one the others wait for, and who speaks: without processes."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

import moec
from moec.errors import MeshError, RankError
from moec.ir.mesh import Mesh
from moec.models import open_model
from moec.plan import Plan
from moec.runtime.diagnosis import Diagnosis, Post
from moec.runtime.launch import Place, place_of
from moec.runtime.recompute import recomputing
from moec.runtime.rendezvous import _gather, meet
from moec.runtime.simulated import run_ranks
from moec.runtime.trail import Trail, watched_axes
from moec.runtime.verdict import Verdict, name_ranks
from moec.runtime.watch import Watch
from tests.distributed.jobs import GPT

PLAN = Plan.model_validate(
    {"moe": {"layers": "1::2", "experts": 4, "residual": "learned"}, "parallel": {"expert": 2}}
)


# the trail


@pytest.mark.parametrize("again", [False, True])
def test_every_exchange_is_known_by_layer_and_direction(again: bool) -> None:
    program = moec.compile(open_model(GPT), PLAN, world=2, verify="off")
    assert program.layout is not None
    axes = [axis for axis, size in program.layout.mesh.axes().items() if size > 1]
    tokens = torch.randint(0, 99, (2, 8))

    def steps(rank: int) -> list[str]:
        local, trail = program.partition(rank), Trail(lambda: 7)
        seen: list[str] = []
        with (
            watched_axes(axes, noting(trail, seen)),
            trail.follow(local.graph),
            recomputing(local, again),
        ):
            local.loss_terms(tokens, tokens)["loss"].backward()
        assert trail.length == len(seen)
        return seen

    first, second = run_ranks(program.layout.mesh, steps)
    assert first == second
    assert "all_to_all over expert_2 in dispatch_1 (forward, step 7)" in first
    assert "all_reduce over data (outside of the layers, step 7)" in first
    assert "all_to_all over expert_2 in moe_1 (backward, step 7)" in first
    layers = [line.split(" in ")[1].split()[0] for line in first if "backward" in line]
    assert list(dict.fromkeys(layers)) == ["moe_1", "dispatch_1"]
    assert (len(layers) > 2) == again, "a layer computed again sends again"


def noting(trail: Trail, seen: list[str]) -> Trail:
    enter = trail.enter

    def noted(axis: str, op: str) -> None:
        enter(axis, op)
        seen.append(str(trail.last))

    trail.enter = noted  # type: ignore[method-assign]
    return trail


def test_groups_are_as_before_afterwards() -> None:
    def same(rank: int) -> bool:
        from moec.runtime.ops.groups import group_of

        before = group_of("data")
        with watched_axes(["data"], Trail()):
            assert group_of("data") is not before
            assert (group_of("data").rank(), group_of("data").size()) == (rank, 2)
        return group_of("data") is before

    assert run_ranks(Mesh(data=2), same) == [True, True]


# the diagnosis: four ranks; 0, 1 and 2, 3 are groups of tensor, 0, 2 and 1, 3 groups of data


def post(tensor: int, data: int, last: str = "data", **more: Any) -> Post:
    counts = {"tensor": tensor, "data": data}
    recent = {axis: {n: f"op {n} over {axis}" for n in range(1, count + 1)} for axis, count in counts.items()}
    return Post(counts, recent, f"op {counts[last]} over {last}", last, "step.py:41 in take", **more)


def diagnosed(*posts: Post, silent: tuple[int, ...] = ()) -> RankError:
    return Diagnosis(Mesh(data=2, tensor=2), dict(enumerate(posts)), silent, 30).error()


def test_the_rank_behind_is_named_with_what_it_did_not_enter() -> None:
    error = diagnosed(post(5, 3), post(5, 3), post(5, 3), post(5, 2, "tensor"))
    assert error.where == "rank 3"
    assert error.found == "it did not enter op 3 over data, in which rank 1 waits"
    assert error.nearest == "it was last seen in op 5 over tensor, at step.py:41 in take; it is still there"


def test_who_waits_is_not_to_blame() -> None:
    """Rank 2 waits for 3 along tensor, so it keeps 0 waiting along data; and 1 waits for 3 along data."""
    error = diagnosed(post(5, 3), post(5, 3), post(5, 2, "tensor"), post(4, 2))
    assert error.where == "rank 3"
    assert "ranks 1 and 2 wait" in error.found


def test_a_silent_rank_has_missed_what_is_waited_in_now() -> None:
    """Its counts are old: it may have stopped long after it spoke."""
    error = diagnosed(post(9, 7), post(9, 7), post(9, 7, "tensor"), post(2, 2), silent=(3,))
    assert error.found.startswith("it did not enter op 7 over data, in which ranks 1 and 2 wait")
    assert error.nearest.endswith("it does not answer")


def test_a_silent_rank_that_kept_up_is_named_all_the_same() -> None:
    error = diagnosed(post(5, 3), post(5, 3), post(5, 3), post(5, 3), silent=(2,))
    assert error.where == "rank 2"
    assert error.found.startswith("it did not enter a collective of the trainer")


def test_a_rank_that_was_never_heard_of() -> None:
    posts = {0: post(5, 3), 1: post(5, 3), 2: post(4, 3, "tensor")}
    error = Diagnosis(Mesh(data=2, tensor=2), posts, (3,), 30).error()
    assert error.where == "rank 3"
    assert error.nearest == "it never said where it is"


def test_nobody_behind() -> None:
    error = diagnosed(*[post(5, 3)] * 4)
    assert error.where == "every rank"
    assert error.found == "no progress since op 3 over data"


def test_a_rank_that_left_early() -> None:
    error = diagnosed(post(5, 3), post(5, 3), post(5, 3), post(5, 2, done=True))
    assert error.nearest == "it was last seen in op 2 over data, and has ended since"


def test_watches_of_ranks_that_share_a_store_find_the_one_that_stands_still() -> None:
    """Two watches, each with a trail; one goes on, for a while."""
    store = HashStore()
    told: list[RankError] = []
    trails = [Trail(lambda: 17), Trail(lambda: 16)]
    for trail in trails:
        trail.enter("data", "all_reduce")
    trails[0].enter("data", "all_reduce")
    mesh, ended = Mesh(data=2), threading.Event()

    def end(error: RankError) -> None:
        told.append(error)
        ended.set()

    watches = [Watch(trail, mesh, rank, store, 0.6, end) for rank, trail in enumerate(trails)]
    with watches[0], watches[1]:
        assert ended.wait(20)
    assert told[0].where == "rank 1"
    assert "it did not enter all_reduce over data (outside of the layers, step 17)" in told[0].found
    assert "it was last seen in all_reduce over data (outside of the layers, step 16)" in told[0].nearest
    assert told[0].nearest.endswith("it is still there")


def test_a_watch_lets_ranks_be_that_go_on() -> None:
    store, trail = HashStore(), Trail()
    told: list[RankError] = []
    with Watch(trail, Mesh(data=1), 0, store, 0.6, told.append):
        for _ in range(15):
            trail.enter("data", "all_reduce")
            threading.Event().wait(0.1)
    assert told == []


# the verdict


def test_one_error_is_told_and_the_others_follow() -> None:
    store = HashStore()
    first, second = (Verdict(store, rank, 2) for rank in (0, 1))
    assert second.claim("text", 2) == "rank 1"
    assert first.claim("connection lost", 1) is None
    assert first.status(1) == 2


def test_ranks_that_fail_alike_are_told_together() -> None:
    store, said = HashStore(), {}

    def fail(rank: int) -> None:
        said[rank] = Verdict(store, rank, 3).claim("the same", 2)

    threads = [threading.Thread(target=fail, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, said.values())) == ["None", "None", "every rank"]


def test_names_of_ranks() -> None:
    assert name_ranks([3], 4) == "rank 3"
    assert name_ranks([1, 3], 4) == "ranks 1 and 3"
    assert name_ranks([0, 1, 2], 4) == "ranks 0, 1 and 2"
    assert name_ranks([0, 1], 2) == "every rank"
    assert name_ranks([0], 1) == "rank 0"


# the rendezvous


def gathered(store: HashStore, world: int, seconds: float = 20.0) -> list[Any]:
    found: list[Any] = [None] * world

    def come(rank: int) -> None:
        try:
            part = _gather(store, rank, world, timedelta(seconds=seconds))
            part.set(f"of/{rank}", "x")
            part.wait([f"of/{other}" for other in range(world)], timedelta(seconds=seconds))
            found[rank] = part
        except MeshError as error:
            found[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_that_start_again_find_each_other_in_a_store_of_old_names() -> None:
    store = HashStore()
    old, new = gathered(store, 3), gathered(store, 3)
    assert not any(isinstance(part, Exception) for part in old + new)
    old[0].set("address", "of a process that is gone")
    assert not new[0].check(["address"])
    new[0].set("address", "here")
    assert new[2].get("address") == b"here"


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "there")
    monkeypatch.setenv("MASTER_PORT", "1")
    store = HashStore()
    gathered(store, 3)  # its names are of another time
    with pytest.raises(MeshError, match="no word from rank 1, 2"):
        _gather(store, 0, 3, timedelta(seconds=0.3))


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in {**there, "RANK": "0", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(MeshError, match="the port is in use"):
            meet(patience=timedelta(seconds=5))


def test_an_address_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in {**there, "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MeshError, match=r"rank 1, rendezvous at 127\.0\.0\.1:9"):
        meet(patience=timedelta(seconds=1))


# the environment


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}


def test_the_place_that_a_launcher_gave() -> None:
    assert place_of({"HOME": "/"}) is None
    assert place_of(TORCHRUN) == Place(1, 4, 0)
    assert place_of({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}) == Place(1, 4, 2)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"MASTER_PORT": ""}, "no MASTER_PORT"),
        ({"MASTER_ADDR": "", "WORLD_SIZE": ""}, "RANK, MASTER_PORT, and no WORLD_SIZE, MASTER_ADDR"),
        ({"RANK": "4"}, "RANK=4 and WORLD_SIZE=4"),
        ({"RANK": "first"}, "RANK=first"),
    ],
)
def test_half_an_environment(change: dict[str, str], found: str) -> None:
    with pytest.raises(MeshError, match=found):
        place_of({**TORCHRUN, **change})
