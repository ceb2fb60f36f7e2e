"""`moec::grouped_linear`: one linear layer per expert, over rows sorted by expert.

    grouped_linear(rows [N,D], weight [E,F,D], bias [E,F]?, counts [E]) -> [N,F]
        rows of expert e times weight[e] transposed, plus bias[e]; rows beyond counts.sum() are zero
    grouped_outer(left [N,F], right [N,D], counts [E]) -> [E,F,D]
        for each expert left-transposed times right over its rows: the gradient of `weight`
    grouped_sum(rows [N,F], counts [E]) -> [E,F]
        for each expert the sum of its rows: the gradient of `bias`

The gradient of `rows` is `grouped_linear` with the weights transposed, so these three are closed. Each writes
every expert's product straight into its slice of one result: indexing `weight[e]` under autograd would write
a gradient the size of the whole weight for every expert. Experts without rows are neither read nor
multiplied; their gradients are zeros. Under autocast, inputs take the autocast dtype, as for `linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moec.runtime.ops.buffers import GRADIENTS, ROWS
from moec.runtime.ops.products import multiply
from moec.runtime.ops.registry import LIBRARY, define, demand, differentiate
from moec.runtime.ops.work import NOTHING, Amount, Call, Load, Price, Product, Work, price


def check_grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> None:
    """Raise an `OperatorError` for arguments that `moec::grouped_linear` cannot mean anything by."""
    name = "grouped_linear"
    dims = (rows.dim(), weight.dim(), counts.dim())
    demand(
        dims == (2, 3, 1), name, f"inputs with {dims} dimensions", "rows [N,D], weight [E,F,D], counts [E]"
    )
    experts, width, depth = weight.shape
    demand(rows.shape[1] == depth, name, f"rows of width {rows.shape[1]}", f"width {depth}, as the weight's")
    demand(counts.shape[0] == experts, name, f"{counts.shape[0]} counts", f"{experts}, one an expert")
    demand(rows.dtype == weight.dtype, name, f"rows of {rows.dtype}", f"{weight.dtype}, as the weight")
    if bias is not None:
        shaped = bias.dim() == 2 and bias.shape[0] == experts and bias.shape[1] == width
        demand(shaped, name, f"bias {list(bias.shape)}", f"bias [{experts}, {width}]")
        demand(bias.dtype == weight.dtype, name, f"bias of {bias.dtype}", f"{weight.dtype}, as the weight")


def spans(counts: Tensor, num_rows: int) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, number of rows) for the experts that have rows. Reads `counts` back to the host."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        fits = count >= 0 and start + count <= num_rows
        demand(fits, "grouped_linear", f"{count} rows after {start}", f"counts that split {num_rows} rows")
        if count:
            yield expert, start, count
        start += count


def _grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    check_grouped_linear(rows, weight, bias, counts)
    out = ROWS.empty((rows.shape[0], weight.shape[1]), rows.dtype, rows.device)
    end = 0
    for expert, start, count in spans(counts, rows.shape[0]):
        end = start + count
        multiply(rows[start:end], weight[expert], None if bias is None else bias[expert], out[start:end])
    out[end:].zero_()
    return out


def _grouped_outer(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    shape = (counts.shape[0], left.shape[1], right.shape[1])
    out = GRADIENTS.empty(shape, left.dtype, left.device)
    done = 0
    for expert, start, count in spans(counts, left.shape[0]):
        out[done:expert].zero_()
        end = start + count
        multiply(left[start:end].t(), right[start:end].t(), None, out[expert])
        done = expert + 1
    out[done:].zero_()
    return out


def _grouped_sum(rows: Tensor, counts: Tensor) -> Tensor:
    out = rows.new_zeros(counts.shape[0], rows.shape[1])
    for expert, start, count in spans(counts, rows.shape[0]):
        torch.sum(rows[start : start + count], 0, out=out[expert])
    return out


def _fake_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    check_grouped_linear(rows, weight, bias, counts)
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _fake_outer(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    return left.new_empty(counts.shape[0], left.shape[1], right.shape[1])


def _fake_sum(rows: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(counts.shape[0], rows.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, _, counts = inputs
    ctx.save_for_backward(rows, weight, counts)


def _backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, counts = ctx.saved_tensors
    to_rows, to_weight, to_bias, *_ = ctx.needs_input_grad
    ops = torch.ops.moec
    return (
        ops.grouped_linear(grad_NF, weight.mT, None, counts) if to_rows else None,
        ops.grouped_outer(grad_NF, rows, counts) if to_weight else None,
        ops.grouped_sum(grad_NF, counts) if to_bias else None,
        None,
    )


def _autocast(device: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(tensor: Tensor | None) -> Tensor | None:
        castable = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(torch.get_autocast_dtype(device)) if castable and tensor is not None else tensor

    def kernel(rows: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
        rows, weight, bias = cast(rows), cast(weight), cast(bias)  # type: ignore[assignment]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.moec.grouped_linear(rows, weight, bias, counts)

    return kernel


define(
    "grouped_linear(Tensor rows, Tensor weight, Tensor? bias, Tensor counts) -> Tensor",
    _grouped_linear,
    _fake_linear,
)
define("grouped_outer(Tensor left, Tensor right, Tensor counts) -> Tensor", _grouped_outer, _fake_outer)
define("grouped_sum(Tensor rows, Tensor counts) -> Tensor", _grouped_sum, _fake_sum)
differentiate("grouped_linear", _setup, _backward)
LIBRARY.impl("grouped_linear", _autocast("cpu"), "AutocastCPU")
LIBRARY.impl("grouped_linear", _autocast("cuda"), "AutocastCUDA")


def _price(call: Call) -> Price:
    """Only experts that have rows are read and multiplied."""
    width, depth = call.shape("weight")[1:]
    load = call.load("counts")
    forward = _rows_through(load, depth, width, call.itemsize("rows"))
    out = load.rows * width * call.itemsize("rows")
    backward = NOTHING
    if call.needs_grad("rows"):
        backward += _rows_through(load, width, depth, call.itemsize("rows"))
    if call.needs_grad("weight"):
        backward += _outer(load, call.shape("counts")[0], width, depth, call.itemsize("rows"))
    if call.has("bias") and call.needs_grad("bias"):
        backward += Work((), out, call.bytes("bias"))
    return Price(forward, backward)


def _rows_through(load: Load, depth: Amount, width: Amount, itemsize: int) -> Work:
    weights = load.touched * width * depth
    product = Product(load.rows, width, depth, load.touched)
    return Work((product,), (load.rows * depth + weights) * itemsize, load.rows * width * itemsize)


def _outer(load: Load, experts: Amount, width: Amount, depth: Amount, itemsize: int) -> Work:
    """The gradient of the weights; those of experts without rows are written too."""
    product = Product(width, depth, load.rows, load.touched, "k")
    return Work((product,), load.rows * (width + depth) * itemsize, experts * width * depth * itemsize)


def _outer_price(call: Call) -> Price:
    width, depth = call.shape("left")[1], call.shape("right")[1]
    return Price(_outer(call.load("counts"), call.shape("counts")[0], width, depth, call.itemsize("left")))


price("grouped_linear", _price)
price("grouped_outer", _outer_price)
