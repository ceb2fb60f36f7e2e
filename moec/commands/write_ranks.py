"""`moec generate` on several ranks: started here (`--nproc N`), or each by a launcher such as torchrun.

Each rank holds its part of the program; the ranks of the first data rank write the text, the others lend
their experts, and rank 0 prints (see `moec.commands.job`).
"""

from __future__ import annotations

import gc

from rich.console import Console

from moec.commands.job import RankOfJob, place_in_job
from moec.commands.programs import part_of
from moec.commands.write import Opening, Writing, begin, given_prompt, opening_of, show_text, write
from moec.ir.mesh import Mesh
from moec.local_program import LocalProgram
from moec.plan import Plan
from moec.runtime.generation.generate_ranks import RankGeneration
from moec.runtime.launch import Place, launch
from moec.runtime.mesh import agree, connected

PROMPT = "moec/prompt"  # where the job's store keeps what rank 0 read


def write_anywhere(asked: Writing) -> int:
    """`moec generate`: in this process, in processes started here, or as one rank; gives the exit status."""
    place = place_in_job("generate", asked.nproc)
    if place is not None:
        return _WritingRank(asked, place).run()
    if asked.nproc is not None:
        return _write_on_ranks(asked, asked.nproc)
    write(asked)
    return 0


def _write_on_ranks(asked: Writing, nproc: int) -> int:
    """Start `nproc` processes of the same command."""
    if asked.prompt != "-":
        opening_of(asked, given_prompt(asked))  # mistakes that need no processes to be seen
    console = Console(stderr=True)
    return launch(
        ["-m", "moec", *words(asked)],
        nproc,
        tell=lambda line: console.print(line, highlight=False, soft_wrap=True),
    )


class _WritingRank(RankOfJob):
    """One rank that writes, or helps to."""

    def __init__(self, asked: Writing, place: Place) -> None:
        super().__init__(place)
        self.asked = asked

    def work(self) -> int:
        """Write together with the other ranks; gives the exit status."""
        asked = self.asked
        with connected(Mesh(data=self.place.world)):
            agree("model", asked.model)
            agree("plan", Plan.resolve(asked.plan).to_toml())
        opening = opening_of(asked, self._prompt())
        local = self._part()
        limit = (local.plan or Plan()).parallel.timeout
        with self.watched(local.layout.mesh, limit):
            self._write(local, opening)
        return 0

    def _write(self, local: LocalProgram, opening: Opening) -> None:
        generation = begin(local, opening, self.asked)
        if not isinstance(generation, RankGeneration):  # a job of one rank
            show_text(generation, opening, self.asked.stop)
            return
        self.trail.step = lambda: generation.lockstep.steps
        with self.followed(local.decoder(generation.request.length).fused.graph):
            show_text(generation, opening, self.asked.stop)

    def _prompt(self) -> bytes:
        """What rank 0 was given; it alone reads standard input, which all ranks share."""
        if self.place.rank == 0:
            self.store.set(PROMPT, given_prompt(self.asked).hex())
        return bytes.fromhex(self.store.get(PROMPT).decode())

    def _part(self) -> LocalProgram:
        """This rank's part. All compile the whole; rank 0 alone proves it, once, for all the same."""
        asked, place = self.asked, self.place
        verify = None if place.rank == 0 else "off"
        local = part_of(asked.model, asked.plan, place.rank, place.world, verify=verify, trust=asked.trust)
        gc.collect()  # the whole goes before the caches come
        return local.eval()


def words(asked: Writing) -> list[str]:
    """The words of the command line that ask for it on one rank, after `moec`."""
    given: dict[str, object] = {"--plan": asked.plan, "--max-new-tokens": asked.new}
    given |= {f"--{name.replace('_', '-')}": value for name, value in asked.options.items()}
    given["--tokenizer"] = asked.tokenizer
    pairs = [f"{name}={value}" for name, value in given.items() if value is not None]
    stops = [f"--stop={text}" for text in asked.stop]
    trusting = ["--trust"] * asked.trust
    return ["generate", asked.model, f"--prompt={asked.prompt}", *pairs, *stops, *trusting]
