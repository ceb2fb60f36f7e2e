"""The number of a layer in names: `transformer.h.{layer}.mlp`, `moe_{layer}.up.weight`."""

from __future__ import annotations

import functools
import re

from moec.ir.region import KINDS
from moec.view.timeline import LAYER

_REGION = re.compile(rf"(?<![\w.])((?:{'|'.join(KINDS)})_)(\d+)(?![\w])")
_ATOM = re.compile(r"(?:(?<=[.\s])|^)(\d+)(?=[.\s]|$)")
_ATTRIBUTE = re.compile(r"^(self(?:\.[A-Za-z]\w*)*\[)(\d+)(?=\])")
_CALLED = re.compile(rf"^(self\.(?:{'|'.join(KINDS)})_)(\d+)(?!\w)")


@functools.lru_cache(maxsize=1 << 16)
def templated(name: str, layer: int | None) -> str:
    """A dotted name (also behind an arrow: `← h.3.up.weight`) with `{layer}` for the layer's number.

    The number of a region that it begins with counts, or else the first atom that is a number; others are not
    the layer's, whatever they are.
    """
    if layer is None:
        return name
    pattern = _REGION if _REGION.search(name) else _ATOM
    return _replaced(pattern, name, layer)


@functools.lru_cache(maxsize=1 << 16)
def templated_code(attribute: str, layer: int | None) -> str:
    """The same of a name as code spells it: `self.h[{layer}].ln.weight`, `self.moe_{layer}`."""
    if layer is None:
        return attribute
    pattern = _CALLED if _CALLED.match(attribute) else _ATTRIBUTE
    return _replaced(pattern, attribute, layer)


def _replaced(pattern: re.Pattern[str], text: str, layer: int) -> str:
    found = pattern.search(text)
    if found is None or found[found.lastindex or 0] != str(layer):
        return text
    start, end = found.span(found.lastindex or 0)
    return text[:start] + LAYER + text[end:]


def filled(text: str, layer: int | None) -> str:
    """The name in one layer: the inverse of `templated`."""
    return text if layer is None else text.replace(LAYER, str(layer))
