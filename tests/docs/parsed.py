"""Commands that pages show and tests do not run: each is read by the parser that would read it."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import typer
from torch.distributed.run import get_args_parser

from moec.cli import app
from tests.docs.pages import Block

EXPANSION = re.compile(r"\$\([^()]*\)|\$\{?\w+\}?")


def require_readable(block: Block) -> None:
    """Fail where a command of `block` is not one, or the block is no shell script."""
    if block.kind not in ("commands", "file"):
        return
    text = re.sub(r"^\$ (.*)\n(?:(?!\$ ).*\n)*", r"\1\n", block.text, flags=re.MULTILINE)
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, f"{block.where}: {checked.stderr}"
    commands = [line for line in text.replace("\\\n", " ").splitlines() if "moec" in shlex.split(line, True)]
    assert commands or "moec" not in text, f"{block.where}: no command of moec was found in it"
    for command in commands:
        try:
            require_command(shlex.split(EXPANSION.sub("1", command.replace('"$@"', "")), comments=True))
        except (Exception, SystemExit) as error:
            pytest.fail(f"{block.where}: {command}\n{error}", pytrace=False)


def require_command(words: list[str]) -> None:
    """Read `[srun] [torchrun … -m] moec COMMAND …`; raises what the parsers raise."""
    words = words[1:] if words[0] == "srun" else words
    if words[0] == "torchrun":
        read = get_args_parser().parse_args(words[1:])
        assert (read.training_script, read.module) == ("moec", True), "torchrun … -m moec …"
        words = ["moec", *read.training_script_args]
    program, name, *options = words
    assert program == "moec", f"moec or torchrun, not {program}"
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    group.commands[name].make_context(name, options).close()
