"""What came of running all ranks of a program in one process, and how far it is from the program itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moec.cost.rank.counted_traffic import compared
from moec.ir.mesh import Mesh
from moec.runtime.ops.sent import Traffic, summed
from moec.runtime.traffic_report import traffic_table
from moec.testing.tolerances import tolerance_of


@dataclass(frozen=True, repr=False)
class Simulation:
    """All ranks beside the whole program; `print` shows it, `agrees` says whether they are the same.

    `logits` [B, S, V]: those of the ranks, joined. `terms` and `expected`: the parts of the loss, summed over
    the ranks and of the whole program. `counts` and `expected_counts`: rows each expert computed, i64 [E] by
    layer. `gradients`: of every parameter, joined. Errors are relative to scale. `routed`: of each rank, the
    rows i64 [E] it sent to each expert, layer by layer. `traffic` and `predicted`: of each rank, as counted
    and as the graph says.
    """

    mesh: Mesh
    logits: Tensor
    terms: Mapping[str, float]
    expected: Mapping[str, float]
    counts: Mapping[str, Tensor]
    expected_counts: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    logits_error: float
    term_errors: Mapping[str, float]
    gradient_errors: Mapping[str, float]
    routed: Sequence[Sequence[Tensor]]
    traffic: Sequence[Traffic]
    predicted: Sequence[Traffic]
    seconds: float

    @property
    def loss(self) -> float:
        """The loss, summed over the ranks."""
        return self.terms["loss"]

    @property
    def max_error(self) -> float:
        """The largest of all errors."""
        return max([self.logits_error, *self.term_errors.values(), *self.gradient_errors.values()])

    @property
    def agrees(self) -> bool:
        """Whether the ranks compute what the program computes (to the tolerance of its dtype), give each
        expert as many rows, and send what the graph says."""
        same = all(torch.equal(self.counts[name], rows) for name, rows in self.expected_counts.items())
        return self.max_error <= tolerance_of(self.logits.dtype) and same and self.traffic_agrees

    @property
    def traffic_agrees(self) -> bool:
        """Whether every rank sent what the graph says, to the byte."""
        return not any(compared(*pair) for pair in zip(self.traffic, self.predicted, strict=True))

    def rows(self) -> dict[str, list[int]]:
        """For each expert layer, the rows that the experts of each rank computed."""
        tables = dict(zip(self.counts, zip(*self.routed, strict=True), strict=True))
        return {name: self._rows(name, torch.stack(tables[name])) for name in tables}

    def _rows(self, layer: str, sent_RE: Tensor) -> list[int]:
        """Ranks of one stretch of the world, as long as expert × slice, send their rows to each other."""
        axes = self.mesh.axes_of(layer)
        length, each = axes.expert * axes.slice, sent_RE.shape[1] // axes.expert
        to_BE = sent_RE.unflatten(0, (-1, length)).sum(1)
        found = []
        for rank in range(self.mesh.world):
            first = self.mesh.coordinate(axes.expert_axis, rank) * each
            found.append(int(to_BE[rank // length, first : first + each].sum()))
        return found

    def __str__(self) -> str:
        console = Console(width=120, color_system=None)
        with console.capture() as captured:
            self._print(console)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    __repr__ = __str__

    def _print(self, console: Console) -> None:
        batch, sequence, _ = self.logits.shape
        verdict = "the same as one process" if self.agrees else "NOT the same as one process"
        console.print(
            f"{self.mesh} · {batch} sequences of {sequence} tokens · {self.seconds:.1f} s · {verdict}"
        )
        console.print()
        console.print(self._errors())
        if self.counts:
            console.print()
            console.print(self._load())
        console.print()
        title = "what all ranks sent to each other"
        console.print(traffic_table(summed(self.traffic), summed(self.predicted), title))

    def _errors(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("", "one process", f"{self.mesh.world} ranks", "error"):
            table.add_column(name, justify="right" if name else "left")
        for name, value in self.terms.items():
            table.add_row(name, f"{self.expected[name]:.6f}", f"{value:.6f}", f"{self.term_errors[name]:.1e}")
        table.add_row("logits", "", "", f"{self.logits_error:.1e}")
        if self.gradient_errors:
            worst = max(self.gradient_errors, key=lambda name: self.gradient_errors[name])
            table.add_row("gradients", "", worst, f"{self.gradient_errors[worst]:.1e}")
        return table

    def _load(self) -> Table:
        table = Table(title="rows computed", title_justify="left", box=None, pad_edge=False)
        table.add_column("layer")
        for name in ("least on a rank", "most on a rank", "least of an expert", "most of an expert"):
            table.add_column(name, justify="right")
        for layer, rows in self.rows().items():
            experts = self.counts[layer].tolist()
            numbers = [min(rows), max(rows), min(experts), max(experts)]
            table.add_row(layer, *(f"{number:,}" for number in numbers))
        return table
