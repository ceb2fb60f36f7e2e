"""Jobs of real processes: `moec train` in a folder of its own, its ranks, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GPT = f"{Path(__file__).with_name('models.py')}:gpt"
#: A `moec train` whose ranks fail where the environment says (see `faulty.py`).
FAULTY = [str(Path(__file__).with_name("faulty.py"))]
LONG = 240.0

PLAN = """
[moe]
layers = "1::2"
experts = 4
residual = "learned"
[parallel]
expert = 2
timeout = {timeout}
"""
#: The end of every plan here: short runs, each step of which is recorded.
TRAINING = """
[compile]
verify = "off"
[train]
steps = {steps}
batch = 4
sequence = 12
eval_batches = 1
save_every = 5
log_every = 1
eval_every = 0
"""


def environment(**more: object) -> dict[str, str]:
    """This environment without a launcher's words, and with `more`."""
    launched = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
    kept = {name: value for name, value in os.environ.items() if name not in launched}
    return {**kept, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in more.items()}}


def write_plan(folder: Path, *, steps: int = 60, timeout: float = 60, name: str = "plan.toml") -> Path:
    """The plan of two expert ranks."""
    path = folder / name
    path.write_text((PLAN + TRAINING).format(steps=steps, timeout=timeout))
    return path


class Job:
    """`moec train` (or another command) of the tiny GPT in `folder`, into `folder/run`; a context that leaves
    nothing running."""

    def __init__(
        self,
        folder: Path,
        *words: object,
        module: list[str] | None = None,
        env: Mapping[str, object] | None = None,
        model: str = GPT,
        command: str = "train",
    ) -> None:
        self.folder, self.run = folder, folder / "run"
        if not (folder / "plan.toml").exists():
            write_plan(folder)
        (folder / "text.txt").write_text("abc abd abe " * 100)
        given = ["--plan", "plan.toml"] if ":" in model else []
        line = [sys.executable, *(module or ["-m", "moec"]), command, model, *given]
        line += ["--data", "text.txt", "--out", "run", *map(str, words)]
        self.process = subprocess.Popen(
            line, cwd=folder, env=environment(**(env or {})), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def end(self, timeout: float = LONG) -> tuple[int, str, str]:
        """Wait for it: exit status, standard output, standard error."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def succeed(self) -> str:
        """Wait for it to end well; gives its output."""
        status, out, err = self.end()
        assert status == 0, f"status {status}\n{out}\n{err}"
        return out

    def ranks(self) -> list[int]:
        """The process ids of the ranks, by rank: the launcher's children, in the order it started them."""
        listed = subprocess.run(
            ["ps", "-axo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
        )
        rows = [line.split() for line in listed.stdout.splitlines()]
        own = str(self.process.pid)
        return sorted(int(pid) for pid, parent, state in rows if parent == own and state[0] != "Z")

    def reach(self, step: int, timeout: float = LONG) -> None:
        """Wait until `step` steps are recorded."""
        self.wait_until(lambda: len(curve(self.run)) >= step, timeout)

    def wait_until(self, holds: Callable[[], bool], timeout: float = LONG, pause: float = 0.02) -> None:
        """Poll; an error when the job ends first, or after `timeout`."""
        deadline = time.monotonic() + timeout
        while not holds():
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(pause)

    def kill(self) -> None:
        """Kill the launcher and all ranks at one moment, as a machine that goes down does."""
        ranks = self.ranks()
        for pid in (self.process.pid, *ranks):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def curve(run: Path) -> list[dict[str, Any]]:
    """The recorded steps of a run without the time they took, oldest first; whole lines alone."""
    path = run / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {name: value for name, value in row.items() if name != "tokens_per_second"}
        for row in rows
        if row["kind"] == "step"
    ]


def told(err: str) -> list[str]:
    """The lines of a job's standard error that moec wrote, those of gloo apart."""
    return [line for line in err.splitlines() if line and "gloo" not in line]
