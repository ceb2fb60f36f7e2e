"""Which overload a call means, and one normal form for its arguments.

The text of a program says `softmax(x, -1)`, not `aten.softmax.int(x, -1)`. Printer, parser and the running
text agree because all three ask `resolve`, which looks only at the *kinds* of the arguments. A call that it
would resolve otherwise is printed with its overload: `softmax.int(x, -1)`.

A kind is `tensor`, `int`, `float`, `bool`, `complex`, `str`, `none`, `dtype`, `device`, `layout`,
`memory_format`, `tensors` (a list of unknown length), or a tuple of kinds for a list of known length.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch._ops import OpOverload, OpOverloadPacket

Kind: TypeAlias = "str | tuple[Kind, ...]"

# Operators whose Tensor operands may be Python numbers (torch's own rule): `x + 1` is `add.Tensor(x, 1)`.
NUMBERS_AS_TENSORS = frozenset(
    "add sub mul div true_divide floor_divide remainder fmod bitwise_and bitwise_or".split()  # noqa: SIM905
)
_VALUES: tuple[tuple[type, str], ...] = (
    (Tensor, "tensor"), (bool, "bool"), (torch.SymBool, "bool"), (int, "int"), (torch.SymInt, "int"),
    (float, "float"), (torch.SymFloat, "float"), (complex, "complex"), (str, "str"), (type(None), "none"),
    (torch.dtype, "dtype"), (torch.device, "device"), (torch.layout, "layout"),
    (torch.memory_format, "memory_format"),
)  # fmt: skip
_SCALARS = {
    "Tensor": ("tensor",), "number": ("int", "float", "complex", "bool"), "int": ("int",),
    "float": ("float", "int"), "complex": ("complex", "float", "int"), "bool": ("bool",),
    "str": ("str",), "ScalarType": ("dtype",),
    "Any": ("str",), "Layout": ("layout",), "MemoryFormat": ("memory_format",), "Device": ("device", "str"),
}  # fmt: skip
_LAST = 2**63 - 1  # torch's spelling of "to the end" in a slice


def kind_of(value: object, kinds: Mapping[fx.Node, Kind] | None = None) -> Kind:
    """The kind of an argument; nodes are looked up in `kinds`. `unknown` for what no program can hold."""
    if isinstance(value, fx.Node):
        return (kinds or {}).get(value, "unknown")
    if isinstance(value, list | tuple):
        return tuple(kind_of(item, kinds) for item in value)
    return next((kind for kind_type, kind in _VALUES if isinstance(value, kind_type)), "unknown")


def kind_of_return(overload: OpOverload) -> Kind:
    """The kind of what an operator returns, read off its schema."""
    kinds = tuple(_kind_of_type(argument.real_type) for argument in overload._schema.returns)
    return kinds[0] if len(kinds) == 1 else kinds


def _kind_of_type(declared: Any) -> Kind:
    text = str(declared)
    if text in ("Tensor", "Optional[Tensor]"):
        return "tensor"
    if text.startswith("List["):
        return "tensors"
    return {"number": "float"}.get(text, text)


def resolve(packet: OpOverloadPacket, args: Sequence[Kind], kwargs: Mapping[str, Kind]) -> OpOverload | None:
    """The first overload, in torch's own order, that accepts these kinds; None when none does."""
    return _resolve(packet, tuple(args), tuple(sorted(kwargs.items())))


@functools.lru_cache(maxsize=4096)
def _resolve(
    packet: OpOverloadPacket, args: tuple[Kind, ...], kwargs: tuple[tuple[str, Kind], ...]
) -> OpOverload | None:
    for overload in candidates(packet):
        if _accepts(overload, args, dict(kwargs)):
            return overload
    return None


@functools.lru_cache(maxsize=1024)
def candidates(packet: OpOverloadPacket) -> tuple[OpOverload, ...]:
    """The overloads of an operator that take or give tensors: no `out=` variants, no script-only ones."""
    named = (getattr(packet, name) for name in packet.overloads())
    return tuple(overload for overload in named if _is_tensor_operator(overload))


def _is_tensor_operator(overload: OpOverload) -> bool:
    schema = overload._schema
    touched = [str(a.real_type) for a in (*schema.arguments, *schema.returns)]
    return not any(a.is_out for a in schema.arguments) and any("Tensor" in text for text in touched)


