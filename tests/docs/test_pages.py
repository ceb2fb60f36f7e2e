"""Every block of code of README.md, CONTRIBUTING.md and docs/ runs, and prints what the page says.

See `pages.py` for what is a block of which kind. Blocks that do not run every day are told one by one, and
their commands are at least read by the parsers that would read them.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from moec.cli import app
from tests.docs.pages import PAGES, ROOT, Block, blocks_of
from tests.docs.parsed import require_command, require_readable
from tests.docs.running import Page, commands_of, pattern_of

BLOCKS = {page: blocks_of(page) for page in PAGES}
EVERY_DAY = [page for page, blocks in BLOCKS.items() if any(not block.when for block in blocks)]
NIGHTLY = [page for page, blocks in BLOCKS.items() if any(block.when == "nightly" for block in blocks)]

# Why blocks are not run at all, and how many there are; a new one has to be put down here.
NOT_RUN = {"Slurm": 1, "two machines": 1, "a rank that hangs": 1}
NIGHTLY_REASONS = {
    "minutes",
    "processes",
    "measures the machine",
    "as on the page of the command line",
}


def name(page: Path) -> str:
    """`docs/cli.md`."""
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a page: empty, but for the examples that come with the project."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.mark.golden
@pytest.mark.timeout(900)  # a page is many commands, and machines are busy
@pytest.mark.parametrize("page", EVERY_DAY, ids=name)
def test_a_page_runs(page: Path, folder: Path) -> None:
    Page(folder).run(block for block in BLOCKS[page] if not block.when)


@pytest.mark.nightly
@pytest.mark.parametrize("page", NIGHTLY, ids=name)
def test_a_page_runs_with_what_takes_long(page: Path, folder: Path) -> None:
    Page(folder).run(block for block in BLOCKS[page] if block.when != "not run")


def test_nothing_is_left_untested_unseen() -> None:
    blocks = [block for page in BLOCKS.values() for block in page]
    untested = [block.where for block in blocks if block.kind == "other" and not block.when]
    assert not untested, "mark these blocks so that something tests them, or say why not"
    reasons = Counter(block.why for block in blocks if block.when == "not run")
    assert reasons == NOT_RUN
    assert {block.why for block in blocks if block.when == "nightly"} <= NIGHTLY_REASONS


def test_commands_that_do_not_run_every_day_are_read() -> None:
    kept = [block for blocks in BLOCKS.values() for block in blocks if block.when]
    assert kept
    for block in kept:
        require_readable(block)


@pytest.mark.parametrize(
    "command",
    [
        "moec train model.py:large --stepz 3",
        "moec trane model.py:large",
        "moec train model.py:large --nproc four",
        "torchrun --nnodez 2 -m moec train model.py:large",
        "torchrun --nnodes 2 moec train model.py:large",
        "bash moec",
    ],
)
def test_reading_refuses_what_would_not_run(command: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        require_command(shlex.split(command))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_indented_commands_are_there(page: Path) -> None:
    """Commands in indented blocks are of benchmarks, which run for hours: their modules and options exist."""
    for module, options in re.findall(r"^    python -m (\S+)((?: +\S+)*)", page.read_text("utf-8"), re.M):
        file = ROOT / (module.replace(".", "/") + ".py")
        assert file.is_file(), f"{name(page)}: python -m {module}"
        for option in re.findall(r"--[\w-]+", options):
            words = {option, option.removeprefix("--").replace("-", "_") + ":"}
            assert any(word in file.read_text("utf-8") for word in words), f"{name(page)}: {module} {option}"


def test_the_pages_that_teach_by_code_are_among_them() -> None:
    taught = {name(page) for page, blocks in BLOCKS.items() if any(b.kind == "python" for b in blocks)}
    tutorials = {f"docs/tutorials/{page}.md" for page in ("your-own-gpt", "write-a-pass", "huggingface")}
    assert {"README.md", "docs/quick-start.md", "docs/concepts.md", *tutorials} <= taught


def test_the_page_of_the_command_line_shows_every_command() -> None:
    commands = [c for block in BLOCKS[ROOT / "docs" / "cli.md"] for c, output in commands_of(block) if output]
    shown = {command.split()[1] for command in commands}
    assert shown == {command.name or command.callback.__name__ for command in app.registered_commands}


def page_of(tmp_path: Path, *lines: str) -> list[Block]:
    """The blocks of a page of these lines, in which ~~~ stands for the fence."""
    page = tmp_path / "page.md"
    page.write_text("\n".join(lines).replace("~~~", "```") + "\n", encoding="utf-8")
    return blocks_of(page)


def test_a_block_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    blocks = page_of(
        tmp_path, "# A", "", "~~~python", "x = 1", "~~~", "~~~python", "", "assert x == 2", "~~~"
    )
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:7: this block fails(.|\n)*line 8"):
        Page(tmp_path).run(blocks)


def test_what_a_block_prints_is_compared(tmp_path: Path) -> None:
    shown = ("~~~python", "print('loss 2.5 of 3')", "~~~", "", "~~~text")
    assert Page(tmp_path).run(page_of(tmp_path, *shown, "loss 9.1 of 3", "~~~")) == 2
    with pytest.raises(pytest.fail.Exception, match=r"the block above prints\nloss 2\.5 of 3"):
        Page(tmp_path).run(page_of(tmp_path, *shown, "loss 9.1 of 4", "~~~"))


def test_commands_are_run_and_compared(tmp_path: Path) -> None:
    right = page_of(tmp_path, "~~~console", "$ moec plans nobody", "nobody", "…", "~~~")
    with pytest.raises(pytest.fail.Exception, match=r"moec plans nobody prints\n(.|\n)*no shipped plan"):
        Page(tmp_path).run(right)
    with pytest.raises(pytest.fail.Exception, match="ends with status 2"):
        Page(tmp_path).run(page_of(tmp_path, "~~~sh", "moec plans nobody", "~~~"))


def test_markers_are_seen(tmp_path: Path) -> None:
    (block,) = page_of(tmp_path, "<!-- not run: Slurm -->", "", '~~~sh title="a.sh"', "srun true", "~~~")
    assert (block.when, block.why, block.title, block.kind) == ("not run", "Slurm", "a.sh", "file")
    with pytest.raises(ValueError, match="no command that pages may have"):
        Page(tmp_path).run(page_of(tmp_path, "~~~sh", "rm -rf /", "~~~"))


def test_patterns_see_a_difference() -> None:
    page = "loss 3.312  12 tokens/s\n…\nend of 4\n"
    assert pattern_of(page).fullmatch("loss 2.0  9 tokens/s\nx\ny\nend of 4\n")
    assert not pattern_of(page).fullmatch("loss 2.0  9 tokens/s\nx\nend of 5\n")
    assert not pattern_of(page).fullmatch("loss nan  9 tokens/s\nend of 4\n")
