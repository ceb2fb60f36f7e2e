"""`generate` on several ranks writes what one process writes, token by token."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import moec
from examples.gpt import GPT, GPTConfig
from moec.all_ranks import all_parts
from moec.decoder import Decoder
from moec.errors import DataError, MeshError, OperatorError
from moec.ir.mesh import DATA, Mesh
from moec.local_program import LocalProgram
from moec.runtime.generation.generate_ranks import own_rows
from moec.runtime.generation.request import Options
from moec.runtime.simulated import run_ranks
from tests.runtime.ranks import run_processes
from tests.test_generate import enlarged

T = TypeVar("T")
VOCABULARY = 51  # uneven on two ranks and on four
PROMPTS = [[1, 2, 3], [40, 5, 6, 7, 8, 9, 10, 11], [30], [4, 4, 4, 4, 4], [50, 0]]
PYRAMID = {
    "layers": "all", "experts": 2, "top_k": 2, "residual": "learned", "init": "fresh", "router_std": 1.0,
    "override": [{"layers": "-1:", "experts": 4}],
}  # fmt: skip
FULL = {"layers": "1::2", "experts": 4, "capacity_factor": 0.5, "min_capacity": 1, "init": "fresh"}
KINDS: dict[str, dict[str, Any]] = {"pyramid": {"moe": PYRAMID}, "capacity": {"moe": FULL}, "dense": {}}
Described = tuple[str, int, dict[str, Any]]
MESHES: list[Described] = [
    ("pyramid", 2, {"expert": 2}),
    ("dense", 2, {"tensor": 2}),
    ("capacity", 2, {"expert": 2, "slice": 2}),
    ("pyramid", 4, {"expert": 4, "tensor": 2, "all_to_all": "coordinated"}),
    ("capacity", 4, {"expert": 4, "node": 2, "all_to_all": "hierarchical"}),
]
OTHERS: list[Described] = [
    ("capacity", 2, {"expert": 1}),
    ("dense", 2, {}),
    ("capacity", 2, {"tensor": 2, "expert": 2}),
    ("pyramid", 4, {"expert": 4}),
    ("pyramid", 4, {"expert": 4, "tensor": 2, "all_to_all": "flat"}),
    ("pyramid", 4, {"expert": 2, "slice": 2}),
    ("capacity", 4, {"expert": 4, "tensor": 4}),
]
NIGHTLY = [pytest.param(*described, marks=pytest.mark.nightly) for described in OTHERS]
DRAWN: Options = {"temperature": 0.8, "seed": 4, "top_k": 20, "repetition_penalty": 1.2}


@cache
def placed(kind: str, world: int, **parallel: Any) -> moec.Program:
    """A GPT of two layers in fp64 on a mesh; it still runs in one process."""
    model = enlarged(GPT(GPTConfig(vocab=VOCABULARY, seq=40, layers=2, width=16, heads=4)))
    plan = {**KINDS[kind], "parallel": parallel, "compile": {"dtype": "fp64"}}
    return moec.compile(model, plan, world=world, verify="off").eval()


def mesh_of(program: moec.Program) -> Mesh:
    assert program.layout is not None
    return program.layout.mesh


@cache
def parts_of(program: moec.Program) -> list[LocalProgram]:
    """The ranks' programs, which keep their decoders."""
    return all_parts(program)


def pair() -> moec.Program:
    """Two ranks that share the experts."""
    return placed("pyramid", 2, expert=2)


def groups() -> moec.Program:
    """Two tensor groups of two ranks."""
    return placed("pyramid", 4, expert=4, tensor=2, all_to_all="coordinated")


def on_ranks(program: moec.Program, body: Callable[[LocalProgram, int], T]) -> list[T]:
    """`body(local, rank)` of every rank."""
    parts = parts_of(program)
    return run_ranks(mesh_of(program), lambda rank: body(parts[rank], rank), timeout=600.0)


def listed(texts: Tensor | list[Tensor]) -> list[list[int]]:
    return [text.tolist() for text in texts]


def step_by_step(decoder: Decoder, texts: Tensor) -> Tensor:
    """Logits [B, 5, V] of positions 5 … 9: a ragged prompt is read, then tokens one by one."""
    rows = texts.shape[0]
    cache, past = decoder.new_cache(rows, 12), torch.arange(rows) % 3 + 3
    read = texts[:, :5].where(torch.arange(5) < past[:, None], 0)
    made: list[Tensor] = []
    decoder.step(read, past * 0, (past - 1)[:, None], cache, 5)
    while len(made) < 7:
        token = texts.gather(1, past[:, None])
        made.append(decoder.step(token, past, past[:, None] * 0, cache, 12))
        past = past + 1
    every = torch.cat(made, 1)  # of row b from position b % 3 + 3 on
    places = torch.arange(5, 10) - (torch.arange(rows) % 3 + 3)[:, None]
    return every.gather(1, places[..., None].expand(-1, -1, every.shape[2]))


