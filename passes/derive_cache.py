"""Derive the program that decodes: fed the next tokens, it remembers those before.

before:  cos, sin = positions(tokens)                  a = attention_0(n, cos, sin)
         o = scaled_dot_product_attention(q, k, v, is_causal=True)
after:   at, seen, cos, sin = positions(tokens, past, keys_0)
         a = attention_0(n, cos, sin, keys_0, values_0, at, seen)
         moec.remember(keys, k, at, 2);  moec.remember(values, v, at, 2)
         o = scaled_dot_product_attention(q, keys, values, seen)

Values of positions become tables, looked up at `past + [0, n)`; what attention pairs new positions with is
remembered. The loss terms go, and no token is dropped: capacity compares the tokens of a batch, of which a
decoder sees one each.

Assumes: attention is causal, and everything else acts position by position (`position_labels.py` looks).
Contract: exact, against `program(tokens)` without capacity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.errors import VerifyError
from moec.ir import Check, Pass, Program, region_of, regions
from moec.ir.graphs import drop_unused, graph_modules, output, placeholder
from moec.ir.identity import made_from
from moec.ir.inputs import Input
from moec.ir.patterns import tensor
from moec.ir.shapes import propagate

from .position_axes import HELD, Labels, Read, Site, refusal
from .position_labels import label_positions
from .position_lookups import Lookups
from .position_moves import Sequence, hint
from .position_tables import PositionTables
from .prove_cached import proof_length, prove_derived

# Where the two capacity factors stand among the arguments.
FACTORS = {torch.ops.moec.assign.default: 2, torch.ops.moec.gate.default: 6}
AT = "_looked_up"  # of names, while what they replace is there too
ADDED_TO_SCORES = (torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.add.Tensor)


@dataclass(frozen=True)
class DeriveCache(Pass):
    """See the module. `length`: the longest row, in positions; tables are made for so many."""

    length: int

    def apply(self, program: Program) -> Program:
        derive(program.graph, self._positions(program))
        return program

    def ensures(self, before: Program, after: Program) -> list[Check]:
        """Fed in ragged steps, the derived program gives the logits of the one it was derived from."""
        return prove_derived(before, after, lambda root: derive(root, self._positions(before)), drop_capacity)

    def _positions(self, program: Program) -> int:
        """What tables are made for: never fewer than the proof feeds."""
        return max(self.length, proof_length(program))


def derive(root: fx.GraphModule, length: int) -> None:
    """Rewrite `root`, in place, to the program that decodes rows of up to `length` positions."""
    propagate(root)  # a copy in another dtype says what it was
    tables = _tables(root, length)
    labels = label_positions(root, tables.later())
    for read in labels.reads:
        _check_shifted(read, tables)
    _drop_terms(root)
    drop_capacity(root)
    _Rewrite(root, labels, tables).run()
    try:
        propagate(root)
    except VerifyError as error:
        raise refusal(error.where, f"sizes that do not fit held positions: {error.found}") from None


def _tables(root: fx.GraphModule, length: int) -> PositionTables:
    region = next(iter(regions(root, "positions").values()), None)
    some = next(iter([*root.parameters(), *root.buffers()]), None)
    device = torch.device("cpu") if some is None else some.device
    if region is None:
        return PositionTables(None, [], length, device)
    returned = output(region.graph).args[0]
    nodes = returned if isinstance(returned, tuple | list) else [returned]
    sequence = Sequence(placeholder(root.graph))
    dims = [tuple(sequence.dims(tensor(node))) for node in nodes]
    return PositionTables(region, dims, length, device)


def _check_shifted(read: Read, tables: PositionTables) -> None:
    """A bias counted from the end of the sequence is one counted from the start, for a softmax alone."""
    if read.index not in tables.shifted:
        return
    last = dict(read.roles).get(read.rank - 1)
    if read.user.target not in ADDED_TO_SCORES or last != HELD:
        found = f"values that depend on the length of the sequence, read by {read.user.target}"
        raise refusal(f"{read.region or 'root'}: {read.user.name}", found)


def _drop_terms(root: fx.GraphModule) -> None:
    """Return the logits alone."""
    end = output(root.graph)
    if isinstance(end.args[0], tuple):
        end.args = (end.args[0][0],)


def drop_capacity(root: fx.GraphModule) -> None:
    """Let every expert take all that come, in place; ranks need not know of each other's choices then."""
    for _, module in graph_modules(root):
        for node in list(module.graph.nodes):
            if node.target is torch.ops.moec.admit.default:
                _admit_all(node)
            first = FACTORS.get(node.target)
            if first is not None:
                node.update_arg(first, 0.0)
                node.update_arg(first + 1, 0.0)
        module.recompile()


