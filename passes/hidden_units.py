"""Which hidden unit each row of an up product belongs to, found by evaluation.

Between the up products and the down product stand pointwise operators and views, so every output of an
up product reaches exactly one hidden unit; which one depends on the spelling (a fused gate and up may be
two halves, or interleaved). Instead of knowing the spellings, ask the gradient: with cotangents that
spell the binary digits of the unit's number, `log2(F)` backward passes read every row's unit at once.

Legend: U outputs of an up product, F hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moec.errors import PassError
from moec.ir.graphs import weight_of
from moec.ir.patterns import is_call

aten = torch.ops.aten
WHOLE_DIM = 2**62  # a slice up to here or beyond has no end

Inner = Callable[[Sequence[Tensor]], Tensor]


def units_of_rows(inner: Inner, widths: Sequence[int], hidden: int) -> list[Tensor] | None:
    """For each up product, the hidden unit i64 [U] of each of its outputs; None when some output has not one.

    `inner`: outputs of the up products [1, U] → input of the down product [1, F], in fp64.
    """
    found: list[Tensor] | None = None
    for attempt in range(4):
        sample = _sample(widths, attempt)
        units = _read(inner, sample, hidden)
        if units is None:
            return None
        found = units if found is None else [torch.maximum(a, b) for a, b in zip(found, units, strict=True)]
        if all(bool((u >= 0).all()) for u in found):
            return found
    return None


def _sample(widths: Sequence[int], attempt: int) -> list[Tensor]:
    """Mostly positive values, where no usual non-linearity is flat; later attempts move elsewhere."""
    generator = torch.Generator().manual_seed(attempt)
    low = (0.3, -1.0, 0.05, -3.0)[attempt]
    drawn = [torch.rand(1, width, generator=generator, dtype=torch.float64) + low for width in widths]
    return [value.requires_grad_() for value in drawn]


def _read(inner: Inner, sample: list[Tensor], hidden: int) -> list[Tensor] | None:
    """Unit numbers, -1 where the gradient vanished at this sample; None when a row reaches several units."""
    with torch.enable_grad():
        out = inner(sample)
    if out.shape[-1] != hidden:
        return None
    unit = torch.arange(hidden)
    whole = _pull(out, torch.ones(1, hidden, dtype=torch.float64), sample)
    numbers = [torch.zeros(value.shape[-1], dtype=torch.long) for value in sample]
    for digit in range(max(1, (hidden - 1).bit_length())):
        code = ((unit >> digit) & 1).to(torch.float64)[None]
        for number, part, total in zip(numbers, _pull(out, code, sample), whole, strict=True):
            share = part[0] / total[0]
            seen = total[0].abs() > 1e-12
            if bool((((share - share.round()).abs() > 1e-9) | (share < -0.5) | (share > 1.5))[seen].any()):
                return None
            number += torch.where(seen, share.round(), 0).long() << digit
    return [torch.where(total[0].abs() > 1e-12, n, -1) for n, total in zip(numbers, whole, strict=True)]


def _pull(out: Tensor, cotangent: Tensor, sample: list[Tensor]) -> list[Tensor]:
    gradients = torch.autograd.grad(
        out, sample, cotangent.expand_as(out), retain_graph=True, allow_unused=True
    )
    return [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, sample, strict=True)]


def blocks_of(units: Tensor, hidden: int) -> int | None:
    """How the units run through the rows: 1 (in order, or each unit's rows together), m (m times over),
    or None."""
    width = units.numel()
    if width % hidden:
        return None
    times = width // hidden
    if torch.equal(units, torch.arange(hidden).repeat_interleave(times)):
        return 1
    return times if torch.equal(units, torch.arange(hidden).repeat(times)) else None


def inner_function(dense: fx.GraphModule, ups: list[fx.Node], down: fx.Node):  # type: ignore[no-untyped-def]
    """Outputs of the up products → input of the down product, computed in fp64 on the CPU."""

    def inner(values):  # type: ignore[no-untyped-def]
        env: dict[fx.Node, Any] = dict(zip(ups, values, strict=True))
        for node in dense.graph.nodes:
            if node is down:
                return env[down.args[0]]
            if node in env or node.op in ("placeholder", "output") or is_call(node, aten.linear.default):
                continue
            env[node] = evaluate(dense, node, env)
        raise AssertionError("unreachable: the down product ends every feed-forward")

    return inner


def evaluate(dense: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """The value of `node` in fp64, from those in `env`; weights on `meta` are ones, nothing is dropped."""
    if node.op == "get_attr":
        value = weight_of(dense, node)
        if value is None:
            return False  # `training`: no dropout
        return (
            torch.ones(value.shape, dtype=torch.float64) if value.is_meta else value.detach().double().cpu()
        )
    if any(source not in env for source in node.all_input_nodes):
        return None  # computed from the region's input; no product's output reaches it
    args = fx.node.map_arg(node.args, lambda n: env[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: env[n])
    if node.target is aten.to.dtype:
        return args[0]
    return node.target(*args, **kwargs)  # type: ignore[operator]


def shrink_view(node: fx.Node, hidden: int, experts: int, where: str) -> None:
    """Give a view that spells the number of hidden units one expert's share of them, in place.

    Raises `PassError` (`where`: the layer) when it cannot be said which of its sizes counts hidden units.
    """

    def share(size: Any) -> Any:
        if not isinstance(size, int) or size % hidden:
            raise PassError(
                where, f"init 'split' through {node.name} = {node.target}{node.args[1:]}",
                f"sizes that are multiples of the {hidden} hidden units", "init = 'copy', 'noise' or 'fresh'",
            )  # fmt: skip
        return size // experts

    args = list(node.args)
    if node.target is aten.split.Tensor:
        args[1] = share(args[1])
    elif node.target is aten.split_with_sizes.default:
        args[1] = [share(size) for size in args[1]]  # type: ignore[union-attr]
    elif node.target is aten.slice.Tensor:
        ends = [position for position in (2, 3) if _is_inside(args, position)]
        args = [share(a) if i in ends else a for i, a in enumerate(args)]
    elif node.target is aten.unflatten.int:
        sizes = list(args[2])  # type: ignore[arg-type]
        whole = [i for i, size in enumerate(sizes) if size == hidden]
        args[2] = [share(s if len(whole) == 1 else None) if i in whole else s for i, s in enumerate(sizes)]
        args[2] = args[2] if whole else [share(None)]
    node.args = tuple(args)


def _is_inside(args: Sequence[Any], position: int) -> bool:
    """Whether a slice has a bound at `position` that counts units: not an end of the dim, nor the place
    within each unit's rows that a step begins from."""
    if len(args) <= position or args[position] is None or args[position] >= WHOLE_DIM:
        return False
    step = args[4] if len(args) > 4 else 1
    return bool(args[position] >= step if position == 2 and step > 1 else args[position] != 0)
