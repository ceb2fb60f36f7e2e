"""The language: programs, regions, origins, ledgers, certificates, stages, and their text."""

from .certificate import Certificate, Check
from .ledger import Entry, Ledger
from .origins import Origin, Origins
from .program import Program, Source
from .region import Region, region_of, regions
from .rewrite import Pass

__all__ = [
    "Certificate", "Check", "Entry", "Ledger", "Origin", "Origins", "Pass", "Program", "Region", "Source",
    "region_of", "regions",
]  # fmt: skip
