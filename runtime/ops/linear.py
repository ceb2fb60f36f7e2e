"""`moec::linear`: torch's `linear`, its products by the table in `products`.

    linear(input [..., D], weight [F, D], bias [F]?) -> [..., F]
    linear_outer(left [..., F], right [..., D]) -> [F, D]
        left-transposed times right over all rows: the gradient of `weight`

Forward and both gradients go where the table says, packed weights are found, and the gradient of the weight
is written into kept memory (`buffers`). Under autocast, inputs take the autocast dtype, as for torch's. On
anything but a CPU it is torch's `linear`.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.runtime.ops.buffers import GRADIENTS
from moec.runtime.ops.products import multiply, packed_part, product
from moec.runtime.ops.registry import LIBRARY, define, demand, differentiate
from moec.runtime.ops.work import NOTHING, Call, Price, Product, Work, price


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise an `OperatorError` for arguments that `moec::linear` cannot mean anything by."""
    name = "linear"
    demand(x.dim() >= 1, name, "a scalar input", "input [..., D]")
    fits = weight.dim() == 2 and weight.shape[1] == x.shape[-1]
    demand(fits, name, f"weight {list(weight.shape)}", f"weight [F, {x.shape[-1]}]")
    demand(x.dtype == weight.dtype, name, f"input of {x.dtype}", f"{weight.dtype}, as the weight")
    if bias is not None:
        shaped = bias.dim() == 1 and bias.shape[0] == weight.shape[0]
        demand(shaped, name, f"bias {list(bias.shape)}", f"bias [{weight.shape[0]}]")
        demand(bias.dtype == weight.dtype, name, f"bias of {bias.dtype}", f"{weight.dtype}, as the weight")


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_linear(input, weight, bias)
    out_NF = product(_rows(input), weight, bias, packed_part(weight))
    return out_NF.view(*input.shape[:-1], weight.shape[0])


def _linear_elsewhere(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_linear(input, weight, bias)
    return F.linear(input, weight, bias)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    out_FD = GRADIENTS.empty((left.shape[-1], right.shape[-1]), left.dtype, left.device)
    multiply(_rows(left).t(), _rows(right).t(), None, out_FD)
    return out_FD


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_linear(input, weight, bias)
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _fake_outer(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[-1], right.shape[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    to_x, to_weight, to_bias = ctx.needs_input_grad
    ops = torch.ops.moec
    return (
        ops.linear(grad, weight.t(), None) if to_x else None,
        ops.linear_outer(grad, x) if to_weight else None,
        _rows(grad).sum(0) if to_bias else None,
    )


def _outer_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _outer_backward(ctx: Any, grad_FD: Tensor) -> tuple[Tensor | None, ...]:
    left, right = ctx.saved_tensors
    to_left, to_right = ctx.needs_input_grad
    ops = torch.ops.moec
    return (
        ops.linear(right, grad_FD, None) if to_left else None,
        ops.linear(left, grad_FD.t(), None) if to_right else None,
    )


def _autocast(device: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(tensor: Tensor | None) -> Any:
        castable = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(torch.get_autocast_dtype(device)) if castable and tensor is not None else tensor

    def kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, weight, bias = cast(input), cast(weight), cast(bias)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            out: Tensor = torch.ops.moec.linear.default(input, weight, bias)
            return out

    return kernel


define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", _linear_elsewhere, _fake)
define("linear_outer(Tensor left, Tensor right) -> Tensor", _outer, _fake_outer)
LIBRARY.impl("linear", _linear, "CPU")
differentiate("linear", _setup, _backward)
differentiate("linear_outer", _outer_setup, _outer_backward)
LIBRARY.impl("linear", _autocast("cpu"), "AutocastCPU")
LIBRARY.impl("linear", _autocast("cuda"), "AutocastCUDA")


def linear_price(call: Call) -> Price:
    """x [..., D] times weight [F, D] transposed; torch's `linear` has the same formula."""
    *rows, depth = call.shape("input")
    width, size = call.shape("weight")[0], prod(rows)
    operands = call.bytes("input") + call.bytes("weight") + call.bytes("bias")
    out = size * width * call.itemsize("input")
    backward = NOTHING
    if call.needs_grad("input"):
        read = out + call.bytes("weight")
        backward += Work((Product(size, depth, width),), read, call.bytes("input"))
    if call.needs_grad("weight"):
        backward += Work((Product(width, depth, size),), out + call.bytes("input"), call.bytes("weight"))
    if call.has("bias") and call.needs_grad("bias"):
        backward += Work((), out, call.bytes("bias"))
    return Price(Work((Product(size, width, depth),), operands, out), backward)


def _outer_price(call: Call) -> Price:
    *rows, width = call.shape("left")
    depth = call.shape("right")[-1]
    read, written = call.bytes("left") + call.bytes("right"), width * depth * call.itemsize("left")
    return Price(Work((Product(width, depth, prod(rows)),), read, written))


price("linear", linear_price)
price("linear_outer", _outer_price)
