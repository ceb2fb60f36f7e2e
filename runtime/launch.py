"""The processes of a job: who this one is, and how several are started on this machine.

torch's elastic agent (what `torchrun` is made of) starts them, watches them, and starts them all again when
one is lost. The environment it gives each one is the same under `torchrun`, so a rank does not know the
difference.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousParameters, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous import registry as rendezvous_registry

from moec.errors import MeshError
from moec.runtime.rendezvous import NEEDED

#: What a process says by its exit status: a user's mistake, an interruption. Neither is helped by a restart.
MISTAKE, INTERRUPTED = 2, 130
#: Seconds that ranks have to save and leave when they are asked to, before they are killed.
PATIENCE = 120
#: The same for those that are left when one has failed.
HASTE = 5


@dataclass(frozen=True)
class Place:
    """Which of `world` processes this one is, and how often the job was started again before."""

    rank: int
    world: int
    restarts: int = 0


def place_of(environment: Mapping[str, str]) -> Place | None:
    """The place that a launcher gave this process; None when none did.

    Raises `MeshError`, naming what is missing, for half an environment.
    """
    if not {"RANK", "WORLD_SIZE"} & environment.keys():
        return None
    missing = [name for name in NEEDED if not environment.get(name)]
    if missing:
        found = f"{', '.join(name for name in NEEDED if name not in missing)}, and no {', '.join(missing)}"
        nearest = "torchrun --nproc-per-node N -m moec …, or moec train … --nproc N"
        raise MeshError("environment", found, "all four, by which ranks find each other", nearest)
    rank, world = environment["RANK"], environment["WORLD_SIZE"]
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        found = f"RANK={rank} and WORLD_SIZE={world}"
        raise MeshError("environment", found, "a number of ranks, and one from 0 to WORLD_SIZE - 1")
    return Place(int(rank), int(world), int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")))


class Agent(LocalElasticAgent):
    """torch's elastic agent, that tells what happened, and starts nothing again after a user's mistake."""

    def __init__(self, spec: WorkerSpec, tell: Callable[[str], None]) -> None:
        super().__init__(spec, DefaultLogsSpecs(), exit_barrier_timeout=PATIENCE, shutdown_timeout=PATIENCE)
        self._tell = tell
        self.ends: dict[int, int] = {}

    @property
    def status(self) -> int:
        """The exit status of the job: that of a rank that failed of itself, as a shell would say it."""
        code = next(iter(self.ends.values()), 0)
        return code if code >= 0 else 128 - code

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        ends = self._ends_so_far(worker_group)  # before those that are left are ended for their sake
        result: RunResult = super()._monitor_workers(worker_group)
        if result.is_failed():
            self.ends = ends or {rank: failure.exitcode for rank, failure in result.failures.items()}
            if self.status in (MISTAKE, INTERRUPTED):
                self._remaining_restarts = 0
            self._tell_of_failure()
        return result

    def _ends_so_far(self, worker_group: WorkerGroup) -> dict[int, int]:
        """The ranks on this machine that have failed, and their exit codes; signals are below zero."""
        assert isinstance(self._pcontext, SubprocessContext)
        codes = {
            worker_group.workers[local].global_rank: handler.proc.poll()
            for local, handler in self._pcontext.subprocess_handlers.items()
        }
        return {rank: code for rank, code in codes.items() if code}

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        assert self._pcontext is not None
        close = self._pcontext.close

        def close_soon(death_sig: signal.Signals | None = None, timeout: int = HASTE) -> None:
            close(death_sig, timeout)

        # When one rank has failed, the others are given 30 s to leave, and no setting to change it.
        self._pcontext.close = close_soon  # type: ignore[method-assign]
        return started

    def _tell_of_failure(self) -> None:
        killed = [
            f"rank {r} ended by {signal.Signals(-code).name}" for r, code in self.ends.items() if code < 0
        ]
        what, left = ", ".join(killed), self._remaining_restarts
        limit = self._worker_group.spec.max_restarts
        if left > 0:
            self._tell(f"{what or 'a rank failed'}; starting again ({limit - left + 1} of {limit})")
        elif killed:
            self._tell(f"{what}, and no restarts are left" if limit else what)


def launch(
    command: Sequence[str], nproc: int, *, max_restarts: int = 0, tell: Callable[[str], None] = print
) -> int:
    """Run `python command…` in `nproc` processes on this machine; gives the exit status of the job.

    They write to this process's output. When one fails, all are started again, up to `max_restarts` times;
    `tell` gets a line each time. Not after status 2 or 130.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    with _signals_kept(), _quiet():
        try:
            agent = Agent(_specification(command, nproc, max_restarts), tell)
            result = agent.run()
            return agent.status if result.is_failed() else 0
        except SignalException:
            return INTERRUPTED
        except (RendezvousTimeoutError, OSError) as error:
            raise MeshError("launch", str(error), "a free port on this machine") from error


def _specification(command: Sequence[str], nproc: int, max_restarts: int) -> WorkerSpec:
    parameters = RendezvousParameters(
        backend="c10d", endpoint="127.0.0.1:0", run_id=uuid.uuid4().hex, min_nodes=1, max_nodes=1,
        local_addr="127.0.0.1", is_host=True,
    )  # fmt: skip
    return WorkerSpec(
        role="moec",
        local_world_size=nproc,
        entrypoint=sys.executable,
        args=tuple(command),
        rdzv_handler=rendezvous_registry.get_rendezvous_handler(parameters),
        max_restarts=max_restarts,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )


@contextmanager
def _signals_kept() -> Iterator[None]:
    """The agent takes signals over, and does not put the handlers back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """What the agent has to say is said by `tell`; each of its loggers has a level of its own."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
