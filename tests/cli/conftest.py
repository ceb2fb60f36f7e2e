"""The command line, run in this process, and one saved program for all who only read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moec.cli import app

MODELS = Path(__file__).with_name("models.py")
GPT = f"{MODELS}:gpt"

Moec = Callable[..., Result]


def run_moec(*words: object) -> Result:
    """`moec` with these words; whatever it raises beside leaving comes through."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False, prog_name="moec")


@pytest.fixture(scope="session")
def moec_() -> Moec:
    """A command that has to succeed."""

    def run(*words: object) -> Result:
        result = run_moec(*words)
        assert result.exit_code == 0, result.output
        return result

    return run


@pytest.fixture
def refused() -> Callable[..., str]:
    """A command that has to be refused: status 2, no output, no traceback; gives the lines of the error."""

    def run(*words: object) -> str:
        result = run_moec(*words)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        labels = [line.split()[0] for line in result.stderr.splitlines()[1:]]
        assert labels in (["found", "needed"], ["found", "needed", "nearest"]), result.stderr
        return result.stderr

    return run


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A residual plan of four experts, and a run of four steps."""
    path = tmp_path_factory.mktemp("plans") / "four.toml"
    path.write_text(
        '[moe]\nlayers = "1::2"\nexperts = 4\nresidual = "learned"\n'
        "[train]\nsteps = 4\nbatch = 2\nsequence = 12\neval_batches = 1\nsave_every = 2\n"
    )
    return path


@pytest.fixture(scope="session")
def saved(moec_: Moec, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved program; tests read it and leave it alone."""
    folder = tmp_path_factory.mktemp("saved") / "program"
    moec_("compile", GPT, "--plan", plan, "--out", folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text to train on."""
    path = tmp_path / "text.txt"
    path.write_text("abc abd abe " * 100)
    return path
