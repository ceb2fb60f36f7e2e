"""Every command of docs/cli.md prints what the page says it prints.

A line `…` stands for any number of lines; numbers that depend on the machine or on rounding are compared by
place, not by value.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from moec.cli import app
from tests.cli.conftest import run_moec

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "cli.md"
BLOCK = re.compile(r"^```console\n\$ moec (.*)\n((?:.*\n)*?)```$", re.MULTILINE)
MEASURED = re.compile(r"\d[\d,]*\.\d+|\d[\d,]*(?= tokens/s)|\de[+-]\d\d")


def expected() -> list[tuple[str, str]]:
    """The commands of the page and their output, in order: later ones read what earlier ones made."""
    return [(found[1], found[2]) for found in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]


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


def test_the_page_says_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "student.toml").write_text(
        "[student]\ndepth = 3\n\n[distill]\nstop = 0.7\n\n[train]\nsequence = 64\n", encoding="utf-8"
    )
    for command, output in expected():
        result = run_moec(*shlex.split(command))
        shown = result.stdout + result.stderr
        assert pattern_of(output).fullmatch(shown), f"moec {command}\n{shown}\nis not\n{output}"


def test_the_page_shows_every_command() -> None:
    shown = {command.split()[0] for command, _ in expected()}
    assert shown == {command.name or command.callback.__name__ for command in app.registered_commands}


def test_patterns_see_a_difference() -> None:
    page = "loss 3.312  12 tokens/s\n…\nend of 4\n"
    assert pattern_of(page).fullmatch("loss 2.0  9 tokens/s\nx\ny\nend of 4\n")
    assert not pattern_of(page).fullmatch("loss 2.0  9 tokens/s\nx\nend of 5\n")
    assert not pattern_of(page).fullmatch("loss nan  9 tokens/s\nend of 4\n")
