"""The command line as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def moec(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moec", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_help_is_quick_and_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys, moec.cli; assert 'torch' not in sys.modules; moec.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Turn an ordinary dense GPT into a sparse one" in done.stdout


def test_a_mistake_ends_with_status_2(tmp_path: Path) -> None:
    done = moec("show", "gpt.py:small", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[:2] == ["gpt.py", "  found   no such file"]


def test_a_reader_that_leaves_early_is_no_error(saved: Path, tmp_path: Path) -> None:
    """`moec show … | head -1`: a pipe whose other end is closed."""
    command = [sys.executable, "-m", "moec", "show", str(saved), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
