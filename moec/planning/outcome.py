"""What became of one arrangement: how long it takes, what it holds, and why it lost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from moec.cost.shown.spelling import spelled
from moec.cost.timing.prediction import Prediction
from moec.cost.timing.schedule import DEVICE
from moec.ir.mesh import Mesh
from moec.plan import Parallel, Plan

KINDS = {
    "product": "dense products",
    "experts": "products of experts, their weights read",
    "routing": "routing",
    "attention": "attention",
    "exposed": "exposed communication",
    "idle": "waiting for the host",
    "optimizer": "the optimizer",
}
_SAME = 1e-9  # relative: times that differ by less were added up in another order


@dataclass(frozen=True)
class Outcome:
    """One arrangement of ranks. `batch`: sequences of one data rank. `memory`: bytes of a rank by part, with
    `total`. `seconds` and `score` (small is good) where it was predicted, and `times`: what those seconds
    are made of. `limit`: bytes that a rank may hold. `exact`: False where `memory` is told of the experts
    alone, which are too large by themselves."""

    plan: Plan
    mesh: Mesh
    batch: int
    memory: Mapping[str, int]
    limit: float
    seconds: float = math.inf
    score: float = math.inf
    times: Mapping[str, float] = field(default_factory=dict)
    exact: bool = True

    @property
    def parallel(self) -> Parallel:
        """How the ranks are arranged."""
        return self.plan.parallel

    @property
    def tokens_per_second(self) -> float:
        """Sequences of all ranks a second: decoded tokens, where a run decodes one of each."""
        return self.batch * self.mesh.data / self.seconds

    @property
    def fits(self) -> bool:
        """Whether a rank has room for it."""
        return self.memory["total"] <= self.limit

    def why_not(self, best: Outcome | None) -> str:
        """Why this is not the best: what does not fit, or where the time goes."""
        if not self.fits:
            return self._excess()
        if best is None or best is self:
            return ""
        return self._slower(best)

    def _excess(self) -> str:
        parts = {name: size for name, size in self.memory.items() if name != "total"}
        largest = max(parts, key=lambda name: parts[name])
        over, most = self.memory["total"] - self.limit, parts[largest]
        if not self.exact:
            return f"does not fit by {spelled(over, 'B')} and more: experts alone take {spelled(most, 'B')}"
        return f"does not fit by {spelled(over, 'B')}: {largest} take {spelled(most, 'B')} of a rank"

    def _slower(self, best: Outcome) -> str:
        ratio = self.score / best.score
        if ratio < 1 + _SAME:
            return "as fast"
        here, there = self._shares(best), best._shares(best)
        more = {name: here.get(name, 0.0) - there.get(name, 0.0) for name in {*here, *there}}
        worst = sorted((name for name in more if more[name] > 0), key=lambda name: -more[name])[:2]
        told = " and ".join(f"{spelled(more[name], 's')} more of {KINDS.get(name, name)}" for name in worst)
        return f"{ratio:.3g}× slower: {told}"

    def _shares(self, best: Outcome) -> dict[str, float]:
        """Seconds by what they are spent on, for as many sequences as the best one has."""
        scale = (self.score / self.seconds) / (best.score / best.seconds)
        return {name: scale * seconds for name, seconds in self.times.items()}


def times_of(prediction: Prediction) -> dict[str, float]:
    """What the seconds of a prediction are made of: the device by kind, links alone, waiting for the host."""
    found: dict[str, float] = defaultdict(float)
    for step in prediction.timeline:
        if step.stream == DEVICE:
            found[step.operation.kind] += step.seconds
    found["exposed"], found["idle"] = prediction.exposed, prediction.idle
    return {name: seconds for name, seconds in found.items() if seconds > 0}
