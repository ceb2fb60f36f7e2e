"""Reading one candidate: is the slice behind this product a feed-forward, and if not, why not?"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from moec.ir.dependence import READS_SHAPE_ONLY
from moec.ir.graphs import placeholder
from moec.ir.outline import parameter_only
from moec.ir.patterns import static, tensor

aten = torch.ops.aten

# Changes of shape that may stand inside a feed-forward as long as they leave the leading dims alone.
VIEWS = {
    aten.unflatten.int, aten.flatten.using_ints, aten.split.Tensor, aten.split_with_sizes.default,
    aten.chunk.default,
    aten.cat.default, aten.stack.default, aten.select.int, aten.slice.Tensor, aten.unbind.int,
    aten.unsqueeze.default,
    aten.squeeze.dim, aten.transpose.int, operator.getitem, aten.expand.default, aten.reshape.default,
    aten.permute.default, aten.repeat_interleave.self_int, aten.flip.default,
}  # fmt: skip
DROPOUT = {aten.dropout.default}
LINEAR_POINTWISE = {aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.to.dtype, aten.rsub.Scalar}
SCALING = {aten.mul.Tensor, aten.div.Tensor}


@dataclass(frozen=True)
class Refusal:
    """Why a product is not the end of a feed-forward; a `near_miss` looked like one until that point."""

    reason: str
    near_miss: bool = False


@dataclass
class FeedForward:
    """A closed region: `root` goes in, `down` comes out, `ups` are the products on `root`."""

    root: fx.Node
    down: fx.Node
    ups: list[fx.Node]
    inner: list[fx.Node] = field(default_factory=list)

    @property
    def nodes(self) -> list[fx.Node]:
        """Every node of the region, in graph order."""
        members = {*self.ups, *self.inner, self.down}
        return [node for node in self.down.graph.nodes if node in members]

    def products(self) -> dict[str, fx.Node]:
        """Role → product: `up` and `down`; of two ups, the one that is squashed is the `gate`."""
        if len(self.ups) == 1:
            return {"up": self.ups[0], "down": self.down}
        if len(self.ups) == 2:
            gate, up = self.ups if self._is_squashed(self.ups[0]) else self.ups[::-1]
            return {"gate": gate, "up": up, "down": self.down}
        return {**{f"up_{i}": up for i, up in enumerate(self.ups)}, "down": self.down}

    def weight_roles(self) -> dict[str, str]:
        """Name of a weight in the root → its role."""
        roles = {}
        for role, product in self.products().items():
            value: Any = product.args[1]
            while value.op != "get_attr":
                value = value.args[0]
            roles[str(value.target)] = role
        return roles

    def _is_squashed(self, up: fx.Node) -> bool:
        """Whether this product meets a non-linearity before it meets the other branch."""
        node = up
        while len(node.users) == 1:
            node = next(iter(node.users))
            if node.target in SCALING and sum(isinstance(a, fx.Node) for a in node.args) > 1:
                return False
            if node in self.inner and node.target not in VIEWS | LINEAR_POINTWISE | SCALING | DROPOUT:
                return True
        return len(up.users) > 1


def read_feed_forward(
    graph: fx.Graph, down: fx.Node, says: set[fx.Node], claimed: set[fx.Node]
) -> FeedForward | Refusal:
    """The feed-forward that ends in the product `down`, or the reason there is none.

    `says`: the token-dependent nodes. `claimed`: nodes of feed-forwards found before; extended on success.
    """
    if down not in says or down in claimed:
        return Refusal("its input does not depend on the tokens")
    if _is_logits(down):
        return Refusal("its output is the logits (language-model head)")
    ups = _ups(down, says)
    if isinstance(ups, Refusal):
        return ups
    found = FeedForward(root=ups[0].args[0], down=down, ups=ups)  # type: ignore[arg-type]
    problem = (
        _rows(graph, found)
        or _inner(graph, found, says)
        or _escape(found)
        or _linear(found, says)
        or _overlap(found, claimed)
    )
    if problem is not None:
        return problem
    claimed.update(found.nodes)
    return found


def _rows(graph: fx.Graph, found: FeedForward) -> Refusal | None:
    """Refuse a region whose rows are not the tokens (one row per sequence, say)."""
    tokens, rows = tensor(placeholder(graph)), tensor(found.root)
    if tokens is None or rows is None or tokens.numel() == math.prod(rows.shape[:-1]):
        return None
    shape = ", ".join(map(str, rows.shape))
    return Refusal(f"its input `{found.root.name}` [{shape}] does not hold one row per token", near_miss=True)


def _is_logits(down: fx.Node) -> bool:
    """Whether only pointwise operators stand between this product and the output."""
    node = down
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op == "output":
            return True
        if not (is_pointwise(node) or node.target in VIEWS):
            return False
    return False


def is_pointwise(node: fx.Node) -> bool:
    """Whether a call acts on each element by itself."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags
        or target in (aten.gelu.default, aten.glu.default, aten.prelu.default)
    )


def _ups(down: fx.Node, says: set[fx.Node]) -> list[fx.Node] | Refusal:
    """The products reached backwards from `down` that share one input."""
    reached, stack, seen = [], [down.args[0]], set[Any]()
    blocked = None
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node not in says or node in seen:
            continue
        seen.add(node)
        if node.target is aten.linear.default:
            reached.append(node)
        elif is_pointwise(node) or node.target in VIEWS | DROPOUT:
            stack.extend(node.all_input_nodes)
        else:
            blocked = blocked or node
    if not reached:
        return _blocked(down, blocked)
    order = {node: i for i, node in enumerate(down.graph.nodes)}
    return _sharing_one_root(down, sorted(reached, key=order.__getitem__), blocked, seen)


