"""A saved folder whose manifest was read: its texts become graphs, its records a program again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from moec.errors import ArtifactError
from moec.ir.certificate import Certificate
from moec.ir.origins import Origin, Origins
from moec.ir.parse import parse_program
from moec.ir.placement import Layout
from moec.ir.retarget import on_device
from moec.ir.shapes import propagate
from moec.plan import Plan

from .manifest import NAME, NEEDED, REBUILD, Manifest, Sheet, WeightRecord, require_whole
from .manifest_records import ledger_of, regions_of, restore_places, source_of
from .weights import rebuild_weights


@dataclass(frozen=True)
class Saved:
    """The folder of a saved program. `trust`: texts edited by hand are taken."""

    folder: Path
    manifest: Manifest
    layout: Layout | None
    trust: bool

    def text(self, file: str) -> str:
        """The text of one file, as it was saved unless it is trusted."""
        return require_whole(self.folder, file, self.manifest, trust=self.trust).read_text(encoding="utf-8")

    def graph(
        self,
        file: str,
        sheet: Sheet,
        weights: Sequence[WeightRecord],
        tensors: Mapping[str, Tensor] | None,
        device: torch.device,
    ) -> fx.GraphModule:
        """The graph whose text is in `file`, over `weights` made of `tensors` (None: on `meta`)."""
        parsed = parse_program(self.text(file), file=str(self.folder / file), trusted=self.trust)
        transient = {record.name for record in weights if not record.persistent}
        graph = parsed.assemble(rebuild_weights(weights, tensors), regions_of(sheet), transient)
        on_device(graph, device if tensors is not None else torch.device("meta"))
        propagate(graph)
        restore_places(graph, sheet)
        return graph

    def program(
        self,
        kind: type[Any],
        graph: fx.GraphModule,
        sheet: Sheet,
        tensors: Mapping[str, Tensor] | None,
        **more: Any,
    ) -> Any:
        """The program of class `kind` around `graph`, with the records of `sheet`; `more` goes to `kind`."""
        manifest = self.manifest
        try:
            program = kind(
                graph, source=source_of(manifest.source, tensors), stage=sheet.stage,
                origins=Origins({name: Origin(**data) for name, data in sheet.origins.items()}),
                ledger=ledger_of(sheet),
                certificates=tuple(map(Certificate.from_json, sheet.certificates)),
                plan=Plan.from_text(manifest.plan) if manifest.plan is not None else None,
                texts={stage: self.text(file) for stage, file in manifest.stages.items()},
                layout=self.layout, **more,
            )  # fmt: skip
        except (TypeError, KeyError, AttributeError) as error:
            found = f"records that do not fit: {error}"
            raise ArtifactError(str(self.folder / NAME), found, NEEDED, REBUILD) from None
        return program.train(manifest.training)
