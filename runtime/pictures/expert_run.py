"""What the records of a run say of its experts, routers and ranks, as arrays over steps.

Legend: N logged steps, E experts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.errors import ArtifactError, nearest

RECORDS = "train.jsonl"


@dataclass(frozen=True)
class Series:
    """What was seen after some steps: `steps` i64 [N], ascending, and `values` f64 [N] or [N, E]."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def thinned(self, most: int) -> Series:
        """At most `most` points: neighbours are averaged, and stand at the last step of theirs."""
        if len(self.steps) <= most:
            return self
        last = np.linspace(0, len(self.steps), most + 1).round().astype(int)[1:]
        parts = np.split(self.values, last[:-1])
        return Series(self.steps[last - 1], np.stack([part.mean(0) for part in parts]))


@dataclass(frozen=True)
class ExpertRun:
    """A run by what was recorded of it; what was not is empty.

    `load`: by layer, the rows of each expert over the mean of the layer's experts, in the steps that were
    logged, or where these say nothing (runs of before that was recorded) in the evaluations: `held_out`.
    `dropped`: the share of (token, choice) pairs that no expert computed. `router_entropy`: in nats.
    `num_bytes` and `messages`: by mesh axis, of a step, of all ranks together.
    """

    folder: Path
    load: Mapping[str, Series]
    held_out: bool
    dropped: Mapping[str, Series]
    router_entropy: Mapping[str, Series]
    num_bytes: Mapping[str, Series]
    messages: Mapping[str, Series]

    @property
    def experts(self) -> dict[str, int]:
        """The number of experts of each layer whose load is known."""
        return {layer: series.values.shape[1] for layer, series in self.load.items()}

    @property
    def layers(self) -> list[str]:
        """Every expert layer that something is known of, in the order of the program."""
        return list(dict.fromkeys([*self.load, *self.dropped, *self.router_entropy]))

    def only(self, wanted: Sequence[str]) -> ExpertRun:
        """The same of some layers: names, globs (`moe_1*`) or numbers. Raises `ArtifactError` for one that is
        not there."""
        kept = {layer for word in wanted for layer in self._named(word)}
        load, dropped, entropy = (
            {layer: series for layer, series in of.items() if layer in kept}
            for of in (self.load, self.dropped, self.router_entropy)
        )
        return replace(self, load=load, dropped=dropped, router_entropy=entropy)

    def _named(self, word: str) -> list[str]:
        pattern = f"moe_{word}" if word.isdigit() else word
        found = [layer for layer in self.layers if fnmatchcase(layer, pattern)]
        if not found:
            shown = ", ".join(self.layers[:6]) + (", …" if len(self.layers) > 6 else "")
            near = nearest(pattern, self.layers)
            raise ArtifactError("--layers", f"no expert layer '{word}'", f"some of {shown}", near)
        return found


def is_run(folder: str | Path) -> bool:
    """Whether `folder` has the records of a run."""
    return (Path(folder) / RECORDS).is_file()


def read_run(folder: str | Path) -> ExpertRun:
    """Read `train.jsonl` of a run, which may still be written to. Raises `ArtifactError` where it has none,
    or a line of it is damaged."""
    folder = Path(folder)
    rows = _rows(folder)
    observed = [row for row in rows if row["kind"] == "observed"]
    steps = [row for row in rows if row["kind"] == "step"]
    evaluated = [row for row in rows if row["kind"] == "evaluation"]
    seen = [row for row in observed if row["counts"]]
    return ExpertRun(
        folder,
        load=_load(seen or evaluated),
        held_out=not seen and any(row["counts"] for row in evaluated),
        dropped=_collected(steps, lambda row: {name: load["dropped"] for name, load in row["load"].items()}),
        router_entropy=_collected(observed, lambda row: row["router_entropy"]),
        num_bytes=_collected(observed, lambda row: _amounts(row, "bytes")),
        messages=_collected(observed, lambda row: _amounts(row, "messages")),
    )


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / RECORDS
    if not path.is_file():
        beside = f"{folder.parent}, which has one" if is_run(folder.parent) else ""
        raise ArtifactError(str(folder), f"no {RECORDS}", "the folder that a training wrote", beside)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break  # cut off: written this very moment, or the machine went down
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ArtifactError(f"{path}:{number}", f"no JSON: {error.msg}", "a record of a step") from error
    return rows


def _amounts(row: Mapping[str, Any], amount: str) -> dict[str, float]:
    return {axis: sending[amount] for axis, sending in row["traffic"].items()}


def _collected(rows: Sequence[Mapping[str, Any]], named: Any) -> dict[str, Series]:
    """By name, the steps at which there was something of that name, and what."""
    steps, values = defaultdict[str, list[int]](list), defaultdict[str, list[Any]](list)
    for row in rows:
        for name, value in named(row).items():
            steps[name].append(row["step"])
            values[name].append(value)
    return {name: Series(np.array(steps[name]), np.array(values[name], np.float64)) for name in steps}


def _load(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Counts over their mean; zeros where an expert layer computed no row at all."""
    counted = _collected(rows, lambda row: row["counts"])
    return {layer: Series(c.steps, _over_mean(c.values)) for layer, c in counted.items()}


def _over_mean(counts_NE: NDArray[np.float64]) -> NDArray[np.float64]:
    mean_N1 = counts_NE.mean(1, keepdims=True)
    return np.divide(counts_NE, mean_N1, out=np.zeros_like(counts_NE), where=mean_N1 > 0)
