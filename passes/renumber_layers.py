"""Number everything anew after layers have left a program: regions, weights, names, paths, records.

before:  attention_0, attention_2, ffn_0, ffn_2, …    transformer.h.2.ln_1.weight
after:   attention_0, attention_1, ffn_0, ffn_1, …    transformer.h.1.ln_1.weight

So a program with fewer layers reads, and names its weights, as one compiled from the shallow model would.
Each origin remembers as `teacher` what its weight was called before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from moec.errors import PassError
from moec.ir import Entry, Ledger, Origin, Origins, Program, Region, region_of, regions
from moec.ir.graphs import graph_modules, named_weights, place
from moec.ir.outline import relative_names

from .layer_names import LayerNames


@dataclass(frozen=True)
class Numbering:
    """What is called how from now on.

    `regions`: old name → new name, of the regions that are left. `weights`: the user's name → the new one, of
    the weights that are left. `structural`: the structural name of each of them → the new one. `names`: for
    every other name and path.
    """

    regions: Mapping[str, str]
    weights: Mapping[str, str]
    structural: Mapping[str, str]
    names: LayerNames


def renumber_layers(program: Program, names: LayerNames, dropped: Sequence[int]) -> None:
    """Renumber `program` in place, its `dropped` blocks gone from the graph already.

    Changes its graph and the names of its weights, and puts new origins, a new ledger and a new source into
    the program; the tensors stay the same. Raises `PassError` when two weights would have one name.
    """
    numbering = _numbering(program, names)
    program.origins = _origins(program, numbering)
    program.ledger = _ledger(program, numbering, dropped)
    _rename_in_graph(program.graph, numbering)
    program.source = replace(
        program.source, aliases=_aliases(program, numbering), unused=_unused(program, names)
    )


# what is called how


def _numbering(program: Program, names: LayerNames) -> Numbering:
    left = regions(program.graph)
    rows = {name: origin for name, origin in program.origins.items() if _is_left(program, name)}
    sources = [origin.source for origin in rows.values()]
    known = dict.fromkeys([source for source in sources if source])
    other = _other_names(program.source.aliases)
    weights = {name: _first_left([name, *other.get(name, ())], names) for name in known}
    if len(set(weights.values())) < len(weights):
        twice = next(n for n in weights.values() if list(weights.values()).count(n) > 1)
        raise PassError(
            "the names of the layers", f"two weights that would be `{twice}`", "one weight a name"
        )
    renamed = _region_names(left)
    here = list(dict.fromkeys(name for name, _ in named_weights(program.graph)))
    structural = {name: _structural(name, renamed, weights, names) for name in here}
    tables = {name: _table(name, rows, weights, names) for name in here if name.startswith("positions.")}
    return Numbering(renamed, weights, structural | _relative(tables), names)


def _is_left(program: Program, structural: str) -> bool:
    *path, leaf = structural.split(".")
    module: nn.Module | None = program.graph
    for atom in path:
        module = module._modules.get(atom) if module is not None else None
    return module is not None and (leaf in module._parameters or leaf in module._buffers)


def _other_names(aliases: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        found.setdefault(name, []).append(alias)
    return found


def _first_left(candidates: Iterable[str], names: LayerNames) -> str:
    """The new name of a weight that may have several: the first of a layer that stays."""
    candidates = list(candidates)
    renamed = (names.new(name) for name in candidates)
    return next((name for name in renamed if name is not None), candidates[0])


def _region_names(left: Mapping[str, fx.GraphModule]) -> dict[str, str]:
    """Attentions are counted by themselves; a feed-forward and what has grown beside it have one number."""
    indices: dict[bool, dict[int, int]] = {True: {}, False: {}}
    found = {}
    for name, module in left.items():
        region = region_of(module)
        assert region is not None
        if region.kind == "positions":
            continue
        table = indices[region.kind == "attention"]
        index = table.setdefault(region.index, len(table))
        found[name] = replace(region, index=index).name
    return found


def _structural(name: str, renamed: Mapping[str, str], weights: Mapping[str, str], names: LayerNames) -> str:
    """The new structural name of a weight: in its region, or at the root under the user's name."""
    first, _, rest = name.partition(".")
    inside = renamed.get(first)
    leaf = rest if inside is not None else name
    found = weights.get(leaf) or names.new(leaf) or leaf
    return found if inside is None else f"{inside}.{found}"


