"""One rank of a job: how it meets the others, is watched, and how errors are told once for all ranks.

Rank 0 speaks for all of them; an error is told by the rank it happened on first.
"""

from __future__ import annotations

import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from rich.console import Console
from torch import fx

from moec.commands.screen import show_error
from moec.errors import MeshError, MoecError, RankError
from moec.ir.mesh import Mesh
from moec.runtime.launch import MISTAKE, Place, place_of
from moec.runtime.mesh import connected
from moec.runtime.rendezvous import meet
from moec.runtime.trail import Trail, watched_axes
from moec.runtime.verdict import Verdict
from moec.runtime.watch import Watch, is_lost_connection, lost_connection

FAILED = 1


def place_in_job(command: str, nproc: int | None) -> Place | None:
    """The place that a launcher gave this process, None when it is to start the job itself, or is alone.

    Raises `MeshError` for a rank that is asked to start `nproc` more.
    """
    place = place_of(os.environ)
    if place is not None and nproc is not None:
        found = f"--nproc {nproc} in a process that is rank {place.rank} of {place.world} already"
        needed = f"one launcher: torchrun without it, or moec {command} without torchrun"
        raise MeshError("--nproc", found, needed)
    return place


class RankOfJob(ABC):
    """One rank of a job, from the meeting of all to its end; what it does in between is `work`."""

    def __init__(self, place: Place) -> None:
        self.place, self.trail = place, Trail()

    @abstractmethod
    def work(self) -> int:
        """Do this rank's part; gives the exit status."""

    def run(self) -> int:
        """Meet the other ranks and work with them; gives the exit status."""
        if self.place.rank:
            _fall_silent()
        self.store = meet()
        self.verdict = Verdict(self.store, self.place.rank, self.place.world)
        with self._errors_told_once():
            status = self.work()
            dist.destroy_process_group()
        return status

    @contextmanager
    def watched(self, mesh: Mesh, limit: float) -> Iterator[None]:
        """Connected with the others, and watched: a rank that hangs for `limit` seconds ends the job."""
        with ExitStack() as stack:
            stack.enter_context(connected(mesh, timeout=timedelta(seconds=2 * limit)))
            stack.enter_context(watched_axes([axis for axis, n in mesh.axes().items() if n > 1], self.trail))
            stack.enter_context(Watch(self.trail, mesh, self.place.rank, self.store, limit, self._end))
            yield

    @contextmanager
    def followed(self, graph: fx.GraphModule, eager: bool = True) -> Iterator[None]:
        """Know the layers of `graph` by name in what is told of a hanging rank; compiled ones have no
        hooks."""
        with ExitStack() as stack:
            if eager:
                stack.enter_context(self.trail.follow(graph))
            yield

    # how it ends badly

    @contextmanager
    def _errors_told_once(self) -> Iterator[None]:
        try:
            yield
        except MoecError as error:
            raise self._told(error) from error
        except BrokenPipeError as error:  # whoever reads rank 0 has seen enough: nothing to tell
            self.verdict.claim(str(error), FAILED)
            raise
        except RuntimeError as error:
            if not is_lost_connection(error):
                self._leave_unless_first(error)
                raise
            raise self._told(lost_connection(error, self.trail, self.place.rank)) from error
        except Exception as error:
            self._leave_unless_first(error)
            raise

    def _told(self, error: MoecError) -> SystemExit:
        """Tell the user, unless another rank did; what is left is to leave."""
        status = FAILED if isinstance(error, RankError) else MISTAKE
        ranks = self.verdict.claim(str(error), status)
        if ranks is None:
            return SystemExit(self.verdict.status(status))
        show_error(_located(error, ranks))
        return SystemExit(status)

    def _leave_unless_first(self, error: Exception) -> None:
        """A bug is shown as Python shows it, by the first rank that meets it."""
        if self.verdict.claim(f"{type(error).__name__}: {error}", FAILED) is None:
            raise SystemExit(self.verdict.status(FAILED)) from error
        print(f"rank {self.place.rank}:", file=sys.stderr)

    def _end(self, error: RankError) -> NoReturn:
        """End the process from the thread of the watch: the other one waits where no exception reaches it."""
        if self.verdict.claim(str(error), FAILED) is not None:
            Console(stderr=True).show_cursor(True)
            show_error(error)
        sys.stderr.flush()
        os._exit(self.verdict.status(FAILED))


def _located(error: MoecError, ranks: str) -> MoecError:
    """The error with the ranks in front, unless all share it or it names one itself."""
    if ranks == "every rank" or error.where.startswith(("rank", "every rank")):
        return error
    return MoecError(f"{ranks}: {error.where}", error.found, error.needed, error.nearest)


def _fall_silent() -> None:
    """Rank 0 speaks for all."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    warnings.simplefilter("ignore")
