"""Leave out layers: a student has the ones that are kept, with the teacher's weights.

before:  x_0b = … x_b …;  x_1b = … x_0b …;  x_2b = … x_1b …     keep = (0, 2)
after:   x_0b = … x_b …;  x_1b = … x_0b …                       block 1 is what block 2 was

What read a block's result reads what the block read. Then everything is numbered anew (`renumber_layers`)
and loss terms are collected anew; a student without expert layers returns logits alone. The text of the
teacher is kept as the stage `teacher`.

Assumes: stage *structured* or *sparse*; blocks are linked by the residual stream alone (`blocks`).
Contract: changes the model, but for all layers kept; the student is the teacher with the kept layers only.
Source:  DeepSpeed-MoE, section 4.2.1, Mixture-of-Students.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from moec.errors import PassError
from moec.ir import Check, Pass, Program
from moec.ir.graphs import drop_unused, output
from moec.plan import Student
from moec.plan.depth import kept_layers

from .block_names import names_by_block
from .blocks import Block, blocks_of
from .collect_terms import collect_terms
from .layer_names import LayerNames
from .name_values import rename_regions, rename_root
from .prove_layers import prove_layers
from .renumber_layers import renumber_layers
from .residual_stream import ancestors, logits_of
from .trim_positions import trim_positions

STAGES = ("structured", "sparse")


@dataclass(frozen=True)
class KeepLayers(Pass):
    """See the module. `keep`: the layers that stay, ascending; or `depth`: how many, spread evenly."""

    keep: tuple[int, ...] | None = None
    depth: int | None = None

    def contract_for(self, program: Program) -> str:
        blocks = blocks_of(program.graph)
        return "exact" if len(self.layers(len(blocks))) == len(blocks) else "changes-model"

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that stay of a program that has `num_layers`; `PlanError` where that cannot be."""
        return kept_layers(Student(keep=self.keep, depth=self.depth), num_layers)

    def requires(self, program: Program) -> None:
        """A program before placement, whose blocks read nothing of each other but the stream."""
        if program.stage not in STAGES or program.layout is not None:
            found = f"a program at stage {program.stage}"
            raise PassError(self.name, found, "one at stage structured or sparse, before it is placed")
        blocks = blocks_of(program.graph)
        _require_closed(program.graph, blocks, self.layers(len(blocks)))

    def apply(self, program: Program) -> Program:
        root, teacher = program.graph, program.text()
        blocks = blocks_of(root)
        keep = self.layers(len(blocks))
        names = LayerNames(names_by_block(program, blocks), keep)
        dropped = [block for block in blocks if block.index not in keep]
        output(root.graph).args = (logits_of(root.graph),)
        _leave_out(dropped)
        drop_unused(root)
        trim_positions(root)
        renumber_layers(program, names, [block.index for block in dropped])
        rename_regions(root, ("positions",))
        rename_root(root)
        collect_terms(root)
        root.recompile()
        program.texts["teacher"] = teacher
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """The teacher, run by hand with the kept layers only."""
        return prove_layers(before, after, self.layers(len(blocks_of(before.graph))))


def _leave_out(dropped: Sequence[Block]) -> None:
    """Who read the exit of a block reads its entry; in order, so that neighbours follow each other."""
    stands_for: dict[fx.Node, fx.Node] = {}
    for block in dropped:
        entry = stands_for.get(block.entry, block.entry)
        stands_for[block.exit] = entry
        block.exit.replace_all_uses_with(entry, propagate_meta=False)


def _require_closed(root: fx.GraphModule, blocks: Sequence[Block], keep: Sequence[int]) -> None:
    """Raise `PassError` when what stays reads a value from inside a block that goes."""
    live = ancestors(logits_of(root.graph))
    gone = {node for block in blocks if block.index not in keep for node in block.nodes}
    for block in blocks:
        for node in block.nodes if block.index not in keep else ():
            readers = [user for user in node.users if user in live and user not in gone]
            if readers and node is not block.exit:
                raise PassError(
                    f"keep_layers: layer {block.index}",
                    f"`{node.name}` inside it is read by `{readers[0].name}`, which stays",
                    "layers that read nothing of each other but the residual stream",
                    f"keep layer {block.index}",
                )  # fmt: skip
