"""Say which feed-forwards of a model are meant.

A *site* is one feed-forward; sites are numbered 0, 1, 2, … in the order the model runs them, and each has the
module path it was captured from, such as `transformer.h.3.mlp`. A selector is one of

    "all"                 every site
    3, "3", "-1"          one site, counted from the front or from the back
    [1, 3, -1]            these sites
    "1::2", "-2:", ":4"   a Python slice
    "depth>0.5"           also >=, < and <=; site i of n has depth i / n, so "depth>=0.5" is the last half
    "*.h.1?.mlp"          a glob over module paths (`*`, `?`, `[12]`; a star also crosses dots)

Selecting nothing, and naming a site that is not there, are errors: a plan that silently does nothing is worse
than one that stops.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction

from moec.errors import PlanError, nearest

LayerSpec = int | str | list[int] | tuple[int, ...]

FORMS = '"all", 3, [1, 3], a slice such as "1::2", "depth>0.5", or a glob such as "*.h.1?.mlp"'

_INDEX = re.compile(r"[+-]?[0-9]{1,9}")
_SLICE = re.compile(r"([+-]?[0-9]{1,9})?:([+-]?[0-9]{1,9})?(?::([+-]?[0-9]{1,9})?)?")
_DEPTH = re.compile(r"depth(>=|<=|>|<)([0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_COMPARE: dict[str, Callable[[Fraction, Fraction], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


@dataclass(frozen=True)
class Layers:
    """A checked selector; `spec` is a string without spaces or a tuple of indices. Build it with `parse`."""

    spec: str | tuple[int, ...]

    @classmethod
    def parse(cls, spec: LayerSpec | Layers) -> Layers:
        """Read any of the forms above; raises PlanError when `spec` is none of them."""
        if isinstance(spec, Layers):
            return spec
        if isinstance(spec, str):
            return cls(_checked_text(spec))
        items = spec if isinstance(spec, list | tuple) else (spec,)
        if not items or any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            raise PlanError("layers", f"layers = {spec!r}", FORMS)
        return cls(tuple(items))

    def resolve(
        self,
        num_sites: int,
        names: Sequence[str],
        where: str = "layers",
        among: str = "feed-forwards of the model",
    ) -> list[int]:
        """The selected ordinals, ascending and without repeats.

        `names[i]` is the module path of site i. `where` and `among` only word the PlanError that is raised
        when nothing is selected or an index lies outside `-num_sites … num_sites - 1`.
        """
        if len(names) != num_sites:
            raise ValueError(f"{num_sites} sites need as many names, got {len(names)}")
        if not num_sites:
            raise PlanError(where, f"layers = {self.text}, and no {among}", "at least one to select from")
        if isinstance(self.spec, tuple):
            chosen = [_checked_index(index, names, where, among) for index in self.spec]
        else:
            chosen = list(_select(self.spec, names))
        if not chosen:
            raise _selects_nothing(self, names, where, among)
        return sorted(set(chosen))

    @property
    def text(self) -> str:
        """The selector as a plan spells it."""
        return f'"{self.spec}"' if isinstance(self.spec, str) else str(list(self.spec))


def _checked_text(text: str) -> str | tuple[int, ...]:
    spec = re.sub(r"\s+", "", text)
    if _INDEX.fullmatch(spec):
        return (int(spec),)
    sliced = _SLICE.fullmatch(spec)
    if sliced and sliced[3] and int(sliced[3]) == 0:
        raise PlanError("layers", f'layers = "{text}"', "a slice whose step is not zero")
    if sliced or _DEPTH.fullmatch(spec) or _is_glob(spec):
        return spec
    hint = "a list, without the quotes" if re.fullmatch(r"\[.*\]", spec) else FORMS
    raise PlanError("layers", f'layers = "{text}"', hint)


def _is_glob(spec: str) -> bool:
    """Module paths hold a letter somewhere; a pattern holds a letter or a star or question mark."""
    allowed = re.fullmatch(r"[\w.*?\[\]!-]+", spec) is not None
    return allowed and re.search(r"[^\W\d]|[*?]", spec) is not None


def _select(spec: str, names: Sequence[str]) -> Iterable[int]:
    """Ordinals a checked text selects, in any order; the one place that gives the text forms a meaning."""
    count = len(names)
    if spec == "all":
        return range(count)
    if depth := _DEPTH.fullmatch(spec):
        # Fractions, so that "depth>0.3" of ten layers is decided exactly.
        compare, bound = _COMPARE[depth[1]], Fraction(depth[2])
        return [site for site in range(count) if compare(Fraction(site, count), bound)]
    if sliced := _SLICE.fullmatch(spec):
        return range(count)[slice(*(int(part) if part else None for part in sliced.groups()))]
    return [site for site, name in enumerate(names) if fnmatchcase(name, spec)]


def _checked_index(index: int, names: Sequence[str], where: str, among: str) -> int:
    count = len(names)
    if not -count <= index < count:
        needed = f"an index from {-count} to {count - 1} ({count} {among}: {_listing(names)})"
        raise PlanError(where, f"index {index}", needed)
    return index % count


def _selects_nothing(layers: Layers, names: Sequence[str], where: str, among: str) -> PlanError:
    needed = f"one that selects some of the {len(names)} {among}: {_listing(names)}"
    near = nearest(str(layers.spec), [*names, "all"])
    return PlanError(where, f"layers = {layers.text}, which selects nothing", needed, near)


def _listing(names: Sequence[str]) -> str:
    """Every site as `ordinal path`, the middle of a long list left out."""
    rows = [f"{site} {name}".rstrip() for site, name in enumerate(names)]
    if len(rows) > 12:
        rows = [*rows[:6], f"… {len(rows) - 9} more …", *rows[-3:]]
    return ", ".join(rows)