def _table(name: str, rows: Mapping[str, Origin], weights: Mapping[str, str], names: LayerNames) -> str:
    """The user's new name of what positions read. A table that is in no state dict has no origin: of its name
    is left what told it apart, `0.attn.slopes`."""
    if name in rows:
        return weights[rows[name].source or ""]
    leaf = name.removeprefix("positions.")
    full = f"{names.blocks}{leaf}" if leaf.split(".")[0].isdigit() else leaf
    return names.new(full) or full


def _relative(tables: Mapping[str, str]) -> dict[str, str]:
    """What positions read of several layers is called by what tells it apart, `0.attn.slopes`, if anything:
    structural name → new one, of structural name → the user's."""
    relative, taken = relative_names(tables.values()), set[str]()
    found = {}
    for name, public in tables.items():
        leaf = relative[public]
        while leaf in taken:
            leaf += "_"
        taken.add(leaf)
        found[name] = f"positions.{leaf}"
    return found


# records


def _origins(program: Program, numbering: Numbering) -> Origins:
    rows: dict[str, Origin] = {}
    for name, origin in program.origins.items():
        if _is_left(program, name):
            source = numbering.weights[origin.source] if origin.source else None
            was = program.origins.public_name(name)
            rows[numbering.structural[name]] = replace(origin, source=source, teacher=was)
    return Origins(rows)


def _ledger(program: Program, numbering: Numbering, dropped: Sequence[int]) -> Ledger:
    left = [entry for entry in program.ledger if entry.weight in numbering.weights]
    entries = [_entry(entry, program, numbering) for entry in left]
    if any(numbering.names.new(entry.weight) is None for entry in left):
        places = _places(program, numbering)  # a shared weight, which a later layer is now the first to read
        entries.sort(key=lambda entry: places.get(entry.weight, len(places)))
    if not dropped:
        return Ledger(entries, program.ledger.notes)
    numbers = ", ".join(map(str, dropped))
    return Ledger(entries, program.ledger.notes).note(
        f"layer{'s' if len(dropped) > 1 else ''} {numbers} dropped"
    )


def _places(program: Program, numbering: Numbering) -> dict[str, int]:
    """The user's new names of weights → the place in the program, still with its old names, of the first call
    that multiplies with them."""
    calls: dict[str, int] = {}
    for number, node in enumerate(program.graph.graph.nodes):
        if node.target is torch.ops.aten.embedding.default:
            continue  # no product: the row of a head that is tied to it stands where the head is
        read = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
        called = [str(node.target)] if node.op == "call_module" else []
        for target in [*read, *called]:
            calls.setdefault(target, number)
    found: dict[str, int] = {}
    for old, new in numbering.structural.items():
        source = program.origins[new].source if new in program.origins else None
        first = calls.get(old, calls.get(old.split(".")[0]))
        if source and first is not None:
            found[source] = min(first, found.get(source, first))
    return found


def _entry(entry: Entry, program: Program, numbering: Numbering) -> Entry:
    """The row under its new names; `program.origins` are the new ones."""
    weight = numbering.weights[entry.weight]
    holders = [name.split(".")[0] for name in program.origins.of_source(weight)]
    role, _, rest = entry.role.partition(" ")
    if role in numbering.regions:
        role = numbering.regions[role]
    elif role.rpartition("_")[2].isdigit() and holders:  # of a layer that is gone, the weight shared
        role = holders[-1]
    first, colon, why = entry.reason.partition(":")
    reason = f"{numbering.regions.get(first, first)}{colon}{why}"
    return replace(entry, weight=weight, role=f"{role} {rest}".strip(), reason=reason)


