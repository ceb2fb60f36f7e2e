"""Build the expert layer of one feed-forward: its graph, its weights, and where each weight came from.

Legend: T tokens, D model, E experts, K chosen, N rows = T·K.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

import moec.runtime.ops  # noqa: F401 - registers torch.ops.moec
from moec.errors import PassError
from moec.ir import Origin, Program, Region, region_of
from moec.ir.graphs import attribute, output, place, placeholder, root_module, training_flag, weight_of
from moec.ir.identity import made_from
from moec.ir.patterns import is_call, tensor
from moec.plan import LayerSettings, Plan

from .branch_experts import seed_of
from .expert_weights import ExpertInit, HiddenAxis
from .hidden_units import blocks_of, inner_function, shrink_view, units_of_rows

aten = torch.ops.aten


@dataclass
class ExpertLayer:
    """A lifted region, ready to be placed: `origins` are keyed by names inside the module."""

    name: str
    index: int
    module: fx.GraphModule
    origins: dict[str, Origin] = field(default_factory=dict)


def build_experts(
    program: Program, name: str, settings: LayerSettings, plan: Plan, made: dict[object, ExpertLayer]
) -> ExpertLayer:
    """The expert layer for the region `name`. Feed-forwards that share their weights share their experts."""
    dense = program.graph.get_submodule(name)
    assert isinstance(dense, fx.GraphModule)
    key = (tuple(id(p) for p in dense.parameters()), settings)
    builder = _Builder(program, name, dense, settings, plan, twin=made.get(key))
    layer = builder.build()
    made.setdefault(key, layer)
    return layer


class _Builder:
    """Writes the graph of one expert layer, operator by operator, in the order a person would read it."""

    def __init__(
        self, program: Program, name: str, dense: fx.GraphModule, settings: LayerSettings, plan: Plan,
        twin: ExpertLayer | None,
    ) -> None:  # fmt: skip
        region = region_of(dense)
        assert region is not None
        assert plan.moe is not None
        self.program, self.name, self.dense, self.settings, self.twin = program, name, dense, settings, twin
        self.region: Region = region
        self.seed = seed_of(plan.moe.seed, region.index, "experts")
        self.owner, self.graph = root_module(), fx.Graph()
        self.origins: dict[str, Origin] = {}
        self.experts = torch.ops.moec
        self._where = f"lift_experts: {name} ({region.path})"

    def build(self) -> ExpertLayer:
        x = made_from(self.graph.placeholder("x"), placeholder(self.dense.graph), taking=())
        self.training = training_flag_of(self.graph)
        value = tensor(placeholder(self.dense.graph))
        assert value is not None
        flat = self._call("tokens", aten.flatten.using_ints, x, 0, -2) if value.dim() > 2 else x
        scores, weights, chosen = self._route(flat, value)
        order, counts = self._assign(chosen)
        rows = self._call("rows", self.experts.dispatch.default, flat, order, self.settings.top_k)
        out = self._inner(rows, counts)
        y = self._call("sums", self.experts.combine.default, out, weights, order, counts)
        y = self._shaped(x, y, value)
        balance = self._call("balance", self.experts.balance_loss.default, scores, chosen)
        z = self._call("z", self.experts.z_loss.default, scores)
        made_from(self.graph.output((y, balance, z, counts)), output(self.dense.graph), taking=())
        module = fx.GraphModule(self.owner, self.graph)
        module.meta["region"] = self._lifted_region()
        return ExpertLayer(f"moe_{self.region.index}", self.region.index, module, self.origins)

    def _call(self, name: str, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.name = name
        node.meta = {"path": self.region.path, "source": self.region.source}
        return node

    def _items(self, node: fx.Node, *names: str) -> list[fx.Node]:
        return [self._call(name, operator.getitem, node, i) for i, name in enumerate(names)]

    def _route(self, tokens: fx.Node, value: Tensor) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Scores, in fp32 at least, from a router without bias; then the choice."""
        s, read = self.settings, tokens
        if s.gate == "straight-through":
            # The weight is one whatever the router says: what the trunk learns must not depend on it either.
            read = self._call("read", aten.detach.default, read)
        if s.noise == "jitter":
            read = self._call("jittered", self.experts.jitter.default, read, s.jitter, self.training)
        scores = self._call("scores", self.experts.router.default, read, self._router(value))
        noise = "rsample" if s.noise == "rsample" else "none"
        bias = self._bias(value.device) if s.balance == "bias" else None
        routed = self._call(
            "routed", self.experts.route.default, scores, bias, s.top_k, s.gate, noise, self.training
        )
        weights, chosen = self._items(routed, "weights", "experts")
        return scores, weights, chosen

    def _router(self, value: Tensor) -> fx.Node:
        device, dtype = value.device, torch.promote_types(value.dtype, torch.float32)
        generator = torch.Generator().manual_seed(self.seed + 7)
        # Slices weigh equally only under equal scores: a split starts from a router that has no opinion.
        std = 0.0 if self.settings.init == "split" and self.settings.top_k == self.settings.experts else None
        shape = (self.settings.experts, int(value.shape[-1]))
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
        drawn = drawn * (self.settings.router_std if std is None else std)
        return self._place("router.weight", nn.Parameter(drawn.to(device=device, dtype=dtype)), Origin(None))

    def _bias(self, device: torch.device) -> fx.Node:
        return self._place("bias", torch.zeros(self.settings.experts, device=device), Origin(None))

    def _place(self, name: str, value: Tensor, origin: Origin) -> fx.Node:
        if self.twin is not None:
            value = attribute(self.twin.module, name)  # type: ignore[assignment]
        place(self.owner, name, value)
        self.origins[name] = origin
        return self.graph.get_attr(name)

    def _assign(self, chosen: fx.Node) -> tuple[fx.Node, fx.Node]:
        s = self.settings
        table = self._call(
            "table", self.experts.assign.default, chosen, s.experts, s.train_capacity, s.eval_capacity,
            s.min_capacity, s.random_token_selection, self.training,
        )  # fmt: skip
        order, counts = self._items(table, "order", "counts")
        return order, counts

    def _shaped(self, x: fx.Node, y: fx.Node, value: Tensor) -> fx.Node:
        """[T, D] back to the leading dims of x."""
        out = tensor(output(self.dense.graph).args[0])
        assert out is not None
        if value.dim() == 2:
            return y
        if list(map(str, out.shape)) == list(map(str, value.shape)):
            return self._call("y", aten.view_as.default, y, x)
        sizes = [self._call(f"size_{d}", aten.sym_size.int, x, d) for d in range(1, value.dim() - 1)]
        return self._call("y", aten.unflatten.int, y, 0, [-1, *sizes])

    # the expert's own computation

    def _inner(self, rows: fx.Node, counts: fx.Node) -> fx.Node:
        """Copy the dense region over sorted rows: products become grouped, everything else stays."""
        env: dict[fx.Node, fx.Node] = {placeholder(self.dense.graph): rows}
        axes, hidden = self._hidden_axes()
        generator = torch.Generator().manual_seed(self.seed)
        init = ExpertInit(self.settings, hidden, generator)
        result = output(self.dense.graph).args[0]
        for node in self.dense.graph.nodes:
            if is_call(node, aten.linear.default):
                env[node] = self._grouped(
                    node, env, counts, init, axes[node], "down" if node is result else "up"
                )
            elif node.op == "call_function" and self._is_needed(node):
                env[node] = self._copy(node, env, hidden)
        assert isinstance(result, fx.Node)
        return env[result]

    def _is_needed(self, node: fx.Node) -> bool:
        """Weights are read where they are used; transpositions of matrices vanish into the expert weights."""
        return not (
            is_call(node, aten.t.default) and all(is_call(u, aten.linear.default) for u in node.users)
        )

    def _copy(self, node: fx.Node, env: dict[fx.Node, fx.Node], hidden: int) -> fx.Node:
        for source in node.all_input_nodes:
            if source not in env:
                env[source] = self._shared(source)
        copied = self.graph.node_copy(node, lambda n: env[n])  # it stays the node it was, on other rows
        if self.settings.init == "split":
            shrink_view(copied, hidden, self.settings.experts, self._where)
        return copied

    def _shared(self, node: fx.Node) -> fx.Node:
        """A weight that is not a product's (a learned slope, say): one for all experts; or
        `self.training`."""
        if node.target == "training":
            return self.training
        value, target = weight_of(self.dense, node), str(node.target)
        assert value is not None
        self._require_one_size(target, value)
        place(self.owner, target, value)
        if f"{self.name}.{target}" in self.program.origins:
            self.origins[target] = self.program.origins[f"{self.name}.{target}"]
        read = self.graph.get_attr(target)
        read.meta = dict(node.meta)  # the same weight, read in another region
        # Rows have two dims: [1, 1, F] must not make them three again.
        return read if value.dim() <= 2 else self._call("flat", aten.flatten.using_ints, read, 0, -2)

    def _require_one_size(self, target: str, value: Tensor) -> None:
        if self.settings.init == "split" and value.numel() > 1:
            raise PassError(
                self._where, f"init 'split' with {target} {list(value.shape)}, a weight for each hidden unit",
                "no weights between up and down but single numbers, since all experts share them",
                "init = 'copy', 'noise', 'partial' or 'fresh'",
            )  # fmt: skip

    def _grouped(
        self, node: fx.Node, env: dict[fx.Node, fx.Node], counts: fx.Node, init: ExpertInit,
        axis: HiddenAxis | None, role: str,
    ) -> fx.Node:  # fmt: skip
        matrix, turned = _matrix(node)
        weight = made_from(self._expert_weight(str(matrix.target), turned, init, axis), matrix)
        rows = env[node.args[0]]  # type: ignore[index]
        if self.settings.init == "split" and role == "down":
            # The weights of the chosen sum to one, so each slice must stand for the whole.
            rows = self._call("whole", aten.mul.Tensor, rows, float(self.settings.experts))
        bias_node = node.args[2] if len(node.args) > 2 else None
        bias = None
        if isinstance(bias_node, fx.Node):
            along = HiddenAxis(0, axis.blocks) if axis is not None and role == "up" else None
            bias = made_from(self._expert_weight(str(bias_node.target), False, init, along), bias_node)
        made = self._call(node.name, self.experts.grouped_linear.default, rows, weight, bias, counts)
        return made_from(made, node)

    def _expert_weight(self, target: str, turned: bool, init: ExpertInit, axis: HiddenAxis | None) -> fx.Node:
        if target in self.origins:
            return self.graph.get_attr(target)
        value = self.dense.get_parameter(target)
        dense = (value.t() if turned else value).detach()
        was = self.program.origins[f"{self.name}.{target}"]
        origin = replace(init.origin(was.source, dense, axis, turned), teacher=was.teacher)
        made = nn.Parameter(init.make(dense, origin, axis).contiguous(), requires_grad=value.requires_grad)
        return self._place(target, made, origin)

    # the hidden units

    def _hidden_axes(self) -> tuple[dict[fx.Node, HiddenAxis | None], int]:
        """Where the hidden units run through each product's matrix; only looked for when the init needs
        it."""
        products = [n for n in self.dense.graph.nodes if is_call(n, aten.linear.default)]
        down = output(self.dense.graph).args[0]
        hidden = int(tensor(down.args[0]).shape[-1])  # type: ignore[union-attr]
        if self.settings.init not in ("split", "partial"):
            return dict.fromkeys(products), hidden
        ups = [p for p in products if p is not down]
        blocks = self._blocks(ups, down, hidden)  # type: ignore[arg-type]
        self._require_divisible(hidden)
        axes: dict[fx.Node, HiddenAxis | None] = {
            up: HiddenAxis(0, b) for up, b in zip(ups, blocks, strict=True)
        }
        return {**axes, down: HiddenAxis(1)}, hidden  # type: ignore[dict-item]

    def _blocks(self, ups: list[fx.Node], down: fx.Node, hidden: int) -> list[int]:
        widths = [int(tensor(up).shape[-1]) for up in ups]  # type: ignore[union-attr]
        units = units_of_rows(inner_function(self.dense, ups, down), widths, hidden)
        blocks = [blocks_of(u, hidden) for u in units] if units is not None else [None]
        if any(b is None for b in blocks):
            raise PassError(
                self._where,
                f"init '{self.settings.init}' on hidden units that are not laid out in order",
                "an up product whose outputs each reach one hidden unit, in order",
                "init = 'copy', 'noise' or 'fresh'",
            )  # fmt: skip
        return [b for b in blocks if b is not None]

    def _require_divisible(self, hidden: int) -> None:
        experts = self.settings.experts
        if self.settings.init == "split" and hidden % experts:
            divisors = [d for d in range(1, hidden + 1) if hidden % d == 0]
            closest = min(divisors, key=lambda d: abs(d - experts))
            raise PassError(
                self._where, f"init 'split' of {hidden} hidden units into {experts}",
                "a number of experts that divides the hidden units", f"experts = {closest}",
            )  # fmt: skip

    def _lifted_region(self) -> Region:
        expert = [leaf for leaf, origin in self.origins.items() if origin.experts]
        s = self.settings
        facts = {
            **s.model_dump(), "expert_parameters": expert, "idle_experts": s.experts - s.top_k,
        }  # fmt: skip
        return replace(self.region, kind="moe", settings=facts)


def training_flag_of(graph: fx.Graph) -> fx.Node:
    """The node that reads `self.training` in a graph that has only inputs so far."""
    if any(node.op not in ("placeholder",) for node in graph.nodes):
        return training_flag(graph)
    return graph.create_node("get_attr", "training", name="training")


def _matrix(node: fx.Node) -> tuple[fx.Node, bool]:
    """The weight a product reads, and whether it is stored as [in, out]."""
    matrix, turned = node.args[1], False
    while is_call(matrix, aten.t.default):
        matrix, turned = matrix.args[0], not turned  # type: ignore[union-attr]
    assert isinstance(matrix, fx.Node)
    return matrix, turned
