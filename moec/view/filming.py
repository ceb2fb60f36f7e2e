"""Film a program: its timeline, read off the snapshots that passes left behind.

    timeline = timeline_of(program, B=8, S=1024)

A frame is made of each graph once; a step is two frames and what their alignment says; blocks that are alike
share a drawing.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import Tensor, fx

import moec
import moec.passes.pipeline
from moec.cost.symbols import MEANINGS
from moec.errors import CostError, nearest
from moec.ir import Certificate, Origin, Pass, Program
from moec.ir.alignment import align
from moec.ir.diff import diff_text
from moec.ir.graphs import named_weights
from moec.ir.identity import identified
from moec.ir.stages import STAGES
from moec.ir.student_diff import student_diff
from moec.plan import Plan
from moec.view.drawings import Drawings
from moec.view.facts import facts_of
from moec.view.folding import sections_of
from moec.view.overlays import Overlays
from moec.view.pairing import Pairing, Union
from moec.view.plan_lines import PlanLines
from moec.view.stills import Frame
from moec.view.templates import Known
from moec.view.timeline import Check, Section, Step, Timeline

NOW, CAPTURED, TEACHER = "now", "captured", "teacher"
LETTERS = ("B", "S", "n", "m", "L")


def timeline_of(program: Program, **sizes: int) -> Timeline:
    """Everything that is shown of `program`, step by step.

    `sizes`: numbers for the letters of FLOPs and bytes (`B`, `S`, and `n`, `m`, `L` of a decoder); left out:
    one sequence as long as the model has positions. Raises `CostError` for other letters.
    """
    return Film(program, letters_of(program, sizes)).timeline()


def letters_of(program: Program, sizes: Mapping[str, int]) -> dict[str, int]:
    """A number for every letter: what is given, else one sequence as long as the model has positions.

    Raises `CostError` for other letters.
    """
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


class Film:
    """The frames of a program, each made once, and the steps between them."""

    def __init__(self, program: Program, sizes: Mapping[str, int]) -> None:
        self.program, self.sizes = program, sizes
        self.graphs: dict[str, fx.GraphModule] = {**program.stages, NOW: program.graph}
        identified(program.graph, len(program.certificates))  # one that was made by hand has none
        plan = program.plan if isinstance(program.plan, Plan) else None
        self.plan = PlanLines(plan, program.graph, program.layout is not None)
        self.drawings = Drawings(Overlays(sizes, program.layout))
        self.fused: dict[str, str] = {}
        self._frames: dict[str, Frame] = {}
        self._texts: dict[str, str] = {}
        self._spelled: Known = {}

    def timeline(self) -> Timeline:
        """All of it."""
        program = self.program
        steps = tuple(self._step(cut) for cut in self._cuts())
        ledger = tuple(program.ledger)
        notes = (*program.source.notes, *program.ledger.notes, *self.drawings.overlays.notes)
        return Timeline(
            program.source.name, program.stage, moec.__version__, facts_of(program), dict(self.sizes),
            self.plan.text, steps, tuple(self.drawings.drawn), ledger, notes, self._sources(), program.text(),
        )  # fmt: skip

    # which steps there are

    def _cuts(self) -> Iterator[_Cut]:
        """Capture, the passes in their order with the stages that they complete, and all of it at once."""
        known = [name for name in (*self.graphs, *self.program.texts) if name != NOW]
        if CAPTURED in known:
            yield _Cut("capture", "capture", "", CAPTURED)
        before = stage = CAPTURED if CAPTURED in known else TEACHER if TEACHER in known else ""
        for certificate, completed in self._passes(known):
            name = certificate.rewrite
            yield _Cut(name, "pass", before if name in known else "", name, certificate)
            before = name if name in known else before
            if completed and completed != stage:
                if stage:
                    yield _Cut(f"{stage} → {completed}", "stage", stage, completed)
                stage = completed
        first = next((name for name in (CAPTURED, TEACHER) if name in known), "")
        yield _Cut(f"{first or self.program.stage} → now", "stage", first, NOW)

    def _passes(self, known: Sequence[str]) -> Iterator[tuple[Certificate, str]]:
        """Each pass with the stage that it completed, '' for none: the snapshot that follows its own."""
        certificates = self.program.certificates
        last = {certificate.rewrite: place for place, certificate in enumerate(certificates)}
        followers = dict(pairwise(known))
        for place, certificate in enumerate(certificates):
            follows = followers.get(certificate.rewrite, "")
            yield certificate, follows if last[certificate.rewrite] == place and follows in STAGES else ""

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
        """The unions and sections of a step; none where there is no graph.

        Where there is only the graph after it, it is drawn as it is: nothing is known of what changed.
        """
        if cut.after not in self.graphs:
            return [], ()
        after = self.frame(cut.after)
        if cut.kind == "capture":
            before, aligned = None, None
        else:
            before = self.frame(cut.before) if cut.before in self.graphs else after
            aligned = align(before.root, after.root)
        if cut.name.startswith("fuse_") and aligned is not None:
            self.fused |= dict.fromkeys(aligned.created, cut.name)
        unions = Pairing(before, after, aligned, self.fused).unions()
        return unions, sections_of(unions, before, after, self.drawings)

    def step(self, before: str, after: str) -> Step:
        """What changed between two snapshots (`now`: the program as it is), drawn among `drawings`."""
        return self._step(_Cut(f"{before} → {after}", "stage", before, after))

    def frame(self, name: str) -> Frame:
        """The graph of a snapshot, taken apart."""
        if name not in self._frames:
            graph = self.graphs[name]
            local = self.program.rank is not None and name not in self._whole_stages
            self._frames[name] = Frame(graph, self._origin, self.plan.of, self._spelled, local)
        return self._frames[name]

    @cached_property
    def _whole_stages(self) -> frozenset[str]:
        """Snapshots from before a program of ranks was cut into parts."""
        names = list(self.program.stages)
        cut = next((place for place, name in enumerate(names) if name.startswith("lower_")), len(names))
        return frozenset(names[:cut])

    def _origin(self, name: str, value: Tensor) -> str:
        """What a weight comes from: as the program says of it, or else the user's name of the same tensor."""
        origins, now = self.program.origins, self._names_now.get(id(value), ())
        if name in now and name in origins:
            return _described(origins[name])
        captured = self._names_captured.get(id(value), ())
        if captured:
            return f"← {captured[0]}"
        return next((_described(origins[other]) for other in now if other in origins), "")

    @cached_property
    def _names_now(self) -> dict[int, tuple[str, ...]]:
        return _names(self.program.graph)

    @cached_property
    def _names_captured(self) -> dict[int, tuple[str, ...]]:
        return _names(self.graphs[CAPTURED]) if CAPTURED in self.graphs else {}

    def _diff(self, cut: _Cut) -> str:
        known = {*self.graphs, *self.program.texts}
        if not {cut.before, cut.after} <= known:
            return ""
        before, after = self._text(cut.before), self._text(cut.after)
        name = self.program.stage if cut.after == NOW else cut.after
        if cut.before == TEACHER:
            return student_diff(before, after, self.program.origins, name)
        return diff_text(before, after, cut.before, name)

    def _text(self, name: str) -> str:
        if name not in self._texts:
            self._texts[name] = self.program.text(None if name == NOW else name)
        return self._texts[name]

    # what is said of the whole

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


def _names(root: fx.GraphModule) -> dict[int, tuple[str, ...]]:
    """The names of each weight; tied ones have several."""
    found: dict[int, tuple[str, ...]] = {}
    for name, value in named_weights(root):
        found[id(value)] = (*found.get(id(value), ()), name)
    return found


def _described(origin: Origin) -> str:
    """An origin as far as layers that are alike have it in common: not what each is in a teacher."""
    return replace(origin, teacher="").describe()


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
