"""Film a program: its timeline, read off the snapshots that passes left behind.

    timeline = timeline_of(program, B=8, S=1024)

A frame is made of each graph once; a step is two frames and what their alignment says; blocks that are alike
share a drawing.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx

import moec
import moec.passes.pipeline
from moec.cost.symbols import MEANINGS
from moec.errors import CostError, nearest
from moec.ir import Certificate, Pass, Program
from moec.ir.alignment import Alignment, align
from moec.ir.diff import diff_text
from moec.ir.graphs import named_weights
from moec.ir.stages import STAGES
from moec.plan import Plan
from moec.view.drawings import Drawings
from moec.view.folding import sections_of
from moec.view.overlays import Overlays
from moec.view.pairing import Pairing, Union
from moec.view.plan_lines import PlanLines
from moec.view.stills import Frame
from moec.view.templates import Known
from moec.view.timeline import Check, LedgerRow, Section, Step, Timeline

NOW, CAPTURED = "now", "captured"
LETTERS = ("B", "S", "n", "m", "L")


def timeline_of(program: Program, **sizes: int) -> Timeline:
    """Everything that is shown of `program`, step by step.

    `sizes`: numbers for the letters of FLOPs and bytes (`B`, `S`, and `n`, `m`, `L` of a decoder); left out:
    one sequence as long as the model has positions. Raises `CostError` for other letters.
    """
    return _Film(program, _numbers(program, sizes)).timeline()


def _numbers(program: Program, sizes: Mapping[str, int]) -> dict[str, int]:
    for letter, number in sizes.items():
        if letter not in LETTERS:
            known = ", ".join(f"{one} ({MEANINGS[one]})" for one in LETTERS)
            raise CostError(
                "timeline", f"{letter} = {number}", f"letters of a graph: {known}", nearest(letter, LETTERS)
            )
        if type(number) is not int or number < 1:
            raise CostError("timeline", f"{letter} = {number!r}", "a whole number, at least one")
    positions = program.source.max_positions or 1024
    return {"B": 1, "S": positions, "n": 1, "m": 1, "L": positions, **sizes}


@dataclass(frozen=True)
class _Cut:
    """A step to be made: `name`, its `kind`, and the snapshots before and after it ('' for none)."""

    name: str
    kind: str
    before: str
    after: str
    certificate: Certificate | None = None


class _Film:
    def __init__(self, program: Program, sizes: Mapping[str, int]) -> None:
        self.program, self.sizes = program, sizes
        self.graphs: dict[str, fx.GraphModule] = {**program.stages, NOW: program.graph}
        self.plan = PlanLines(
            program.plan if isinstance(program.plan, Plan) else None,
            program.graph,
            program.layout is not None,
        )
        self.drawings = Drawings(Overlays(sizes, program.layout))
        self.fused: dict[str, str] = {}
        self._frames: dict[str, Frame] = {}
        self._texts: dict[str, str] = {}
        self._spelled: Known = {}

    def timeline(self) -> Timeline:
        program = self.program
        steps = tuple(self._step(cut) for cut in self._cuts())
        ledger = tuple(LedgerRow(**asdict(entry)) for entry in program.ledger)
        notes = (*program.source.notes, *program.ledger.notes)
        return Timeline(
            program.source.name, program.stage, moec.__version__, self._facts(), dict(self.sizes),
            self.plan.text, steps, tuple(self.drawings.drawn), ledger, notes, self._sources(), program.text(),
        )  # fmt: skip

    # which steps there are

    def _cuts(self) -> Iterator[_Cut]:
        """Capture, the passes in their order with the stages that they complete, and all of it at once."""
        first = CAPTURED if CAPTURED in self.graphs else next(iter(self.graphs))
        yield _Cut("capture" if first == CAPTURED else first, "capture", "", first)
        before, stage = first, first
        for certificate, completed in self._passes():
            name = certificate.rewrite
            yield _Cut(name, "pass", before, name, certificate)
            before = name if name in self.graphs else before
            if completed and completed != stage:
                yield _Cut(f"{stage} → {completed}", "stage", stage, completed)
                stage = completed
        if first != NOW:
            yield _Cut(f"{first} → now", "stage", first, NOW)

    def _passes(self) -> Iterator[tuple[Certificate, str]]:
        """Each pass with the stage that it completed, '' for none."""
        order = list(dict.fromkeys([*self.graphs, *self.program.texts]))
        last = {certificate.rewrite: place for place, certificate in enumerate(self.program.certificates)}
        for place, certificate in enumerate(self.program.certificates):
            at = order.index(certificate.rewrite) + 1 if certificate.rewrite in order else len(order)
            follows = order[at] if at < len(order) else ""
            fits = last[certificate.rewrite] == place and follows in STAGES
            yield certificate, follows if fits else ""

    # one step

    def _step(self, cut: _Cut) -> Step:
        unions, sections = self._drawn(cut)
        counts = Counter[str](pair.status for union in unions for pair in union.line_pairs())
        found = cut.certificate
        return Step(
            cut.name, cut.kind, cut.before, cut.after if cut.after != NOW else self.program.stage,  # type: ignore[arg-type]
            doc_of(cut.name) if cut.kind == "pass" else "", _check(found) if found is not None else None,
            found.seconds if found is not None else 0.0, dict(counts), sections, self._diff(cut),
        )  # fmt: skip

    def _drawn(self, cut: _Cut) -> tuple[list[Union], tuple[Section, ...]]:
        """The unions and sections of a step; none where a graph is missing."""
        if cut.after not in self.graphs or (cut.before and cut.before not in self.graphs):
            return [], ()
        before, after = (self._frame(name) if name else None for name in (cut.before, cut.after))
        assert after is not None
        aligned = self._aligned(cut) if before is not None else None
        if cut.name.startswith("fuse_") and aligned is not None:
            self.fused |= dict.fromkeys(aligned.created, cut.name)
        unions = Pairing(before, after, aligned, self.fused).unions()
        return unions, sections_of(unions, before, after, self.drawings)

    def _aligned(self, cut: _Cut) -> Alignment:
        return align(self.graphs[cut.before], self.graphs[cut.after])

    def _frame(self, name: str) -> Frame:
        if name not in self._frames:
            graph = self.graphs[name]
            local = self.program.rank is not None and name not in self._whole_stages
            self._frames[name] = Frame(graph, self._origin, self.plan.of, self._spelled, local)
        return self._frames[name]

    @cached_property
    def _whole_stages(self) -> frozenset[str]:
        """Snapshots from before a program of ranks was cut into parts."""
        names = list(self.graphs)
        cut = next((place for place, name in enumerate(names) if name.startswith("lower_")), len(names))
        return frozenset(names[:cut])

    def _origin(self, name: str, value: Tensor) -> str:
        """What a weight comes from: by its name now, or by the name that the same tensor has now."""
        origins = self.program.origins
        known = name if name in origins else self._now.get(id(value), "")
        return origins[known].describe() if known in origins else ""

    @cached_property
    def _now(self) -> dict[int, str]:
        return {id(value): name for name, value in named_weights(self.program.graph)}

    def _diff(self, cut: _Cut) -> str:
        if not cut.before or not all(name in self.graphs or name in self.program.texts for name in
                                     (cut.before, cut.after)):  # fmt: skip
            return ""
        return diff_text(self._text(cut.before), self._text(cut.after), cut.before, cut.after)

    def _text(self, name: str) -> str:
        if name not in self._texts:
            self._texts[name] = self.program.text(None if name == NOW else name)
        return self._texts[name]

    # what is said of the whole

    def _facts(self) -> dict[str, str]:
        program = self.program
        total, active = program.num_parameters(), program.num_parameters(active=True)
        facts = {"model": program.source.name, "stage": program.stage, "parameters": f"{total:,}"}
        facts |= {"active parameters": f"{active:,}"} if active != total else {}
        facts |= {"dtype": str(program.source.dtype).removeprefix("torch.")}
        facts |= {"vocabulary": f"{program.source.vocabulary:,}"}
        limit = program.source.max_positions
        facts |= {"positions": f"{limit:,}"} if limit is not None else {}
        facts |= {"experts": ", ".join(program._experts())} if program._experts() else {}
        facts |= {"mesh": str(program.layout.mesh)} if program.layout is not None else {}
        return facts

    def _sources(self) -> dict[str, str]:
        """The user's lines that something drawn was written on, as capture read them."""
        lines: Mapping[str, str] = self.graphs.get(CAPTURED, self.program.graph).meta.get("lines", {})
        named = {
            side.source for drawing in self.drawings.drawn for node in drawing.nodes
            for side in (node.before, node.after) if side is not None
        }  # fmt: skip
        named |= {box.source for drawing in self.drawings.drawn for box in drawing.regions}
        named |= {entry.source for entry in self.program.ledger}
        return {source: line for source, line in lines.items() if source in named}


def _check(certificate: Certificate) -> Check:
    """The worst check of a certificate: the one that uses most of its tolerance."""
    worst = max(certificate.checks, key=lambda check: check.error / (check.tolerance or 1.0), default=None)
    error, tolerance, what = (worst.error, worst.tolerance, worst.what) if worst else (None, None, "")
    return Check(certificate.contract, certificate.verdict, error, tolerance, what, certificate.note)


def doc_of(name: str) -> str:
    """What the pass of this name says of itself, its drawing included; '' where no such pass is known."""
    found = next((kind for kind in _kinds(Pass) if object.__new__(kind).name == name), None)
    module = sys.modules.get(found.__module__) if found is not None else None
    return (module.__doc__ or "") if module is not None else ""


def _kinds(kind: Any) -> Iterator[type[Pass]]:
    """Every pass that was imported; those of the pipelines are."""
    for one in kind.__subclasses__():
        if not inspect.isabstract(one):
            yield one
        yield from _kinds(one)
