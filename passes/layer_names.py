"""How a model numbers its layers in its names, and what the names are once layers are left out.

    transformer.h.5.mlp.c_fc.weight → transformer.h.4.mlp.c_fc.weight        4 is gone
    layers.3.norm.weight                                                     is gone itself
    4.weight (nn.Sequential, after the blocks) → 3.weight

A *list* is a name up to a number (`transformer.h.`, or `block_` where the number ends a word) under which
every block has one number at most, ascending. There may be several (`attentions.3`, `ffns.3`). A list with a
number for every block goes on counting without a gap; one that only some blocks have (`experts.0` in every
other block) is closed up by itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

_NUMBERED = re.compile(r"([A-Za-z_]*?)(\d+)")


class LayerNames:
    """New names, for a model whose `num_blocks` blocks have `names` and of which `keep` stay.

    `names`: for each block, the dotted names of its weights and modules that are its own.
    """

    def __init__(self, names: Sequence[Collection[str]], keep: Sequence[int]) -> None:
        self._numbers: dict[str, dict[int, int | None]] = {}
        self._shift: dict[str, tuple[int, int]] = {}
        for prefix, numbers in _lists(names).items():
            self._add(prefix, numbers, len(names), list(keep))

    @property
    def blocks(self) -> str:
        """The list that every block has a number in, `transformer.h.`; '' where there is none."""
        return next((prefix for prefix in self._shift if prefix.endswith(".")), "")

    def _add(self, prefix: str, numbers: Mapping[int, int], num_blocks: int, keep: list[int]) -> None:
        """`numbers`: block → its number in this list."""
        stay = [block for block in keep if block in numbers]
        offsets = {number - block for block, number in numbers.items()}
        if len(offsets) == 1:
            offset = offsets.pop()
            table = {numbers[block]: keep.index(block) + offset for block in stay}
        else:
            table = dict(zip((numbers[block] for block in stay), numbers.values(), strict=False))
        self._numbers[prefix] = {number: table.get(number) for number in numbers.values()}
        if len(numbers) == num_blocks:
            self._shift[prefix] = (max(numbers.values()), num_blocks - len(keep))

    def new(self, name: str) -> str | None:
        """The name in the shallow model; None for a name of a layer that is gone. Works on paths too."""
        found = []
        for atom, prefix, number in _atoms(name):
            renumbered = self._number(prefix, number) if number is not None else None
            if number is not None and self._is_gone(prefix, number):
                return None
            found.append(atom if renumbered is None else f"{prefix.rpartition('.')[2]}{renumbered}")
        return ".".join(found)

    def _number(self, prefix: str, number: int) -> int | None:
        last, dropped = self._shift.get(prefix, (number, 0))
        known = self._numbers.get(prefix, {})
        return number - dropped if number > last else known.get(number)

    def _is_gone(self, prefix: str, number: int) -> bool:
        known = self._numbers.get(prefix, {})
        return number in known and known[number] is None


def _lists(names: Sequence[Collection[str]]) -> dict[str, dict[int, int]]:
    """Prefix → block → the one number of that block."""
    found: dict[str, dict[int, set[int]]] = {}
    for block, own in enumerate(names):
        for name in own:
            for _, prefix, number in _atoms(name):
                if number is not None:
                    found.setdefault(prefix, {}).setdefault(block, set()).add(number)
    lists = {}
    for prefix, blocks in found.items():
        numbers = {block: next(iter(several)) for block, several in sorted(blocks.items())}
        ascending = all(a < b for a, b in zip(numbers.values(), [*numbers.values()][1:], strict=False))
        if len(blocks) > 1 and ascending and all(len(several) == 1 for several in blocks.values()):
            lists[prefix] = numbers
    return lists


def _atoms(name: str) -> Iterator[tuple[str, str, int | None]]:
    """Each atom of a dotted name, the name up to its number, and the number (None where it ends in none)."""
    before = ""
    for atom in name.split("."):
        numbered = _NUMBERED.fullmatch(atom)
        yield atom, before + (numbered[1] if numbered else atom), int(numbered[2]) if numbered else None
        before += f"{atom}."
