"""`moec.Program`: a compiled program with everything one can do to it.

`ir.Program` is the data passes work on; this adds the verbs that need the upper floors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec import ir
from moec.errors import DataError
from moec.ir import region_of, regions
from moec.ir.retarget import on_device
from moec.plan import LayerSettings
from moec.runtime.trainable import LossTerms

if TYPE_CHECKING:
    from moec.local_program import LocalProgram
    from moec.simulation import Simulation

IGNORED = -100  # a target that does not count, as in torch.nn.functional.cross_entropy


class Program(ir.Program):
    """A program that can be run, trained, saved and shown; `moec.compile` makes it, `moec.load` reads it
    back."""

    backend: str = "eager"
    _compiled: Callable[[Tensor], Any] | None = None

    @classmethod
    def of(cls, program: ir.Program, backend: str = "eager") -> Program:
        """The same program with the upper verbs; shares the graph and all weights."""
        made = cls(program.graph, **program._records())
        made.backend = backend
        return made

    def _execute(self, tokens: Tensor) -> Any:
        if self.backend == "eager":
            return self.graph(tokens)
        if self._compiled is None:
            compiled = torch.compile(self.graph, backend=self.backend, fullgraph=True, dynamic=True)
            object.__setattr__(self, "_compiled", compiled)
        assert self._compiled is not None
        return self._compiled(tokens)

    def loss(self, tokens: Tensor, targets: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The training loss: next-token cross-entropy plus the plan's balance and z terms; fp32 scalar.

        `targets` i64 [B, S]: what each position should say; left out, the next token (the last position has
        none). Positions with target -100, or where `mask` [B, S] is false, do not count.
        """
        return self.loss_terms(tokens, targets, mask)["loss"]

    def loss_terms(
        self, tokens: Tensor, targets: Tensor | None = None, mask: Tensor | None = None
    ) -> LossTerms:
        """The loss, taken apart: `loss`, `task`, and for sparse programs `balance`, `z` (weighted) and
        `counts`."""
        logits, terms = self.run(tokens)
        task = task_loss(logits, *self._targets(tokens, targets, mask))
        if not terms:
            return {"loss": task, "task": task}
        balance, z = at_least_float(terms["balance"]), at_least_float(terms["z"])
        return {
            "loss": task + balance + z,
            "task": task,
            "balance": balance,
            "z": z,
            "counts": terms["counts"],
        }

    def _targets(
        self, tokens: Tensor, targets: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if targets is None:
            if tokens.shape[1] < 2:
                raise DataError(
                    "program.loss", "one position and no targets", "two positions at least, or targets"
                )
            targets = F.pad(tokens[:, 1:], (0, 1), value=IGNORED)
        if targets.shape != tokens.shape:
            raise DataError("program.loss", f"targets {list(targets.shape)}", f"targets {list(tokens.shape)}")
        return targets, mask

    def moe_settings(self) -> Mapping[str, LayerSettings]:
        """The settings of each expert layer, by name; empty for a dense program."""
        found = {}
        for name, module in regions(self.graph, "moe").items():
            region = region_of(module)
            assert region is not None
            known = {
                key: value for key, value in region.settings.items() if key in LayerSettings.model_fields
            }
            found[name] = LayerSettings(**known)
        return found

    def moe_biases(self) -> Mapping[str, Tensor]:
        """The selection biases f32 [E] of the layers balanced by bias; the trainer nudges them in place."""
        return {
            name: module.get_buffer("bias")
            for name, module in regions(self.graph, "moe").items()
            if isinstance(getattr(module, "bias", None), Tensor)
        }

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to()`, `.cuda()`, …: device constants in the graph follow the weights."""
        super()._apply(fn, recurse)
        some = next(self.parameters(), None)
        if some is not None:
            on_device(self.graph, some.device)
        return self

    # what others have built on top

    def fingerprint(self) -> str:
        """A hash of the text, the origins and the plan, not of the weights."""
        from moec.runtime.artifact import fingerprint

        return fingerprint(self)

    def explain(self, about: str = "") -> str:
        """What was done to each matrix product, and why not otherwise; `about`: a layer, region, weight or
        glob."""
        from moec.explain import explain

        return str(explain(self, about))

    def save(self, directory: str | Path) -> Path:
        """Write text, manifest and weights; `moec.load` reads them. Atomic; nothing executable is pickled.

        A placed program is written with the program of its ranks, and its weights in the parts they hold.
        """
        from moec.runtime.artifact import save_program

        local = None if self.layout is None else self.partition(0)
        return save_program(self, directory, local=local)

    def partition(self, rank: int) -> LocalProgram:
        """The program of one rank: its parts of the weights (copies), its communication in the graph.

        The text is the same for every rank. A program that is not placed has one rank, 0. Raises `PassError`
        for a rank that is not on the mesh.
        """
        from moec.local_program import partition

        return partition(self, rank)

    def simulate(self, tokens: Tensor, targets: Tensor | None = None, **options: Any) -> Simulation:
        """Run all ranks of this placed program in one process, and compare them with it (`moec.simulate`)."""
        from moec.simulate import simulate

        return simulate(self, tokens, targets, **options)

    def to_dtype(self, dtype: torch.dtype) -> Program:
        """A copy in another floating dtype, casts and constants included."""
        from moec.ir.retarget import in_dtype

        made = Program(in_dtype(self.graph, dtype), **self._records())
        made.backend = self.backend
        return made


def task_loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in fp32 over the positions that count. logits [B, S, V], targets i64 [B, S]."""
    if mask is not None:
        targets = targets.masked_fill(~mask.bool(), IGNORED)
    return F.cross_entropy(at_least_float(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def at_least_float(value: Tensor) -> Tensor:
    """`value` in fp32, or in fp64 where it is: what losses are computed in."""
    return value.float() if value.dtype != torch.float64 else value
