"""Generation against transformers: the same function, differences that are seen, and what is recorded."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import generation, page, peers_generation
from benchmarks.generation import Result, agreeing, check_tokens, compare_logits, gigabytes
from benchmarks.generation_cases import CASES, Case, Size, compiled, difference, prompts
from benchmarks.peers_generation import WAYS, ExpertsUsed, Way
from moec.program import Program

SMALL = {
    "mixtral": Size(2, 64, 96, 4, 2, 4, 2, 128),
    "qwen2-moe": Size(2, 64, 32, 12, 4, 4, 4, 128, shared=96),
}
KEYS = {case.name: key for key, case in CASES.items()}


def small(name: str) -> Case:
    return replace(CASES[name], size=SMALL[name])


@cache
def _compiled(name: str) -> tuple[Program, PreTrainedModel]:
    return compiled(small(name))


def pair(name: str) -> tuple[Program, PreTrainedModel]:
    """Our program and its twin, whose weights may be changed."""
    program, twin = _compiled(name)
    return program, copy.deepcopy(twin)


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "compiled", lambda case: pair(KEYS[case.name]))


#: The peers that need no compiler: one that does takes half a minute for each of four shapes.
UNCOMPILED = {name: way for name, way in WAYS.items() if not way.compiled}


@pytest.mark.parametrize("name", CASES)
def test_all_contenders_write_the_same_tokens(name: str) -> None:
    ways = UNCOMPILED | {"batched": Way("grouped_mm", "batched_mm")}
    for rows, result in zip((1, 3), generation.measure(small(name), [1, 3], 5, 1, 10.0, ways), strict=True):
        assert result.difference_of_logits < 1e-6
        assert set(result.times) == {
            "moec",
            "transformers",
            "transformers, eager experts",
            "batched",
        }
        assert not result.failed
        top_k = SMALL[name].top_k
        assert top_k <= result.experts_used <= min(top_k * rows, SMALL[name].experts)
        assert result.limit_ms == pytest.approx(result.step_gb / 10 * 1e3, abs=0.006)
        ours = result.times["moec"]
        assert ours["tokens_per_s"] == pytest.approx(5 * rows / ours["min_s"], rel=0.01)
        assert ours["min_ratio"] == ours["median_ratio"] == 1


def test_compiled_steps_are_compiled_and_the_default_ones_are_not() -> None:
    options = {name: way.options() for name, way in WAYS.items()}
    assert options["transformers"] == options["transformers, eager experts"] == {}
    for name in ("transformers, compiled", "transformers, batched_mm, compiled"):
        assert options[name]["cache_implementation"] == "static"
        assert options[name]["compile_config"]._compile_all_devices is True


def test_ways_share_the_weights_and_not_the_implementation() -> None:
    _, twin = pair("mixtral")
    write = peers_generation.transformers(twin, Way("grouped_mm", "batched_mm"))
    before = write(prompts(small("mixtral"), 1, 7), 3)
    assert twin.config._experts_implementation != "batched_mm"
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    assert not torch.equal(write(prompts(small("mixtral"), 1, 7), 3), before)


@pytest.mark.parametrize("name", CASES)
def test_an_altered_weight_is_seen(name: str) -> None:
    program, twin = pair(name)
    tokens = prompts(small(name), 2, 7)
    assert compare_logits(program, twin, tokens) < 1e-6
    with torch.no_grad():
        twin.model.layers[1].mlp.experts.down_proj.mul_(1.01)
    with pytest.raises(AssertionError, match="logits of transformers and moec differ by"):
        compare_logits(program, twin, tokens)


def test_another_token_or_another_number_of_them_is_seen() -> None:
    check_tokens(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]]), "it")
    with pytest.raises(AssertionError, match="it writes another token in row 1 at 0"):
        check_tokens(torch.tensor([[1, 2], [5, 4]]), torch.tensor([[1, 2], [3, 4]]), "it")
    with pytest.raises(AssertionError, match=r"it wrote tokens \[1, 1\], not \[1, 2\]"):
        check_tokens(torch.tensor([[1]]), torch.tensor([[1, 2]]), "it")


def test_a_peer_that_fails_is_recorded_and_ours_may_not() -> None:
    def fails(tokens: Tensor, new: int) -> Tensor:
        raise RuntimeError("no such thing\nat all")

    def writes(tokens: Tensor, new: int) -> Tensor:
        return tokens[:, :new]

    tokens, result = torch.ones(1, 4, dtype=torch.int64), Result("c", 1, 4, 2)
    assert list(agreeing({"moec": writes, "peer": fails}, tokens, 2, result)) == ["moec"]
    assert result.failed == {"peer": "RuntimeError: no such thing"}
    with pytest.raises(RuntimeError, match="no such thing"):
        agreeing({"moec": fails}, tokens, 2, result)


def test_what_a_step_reads() -> None:
    program, _ = pair("mixtral")
    experts, router, norms = 3 * 64 * 96, 4 * 64, 2 * 64
    attention = 2 * 64 * 64 + 2 * 32 * 64
    layer = 1.5 * experts + router + norms + attention
    assert gigabytes(program, 1.5, generation.EMBEDDING) == pytest.approx(
        4e-9 * (2 * layer + 64 + 128 * 64), rel=1e-9
    )


def test_experts_are_counted_while_decoding() -> None:
    used = ExpertsUsed.of(pair("mixtral")[1], prompts(small("mixtral"), 1, 9), 4)
    assert used == 2  # one token chooses two experts; the prompt's nine would have chosen all four


def test_differences_are_relative_to_the_largest_logit() -> None:
    assert difference(torch.tensor([2.0, -4.0]), torch.tensor([2.0, -5.0])) == 0.25


def test_the_table_says_who_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), width=130)
    monkeypatch.setattr(generation, "_CONSOLE", screen)
    row = {"tokens_per_s": 10.0, "first_token_ms": 5.0, "step_ms": 4.0, "min_ratio": 1, "median_ratio": 1}
    generation.show(Result("c", 8, 4, 2, times={"moec": row}, failed={"peer": "broke"}, limit_ms=1.0))
    text = screen.file.getvalue()
    assert "broke" in text
    assert "25%" in text


def test_the_page_holds_what_was_recorded() -> None:
    record = json.loads(generation.RESULTS.read_text(encoding="utf-8"))
    assert generation.page_table(record["cases"]) in page.PAGE.read_text(encoding="utf-8")
    assert {case["rows"] for case in record["cases"]} == {1, 8}
    assert len(record["cases"]) == 2 * len(CASES)
    assert max(case["difference_of_logits"] for case in record["cases"]) < generation.SAME


def test_a_table_is_put_between_its_marks(tmp_path: Path) -> None:
    begin, end = page.marks("x")
    place = tmp_path / "page.md"
    place.write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    page.write_table(place, "x", "| new |")
    page.write_table(place, "x", "| new |")
    assert place.read_text(encoding="utf-8") == f"before\n{begin}\n\n| new |\n\n{end}\nafter\n"
    place.write_text(f"{end}\n{begin}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="needs one line <!-- x: begin -->"):
        page.write_table(place, "x", "")


def test_only_the_benchmarks_own_record_changes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, end = page.marks("own")
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text(f"{begin}\n{end}\n", encoding="utf-8")
    own = tmp_path / "made" / "own.json"
    page.record({"cases": [1]}, tmp_path / "other.json", own, str)
    assert page.PAGE.read_text(encoding="utf-8") == f"{begin}\n{end}\n"
    page.record({"cases": [1]}, own, own, str)
    assert "\n[1]\n" in page.PAGE.read_text(encoding="utf-8")
    assert json.loads(own.read_text(encoding="utf-8")) == {"cases": [1]}
