"""Parts of programs that README.md and docs/ show are what is printed now; `make golden` puts them in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moec
from examples import gpt
from moec.testing import assert_golden
from tests.docs.pages import ROOT


@pytest.mark.golden
def test_the_readme_shows_the_program_as_it_is() -> None:
    readme = ROOT / "README.md"
    torch.manual_seed(0)
    program = moec.compile(gpt.small(), plan=ROOT / "examples" / "pr_moe.toml", verify="off")
    before, after = program.text("structured"), program.text()
    shown = [
        _part_with("def ffn_0(", before),
        _part_with("def moe_1(", after),
        _part_with("def mix_1(", after),
        _part_with("# block 1 ", after, between="\n\n"),
    ]
    _assert_shows(readme, "before and after", shown)


def _part_with(line: str, text: str, between: str = "\n\n\n") -> str:
    return next(part.strip("\n") for part in text.split(between) if line in part)


@pytest.mark.golden
def test_the_guide_shows_a_layer_of_one_rank_as_it_is() -> None:
    plan = moec.Plan.from_toml(ROOT / "examples" / "pr_moe.toml")
    plan = plan.model_copy(update={"parallel": plan.parallel.model_copy(update={"expert": 4})})
    local = moec.compile(gpt.small(), plan, world=4, verify="off").partition(0)
    text = local.text()
    shown = [
        _part_with("def dispatch_3(", text),
        _part_with("def moe_3(", text),
        _part_with("# block 3 ", text, between="\n\n"),
    ]
    _assert_shows(ROOT / "docs" / "distributed.md", "partitioned", shown)


@pytest.mark.golden
def test_the_guide_shows_a_decoder_as_it_is() -> None:
    torch.manual_seed(0)
    program = moec.compile(gpt.small(), plan=ROOT / "examples" / "pr_moe.toml", verify="off")
    decoder = program.decoder()
    text, page = decoder.program.text(), ROOT / "docs" / "inference.md"
    shown = [_part_with(line, text) for line in ("def positions(", "def attention_0(")]
    _assert_shows(page, "cached", shown)
    _assert_shows(page, "fused", [_part_with("def moe_1(", decoder.fused.text())])


@pytest.mark.golden
def test_the_guide_shows_a_cost_as_it_is() -> None:
    program = moec.compile(gpt.small(), plan=ROOT / "examples" / "pr_moe.toml", verify="off")
    _assert_shows(ROOT / "docs" / "cost.md", "costs", [str(program.cost("forward"))], language="")


def _assert_shows(page: Path, marker: str, parts: list[str], language: str = "py") -> None:
    """The page holds these parts of a program, as code, between the comments `marker`: begin and end."""
    begin, end = (f"<!-- {marker}: {edge} -->" for edge in ("begin", "end"))
    fence = "```"  # not marked `python`: parts of a program do not run by themselves
    excerpt = "\n\n".join(parts)
    head, _, rest = page.read_text(encoding="utf-8").partition(begin)
    assert_golden(
        f"{head}{begin}\n\n{fence}{language}\n{excerpt}\n{fence}\n\n{end}{rest.partition(end)[2]}", page
    )