def _accepts(overload: OpOverload, args: Sequence[Kind], kwargs: Mapping[str, Kind]) -> bool:
    declared = overload._schema.arguments
    positional = [argument for argument in declared if not argument.kwarg_only]
    if len(args) > len(positional):
        return False
    given = {argument.name: kind for argument, kind in zip(positional, args, strict=False)}
    names = {argument.name for argument in declared}
    if not set(kwargs) <= names - set(given):
        return False
    given.update(kwargs)
    numbers = overload._opname.rstrip("_") in NUMBERS_AS_TENSORS
    return all(
        _fits(str(argument.real_type), given[argument.name], _length(argument), numbers)
        if argument.name in given
        else argument.has_default_value()
        for argument in declared
    )


def _length(argument: Any) -> int | None:
    """N of a list argument declared `int[N]`, for which torch also takes a single int."""
    length: int | None = argument.N
    return length


def _fits(declared: str, kind: Kind, length: int | None, numbers: bool) -> bool:
    if declared.startswith("Optional["):
        return kind == "none" or _fits(declared[9:-1], kind, length, numbers)
    if declared.startswith("List["):
        return _fits_list(declared[5:-1], kind, length)
    if declared == "Tensor" and numbers and kind in ("int", "float", "bool"):
        return True
    return isinstance(kind, str) and kind in _SCALARS.get(declared, ())


def _fits_list(declared: str, kind: Kind, length: int | None) -> bool:
    if kind == "tensors":
        return declared in ("Tensor", "Optional[Tensor]")
    if isinstance(kind, tuple):
        return all(_fits(declared, item, None, numbers=False) for item in kind)
    return length is not None and _fits(declared, kind, None, numbers=False)


def normal_call(
    overload: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The one spelling of a call: positional up to the last argument that is not its default, then keywords.

    Two calls that mean the same have equal normal forms. Raises `TypeError` when the arguments do not fit.
    """
    declared = overload._schema.arguments
    given = _bound(overload, args, kwargs)
    if overload is torch.ops.aten.slice.Tensor:
        given = _without_trivial_ends(given)
    kept = {a.name: given[a.name] for a in declared if a.name in given and not is_default(a, given[a.name])}
    positional = [argument for argument in declared if not argument.kwarg_only]
    last = max((i for i, argument in enumerate(positional) if argument.name in kept), default=-1)
    values = tuple(kept.get(a.name, a.default_value) for a in positional[: last + 1])
    return values, {a.name: kept[a.name] for a in declared if a.kwarg_only and a.name in kept}


def _bound(overload: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    declared = overload._schema.arguments
    positional = [argument for argument in declared if not argument.kwarg_only]
    if len(args) > len(positional):
        raise TypeError(f"{overload} takes {len(positional)} positional arguments, {len(args)} given")
    given = {a.name: _plain(value) for a, value in zip(positional, args, strict=False)}
    for name, value in kwargs.items():
        if name in given or all(name != argument.name for argument in declared):
            raise TypeError(f"{overload} does not take {name!r} here")
        given[name] = _plain(value)
    missing = [a.name for a in declared if a.name not in given and not a.has_default_value()]
    if missing:
        raise TypeError(f"{overload} also needs {', '.join(missing)}")
    return {a.name: _of_type(str(a.real_type), given[a.name]) for a in declared if a.name in given}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _of_type(declared: str, value: Any) -> Any:
    """A device named by a string is that device."""
    return torch.device(value) if isinstance(value, str) and "Device" in declared else value


def _without_trivial_ends(given: dict[str, Any]) -> dict[str, Any]:
    """From 0 and up to the end are what leaving an end of a slice out means."""
    trivial = {"start": 0, "end": _LAST}
    return {k: v for k, v in given.items() if k not in trivial or type(v) is not int or v != trivial[k]}


def is_default(argument: Any, value: Any) -> bool:
    """Whether passing `value` says no more than leaving the argument out."""
    if not argument.has_default_value():
        return False
    default = argument.default_value
    return type(value) is type(default) and not isinstance(value, fx.Node) and bool(value == default)
