"""Every Python block of README.md and docs/ runs: in order, in one namespace per page, in an empty folder."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import moec
from examples import gpt
from moec.testing import assert_golden

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code on a page; `line` is the line of the page that its first line stands on."""

    page: Path
    line: int
    text: str

    def run(self, names: dict[str, object]) -> None:
        """Execute it in `names`; an error names the line of the page."""
        # Blank lines in front make the numbers in a traceback those of the page.
        exec(compile("\n" * (self.line - 1) + self.text, str(self.page), "exec"), names)


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page that are marked `python`, from top to bottom."""
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, m.start(1)) + 1, m[1]) for m in BLOCK.finditer(text)]


def run_page(page: Path, folder: Path) -> int:
    """Run every block of `page`; gives how many there were. Fails naming the block that failed."""
    names: dict[str, object] = {"__name__": "page"}
    blocks = blocks_of(page)
    for block in blocks:
        try:
            block.run(names)
        except Exception:
            pytest.fail(f"{page}:{block.line}: this block fails\n{traceback.format_exc()}", pytrace=False)
    return len(blocks)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page)], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # pages name files by their place in the project
    assert run_page(page, tmp_path) > 0


def test_the_pages_that_teach_by_code_are_among_them() -> None:
    taught = {page.name for page in PAGES if blocks_of(page)}
    assert {"README.md", "writing-a-pass.md"} <= taught


def test_a_block_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    fence, end = "```python", "```"
    lines = ["# A page", "", fence, "x = 1", end, "", "and", "", fence, "", "assert x == 2", end, ""]
    page.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:10: this block fails(.|\n)*line 11"):
        run_page(page, tmp_path)


def test_every_link_to_a_file_leads_to_one() -> None:
    link = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
    missing = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in link.findall(page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not missing


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