def _admit_all(node: fx.Node) -> None:
    """`admit` counts the choices of all ranks; `assign` only those here, which are all kept."""
    experts, choices, _, *rest = node.args
    counts = next(user for user in node.users if user.args[1] == 1)
    for kept in [user for user in node.users if user.args[1] == 2]:  # read by the terms, which are gone
        kept.replace_all_uses_with(counts)
        node.graph.erase_node(kept)
    known = tensor(choices)
    assert known is not None
    node.target, node.args = torch.ops.moec.assign.default, (experts, int(known.shape[1]), *rest)


class _Rewrite:
    """Carries out what the labels say."""

    def __init__(self, root: fx.GraphModule, labels: Labels, tables: PositionTables) -> None:
        self.root, self.labels = root, labels
        self.tokens = placeholder(root.graph)
        self.caches = self._caches()
        self._add_inputs(Sequence(self.tokens).batch)
        held = next(((name, site.dim) for site, (name, _) in self.caches.items()), None)
        self.lookups = Lookups(root, tables, {"tokens": self.tokens, **self.inputs}, held)

    def run(self) -> None:
        for read in self.labels.reads:
            self._look_up(read)
        for site, (_, inner) in self.caches.items():
            self._remember(site, inner)
        for name in dict.fromkeys(region for region, _ in self._regional):
            self._drop_unread_inputs(name)
        self.lookups.finish()
        for module in regions(self.root).values():
            drop_unused(module)
        drop_unused(self.root)

    # inputs

    def _caches(self) -> dict[Site, tuple[str, str]]:
        """Site → (name of the cache in the root, in its region)."""
        found: dict[Site, tuple[str, str]] = {}
        taken: set[str] = set()
        for site in self.labels.sites:
            region = region_of(self.root.get_submodule(site.region)) if site.region else None
            base = site.name if region is None else f"{site.name}_{region.index}"
            name, count = base, 1
            while name in taken:
                name, count = f"{base}_{count}", count + 1
            taken.add(name)
            found[site] = (name, name if region is None else name.replace(f"_{region.index}", "", 1))
        return found

    def _add_inputs(self, batch: int) -> None:
        """`past`, `wanted` and the caches in the root; caches and positions in every region that uses
        them."""
        graph, last = self.root.graph, self.tokens
        inputs = {"past": Input(("B",)), "wanted": Input(("B", "m"))}
        inputs |= {name: _cache_input(site, batch) for site, (name, _) in self.caches.items()}
        self.tokens.meta = {"input": Input(("B", "n"))}  # and no shapes: those of before are of other sizes
        self.inputs: dict[str, fx.Node] = {}
        for name, like in inputs.items():
            with graph.inserting_after(last):
                last = self.inputs[name] = graph.placeholder(name)
            last.meta["input"] = like
        for site, (name, _) in self.caches.items():
            if "placement" in site.value.meta:  # its heads are those of the keys and values
                self.inputs[name].meta["placement"] = site.value.meta["placement"]
        self._regional: dict[tuple[str, str], fx.Node] = {}

    def _given(self, region: str, name: str, value: fx.Node) -> fx.Node:
        """The input `name` of `region` that stands for `value` of the root; `value` itself in the root."""
        if not region:
            return value
        if (region, name) not in self._regional:
            module = self.root.get_submodule(region)
            assert isinstance(module, fx.GraphModule)
            with module.graph.inserting_after(_last_placeholder(module.graph)):
                self._regional[region, name] = module.graph.placeholder(name)
            for call in self._calls(region):
                call.args = (*call.args, value)
        return self._regional[region, name]

    def _calls(self, region: str) -> list[fx.Node]:
        return [n for n in self.root.graph.nodes if n.op == "call_module" and n.target == region]

    def _drop_unread_inputs(self, region: str) -> None:
        """Inputs that nothing reads any more: tables of positions that were replaced; the new take their
        names."""
        module = self.root.get_submodule(region)
        assert isinstance(module, fx.GraphModule)
        places = [node for node in module.graph.nodes if node.op == "placeholder"]
        unread = {i: node for i, node in enumerate(places) if not node.users and i > 0}
        for call in self._calls(region):
            call.args = tuple(value for i, value in enumerate(call.args) if i not in unread)
        for node in unread.values():
            module.graph.erase_node(node)
        for (owner, name), node in self._regional.items():
            if owner == region and name.endswith(AT):
                node.name = node.target = name.removesuffix(AT)

    # caches

    def _remember(self, site: Site, inner: str) -> None:
        at = self._given(site.region, "at", self.lookups.at)
        cache = self._given(site.region, inner, self.inputs[self.caches[site][0]])
        graph, after = site.value.graph, site.value
        if after.op == "placeholder":
            after = _last_placeholder(graph) if site.region else self.lookups.at
        with graph.inserting_after(after):
            made = graph.call_function(torch.ops.moec.remember.default, (cache, site.value, at, site.dim))
        made.name = f"kept_{inner}"
        made_from(made, site.user)
        site.user.replace_input_with(site.value, cache)

    # tables

    def _look_up(self, read: Read) -> None:
        value, table = self.lookups.value(read), read.table
        given = self._given(read.region, value.name if table is None else f"{table.name}{AT}", value)
        if table is not None and read.region:
            made_from(given, table, taking=())
        if read.value is not None:
            found = given if read.value is table else _part_of(given, read)
            read.user.replace_input_with(read.value, found)
            if read.value is not table and not read.value.users:
                read.value.graph.erase_node(read.value)  # it would keep its table
            return
        user = read.user  # is_causal=True
        rest = {k: v for k, v in user.kwargs.items() if k not in ("attn_mask", "is_causal")}
        dropout = user.args[4] if len(user.args) > 4 else rest.pop("dropout_p", 0.0)
        user.args, user.kwargs = (*user.args[:3], given, dropout), rest


def _part_of(given: fx.Node, read: Read) -> fx.Node:
    """What `read.value` took of its table, taken of what is looked up in its place; both have the same last
    dims."""
    taken, table = read.value, tensor(read.table)
    assert taken is not None
    assert table is not None
    dim, *rest = taken.args[1:]
    assert isinstance(dim, int)
    with read.user.graph.inserting_before(read.user):
        part = torch.ops.moec.part.default
        made = read.user.graph.call_function(part, (given, dim % table.dim() - table.dim(), *rest))
    made_from(made, taken, taking=("path", "source", "placement"))
    made.name = taken.name
    return made


def _cache_input(site: Site, batch: int) -> Input:
    value = tensor(site.value)
    assert value is not None
    each = hint(value.shape[0]) // batch
    sizes: list[int | str] = [hint(size) for size in value.shape]
    sizes[0] = "B" if each == 1 else f"{each}*B"
    sizes[site.dim] = "L"
    return Input(tuple(sizes), value.dtype)


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return [node for node in graph.nodes if node.op == "placeholder"][-1]
