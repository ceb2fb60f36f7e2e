"""Formulas of torch's products of matrices that no layer of weights is behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_uppercase

import sympy

from moec.runtime.ops.work import NOTHING, Amount, Call, Formula, Price, Product, Work

Sizes = Sequence[Amount]


def _priced(call: Call, left: str, right: str, sizes: tuple[Amount, Amount, Amount], count: Amount) -> Price:
    """`count` products [m, k] · [k, n] of the arguments `left` and `right`."""
    m, n, k = sizes
    operands, out = call.bytes(left) + call.bytes(right), call.result_bytes()
    forward = Work((Product(count * m, n, k, count),), operands, out)
    backward = NOTHING
    if call.needs_grad(left):
        backward += Work((Product(count * m, k, n, count),), out + call.bytes(right), call.bytes(left))
    if call.needs_grad(right):
        backward += Work((Product(count * k, n, m, count),), out + call.bytes(left), call.bytes(right))
    return Price(forward, backward)


def mm(call: Call) -> Price:
    """[M, K] · [K, N]."""
    m, k = call.shape("self")
    return _priced(call, "self", "mat2", (m, call.shape("mat2")[1], k), 1)


def bmm(call: Call) -> Price:
    """[B, M, K] · [B, K, N]."""
    count, m, k = call.shape("self")
    return _priced(call, "self", "mat2", (m, call.shape("mat2")[2], k), count)


def addmm(call: Call) -> Price:
    """input + mat1 · mat2."""
    m, k = call.shape("mat1")
    return _added(call, _priced(call, "mat1", "mat2", (m, call.shape("mat2")[1], k), 1))


def baddbmm(call: Call) -> Price:
    """input + batch1 · batch2."""
    count, m, k = call.shape("batch1")
    return _added(call, _priced(call, "batch1", "batch2", (m, call.shape("batch2")[2], k), count))


def _added(call: Call, price: Price) -> Price:
    forward = price.forward + Work((), call.bytes("self"), 0, 0)
    backward = price.backward
    if call.needs_grad("self"):
        backward += Work((), call.result_bytes(), call.bytes("self"))
    return Price(forward, backward)


def matmul(call: Call) -> Price:
    """[..., M, K] · [..., K, N], the dims before broadcast; of a vector on the right torch counts nothing."""
    left, right = call.shape("self"), call.shape("other")
    if len(right) == 1:
        return _vector(call)
    m = left[-2] if len(left) > 1 else 1
    count = math.prod(_broadcast(left[:-2], right[:-2]))
    return _priced(call, "self", "other", (m, right[-1], left[-1]), count)


def _vector(call: Call) -> Price:
    read, out = call.bytes("self") + call.bytes("other"), call.result_bytes()
    wanted = call.needs_grad("self") or call.needs_grad("other")
    return Price(Work((), read, out), Work((), read + out, read) if wanted else NOTHING)


def _broadcast(left: Sizes, right: Sizes) -> Sizes:
    longest = max(len(left), len(right))
    padded = [(1,) * (longest - len(sizes)) + tuple(sizes) for sizes in (left, right)]
    return [b if a == 1 else a for a, b in zip(*padded, strict=True)]


def _dots_spelled(words: list[str], shapes: Sequence[Sizes], output: str) -> tuple[list[str], str]:
    """The words of an einsum with letters for `...`: the same dims everywhere, counted from the last."""
    hidden = [len(shape) - len(word.replace("...", "")) for word, shape in zip(words, shapes, strict=True)]
    spare = [letter for letter in ascii_uppercase if letter not in "".join(words)][: max(hidden)]
    found = [
        word.replace("...", "".join(spare[len(spare) - count :]))
        for word, count in zip(words, hidden, strict=True)
    ]
    return found, output.replace("...", "".join(spare))


def einsum(call: Call) -> Price:
    """Of two operands, with sums: one product over all letters. Without sums torch multiplies one by one."""
    inputs, _, output = str(call.value("equation")).replace(" ", "").partition("->")
    shapes = call.tensors("tensors")
    words, output = _dots_spelled(inputs.split(","), shapes, output)
    sizes = {
        a: n for word, shape in zip(words, shapes, strict=True) for a, n in zip(word, shape, strict=True)
    }
    summed = [letter for letter in sizes if letter not in output]
    read, out = call.bytes("tensors"), call.result_bytes()
    backward = Work((), read + out, read) if call.needs_grad("tensors") else NOTHING
    if len(words) != 2 or not summed:
        return Price(Work((), read, out), backward)
    shared = [a for a in sizes if a in words[0] and a in words[1]]
    count = sympy.prod([sizes[a] for a in shared if a not in summed])
    m, n = (sympy.prod([sizes[a] for a in word if a not in shared]) for word in words)
    k = sympy.prod([sizes[a] for a in summed])
    forward = Work((Product(count * m, n, k, count),), read, out)
    both = (Product(count * m, k, n, count), Product(count * k, n, m, count))
    return Price(forward, Work(both, read + out, read) if call.needs_grad("tensors") else NOTHING)


PRODUCTS: dict[str, Formula] = {
    "aten::mm": mm,
    "aten::bmm": bmm,
    "aten::addmm": addmm,
    "aten::baddbmm": baddbmm,
    "aten::matmul": matmul,
    "aten::einsum": einsum,
}
