"""`moec generate`."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import moec
from moec.cli import app
from moec.commands import write
from moec.commands.write import until
from moec.runtime.generation.batch import Batch
from moec.runtime.generation.rows import Event
from tests.cli.conftest import GPT, Moec

Refused = Callable[..., str]


def bytes_of(program: moec.Program, prompt: bytes, new: int, **options: object) -> bytes:
    """What Python's `generate` writes; a separator (NUL) ends a text and is not shown."""
    (text,) = program.generate([list(prompt)], new, stop=0, **options)
    return bytes(text.tolist()).rstrip(b"\0")


def shown(text: bytes) -> str:
    decoded = text.decode("utf-8", "replace")
    return decoded if decoded.endswith("\n") else decoded + "\n"


def test_it_shows_the_prompt_and_more(moec_: Moec, saved: Path) -> None:
    out = moec_("generate", saved, "--prompt", "abc", "--max-new-tokens", 9).stdout
    assert out == shown(bytes_of(moec.load(saved), b"abc", 9))


def test_options_are_those_of_python(moec_: Moec, saved: Path) -> None:
    options = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    out = moec_("generate", saved, "--prompt", "abc", "-n", 12, *words).stdout
    assert out == shown(bytes_of(moec.load(saved), b"abc", 12, **options))
    assert out != moec_("generate", saved, "--prompt", "abc", "-n", 12, *words[:-1], 4).stdout


def test_a_model_writes_before_it_is_trained(moec_: Moec, plan: Path) -> None:
    out = moec_("generate", GPT, "--plan", plan, "--prompt", "ab", "-n", 5).stdout
    assert out == moec_("generate", GPT, "--plan", plan, "--prompt", "ab", "-n", 5).stdout
    assert out.startswith("ab")


def test_without_a_number_it_writes_what_there_is_room_for(moec_: Moec, saved: Path) -> None:
    out = moec_("generate", saved, "--prompt", "abc").stdout
    assert out == shown(bytes_of(moec.load(saved), b"abc", 13))


def test_keep_writes_beyond_the_longest_sequence(moec_: Moec, saved: Path) -> None:
    out = moec_("generate", saved, "--prompt", "abc", "-n", 60, "--keep", 8).stdout
    assert out == shown(bytes_of(moec.load(saved), b"abc", 60, keep=8))


def test_the_prompt_may_come_from_standard_input(saved: Path) -> None:
    words = ["generate", str(saved), "--prompt", "-", "-n", "4"]
    result = CliRunner().invoke(app, words, input="päd", catch_exceptions=False)
    assert result.stdout == shown(bytes_of(moec.load(saved), "päd".encode(), 4))


def test_it_ends_after_a_stop(moec_: Moec, saved: Path) -> None:
    words = ("generate", saved, "--prompt", "abc", "-n", 12, "--temperature", 1, "--seed", 2)
    whole = moec_(*words).stdout
    stop = whole[6:8]
    assert stop.strip()
    end = whole.index(stop, 3) + len(stop)
    assert moec_(*words, "--stop", "never this", "--stop", stop).stdout == whole[:end].rstrip("\n") + "\n"


def test_text_comes_as_it_is_written(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    """Each piece reaches the screen before the next token is computed."""
    order: list[str] = []
    step, show = Batch.step, write._show

    def noted_step(batch: Batch) -> list[Event]:
        order.append("step")
        return step(batch)

    def noted_show(piece: str) -> str:
        order.append("show")
        return show(piece)

    monkeypatch.setattr(Batch, "step", noted_step)
    monkeypatch.setattr(write, "_show", noted_show)
    CliRunner().invoke(app, ["generate", str(saved), "--prompt", "abc", "-n", "3"], catch_exceptions=False)
    assert order[:7] == ["show", "step", "show", "step", "show", "step", "show"]


class Screen(io.StringIO):
    """Standard output that is a terminal, or none."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_a_terminal_is_not_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, told in ((True, "a�[2J\n\tb"), (False, "a\x1b[2J\n\tb")):
        screen = Screen(terminal)
        monkeypatch.setattr(sys, "stdout", screen)
        write._show("a\x1b[2J\n\tb")
        assert screen.getvalue() == told


@given(
    text=st.text("ab\n", max_size=14), cuts=st.lists(st.integers(0, 14), max_size=6),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)  # fmt: skip
def test_a_stop_is_found_wherever_pieces_are_cut(text: str, cuts: list[int], stops: list[str]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert "".join(until(iter(pieces), stops)) == text[: min(ends, default=len(text))]


# what is refused


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["-n", "14"], ["found   a prompt of 3 tokens and 14 new ones: 17", "nearest --max-new-tokens 13"]),
        (["-n", "0"], ["found   --max-new-tokens 0"]),
        (["--temperature", "-1"], ["found   --temperature -1.0"]),
        (["--top-k", "5"], ["found   --top-k 5 with --temperature 0", "nearest --temperature 1.0"]),
        (["--top-p", "2", "--temperature", "1"], ["found   --top-p 2.0"]),
        (["--repetition-penalty", "0"], ["found   --repetition-penalty 0.0"]),
        (["--seed", "-1"], ["found   seed -1"]),
        (["--keep", "17"], ["found   keep 17", "at most 16"]),
        (["--stop", ""], ["--stop", "found   an empty text"]),
        (["--prompt", ""], ["--prompt", "found   an empty prompt"]),
        (["--prompt", "a" * 17], ["found   a prompt of 17 tokens", "at most 16 positions"]),
    ],
)
def test_what_cannot_be_written(words: list[str], lines: list[str], saved: Path, refused: Refused) -> None:
    told = refused("generate", saved, "--prompt", "abc", *words)
    assert [line for line in lines if line not in told] == [], told


def test_a_prompt_outside_of_the_vocabulary(refused: Refused) -> None:
    told = refused("generate", f"{GPT}?vocab=99", "--prompt", "eee")
    assert "token 101 of 'bytes', and a model of 99" in told
