"""Where every parameter came from.

One table is read by loading, saving, going back to dense, and review:

    ffn_2.up.weight            ← transformer.h.2.mlp.c_fc.weight
    moe_3.up.weight[e]         ← transformer.h.3.mlp.c_fc.weight (transposed)     copy × 32
    moe_3.router.weight        new
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Origin:
    """How one parameter of the program was made from the source model.

    `source`: the user's name, or None for a parameter that is new. `how`: `same` (the user's own tensor),
    `copy`, `noise`, `partial`, `split` (one slice of the hidden dimension per expert), `fresh`.
    `transposed`: the user stored the matrix as [in, out]. `experts`: length of the leading expert axis, 0 if
    there is none. For `split`: `dim` is the dimension of the source (after transposition) that was dealt out,
    `blocks` how often the hidden units run through it (2 for a fused gate and up). `teacher`: what the weight
    is called in the teacher that it is from, '' where there is none.
    """

    source: str | None
    how: str = "same"
    transposed: bool = False
    experts: int = 0
    dim: int = 0
    blocks: int = 1
    teacher: str = ""

    @property
    def reversible(self) -> bool:
        """Whether the source tensor can be rebuilt from this parameter alone (copies: while they agree)."""
        return self.source is not None and self.how in ("same", "copy", "split")

    def restore(self, value: Tensor) -> Tensor | None:
        """The source tensor, or None when `value` no longer determines it (copies that have drifted
        apart)."""
        if not self.reversible:
            return None
        if self.how == "same":
            return value
        dense = self.joined(value) if self.how == "split" else self._agreed(value)
        return dense.t().contiguous() if dense is not None and self.transposed else dense

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradient of the source tensor, by the chain rule through how this parameter was made from
        it."""
        if not self.experts:
            return gradient
        dense = self.joined(gradient) if self.how == "split" else gradient.sum(0)
        return dense.t() if self.transposed else dense

    def deal(self, dense: Tensor) -> Tensor:
        """`split`: slices [E, …] of `dense` along `dim`, one per expert; the inverse of `restore`."""
        size = dense.shape[self.dim] // self.blocks
        units = dense.unflatten(self.dim, [self.blocks, self.experts, size // self.experts])
        dealt = units.movedim(self.dim + 1, 0).flatten(self.dim + 1, self.dim + 2)
        return dealt.contiguous()

    def joined(self, value: Tensor) -> Tensor:
        """`split`: the slices [E, …] put together along `dim`."""
        units = value.unflatten(self.dim + 1, [self.blocks, value.shape[self.dim + 1] // self.blocks])
        return units.movedim(0, self.dim + 1).flatten(self.dim, self.dim + 2)

    def _agreed(self, value: Tensor) -> Tensor | None:
        return value[0].clone() if bool((value == value[0]).all()) else None

    def record(self) -> dict[str, Any]:
        """As plain data; `Origin(**record)` is the same row."""
        return {key: value for key, value in asdict(self).items() if key != "teacher" or value}

    def describe(self) -> str:
        """The right-hand side of the table's row."""
        taught = f"    teacher's {self.teacher}" if self.teacher not in ("", self.source) else ""
        if self.source is None:
            return f"new{taught}"
        turned = " (transposed)" if self.transposed else ""
        times = f"    {self.how} × {self.experts}" if self.experts else ""
        return f"← {self.source}{turned}{times}{taught}"


class Origins(Mapping[str, Origin]):
    """Structural name (`ffn_2.up.weight`) → `Origin`. Immutable; `with_` returns a changed table."""

    def __init__(self, table: Mapping[str, Origin]) -> None:
        self._table = dict(table)

    def __getitem__(self, name: str) -> Origin:
        return self._table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def with_(self, added: Mapping[str, Origin], removed: set[str] | frozenset[str] = frozenset()) -> Origins:
        """This table without `removed`, and with the rows of `added`."""
        kept = {name: origin for name, origin in self._table.items() if name not in removed}
        return Origins({**kept, **added})

    def of_weights(self, names: Iterable[str]) -> Origins:
        """The rows of weights that exist; what a pass moved or dropped leaves the table."""
        present = set(names)
        return Origins({name: origin for name, origin in self._table.items() if name in present})

    def renamed(self, names: Mapping[str, str]) -> Origins:
        """The same rows under new structural names (`names`: old → new; others stay)."""
        return Origins({names.get(name, name): origin for name, origin in self._table.items()})

    def public_name(self, name: str) -> str:
        """The name a user sees: the user's own for an untouched parameter, the structural one otherwise."""
        origin = self._table.get(name)
        return origin.source if origin is not None and origin.how == "same" and origin.source else name

    def of_source(self, source: str) -> list[str]:
        """Structural names of every parameter made from the user's parameter `source`."""
        return [name for name, origin in self._table.items() if origin.source == source]

    def moved(self, name: str, new: str) -> Origins:
        """The table after a parameter moved from `name` to `new` unchanged."""
        return self.with_({new: replace(self._table[name])}, {name})

    def __str__(self) -> str:
        left = {n: f"{n}[e]" if o.experts else n for n, o in self._table.items()}
        width = max(map(len, left.values()), default=0)
        return "\n".join(f"{left[n]:<{width}}  {o.describe()}" for n, o in self._table.items())
