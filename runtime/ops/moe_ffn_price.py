"""What `moec::moe_ffn` costs: the products of the formula's matrices, and what is read and written.

Rows are gathered and summed inside: `x` is read once a row, and nothing between the products leaves the chip.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.runtime.ops.work import NOTHING, Amount, Call, Load, Price, Product, Work, price


@dataclass(frozen=True)
class _Layer:
    """The sizes of one call: `matrices` (width, depth), the ups and then the down; `slots` includes dropped
    rows."""

    load: Load
    matrices: tuple[tuple[Amount, Amount], ...]
    experts: Amount
    tokens: Amount
    slots: Amount
    itemsize: int

    @classmethod
    def of(cls, call: Call) -> _Layer:
        shapes = call.tensors("matrices")
        sizes = tuple((width, depth) for _, width, depth in shapes)
        tokens, slots = call.shape("x")[0], call.shape("order")[0]
        return cls(call.load("counts"), sizes, shapes[0][0], tokens, slots, call.itemsize("x"))

    @property
    def weights(self) -> Amount:
        """Bytes of the matrices of experts that have rows."""
        size = sum(width * depth for width, depth in self.matrices)
        return self.load.touched * size * self.itemsize

    @property
    def ups(self) -> Amount:
        """Bytes of the results of the up products, which backward needs."""
        return self.slots * sum(width for width, _ in self.matrices[:-1]) * self.itemsize

    @property
    def rows(self) -> Amount:
        """Bytes of the rows that are gathered."""
        return self.load.rows * self.matrices[0][1] * self.itemsize

    @property
    def answers(self) -> Amount:
        """Bytes of the answer of every row."""
        return self.load.rows * self.matrices[-1][0] * self.itemsize


def forward_work(call: Call, save: bool) -> Work:
    """Gather, multiply, formula, multiply, sum; with `save` the up products are written."""
    layer = _Layer.of(call)
    load = layer.load
    products = tuple(Product(load.rows, width, depth, load.touched) for width, depth in layer.matrices)
    read = layer.rows + layer.weights + sum(call.bytes(name) for name in ("weights", "order", "dense", "mix"))
    widest = max(call.itemsize(name) for name in ("x", "dense", "mix") if call.has(name))
    written = layer.tokens * layer.matrices[-1][0] * widest
    return Work(products, read, written + (layer.ups if save else 0))


def backward_work(call: Call, to_x: bool, to_matrices: bool, to_biases: bool) -> Work:
    """What arrives is pulled through the down matrix always; the rest as it is wanted."""
    layer = _Layer.of(call)
    load = layer.load
    *ups, (down_width, down_depth) = layer.matrices
    products = [Product(load.rows, down_depth, down_width, load.touched)]
    read, written = layer.answers + layer.weights + layer.ups, call.bytes("weights")
    if to_x:
        products += [Product(load.rows, depth, width, load.touched) for width, depth in ups]
        written += call.bytes("x")
    if to_matrices:
        products += [Product(width, depth, load.rows, load.touched, "k") for width, depth in layer.matrices]
        read += layer.rows
        written += layer.experts * sum(width * depth for width, depth in layer.matrices) * layer.itemsize
    if to_biases:
        written += call.bytes("biases")
    return Work(tuple(products), read, written)


def _price(call: Call) -> Price:
    wanted = [call.needs_grad(name) for name in ("x", "matrices", "biases")]
    learning = any(wanted) or any(call.needs_grad(name) for name in ("weights", "dense", "mix"))
    back = NOTHING
    if learning:
        back = backward_work(call, *wanted)
    if learning and call.has("dense"):
        back += Work((), call.bytes("dense"), call.bytes("dense"))
    return Price(forward_work(call, learning), back)


def _backward_price(call: Call) -> Price:
    to_x, _, to_matrices, to_biases = call.value("needed")
    return Price(backward_work(call, to_x, to_matrices, to_biases))


price("moe_ffn", _price)
price("moe_ffn_forward", lambda call: Price(forward_work(call, call.value("save"))))
price("moe_ffn_backward", _backward_price)