def _blocked(down: fx.Node, blocked: fx.Node | None) -> Refusal:
    if blocked is None:
        return Refusal("no product stands before it")
    return Refusal(f"its input comes from `{blocked.name}`, which is not pointwise")


def _sharing_one_root(
    down: fx.Node, reached: list[fx.Node], blocked: fx.Node | None, seen: set[Any]
) -> list[fx.Node] | Refusal:
    roots = list(dict.fromkeys(up.args[0] for up in reached))
    if len(roots) == 1:
        # Reaching past the root is no problem; stopping at something else is.
        if blocked is not None and blocked is not roots[0] and not _is_behind(blocked, roots[0]):
            return Refusal(
                f"a product shares its input with `{blocked.name}`, which is not pointwise", near_miss=True
            )
        return reached
    if blocked is not None:
        return Refusal(f"its input also comes from `{blocked.name}`, which is not pointwise", near_miss=True)
    names = " and ".join(f"`{r.name}`" for r in roots[:2])  # type: ignore[union-attr]
    return Refusal(f"its products have different inputs: {names}", near_miss=True)


def _is_behind(node: fx.Node, root: Any) -> bool:
    """Whether `root` is computed from `node`."""
    stack, seen = [root], set[Any]()
    while stack:
        current = stack.pop()
        if current is node:
            return True
        if isinstance(current, fx.Node) and current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False


def _inner(graph: fx.Graph, found: FeedForward, says: set[fx.Node]) -> Refusal | None:
    """Collect everything between the ups and `down`; refuse what would not survive sorting rows by expert."""
    weights = parameter_only(graph)
    stack, seen = [found.down.args[0]], {found.root, *found.ups}
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen or node in weights:
            continue
        seen.add(node)
        if node not in says:
            return Refusal(f"it depends on positions through `{node.name}`", near_miss=True)
        if not (is_pointwise(node) or node.target in VIEWS | DROPOUT):
            return Refusal(f"`{node.name}` stands inside it and is not pointwise", near_miss=True)
        if not _keeps_rows(node, found.root):
            return Refusal(f"`{node.name}` mixes rows: it changes more than features", near_miss=True)
        found.inner.append(node)
        stack.extend(node.all_input_nodes)
    return None


def _keeps_rows(node: fx.Node, root: fx.Node) -> bool:
    """Whether a view leaves every leading dim of the region's input alone, and names feature dims from the
    end."""
    if node.target not in VIEWS or node.target is operator.getitem:
        return True
    before, after, rows = tensor(_first(node)), tensor(node), tensor(root)
    dims = [a for a in node.args[1:] if isinstance(a, int)] if node.target is not aten.expand.default else []
    if before is None or rows is None:
        return False
    lead = rows.dim() - 1
    sizes = [s for a in node.args[1:] if isinstance(a, (list, tuple)) for s in a]
    if any(isinstance(s, fx.Node) for s in sizes) or (node.target is aten.reshape.default):
        return False
    if after is not None and [str(s) for s in after.shape[:lead]] != [str(s) for s in rows.shape[:lead]]:
        return False
    return _from_the_end(node, dims, before.dim(), lead) and static(before.shape[lead:])


def _from_the_end(node: fx.Node, dims: list[int], rank: int, lead: int) -> bool:
    """Whether the dims a view names are negative and lie among the feature dims."""
    position = {aten.split.Tensor: 1, aten.chunk.default: 1, aten.split_with_sizes.default: 1}
    named: list[Any]
    if node.target in position:
        named = [node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)]
    elif node.target in (aten.cat.default, aten.stack.default, aten.unbind.int):
        named = [node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)]
    elif node.target in (aten.expand.default, aten.permute.default):
        return node.target is aten.expand.default
    else:
        named = dims[:2] if node.target in (aten.flatten.using_ints, aten.transpose.int) else dims[:1]
    extra = 1 if node.target in (aten.stack.default, aten.unsqueeze.default) else 0
    return all(isinstance(d, int) and d < 0 and d + rank + extra >= lead for d in named)


def _first(node: fx.Node) -> Any:
    first = node.args[0]
    return first[0] if isinstance(first, (list, tuple)) else first


def _escape(found: FeedForward) -> Refusal | None:
    """Refuse when a value from inside is read outside."""
    members = set(found.nodes)
    for node in found.nodes:
        for user in node.users:
            if node is not found.down and user not in members and user.target not in READS_SHAPE_ONLY:
                return Refusal(f"`{node.name}` inside it is also used by `{user.name}`", near_miss=True)
    return None


def _linear(found: FeedForward, says: set[fx.Node]) -> Refusal | None:
    """Refuse a chain without any non-linearity (a low-rank pair, say)."""
    for node in found.inner:
        if node.target in VIEWS | DROPOUT | LINEAR_POINTWISE:
            continue
        factors = [a for a in node.args if isinstance(a, fx.Node) and a in says]
        if node.target in SCALING and len(factors) < 2:
            continue
        return None
    return Refusal("no non-linearity between its products (a low-rank pair)", near_miss=True)


def _overlap(found: FeedForward, claimed: set[fx.Node]) -> Refusal | None:
    taken = next((node for node in found.nodes if node in claimed), None)
    return (
        Refusal(f"`{taken.name}` already belongs to another feed-forward", near_miss=True) if taken else None
    )
