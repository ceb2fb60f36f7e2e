"""`LocalProgram`: what one rank of a placed program holds, runs and trains."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from moec import ir
from moec.errors import PassError
from moec.ir import regions
from moec.ir.hollow import hollow
from moec.ir.local import own_weights
from moec.ir.mesh import DATA
from moec.ir.placement import Layout, Placement, Split
from moec.ir.retarget import on_device
from moec.objective import at_least_float
from moec.passes.arrange_ranks import ArrangeRanks
from moec.passes.name_axes import NameAxes
from moec.passes.pipeline import partitioned
from moec.passes.place_dense import logits_split
from moec.passes.place_experts import PlaceExperts
from moec.passes.runner import Runner
from moec.plan import Plan
from moec.program import Program
from moec.runtime.aligned_draws import align_draws
from moec.runtime.data import IGNORED
from moec.runtime.distillation.lesson import Lesson
from moec.runtime.distillation.losses import words_of
from moec.runtime.trainable import LossTerms

if TYPE_CHECKING:
    from moec.decoder import Decoder
    from moec.runtime.generation.generate import Generation, Stream
    from moec.runtime.generation.prompts import PromptsLike
    from moec.runtime.generation.request import Options

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
    _whole: tuple[Program, ...] = ()  # in a tuple: no child of this module

    @property
    def whole(self) -> Program:
        """The program that this is a part of, its weights on `meta`: text, stages and records."""
        if not self._whole:
            raise PassError(
                "local.whole", "a copy of a part", "program.partition(rank) or moec.load(dir, rank=r)"
            )
        return self._whole[0]

    def fused(self, verify: str = "auto") -> LocalProgram:
        """As of `Program`; not checked here, since a rank runs with the others."""
        return self._completed(super().fused(verify))

    def named(self, name: str) -> LocalProgram:
        """The same part, over the same weights, whose axes go by `name`: `teacher_tensor`, …

        So two programs that are arranged differently run on the same ranks: they are connected by
        `mesh.joined(other.layout.mesh)`. It is never saved. Raises `PassError` where it has a name already.
        """
        made = Runner(verify="off").run(self.fork(), [NameAxes(name)])
        assert isinstance(made, LocalProgram)
        made.backend, made._whole = self.backend, self._whole
        align_draws(made.graph, made.layout.mesh)
        return made.train(self.training)

    def _made_like_this(self, made: ir.Program) -> LocalProgram:
        return self._completed(super()._made_like_this(made))

    def _completed(self, made: Program) -> LocalProgram:
        """What passes made of this one, with what they do not carry along."""
        assert isinstance(made, LocalProgram)
        made._whole = self._whole
        align_draws(made.graph, self.layout.mesh)
        return made

    def fingerprint(self) -> str:
        """That of the whole program: the same on every rank, on any mesh."""
        return self.whole.fingerprint()

    def save(self, directory: str | Path) -> Path:
        """Write this rank's weights into one folder with those of the others; every rank calls it.

        What is there afterwards is what `save` of the whole program writes. Whole or not there.
        """
        if self.layout.mesh.name:
            found = f"a part whose axes are called {self.layout.mesh.name}_…"
            raise PassError("local.save", found, "the part that was named")
        from moec.runtime.partitioned import save_part

        return save_part(self, self.whole, directory)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V] for this rank's tokens [B, S] (i64); gathered where the vocabulary is split."""
        logits = self.run(tokens)[0]
        words = words_of(self, logits)
        return torch.ops.moec.gather_vocabulary(logits, words.number, words.axis) if words.axis else logits

    @functools.cached_property
    def words(self) -> Split | None:
        """How the words of the graph's logits lie on the tensor ranks; None: whole on each."""
        return logits_split(self)

    def generate(
        self,
        tokens: PromptsLike,
        max_new_tokens: int,
        *,
        stream: Stream | None = None,
        dealt: bool = True,
        **options: Unpack[Options],
    ) -> Tensor | list[Tensor]:
        """As of `Program`, by all ranks together: each calls it, and each gets the whole result.

        All are given the same; data rank d writes the d-th stretch of the rows (`rows` at a time on each),
        and `stream` is called on the ranks that write a row. With `dealt=False`, `tokens` are this rank's own
        prompts, possibly none, and the result is of those; ranks of a tensor group are given the same.
        Raises `MeshError` where ranks do not do the same, and the errors of `Program.generate`.
        """
        from moec.runtime.generation.generate import finished

        return finished(self.stream(tokens, max_new_tokens, dealt=dealt, **options), stream)

    def stream(
        self, tokens: PromptsLike, max_new_tokens: int, *, dealt: bool = True, **options: Unpack[Options]
    ) -> Generation:
        """The tokens of `generate` as they come, of the rows that this rank writes.

        Every rank goes on to the end, or calls `close()`: ranks step together.
        """
        if self.layout.mesh.world == 1:
            return super().stream(tokens, max_new_tokens, **options)
        from moec.runtime.generation.generate_ranks import RankGeneration
        from moec.runtime.generation.request import Request

        request = Request.of(
            tokens,
            max_new_tokens,
            vocabulary=self.source.vocabulary,
            max_positions=self.source.max_positions,
            least=int(dealt),
            **options,
        )
        decoder = self.decoder(request.length)
        return RankGeneration(decoder, request, self.layout.mesh, self.rank, dealt=dealt)

    def _decoder_class(self) -> type[Decoder]:
        from moec.local_decoder import LocalDecoder

        return LocalDecoder

    def _check(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[0] or tokens.is_floating_point():
            super()._check(tokens)  # a rank may have no tokens: the others need it all the same

    def loss_terms(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        lesson: Lesson | None = None,
    ) -> LossTerms:
        """This rank's share of the loss and of its parts; `counts` are those of all ranks' tokens."""
        return super().loss_terms(tokens, targets, mask, lesson=lesson)

    def _count(self, targets: Tensor) -> Tensor:
        """The positions of the whole job that count, as often as ranks compute each."""
        count = (targets != IGNORED).sum()
        if self.layout.mesh.data > 1:
            axis = self.layout.mesh.axis(DATA)
            count = c10d.wait_tensor(c10d.all_reduce(count, "sum", axis))
        return count * self.layout.mesh.tensor

    def _task_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        wide, words = at_least_float(logits).flatten(0, 1), words_of(self, logits)
        if not words.axis:
            losses = F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        else:
            how = words.number, IGNORED, words.axis
            losses = torch.ops.moec.cross_entropy_part(wide, targets.flatten(), *how).sum()
        return losses / self._count(targets)

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
    if program.stage in ("fused", "cached"):
        found, needed = f"a {program.stage} program", "the program it was made from, whose parts are fused"
        raise PassError("partition", found, needed, "program.partition(rank).fused()")
    if program.layout is None:
        program = _on_one_rank(program)
    layout = program.layout
    assert layout is not None
    if type(rank) is not int or not 0 <= rank < layout.mesh.world:
        found = f"rank {rank} of a program on {layout.mesh.world}"
        raise PassError("partition", found, f"a rank from 0 to {layout.mesh.world - 1}")
    whole = hollow(program)
    local = program.fork()
    local.layout, local.rank, local._snapshots = layout, rank, whole.stages
    done = Runner(verify="off").run(local, partitioned(rank))
    own_weights(done.graph, program.graph)
    made = LocalProgram.of(done, program.backend)
    assert isinstance(made, LocalProgram)
    made._whole = (whole,)
    align_draws(made.graph, layout.mesh)
    return made.train(program.training)


def _on_one_rank(program: Program) -> Program:
    """A program that was not placed, placed on a mesh of one rank."""
    one = [ArrangeRanks(Plan(), world=1), PlaceExperts()]
    return Program.of(Runner(verify="off").run(program.fork(), one), program.backend)


def load_local(
    directory: str | Path, rank: int, *, trust: bool = False, device: torch.device | str = "cpu"
) -> LocalProgram:
    """The program of `rank` as saved in `directory` (see `moec.load`)."""
    from moec.runtime.artifact import load_program
    from moec.runtime.partitioned import load_part

    local = load_part(directory, rank, LocalProgram, trust=trust, device=device)
    whole = load_program(directory, trust=trust, device="meta", kind=Program)
    on_device(whole.graph, torch.device(device))  # its text speaks of the device that the weights are on
    whole.source = local.source
    local._whole = (whole,)
    align_draws(local.graph, local.layout.mesh)
    return local
