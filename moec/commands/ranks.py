"""`moec train` on several ranks: started here (`--nproc N`), or each by a launcher such as torchrun.

    moec train … --nproc 4                       4 processes of `moec train …`, started again when one is lost
    torchrun --nproc-per-node 4 -m moec train …  the same processes, on as many machines as torchrun is given

Each of these processes is one rank of a job (`moec.commands.job`).
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moec.commands.asked import Run, require_right_folder, training_settings
from moec.commands.job import RankOfJob, place_in_job
from moec.commands.learn import finish, require_room, train, warn_of_no_teacher
from moec.commands.programs import part_of
from moec.commands.tokenizer import open_tokenizer, record_tokenizer
from moec.errors import PlanError
from moec.ir.mesh import Mesh
from moec.local_program import LocalProgram
from moec.models import is_saved_program
from moec.passes.arrange_ranks import data_size
from moec.plan import Plan, Train
from moec.runtime.checkpoint import latest_checkpoint
from moec.runtime.data import load_text
from moec.runtime.launch import INTERRUPTED, Place, launch
from moec.runtime.mesh import agree, connected
from moec.runtime.train import Trainer, TrainResult


def train_anywhere(run: Run) -> int:
    """`moec train`: in this process, in processes started here, or as one rank of a job; gives the status."""
    place = place_in_job("train", run.nproc)
    if place is not None:
        return TrainingRank(run, place).run()
    if run.nproc is None:
        return train(run)
    _refuse_early(run, run.nproc)
    return start_ranks(run, run.nproc)


def start_ranks(run: Run, nproc: int) -> int:
    """Start `nproc` processes of the same command; gives the exit status of the job."""
    console = Console(stderr=True)
    return launch(
        ["-m", "moec", *replace(run, nproc=None, max_restarts=0).words()],
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


class TrainingRank(RankOfJob):
    """One rank that trains."""

    def __init__(self, run: Run, place: Place) -> None:
        super().__init__(place)
        self.asked = run

    def work(self) -> int:
        """Train together with the other ranks; gives the exit status."""
        run = self.asked
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
            return latest_checkpoint(Path(self.asked.out)) is not None
        require_right_folder(self.asked)
        return self.asked.resume

    def _part(self) -> LocalProgram:
        """This rank's part. All compile the whole; rank 0 alone proves it, once, for all the same."""
        run, place = self.asked, self.place
        verify = None if place.rank == place.restarts == 0 else "off"
        local = part_of(run.model, run.plan, place.rank, place.world, verify=verify, trust=run.trust)
        gc.collect()  # the whole goes before training needs the room
        return local

    def _learn(self, local: LocalProgram, settings: Train, resume: bool) -> TrainResult:
        run, mesh = self.asked, local.layout.mesh
        limit = local.plan.parallel.timeout if local.plan else Plan().parallel.timeout
        words = open_tokenizer(run.tokenizer, local.source.tokenizer)
        data = load_text(*run.data, sequence=settings.sequence, vocabulary=words)
        eager = local.backend in ("eager", "fused")
        with self.watched(mesh, limit), self.followed(local.executed, eager):
            agree("settings", str(settings))
            console = Console(stderr=run.as_json)
            warn_of_no_teacher(run, local.plan, console)
            trainer = Trainer(local, settings, data, run.out, plan=local.plan, console=console)
            self.trail.step = lambda: trainer.step + 1
            result = trainer.run(resume=resume)
            if not result.interrupted:
                record_tokenizer(local, words)
                local.eval().save(run.program)
            return result
