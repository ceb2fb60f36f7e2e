"""The comparison on two ranks: who takes part, that differences are seen, and what is recorded."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.multiprocessing.spawn import spawn

import moec
from benchmarks import ranks
from benchmarks.peers_ranks import FirstOutput, expert_layers, fill, is_expert, qwen3_moe
from benchmarks.race import race
from benchmarks.rank_cases import CASES, Case, Size, batch_of
from benchmarks.rank_steps import step_of_model
from benchmarks.ranks import Peaks, Result, compare, compiled, free_port, joined, measure

ROOT = Path(ranks.__file__).parents[1]
SMALL = Size(layers=2, width=64, hidden=32, experts=8, vocab=64, sequence=16, batch=2)
CASE = replace(CASES["qwen3"], size=SMALL)
OURS, THEIRS, MISSING = "moec", "transformers, eager", "Tutel, no drops"


def _rank(rank: int, port: int, folder: str) -> None:
    with joined(rank, port):
        result = measure(CASE, rounds=1, peaks=Peaks(10.0, 10.0))
        altered = _see_altered_weights(CASE)
        Path(folder, f"{rank}.json").write_text(json.dumps(vars(result) | {"altered": altered}))


def _see_altered_weights(case: Case) -> str:
    """What `compare` says of a model whose embedding differs by a thousandth from the one it is held to."""
    dense, batch = case.dense(case.size, case.size.hidden), batch_of(case.size)
    step, result = step_of_model(dense, batch), Result("altered", case.size.tokens)
    ours = step.gradients()
    compare("the same", step, ours, result)
    with torch.no_grad():
        next(dense.parameters()).mul_(1.001)
    try:
        compare("altered", step, ours, result)
    except AssertionError as error:
        return str(error)
    return "not seen"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_rank, (free_port(), str(folder)), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_all_compute_the_same_and_are_timed(results: list[dict[str, Any]]) -> None:
    first = results[0]
    assert {OURS, THEIRS, "transformers, grouped_mm"} <= set(first["times"])
    assert first["error_of_ours"][OURS] < ranks.SAME
    assert first["difference_to_ours"][THEIRS] < ranks.SAME
    assert first["losses"][THEIRS] == pytest.approx(first["losses"][OURS], rel=1e-5)
    assert first["times"][OURS]["min_ratio"] == 1.0
    assert all(row["busy_ms"] > 0 and row["min_ms"] > 0 for row in first["times"].values())
    assert first["limit"]["all_to_alls"] == 4 * SMALL.layers
    assert first["limit"]["sum_ms"] > first["limit"]["products_ms"] > 0


def test_ranks_record_the_same_times(results: list[dict[str, Any]]) -> None:
    assert results[0]["times"] == results[1]["times"]
    assert results[0]["error_of_ours"] == results[1]["error_of_ours"]


def test_who_is_not_installed_is_named_with_the_way_to_install(results: list[dict[str, Any]]) -> None:
    everyone = set(results[0]["times"]) | set(results[0]["missing"])
    assert everyone >= {MISSING, "DeepSpeed, no drops", "transformers, with its FSDP2"}
    assert all("install" in reason for reason in results[0]["missing"].values())


def test_other_gradients_are_seen(results: list[dict[str, Any]]) -> None:
    assert str(results[0]["altered"]).startswith("altered and moec have gradients that differ by")


def test_transformers_own_model_computes_what_the_program_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    torch.manual_seed(0)
    dense = CASE.dense(SMALL, SMALL.hidden)
    program = compiled(dense, CASE.moe["moec"])
    tokens = torch.randint(SMALL.vocab, (2, 9))
    theirs = qwen3_moe(dense, program, "eager")
    assert sum(p.numel() for p in theirs.parameters()) == program.num_parameters()
    torch.testing.assert_close(theirs(tokens).logits, program(tokens), rtol=1e-4, atol=1e-5)


def test_an_expert_layer_knows_its_weights_by_the_users_names() -> None:
    case = replace(CASES["top-1"], size=replace(SMALL, hidden=256))
    dense = case.dense(case.size, 256)
    plan = {"moe": case.moe["moec, no drops"]}
    first, last = expert_layers(moec.compile(dense, plan, world=1, verify="off"))
    assert (first.path, last.path) == ("blocks.0.mlp", "blocks.1.mlp")
    assert (first.experts, first.width, first.top_k) == (8, 64, 1)
    shapes = {name: tuple(stack.shape) for name, stack in first.stacks.items()}
    up, down = {"up.weight": (8, 256, 64), "up.bias": (8, 256)}, {"down.weight": (8, 64, 256)}
    assert shapes == {**up, **down, "down.bias": (8, 64)}


def test_a_peers_experts_are_told_by_its_marks() -> None:
    plain, deepspeeds, tutels = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    deepspeeds.allreduce, tutels._tutel_expert = False, True
    assert [is_expert(parameter) for parameter in (plain, deepspeeds, tutels)] == [False, True, True]


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a weight \[2\] for a peer's parameter \[1, 2\]"):
        fill(torch.zeros(1, 2), torch.ones(2))


def test_the_first_output_is_the_layers() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
            return x + 1, 7

    assert FirstOutput(Two())(torch.zeros(1)).item() == 1


def test_before_is_called_ahead_of_every_measured_round() -> None:
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = race(contenders, rounds=2, warm_up=1, before=lambda: calls.append("-"))
    assert "".join(calls) == "ab-a-b-b-a"
    assert [len(timing.busy) for timing in timings.values()] == [2, 2]


def test_the_table_says_who_drops_other_tokens_and_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), width=130)
    monkeypatch.setattr(ranks, "_CONSOLE", screen)
    row = {
        "min_ms": 10.0, "median_ms": 11.0, "min_ratio": 1.0, "median_ratio": 1.0, "busy_ms": 9.0,
        "busy_ratio": 1.0,
    }  # fmt: skip
    times, limit = {"moec": row, "DeepSpeed, capacity 1.0": row}, {"sum_busy_ms": 4.5}
    ranks.show(
        Result("c", 8, times, error_of_ours={"moec": 2e-7}, missing={"Tutel": "not installed"}, limit=limit)
    )
    text = screen.file.getvalue()
    assert "2e-07 from one process" in text
    assert "drops other tokens" in text
    assert "not installed" in text
    assert "50%" in text


def test_the_page_holds_what_was_recorded() -> None:
    record = json.loads((ROOT / "benchmarks/results/ranks.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert ranks.page_table(record["cases"]) in page
    assert record["command"] in page
    names = {"moec", "moec, no drops", "moec, capacity 1.0"}
    ours = [error for case in record["cases"] for error in case["error_of_ours"].values()]
    theirs = [apart for case in record["cases"] for apart in case["difference_to_ours"].values()]
    assert {name for case in record["cases"] for name in case["error_of_ours"]} == names
    assert max(ours + theirs) < ranks.SAME