@pytest.mark.parametrize(("kind", "world", "parallel"), [*MESHES, *NIGHTLY], ids=str)
def test_every_mesh_writes_what_one_process_writes(kind: str, world: int, parallel: dict[str, Any]) -> None:
    """Ragged prompts whose rows stop at different steps; the likeliest tokens, and drawn ones."""
    program = placed(kind, world, **parallel)
    greedy = listed(program.generate(PROMPTS, 14))
    stop = greedy[1][10]  # one row at least ends early
    stopped, drawn = (
        listed(program.generate(PROMPTS, 14, stop=stop)),
        listed(program.generate(PROMPTS, 9, **DRAWN)),
    )
    assert len({len(text) - len(prompt) for text, prompt in zip(stopped, PROMPTS, strict=True)}) > 1
    texts = torch.randint(VOCABULARY, (5, 12))
    logits = step_by_step(program.decoder(40), texts)
    mesh = mesh_of(program)

    def body(local: LocalProgram, rank: int) -> None:
        assert listed(local.generate(PROMPTS, 14, stop=stop)) == stopped
        assert listed(local.generate(PROMPTS, 9, **{**DRAWN, "rows": 1, "chunk": 3})) == drawn
        own = own_rows(5, mesh, rank)
        found = step_by_step(local.decoder(40), texts[own.start : own.stop])
        torch.testing.assert_close(found, logits[own.start : own.stop], rtol=0, atol=1e-9)

    on_ranks(program, body)


