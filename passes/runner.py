"""Run passes: fork, require, apply, shape, check, certify, snapshot. Passes know nothing of it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moec.errors import PassError, VerifyError, nearest
from moec.ir import Certificate, Check, Pass, Program
from moec.ir.compare import Observation, comparisons, error_of, observe
from moec.ir.graphs import named_weights
from moec.ir.identity import identified, identify, identities
from moec.ir.inputs import inputs_of
from moec.ir.shapes import propagate
from moec.ir.stages import check_stage

VERIFY = ("auto", "off", "full")

# `auto` proves programs that take about ten seconds or less in all: tokens × parameters × passes in fp64.
AUTO_PARAMETERS = 12_000_000
SAMPLE = (2, 7)


@dataclass
class Runner:
    """Runs a list of passes on a program.

    `verify`: `auto` proves contracts where that takes seconds, `full` always, `off` never. `disable`: names
    of passes to leave out. `in_place`: passes rewrite the very program they are given, and no snapshots are
    kept: for one that is made to be read once. Raises what a pass's `requires` raises, and `VerifyError` when
    a contract is broken, naming the pass and the tensor.
    """

    verify: str = "auto"
    disable: Collection[str] = ()
    in_place: bool = False
    _seen: Observation | None = field(default=None, repr=False)

    def run(self, program: Program, passes: Iterable[Pass]) -> Program:
        """The program after all passes, with a snapshot and a certificate for each."""
        passes = list(passes)
        self.require_names(passes)
        self._seen = None
        for rewrite in passes:
            if rewrite.name in self.disable:
                program.ledger = program.ledger.note(f"{rewrite.name} was disabled")
                program = self._finish(program, rewrite)
                continue
            program = self.step(program, rewrite)
        return program

    def step(self, before: Program, rewrite: Pass) -> Program:
        """One pass on a fork of `before`, or on itself where that is asked for."""
        started = time.perf_counter()
        rewrite.requires(before)
        contract = rewrite.contract_for(before)
        identified(before.graph, len(before.certificates))
        own = before if self.in_place else before.fork()
        stood = identities(own.graph)
        after = rewrite.apply(own)
        propagate(after.graph)
        identify(after.graph, stood.step(len(before.certificates) + 1, rewrite), stood)
        after.origins = after.origins.of_weights(name for name, _ in named_weights(after.graph))
        certificate = self._certify(rewrite, contract, before, after)
        took = time.perf_counter() - started
        after.certificates = (*before.certificates, replace(certificate, seconds=round(took, 3)))
        if not self.in_place:
            after.with_snapshot(rewrite.name)
        return self._finish(after, rewrite)

    def _finish(self, program: Program, rewrite: Pass) -> Program:
        if rewrite.makes:
            check_stage(program.graph, rewrite.makes)
            program.stage = rewrite.makes
            if not self.in_place:
                program.with_snapshot(rewrite.makes)
        return program

    def require_names(self, passes: Iterable[Pass]) -> None:
        """Raise `PassError`, with the nearest name, when `disable` or `verify` names what there is not."""
        names = [rewrite.name for rewrite in passes]
        if self.verify not in VERIFY:
            raise PassError(
                "verify", f"'{self.verify}'", f"one of {', '.join(VERIFY)}", nearest(self.verify, VERIFY)
            )
        for name in self.disable:
            if name not in names:
                raise PassError(
                    "disable", f"'{name}'", f"names of passes: {', '.join(names)}", nearest(name, names)
                )

    def _certify(self, rewrite: Pass, contract: str, before: Program, after: Program) -> Certificate:
        if not self._proves(before, after):
            self._seen = None
            return Certificate(rewrite.name, contract, "stated", note=self._why_not(before))
        checks = list(rewrite.ensures(before, after))
        if len(inputs_of(after.graph.graph)) > 1:
            return self._with_memory(rewrite, contract, checks)
        needed = self._seen or observe(before.graph, before.origins, proof_tokens(before))
        found = observe(after.graph, after.origins, proof_tokens(after))
        self._seen = found
        note = ""
        if contract == "exact":
            checks += comparisons(needed, found)
        else:
            note = f"logits moved by {error_of(found.logits, needed.logits):.1e} of their scale"
        _require(rewrite, checks)
        verdict = "proved" if contract == "exact" else "measured"
        return Certificate(rewrite.name, contract, verdict, tuple(checks), note)

    def _with_memory(self, rewrite: Pass, contract: str, checks: list[Check]) -> Certificate:
        """A decoder is not run on tokens alone: what the pass itself checks is what there is."""
        self._seen = None
        _require(rewrite, checks)
        note = "" if checks else "not checked here: a program with memory"
        return Certificate(rewrite.name, contract, "proved" if checks else "stated", tuple(checks), note)

    def _proves(self, before: Program, after: Program) -> bool:
        alone = after.rank is None  # the program of one rank does not run without the others
        if self.verify == "off" or self.in_place or not alone or any(p.is_meta for p in after.parameters()):
            return False
        return (
            self.verify == "full" or max(before.num_parameters(), after.num_parameters()) <= AUTO_PARAMETERS
        )

    def _why_not(self, program: Program) -> str:
        if program.rank is not None:
            return "not checked here: a rank runs with the others; program.simulate() compares"
        if any(p.is_meta for p in program.parameters()):
            return "not checked: the weights are on meta"
        return (
            "not checked: verify='off'"
            if self.verify == "off"
            else "not checked: large model; verify='full' checks"
        )


def proof_tokens(program: Program) -> Tensor:
    """The small fixed batch that contracts are proved on: random tokens of the vocabulary, i64 [2, ≤ 7]."""
    batch, length = SAMPLE
    limit = program.source.max_positions
    length = min(length, limit) if limit is not None else length
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in program.parameters()), torch.device("cpu"))
    return torch.randint(0, program.source.vocabulary, (batch, length), generator=generator).to(device)


def _require(rewrite: Pass, checks: list[Check]) -> None:
    broken = [check for check in checks if not check.holds]
    if broken:
        worst = broken[0]
        at = f" at {worst.worst}" if worst.worst else ""
        raise VerifyError(
            f"pass {rewrite.name}", f"{worst.what} differ by {worst.error:.1e} of their scale{at}",
            f"at most {worst.tolerance:.0e} in {worst.dtype} (contract: {rewrite.contract})",
            "moec bisect finds the site and writes a script that shows it",
        )  # fmt: skip
