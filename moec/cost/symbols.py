"""The letters that costs are written in, and what they mean.

`B` and `S` are those of one rank. An axis of ranks is a letter of its own, named as the mesh names it.
"""

from __future__ import annotations

import functools

import sympy

MEANINGS = {
    "B": "sequences of one rank",
    "S": "tokens of a sequence",
    "n": "new tokens of a row that is decoded",
    "m": "positions of a row of which logits are wanted",
    "L": "positions that the cache has room for; attention runs over all of them",
    "data": "ranks that hold the dense part and see other tokens",
    "tensor": "ranks that share one dense layer",
    "world": "ranks",
}
RATES = {
    "peak": "floating point operations a second of one device",
    "bandwidth": "bytes a second between a device and its memory",
    "launch": "seconds to start one kernel",
    "latency": "seconds until the first byte of a message arrives",
    "link": "bytes a second that one device sends",
}
_AXES = {
    "expert_alike": "ranks with the same place on the expert axis, whatever their slice",
    "expert_data": "ranks that hold the same experts",
    "expert": "ranks that the experts of a layer are dealt out to",
    "slice": "ranks that share one expert",
}


@functools.cache
def symbol(name: str) -> sympy.Symbol:
    """The letter of this name: a positive integer."""
    return sympy.Symbol(name, positive=True, integer=True)


@functools.cache
def rate(name: str) -> sympy.Symbol:
    """The letter of what hardware does, one of `RATES`: a positive number; raises `KeyError` for others."""
    assert RATES[name]
    return sympy.Symbol(name, positive=True)


def is_letter(name: str) -> bool:
    """Whether costs use this letter."""
    try:
        return bool(meaning(name))
    except KeyError:
        return False


def meaning(name: str) -> str:
    """What a letter stands for, with its unit; raises `KeyError` for one that costs do not use."""
    if name in MEANINGS or name in RATES:
        return MEANINGS.get(name) or RATES[name]
    kind = next((kind for kind in _AXES if name.startswith(f"{kind}_")), None)
    if kind is None:
        raise KeyError(name)
    part = next((f", those {end} a node" for end in ("inside", "between") if name.endswith(end)), "")
    return f"{_AXES[kind]} ({name}){part}"
