"""`LocalProgram`: what one rank of a placed program holds, runs and trains."""

from __future__ import annotations

from collections.abc import Mapping
import torch
import torch.nn.functional as F
from torch import Tensor

from moec.errors import PassError
from moec.ir import regions
from moec.ir.mesh import DATA, Mesh
from moec.ir.placement import Layout, Placement
from moec.passes.pipeline import partitioned
from moec.passes.runner import Runner
from moec.program import IGNORED, Program
from moec.runtime.trainable import LossTerms

c10d = torch.ops._c10d_functional


class LocalProgram(Program):
    """The program of `rank`: the same text on every rank, local parts of the weights, collectives in the
    graph.

    It runs inside `moec.runtime.mesh.connected(mesh)`, together with all other ranks. Logits are those of the
    rank's own tokens; every loss term is the rank's share: the sum over the ranks is the program's, and the
    gradient of a parameter is the sum over the ranks that hold it (`placements()[name].holders`).
    """

    layout: Layout
    rank: int

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V] for this rank's tokens [B, S] (i64); gathered where the vocabulary is split."""
        return self.run(tokens)[0]

    def loss_terms(
        self, tokens: Tensor, targets: Tensor | None = None, mask: Tensor | None = None
    ) -> LossTerms:
        """This rank's share of the loss and of its parts; `counts` are those of all ranks' tokens."""
        logits, terms = self.run(tokens)
        targets, mask = self._targets(tokens, targets, mask)
        if mask is not None:
            targets = targets.masked_fill(~mask.bool(), IGNORED)
        task = self._task_share(logits, targets)
        if not terms:
            return {"loss": task, "task": task}
        balance, z = terms["balance"].float(), terms["z"].float()
        total = task + balance + z
        return {"loss": total, "task": task, "balance": balance, "z": z, "counts": terms["counts"]}

    def _task_share(self, logits: Tensor, targets: Tensor) -> Tensor:
        wide = logits.float() if logits.dtype != torch.float64 else logits
        count = (targets != IGNORED).sum()
        if self.layout.mesh.data > 1:
            count = c10d.wait_tensor(c10d.all_reduce(count, "sum", DATA))
        losses = F.cross_entropy(
            wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return losses / (count * self.layout.mesh.tensor)

    def placements(self) -> dict[str, Placement]:
        """Where each parameter lies, by its public name."""
        names = (name for name, _ in self.graph.named_parameters())
        return {self._public(name): self.layout.of(name) for name in names}

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each whole parameter, by its public name."""
        named = self.graph.named_parameters()
        return {self._public(n): self.layout.shapes.get(n, tuple(value.shape)) for n, value in named}

    def moe_biases(self) -> Mapping[str, Tensor]:
        """As of `Program`; a bias lies where the router does, in the first half of a layer in two halves."""
        found = dict(super().moe_biases())
        for name, module in regions(self.graph, "dispatch").items():
            if isinstance(getattr(module, "bias", None), Tensor):
                found[name.replace("dispatch", "moe")] = module.get_buffer("bias")
        return found

    def to_dense_state_dict(self, strict: bool = True) -> dict[str, Tensor]:
        """Refused: a rank holds parts."""
        raise PassError(
            "to_dense_state_dict", f"the parts of rank {self.rank}", "the whole program", "moec.load(dir)"
        )


def partition(program: Program, rank: int) -> LocalProgram:
    """The program of `rank` (see `Program.partition`)."""
    layout = program.layout or Layout(Mesh())
    if not 0 <= rank < layout.mesh.world:
        found = f"rank {rank} of a program on {layout.mesh.world}"
        raise PassError("partition", found, f"a rank from 0 to {layout.mesh.world - 1}")
    local = program.fork()
    local.layout, local.rank = layout, rank
    return LocalProgram.of(Runner(verify="off").run(local, partitioned(rank)), program.backend)  # type: ignore[return-value]
