"""Runs a page from top to bottom: its Python in one namespace, its commands, in a folder of their own."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from moec.plan import Plan
from tests.cli.conftest import run_moec
from tests.docs.pages import ROOT, Block

MEASURED = re.compile(r"\d[\d,]*\.\d+(?:e[+-]\d\d)?|\d[\d,]*(?= tokens/s)|\de[+-]\d\d")


def pattern_of(text: str) -> re.Pattern[str]:
    """What an output has to look like."""
    lines = []
    for line in text.splitlines():
        if line == "…":
            lines.append(r"(?:.*\n)*")
            continue
        parts = [re.escape(part) for part in MEASURED.split(line)]
        spaced = [re.sub(r"(\\ )+", r" +", part) for part in parts]
        lines.append(r"[\d,.e+-]+".join(spaced).replace("…", ".*") + r" *\n")
    return re.compile("".join(lines))


def assert_printed(block: Block, expected: str, printed: str, what: str) -> None:
    """`printed` is what the page shows below `what`; `make golden` puts it in where nothing was left out."""
    printed = "\n".join(line.rstrip() for line in printed.rstrip().splitlines()) + "\n"
    if pattern_of(expected).fullmatch(printed):
        return
    text = block.page.read_text(encoding="utf-8")
    old, new = (f"```{block.language}\n{output}```\n" for output in (expected, printed))
    if os.environ.get("MOEC_GOLDEN") == "1" and "…" not in expected and old in text:
        block.page.write_text(text.replace(old, new, 1), encoding="utf-8")
    else:
        pytest.fail(f"{block.where}: {what} prints\n{printed}\nand the page says\n{expected}", pytrace=False)


def commands_of(block: Block) -> Iterator[tuple[str, str | None]]:
    """(command, what it prints) of a block of commands; None where the page does not say."""
    if not block.text.startswith("$ "):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield shlex.join(words), None
        return
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


class Page:
    """A page that is being run in `folder`, which is also the current one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, object] = {"__name__": "page"}
        self.printed = ""

    def run(self, blocks: Iterable[Block]) -> int:
        """Run the blocks in order; gives how many did something. A failure names the block's line."""
        done = 0
        for block in blocks:
            step = getattr(self, f"_{block.kind}", None)
            if step is not None:
                step(block)
                done += 1
        return done

    def _file(self, block: Block) -> None:
        if block.language == "toml":
            self._plan(block)
        path = self.folder / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")

    def _plan(self, block: Block) -> None:
        Plan.from_text(block.text, block.where)

    def _python(self, block: Block) -> None:
        printed = io.StringIO()
        # Blank lines in front make the numbers in a traceback those of the page.
        text = "\n" * (block.line - 1) + block.text
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(text, str(block.page), "exec"), self.names)
        except Exception:
            pytest.fail(f"{block.where}: this block fails\n{traceback.format_exc()}", pytrace=False)
        self.printed = printed.getvalue()

    def _output(self, block: Block) -> None:
        assert_printed(block, block.text, self.printed, "the block above")

    def _commands(self, block: Block) -> None:
        for command, output in commands_of(block):
            status, printed = run_command(command, self.folder)
            if output is not None:
                assert_printed(block, output, printed, command)
            elif status != 0:
                pytest.fail(f"{block.where}: {command} ends with status {status}\n{printed}", pytrace=False)


def run_command(command: str, folder: Path) -> tuple[int, str]:
    """(status, output) of `moec …`, in this process; `python …`, in another; `make …`, only as far as saying
    what it would do."""
    program, *words = shlex.split(command)
    if program == "moec" and "--nproc" not in words:
        result = run_moec(*words)
        return result.exit_code, result.stdout + result.stderr
    start = {
        "moec": [sys.executable, "-m", "moec"],
        "python": [sys.executable],
        "make": [str(shutil.which("make")), "--dry-run", "-C", str(ROOT)],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    if program not in start:
        raise ValueError(f"{command!r}: no command that pages may have: moec, {', '.join(start)}")
    done = subprocess.run([*start[program], *words], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr
