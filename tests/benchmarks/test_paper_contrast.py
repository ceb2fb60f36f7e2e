"""The paper's contrast: its baselines compute what the program computes, and what is recorded."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import page, paper_contrast
from benchmarks.paper_contrast import BASELINES, LOOP, Result, compiled, measure
from benchmarks.paper_layers import CachedGPT, ExpertsInUse, OneHotEinsum
from benchmarks.peers import MissingPeerError
from benchmarks.peers_ranks import ExpertLayer
from examples.gpt import GPTConfig
from moec.program import Program

CONFIG = GPTConfig(64, 64, 4, 64, 2, dropout=0.0)
EINSUM = "PyTorch, one-hot einsum"


@pytest.fixture(scope="module")
def program() -> Program:
    return compiled(CONFIG, 16)


def _missing(layer: ExpertLayer) -> nn.Module:
    raise MissingPeerError("not installed: pip install it")


@pytest.mark.parametrize("rows", [1, 5])
def test_all_have_the_same_logits(program: Program, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASELINES, "DeepSpeed MoE", _missing)
    result = measure(program, CONFIG, rows, 4, 1, 10.0)
    assert list(result.times) == ["moec", LOOP, EINSUM]
    assert result.missing == {"DeepSpeed MoE": "not installed: pip install it"}
    assert max(result.difference_to_ours.values()) < 1e-6
    assert 1 <= result.experts_used <= rows
    assert result.times["moec"]["min_ratio"] == 1
    assert result.model == "4 layers, d64 f256 E16 K1"


@pytest.mark.parametrize("make", [OneHotEinsum, ExpertsInUse])
@torch.no_grad()
def test_a_baseline_is_the_program(program: Program, make: Callable[[ExpertLayer], nn.Module]) -> None:
    tokens = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(0))
    model = CachedGPT.of(program, CONFIG, make)
    model.new_cache(3, 11)
    expected = program(tokens)
    torch.testing.assert_close(model.step(tokens[:, :7], 0), expected[:, 6:7], rtol=0, atol=1e-5)
    for past in range(7, 11):
        logits = model.step(tokens[:, past : past + 1], past)
        torch.testing.assert_close(logits, expected[:, past : past + 1], rtol=0, atol=1e-5)


def test_a_baseline_shares_the_programs_weights(program: Program) -> None:
    model = CachedGPT.of(program, CONFIG, ExpertsInUse)
    ours = {weight.data_ptr() for weight in program.parameters()}
    theirs = {weight.data_ptr() for weight in model.model.parameters()}
    theirs |= {
        stack.data_ptr() for layer in model.of_type(ExpertsInUse) for stack in layer.layer.stacks.values()
    }
    assert theirs <= ours


def test_an_altered_baseline_is_seen(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    class Altered(ExpertsInUse):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    monkeypatch.setitem(BASELINES, "DeepSpeed MoE", Altered)
    with pytest.raises(AssertionError, match="logits of DeepSpeed MoE and moec differ by"):
        measure(program, CONFIG, 2, 8, 1, 10.0)


def test_the_table_says_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), width=130)
    monkeypatch.setattr(paper_contrast, "_CONSOLE", screen)
    row = {"min_ms": 4.0, "median_ms": 5.0, "min_ratio": 1.0, "median_ratio": 1.0}
    paper_contrast.show(Result("m", 8, 4, {"moec": row}, missing={"peer": "not installed"}, limit_ms=1.0))
    text = screen.file.getvalue()
    assert "not installed" in text
    assert "25%" in text


def test_the_page_holds_what_was_recorded() -> None:
    record = json.loads(paper_contrast.RESULTS.read_text(encoding="utf-8"))
    assert paper_contrast.page_table(record["cases"]) in page.PAGE.read_text(encoding="utf-8")
    apart = [value for case in record["cases"] for value in case["difference_to_ours"].values()]
    assert max(apart) < paper_contrast.SAME
    assert [case["rows"] for case in record["cases"]] == list(paper_contrast.BATCHES)