def test_capacity_is_left_out_in_one_process_and_on_ranks() -> None:
    """The logits compared above are those of a program that drops no token, not those that training sees."""
    program, texts = placed("capacity", 2, **MESHES[2][2]), torch.randint(VOCABULARY, (4, 12))
    free = moec.compile(
        enlarged(GPT(GPTConfig(vocab=VOCABULARY, seq=40, layers=2, width=16, heads=4))),
        {"moe": {**FULL, "capacity_factor": "dropless"}, "compile": {"dtype": "fp64"}}, verify="off",
    ).eval()  # fmt: skip
    free.load_state_dict(program.state_dict())
    found = step_by_step(program.decoder(40), texts)
    torch.testing.assert_close(found, free(texts)[:, 5:10], rtol=0, atol=1e-9)
    assert not torch.allclose(found, program(texts)[:, 5:10], atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_prompts_than_data_ranks(count: int) -> None:
    """Ranks without rows go along, in any number, with their experts."""
    program = placed("capacity", 4, **MESHES[-1][2])
    needed = listed(program.generate(PROMPTS[:count], 8))
    for texts in on_ranks(program, lambda local, _: local.generate(PROMPTS[:count], 8)):
        assert listed(texts) == needed


def test_a_tensor_comes_back_as_a_tensor() -> None:
    program = pair()
    tokens, mask = torch.randint(VOCABULARY, (3, 6)), torch.ones(3, 6, dtype=torch.bool)
    mask[1, :4] = False
    stop = int(program.generate(tokens, 5, mask=mask)[0, 7])  # type: ignore[call-overload]
    needed = program.generate(tokens, 5, mask=mask, stop=stop, pad=-1)
    assert isinstance(needed, Tensor)
    assert (needed == -1).any()
    for found in on_ranks(program, lambda local, _: local.generate(tokens, 5, mask=mask, stop=stop, pad=-1)):
        assert isinstance(found, Tensor)
        assert torch.equal(found, needed)


def test_ranks_with_prompts_of_their_own() -> None:
    """Each data rank has others, one has none; ranks of a tensor group have the same."""
    program = groups()
    own = [PROMPTS[:3], []]
    mesh = mesh_of(program)

    def body(local: LocalProgram, rank: int) -> list[list[int]]:
        prompts = own[mesh.coordinate(DATA, rank)]
        return listed(local.generate(prompts, 7, dealt=False, **DRAWN))

    needed = listed(program.generate(PROMPTS[:3], 7, **DRAWN))
    assert on_ranks(program, body) == [needed, needed, [], []]


def test_a_rank_tells_of_the_rows_it_writes() -> None:
    """Events and the callback count rows as the request does; what is cancelled ends there, everywhere."""
    program = pair()
    whole = listed(program.generate(PROMPTS, 8))

    def body(local: LocalProgram, rank: int) -> tuple[set[int], list[list[int]]]:
        told: list[tuple[int, int]] = []

        def stream(row: int, token: int) -> bool:
            told.append((row, token))
            return not (row == 4 and len([one for one in told if one[0] == 4]) == 2)

        texts = listed(local.generate(PROMPTS, 8, stream=stream))
        for row in {row for row, _ in told}:
            assert texts[row] == PROMPTS[row] + [token for one, token in told if one == row]
        return {row for row, _ in told}, texts

    (first, texts), (second, same) = on_ranks(program, body)
    assert (first, second) == ({0, 1, 2}, {3, 4})
    assert texts == same == [*whole[:4], whole[4][: len(PROMPTS[4]) + 2]]


def test_a_generation_may_be_closed_early() -> None:
    """The rank that leaves first still lends its experts to the other."""
    program = pair()
    whole = listed(program.generate(PROMPTS[:2], 8))

    def body(local: LocalProgram, rank: int) -> tuple[list[list[int]], list[str | None]]:
        generation = local.stream(PROMPTS[:2], 8)
        for _ in zip(range(3 if rank == 0 else 99), generation, strict=False):
            pass
        generation.close()
        return listed(generation.result()), list(generation.ended)

    for texts, ended in on_ranks(program, body):
        assert texts == [whole[0][: len(PROMPTS[0]) + 3], whole[1]]
        assert ended == ["cancelled", "length"]


# what is refused


def refusal(program: moec.Program, body: Callable[[LocalProgram, int], object]) -> str:
    with pytest.raises(MeshError) as caught:
        on_ranks(program, body)
    return str(caught.value)


def test_ranks_that_are_asked_for_different_things() -> None:
    program = pair()
    told = refusal(program, lambda local, rank: local.generate(PROMPTS, 8, seed=rank))
    assert "rank 1 with another request" in told


def test_ranks_of_a_tensor_group_with_different_prompts() -> None:
    """They would add up parts of different texts; it is noticed before the first step."""
    program = groups()
    told = refusal(program, lambda local, rank: local.generate(PROMPTS[rank : rank + 1], 5, dealt=False))
    assert "generate, step 1" in told
    assert "rank 1 with other tokens than rank 0, of the same tensor group" in told


def test_a_tensor_rank_that_leaves_alone() -> None:
    program = groups()

    def body(local: LocalProgram, rank: int) -> None:
        local.generate(PROMPTS, 5, stream=lambda row, _: not (rank == 3 and row == 4))

    assert "rank 3 with other tokens than rank 2" in refusal(program, body)


def test_a_result_before_its_end_and_ranks_that_are_not_connected() -> None:
    program = pair()

    def body(local: LocalProgram, rank: int) -> str:
        generation = local.stream(PROMPTS, 3)
        with pytest.raises(DataError) as caught:
            generation.result()
        generation.close()
        return str(caught.value)

    assert "rows that have not ended" in on_ranks(program, body)[0]
    with pytest.raises(OperatorError, match="connected"):
        program.partition(0).generate(PROMPTS, 3)


def test_mistakes_are_told_before_any_work() -> None:
    local = pair().partition(0)
    with pytest.raises(DataError, match="a prompt of 3 tokens and 40 new ones"):
        local.generate(PROMPTS, 40)
    with pytest.raises(DataError, match="no prompt"):
        local.generate([], 4)


def test_a_part_of_a_program_on_one_rank() -> None:
    model = enlarged(GPT(GPTConfig(vocab=VOCABULARY, seq=40, layers=1, width=16, heads=4)))
    program = moec.compile(model, KINDS["pyramid"], verify="off").eval()
    assert listed(program.partition(0).generate(PROMPTS, 4)) == listed(program.generate(PROMPTS, 4))


# processes


def process(rank: int, kind: str, world: int, parallel: dict[str, Any]) -> list[list[int]]:
    local = placed(kind, world, **parallel).partition(rank)
    stop = listed(placed(kind, world, **parallel).generate(PROMPTS, 8))[0][-2]
    return [*listed(local.generate(PROMPTS, 8, stop=stop)), *listed(local.generate(PROMPTS[:1], 8, **DRAWN))]


@pytest.mark.parametrize(
    ("kind", "world", "parallel"),
    [
        ("pyramid", 2, {"expert": 2}),
        pytest.param("capacity", 2, {"expert": 2, "tensor": 2}, marks=pytest.mark.nightly),
        pytest.param("pyramid", 4, {"expert": 4, "tensor": 2}, marks=pytest.mark.nightly),
        pytest.param("pyramid", 4, {"expert": 2, "slice": 2}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_processes_write_what_one_writes(kind: str, world: int, parallel: dict[str, Any]) -> None:
    program = placed(kind, world, **parallel)
    stop = listed(program.generate(PROMPTS, 8))[0][-2]
    needed = [
        *listed(program.generate(PROMPTS, 8, stop=stop)), *listed(program.generate(PROMPTS[:1], 8, **DRAWN))
    ]  # fmt: skip
    body = partial(process, kind=kind, world=world, parallel=parallel)
    assert run_processes(mesh_of(program), body) == [needed] * world