def _aliases(program: Program, numbering: Numbering) -> dict[str, str]:
    """Tied names of layers that stay → the name kept."""
    found = {}
    for alias, name in program.source.aliases.items():
        renamed, kept = numbering.names.new(alias), numbering.weights.get(name)
        kept = kept or (numbering.names.new(name) if name in program.source.unused else None)
        if renamed is not None and kept is not None and renamed != kept:
            found[renamed] = kept
    return found


def _unused(program: Program, names: LayerNames) -> dict[str, Tensor]:
    renamed = ((names.new(name), value) for name, value in program.source.unused.items())
    return {name: value for name, value in renamed if name is not None}


# the graph


def _rename_in_graph(root: fx.GraphModule, numbering: Numbering) -> None:
    for name, module in graph_modules(root):
        outer = f"{name}." if name else ""
        own = {n for n, _, _, _ in _own_weights(module)}
        renamed = {n: numbering.structural[f"{outer}{n}"] for n in own}
        if name:
            renamed = {n: new.partition(".")[2] for n, new in renamed.items()}
        _rename_weights(module, renamed)
        for node in module.graph.nodes:
            if node.meta.get("path"):
                node.meta["path"] = _path(str(node.meta["path"]), numbering)
    _rename_regions(root, numbering)


def _path(path: str, numbering: Numbering) -> str:
    return numbering.names.new(path) or path


def _own_weights(module: nn.Module) -> Iterator[tuple[str, Tensor, bool, nn.Module]]:
    """Name, tensor, whether it is in the state dict, and owner of every weight that is in no region."""
    for path, child in module.named_modules(remove_duplicate=False):
        if any(region_of(module.get_submodule(above)) for above in _above(path)):
            continue
        for leaf, value in [*child._parameters.items(), *child._buffers.items()]:
            if value is not None:
                name = f"{path}.{leaf}" if path else leaf
                yield name, value, leaf not in child._non_persistent_buffers_set, child


def _above(path: str) -> list[str]:
    atoms = path.split(".") if path else []
    return [".".join(atoms[: i + 1]) for i in range(len(atoms))]


def _rename_weights(module: fx.GraphModule, renamed: Mapping[str, str]) -> None:
    """Put the weights of one graph where they are called `renamed`, in their order."""
    if all(old == new for old, new in renamed.items()):
        return
    weights = [(name, value, persistent) for name, value, persistent, _ in _own_weights(module)]
    below = {name: child for name, child in module._modules.items() if region_of(child) is not None}
    module._modules.clear()
    module._parameters.clear()
    module._buffers.clear()
    module._non_persistent_buffers_set.clear()
    for name, value, persistent in weights:
        place(module, renamed[name], value, persistent=persistent)
    for name, child in below.items():
        module.add_module(name, child)
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target) in renamed:
            node.target = renamed[str(node.target)]
            node.name = str(node.target).replace(".", "_")


def _rename_regions(root: fx.GraphModule, numbering: Numbering) -> None:
    table = root._modules
    root._modules = {numbering.regions.get(name, name): child for name, child in table.items()}
    for node in root.graph.nodes:
        if node.op == "call_module":
            node.target = numbering.regions.get(str(node.target), str(node.target))
    for name in numbering.regions.values():
        module = root.get_submodule(name)
        region = region_of(module)
        assert isinstance(module, fx.GraphModule)
        assert region is not None
        module.meta["region"] = _renumbered(region, name, numbering)


def _renumbered(region: Region, name: str, numbering: Numbering) -> Region:
    path = _path(region.path, numbering) if region.path else ""
    return replace(region, index=int(name.rpartition("_")[2]), path=path)
