"""`moec train` on several ranks: started here (`--nproc N`), or each by a launcher such as torchrun.

    moec train … --nproc 4                       4 processes of `moec train …`, started again when one is lost
    torchrun --nproc-per-node 4 -m moec train …  the same processes, on as many machines as torchrun is given

Each of these processes is one rank. Rank 0 speaks for all of them; an error is told once, by the rank it
happened on.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from rich.console import Console

from moec.commands.learn import (
    Run,
    finish,
    require_right_folder,
    require_room,
    train,
    training_settings,
    words,
)
from moec.commands.programs import part_of
from moec.commands.screen import show_error
from moec.errors import MeshError, MoecError, PlanError, RankError
from moec.ir.mesh import Mesh
from moec.local_program import LocalProgram
from moec.models import is_saved_program
from moec.passes.arrange_ranks import data_size
from moec.plan import Plan, Train
from moec.runtime.checkpoint import latest_checkpoint
from moec.runtime.data import load_text
from moec.runtime.launch import INTERRUPTED, MISTAKE, Place, launch, place_of
from moec.runtime.mesh import agree, connected
from moec.runtime.rendezvous import meet
from moec.runtime.trail import Trail, watched_axes
from moec.runtime.train import Trainer, TrainResult
from moec.runtime.verdict import Verdict
from moec.runtime.watch import Watch, is_lost_connection, lost_connection

FAILED = 1


def train_anywhere(run: Run) -> int:
    """`moec train`: in this process, in processes started here, or as one rank of a job; gives the status."""
    place = place_of(os.environ)
    if place is None:
        return train(run) if run.nproc is None else _train_on_ranks(run, run.nproc)
    if run.nproc is not None:
        found = f"--nproc {run.nproc} in a process that is rank {place.rank} of {place.world} already"
        raise MeshError("--nproc", found, "one launcher: torchrun without it, or moec train without torchrun")
    return _RankOfJob(run, place).train()


def _train_on_ranks(run: Run, nproc: int) -> int:
    """Start `nproc` processes of the same command."""
    _refuse_early(run, nproc)
    console = Console(stderr=True)
    return launch(
        ["-m", "moec", *words(replace(run, nproc=None, max_restarts=0))],
        nproc,
        max_restarts=run.max_restarts,
        tell=lambda line: console.print(line, highlight=False, soft_wrap=True),
    )


def _refuse_early(run: Run, nproc: int) -> None:
    """Mistakes that need no processes to be seen."""
    require_right_folder(run)
    if is_saved_program(run.model):
        return  # its plan lies with it
    plan = Plan.resolve(run.plan)
    settings = training_settings(plan.train, run.changed)
    data = data_size(plan.parallel, nproc)
    if settings.batch // settings.accumulate < data:
        found = f"batch = {settings.batch} in {settings.accumulate} parts for {data} data ranks"
        raise PlanError("[train]", found, "a sequence at least for each rank in each part", f"batch = {data}")


class _RankOfJob:
    """One rank of a job, from the meeting of all to its end."""

    def __init__(self, run: Run, place: Place) -> None:
        self.run, self.place, self.trail = run, place, Trail()

    def train(self) -> int:
        """Train together with the other ranks; gives the exit status."""
        if self.place.rank:
            _fall_silent()
        self.store = meet()
        self.verdict = Verdict(self.store, self.place.rank, self.place.world)
        with self._errors_told_once():
            status = self._train()
            dist.destroy_process_group()
        return status

    def _train(self) -> int:
        run = self.run
        with connected(Mesh(data=self.place.world)):
            agree("model", run.model)
            agree("plan", Plan.resolve(run.plan).to_toml())
        resume, local = self._resumes(), self._part()
        settings = training_settings((local.plan or Plan()).train, run.changed)
        require_room(local, settings)
        result = self._learn(local, settings, resume)
        return finish(run, result) if self.place.rank == 0 else INTERRUPTED * result.interrupted

    def _resumes(self) -> bool:
        """A job that was started again goes on from its newest checkpoint, if it had come to one."""
        if self.place.restarts:
            return latest_checkpoint(Path(self.run.out)) is not None
        require_right_folder(self.run)
        return self.run.resume

    def _part(self) -> LocalProgram:
        """This rank's part. All compile the whole; rank 0 alone proves it, once, for all the same."""
        run, place = self.run, self.place
        verify = None if place.rank == place.restarts == 0 else "off"
        local = part_of(run.model, run.plan, place.rank, place.world, verify=verify, trust=run.trust)
        gc.collect()  # the whole goes before training needs the room
        return local

    def _learn(self, local: LocalProgram, settings: Train, resume: bool) -> TrainResult:
        run, mesh = self.run, local.layout.mesh
        limit = local.plan.parallel.timeout if local.plan else Plan().parallel.timeout
        data = load_text(*run.data, sequence=settings.sequence, vocabulary=run.tokenizer or "bytes")
        with ExitStack() as stack:
            stack.enter_context(connected(mesh, timeout=timedelta(seconds=2 * limit)))
            agree("settings", str(settings))
            stack.enter_context(watched_axes([axis for axis, n in mesh.axes().items() if n > 1], self.trail))
            if local.backend in ("eager", "fused"):  # a compiled graph has no hooks
                stack.enter_context(self.trail.follow(local.executed))
            stack.enter_context(Watch(self.trail, mesh, self.place.rank, self.store, limit, self._end))
            trainer = Trainer(
                local, settings, data, run.out, plan=local.plan, console=Console(stderr=run.as_json)
            )
            self.trail.step = lambda: trainer.step + 1
            result = trainer.run(resume=resume)
            if not result.interrupted:
                local.eval().save(Path(run.out) / "program")
            return result

    # how it ends badly

    @contextmanager
    def _errors_told_once(self) -> Iterator[None]:
        try:
            yield
        except MoecError as error:
            raise self._told(error) from error
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
