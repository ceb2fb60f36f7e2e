"""What the layers of a program are called: the weights that blocks read, and the modules they are of."""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir import Program, region_of

from .blocks import Block


def weights_of(program: Program, block: Block) -> list[str]:
    """Structural names of the weights that a block reads, in the order of the origins.

    Those that have an origin: a table that is in no state dict has none.
    """
    read = {str(n.target) for node in block.nodes for n in node.all_input_nodes if n.op == "get_attr"}
    return [name for name in program.origins if name in read or name.split(".")[0] in block.regions]


def names_by_block(program: Program, blocks: Sequence[Block]) -> list[set[str]]:
    """For each block, the user's names of the weights that it alone reads, and the paths of its modules."""
    read = [_sources_of(program, block) for block in blocks]
    shared = {name for name in set().union(*read) if sum(name in own for own in read) > 1}
    return [own - shared | _paths_of(program, block) for own, block in zip(read, blocks, strict=True)]


def _sources_of(program: Program, block: Block) -> set[str]:
    """The user's names of the weights that a block reads."""
    sources = (program.origins[name].source for name in weights_of(program, block))
    return {source for source in sources if source}


def _paths_of(program: Program, block: Block) -> set[str]:
    paths = {str(node.meta.get("path") or "") for node in block.nodes}
    found = (region_of(program.graph.get_submodule(name)) for name in block.regions)
    return {path for path in paths | {region.path for region in found if region is not None} if path}
