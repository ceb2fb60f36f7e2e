"""torch's flop counter is told what `moec::` operators multiply.

    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode() as counter:
        program(tokens)

The counter sees a kernel of `moec::` as one call and nothing inside it. Importing this module registers the
formulas that stand beside the kernels (`work.price`) with torch; shapes are those of the call, and rows of
experts are read off its counts. Where the counts have no numbers (fake tensors, `meta`) every row counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from moec.runtime.ops.work import PRICES, Load


class RunningCall:
    """A call that runs, as formulas see it (`work.Call`): sizes are integers."""

    training = False

    def __init__(self, schema: torch.FunctionSchema, arguments: Sequence[Any], named: dict[str, Any]) -> None:
        self.arguments = {one.name: one.default_value for one in schema.arguments}
        self.arguments |= dict(zip(self.arguments, arguments, strict=False)) | named
        self.results: tuple[Any, ...] = ()

    @property
    def operands(self) -> list[str]:
        """See `work.Call`, here and below."""
        return [name for name in self.arguments if self.has(name)]

    def has(self, name: str) -> bool:
        return any(True for _ in self._tensors(name))

    def shape(self, name: str) -> tuple[int, ...]:
        (tensor,) = self._tensors(name)
        return tuple(tensor.shape)

    def bytes(self, name: str) -> int:
        return sum(map(_bytes, self._tensors(name)))

    def itemsize(self, name: str) -> int:
        return next(self._tensors(name)).dtype.itemsize

    def needs_grad(self, name: str) -> bool:
        return any(tensor.requires_grad for tensor in self._tensors(name))

    def is_weight(self, name: str) -> bool:
        return any(isinstance(tensor, torch.nn.Parameter) for tensor in self._tensors(name))

    def value(self, name: str) -> Any:
        return self.arguments[name]

    def tensors(self, name: str) -> Sequence[tuple[int, ...]]:
        return [tuple(tensor.shape) for tensor in self._tensors(name)]

    def load(self, name: str) -> Load:
        (counts,) = self._tensors(name)
        if counts.device.type == "meta" or isinstance(counts, torch._subclasses.FakeTensor):
            return Load(self._most_rows(), counts.numel())
        return Load(int(counts.sum()), int((counts > 0).sum()))

    def result(self, index: int = 0) -> tuple[int, ...]:
        return tuple(self.results[index].shape)

    def result_bytes(self, index: int | None = None) -> int:
        chosen = self.results if index is None else self.results[index : index + 1]
        return sum(_bytes(tensor) for tensor in chosen if isinstance(tensor, Tensor))

    def _most_rows(self) -> Any:
        """Rows and slots are tables of as many lines, whatever their argument is called."""
        tables = (name for name in ("order", "rows", "left") if name in self.arguments)
        return self.shape(next(tables))[0]

    def _tensors(self, name: str) -> Iterator[Tensor]:
        given = self.arguments.get(name)
        for item in given if isinstance(given, list | tuple) else [given]:
            if isinstance(item, Tensor):
                yield item


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def flops_of(name: str) -> Callable[..., int | torch.SymInt]:
    """The flop formula of the operator `moec::name`, as torch calls it (with tensors, `get_raw`)."""
    schema = getattr(torch.ops.moec, name).default._schema
    formula = PRICES[f"moec::{name}"]

    def flops(*arguments: Any, out_val: Any = None, **named: Any) -> int | torch.SymInt:
        call = RunningCall(schema, arguments, named)
        call.results = tuple(out_val) if isinstance(out_val, list | tuple) else (out_val,)
        found = formula(call).forward.flops
        # A program may be lowered while somebody counts: of sizes that are data there is no number yet.
        return found if isinstance(found, torch.SymInt) else int(found)

    return flops


def register() -> None:
    """Register the formulas of all operators of `moec::` that have one with torch, each once."""
    for full in PRICES:
        name = full.removeprefix("moec::")
        packet = getattr(torch.ops.moec, name)
        if packet not in flop_registry and not composite(packet.default):
            register_flop_formula(packet, get_raw=True)(flops_of(name))


def composite(operator: torch._ops.OpOverload) -> bool:
    """Whether torch takes the operator apart before anyone counts (`moec::moe_ffn`)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd")


register()
