"""`moec diff MODEL PLAN PLAN`: what two plans make of one model, and what that costs, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from moec.commands.foreseen import Asked, program_on_meta
from moec.commands.screen import show, show_heading, show_json, show_table
from moec.cost.cost import Cost
from moec.cost.operation import KINDS
from moec.cost.shown.spelling import expanded, in_full, spelled
from moec.cost.shown.table import NONE
from moec.cost.timing.prediction import Prediction
from moec.errors import PlanError
from moec.explain import explain
from moec.ir.layout import ranges
from moec.plan import Plan
from moec.program import Program

DENSE = "dense"
ALIKE = 1e-9  # times that differ by less were added up in another order


@dataclass(frozen=True)
class Fact:
    """One row: the same thing said of both; `unit` of numbers (`FLOP`, `B`, `s`)."""

    name: str
    left: Any
    right: Any
    unit: str = ""

    @property
    def change(self) -> str:
        """`=`, or how many times as much, or that it is another, new, or gone."""
        left, right = self.left, self.right
        if left == right:
            return "="
        if left is None or right is None:
            return "new" if left is None else "gone"
        if not (_is_number(left) and _is_number(right)):
            return "≠"
        if math.isclose(left, right, rel_tol=ALIKE):
            return "="
        return f"×{float(right) / float(left):.3g}" if left else "≠"

    def row(self) -> tuple[str, str, str, str]:
        """As it is printed."""
        return self.name, self._cell(self.left), self._cell(self.right), self.change

    def _cell(self, value: Any) -> str:
        if value is None:
            return NONE
        if isinstance(value, int) and not self.unit:
            return f"{value:,}"
        return value if isinstance(value, str) else spelled(value, self.unit)

    def data(self) -> dict[str, Any]:
        """As JSON holds it."""
        sides = {"left": self.left, "right": self.right}
        told = {key: value if _plain(value) else in_full(value) for key, value in sides.items()}
        return {"what": self.name, **told, "unit": self.unit, "change": self.change}


def is_plan(word: str) -> bool:
    """Whether a word of the command line means a plan: a TOML file, a shipped one, or `dense`."""
    return word.endswith(".toml") or word == DENSE or word in Plan.shipped_names()


def diff_plans(model: str, plans: tuple[str, str], asked: Asked, *, as_json: bool) -> None:
    """Print what `plans` make of `model`, a row for each fact."""
    asked.opened_hardware()
    both = [_Side(model, None if plan == DENSE else plan, asked) for plan in plans]
    facts = [*_joined(both[0].structure(), both[1].structure())]
    facts += _joined(*(side.amounts() for side in both))
    if as_json:
        show_json({"plans": plans, "letters": asked.letters, "facts": [fact.data() for fact in facts]})
        return
    sizes = ", ".join(f"{name} = {number:,}" for name, number in asked.letters.items())
    show_heading(f"{both[0].cost.phase}{'; ' if sizes else ''}{sizes}")
    show("")
    show_table(("", *plans, "change"), [fact.row() for fact in facts])


def plans_meant(first: str, second: str | None, plan: str | None) -> tuple[str, str] | None:
    """The two plans that are compared, or None where stages are meant; raises `PlanError` for one of each."""
    words = [word for word in (first, second) if word is not None]
    if not any(map(is_plan, words)):
        return None
    if second is None or not all(map(is_plan, words)):
        other = next((word for word in words if not is_plan(word)), None)
        found = f"a plan and {'nothing else' if other is None else repr(other)}"
        raise PlanError("moec diff", found, "two plans, or two stages", f"moec diff MODEL {DENSE} pr_moe")
    if plan is not None:
        raise PlanError("--plan", "a third plan", "the two that are compared")
    return first, second


class _Side:
    """One of two plans: the program, its cost and its time."""

    def __init__(self, model: str, plan: str | None, asked: Asked) -> None:
        self.program: Program = program_on_meta(model, plan, asked.ranks)
        asked.require_room(self.program)
        self.cost: Cost = self.program.cost(asked.checked_phase)
        self.letters: dict[str, int] = asked.letters
        self.prediction: Prediction | None = asked.predicted(self.cost)

    def structure(self) -> dict[tuple[str, str], Any]:
        """(name, unit) → what the program is made of."""
        layers, mesh = explain(self.program).layers, self.cost.mesh
        return {
            ("layers", ""): len({one.layer for one in self.cost.operations if one.layer is not None}),
            ("expert layers", ""): len(layers),
            ("experts", ""): _by_layer((layer.name, str(layer.settings["experts"])) for layer in layers),
            ("top-k", ""): _by_layer((layer.name, str(layer.settings["top_k"])) for layer in layers),
            ("residual", ""): _by_layer((layer.name, str(layer.settings["residual"])) for layer in layers),
            ("ranks", ""): mesh.world,
            ("mesh", ""): f"data {mesh.data} × tensor {mesh.tensor}",
            ("mesh of experts", ""): _by_layer((layer, str(axes)) for layer, axes in mesh.layers),
            ("parameters", ""): self.program.num_parameters(),
            ("active parameters", ""): self.program.num_parameters(active=True),
        }

    def amounts(self) -> dict[tuple[str, str], Any]:
        """(name, unit) → what it costs one rank."""
        memory = self.cost.memory
        parts = {**memory.parts, "together": memory.total}
        found = {(f"memory: {name}", "B"): self.cost.at(part, **self.letters) for name, part in parts.items()}
        found |= {
            ("FLOPs", "FLOP"): self.cost.at("flops", **self.letters),
            ("bytes moved", "B"): self.cost.at("bytes", **self.letters),
            ("kernels", ""): self.cost.at("calls", **self.letters),
            ("sent", "B"): self.cost.at("sent", **self.letters),
        }
        for row in self._sent_by_axis():
            found[row[0], "B"] = row[1]
        return found | self._times()

    def _sent_by_axis(self) -> Iterator[tuple[str, Any]]:
        total: dict[str, Any] = {}
        for row in self.cost.table("axis", **self.letters).rows:
            total[row[0]] = total.get(row[0], 0) + row[-1]
        yield from ((f"sent along {axis}", amount) for axis, amount in total.items())

    def _times(self) -> dict[tuple[str, str], Any]:
        if self.prediction is None:
            return {}
        by = self.prediction.by("kind")
        whole = {("time", "s"): self.prediction.seconds, ("only links at work", "s"): self.prediction.exposed}
        return whole | {(f"time of {kind}", "s"): by[kind] for kind in KINDS if by.get(kind)}


def _by_layer(settings: Iterable[tuple[str, str]]) -> str | None:
    """`32 in 1, 3–5; 64 in 7` of pairs (`moe_1`, `32`); the setting alone where all layers have it."""
    layers: dict[str, list[int]] = {}
    for name, setting in settings:
        layers.setdefault(setting, []).append(int(name.rpartition("_")[2]))
    if len(layers) < 2:
        return next(iter(layers), None)
    return "; ".join(f"{setting} in {ranges(found)}" for setting, found in layers.items())


def _joined(left: dict[tuple[str, str], Any], right: dict[tuple[str, str], Any]) -> Iterator[Fact]:
    """Rows of both, in the order of the left, what only the right has behind what it follows there."""
    names = list(left)
    for place, name in enumerate(right):
        if name not in left:
            before = list(right)[place - 1] if place else None
            names.insert(names.index(before) + 1 if before in names else len(names), name)
    for key in names:
        if left.get(key) or right.get(key):
            yield Fact(key[0], _canonical(left.get(key)), _canonical(right.get(key)), key[1])


def _canonical(value: Any) -> Any:
    """Equal polynomials are one expression."""
    return value if _plain(value) else expanded(value)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) and bool(getattr(value, "is_number", True))
