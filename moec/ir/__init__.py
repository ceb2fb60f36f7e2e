"""The language: programs, regions, origins, ledgers, certificates, stages, and their text."""

from .alignment import Alignment, align
from .certificate import Certificate, Check
from .identity import Place, identity_of, made_from
from .ledger import Entry, Ledger
from .origins import Origin, Origins
from .program import Program, Source
from .region import Region, region_of, regions
from .rewrite import Pass

__all__ = [
    "Alignment", "Certificate", "Check", "Entry", "Ledger", "Origin", "Origins", "Pass", "Place", "Program",
    "Region", "Source", "align", "identity_of", "made_from", "region_of", "regions",
]  # fmt: skip
