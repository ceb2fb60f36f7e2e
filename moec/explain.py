"""What was done to each matrix product of a model, and why not otherwise.

`explain(program)` reads the ledger, the origins and the regions of a program; it changes and computes
nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, fx, nn

from moec.errors import PassError, nearest
from moec.ir import Entry, Origin, Origins, Program, Region, region_of, regions

SETTINGS = ("experts", "top_k", "residual", "gate", "init")


@dataclass(frozen=True)
class Product:
    """One matrix product: its ledger entry, the module it stands in, what its weight has become, and what the
    weight was called in the teacher, for a student ('' otherwise)."""

    weight: str
    path: str
    shape: tuple[int, ...]
    source: str
    role: str
    status: str
    reason: str
    by: str
    became: tuple[str, ...] = ()
    teacher: str = ""


@dataclass(frozen=True)
class SparseLayer:
    """The plan's effect on one layer; `before`, `after`, `active` count parameters, router and mix too."""

    name: str
    path: str
    source: str
    settings: Mapping[str, Any]
    capacity: str
    before: int
    after: int
    active: int


@dataclass(frozen=True)
class Explanation:
    """Rows in program order, sparse layers, remarks, totals. `str()` is the text, `to_json()` plain data."""

    name: str
    stage: str
    products: tuple[Product, ...]
    layers: tuple[SparseLayer, ...]
    notes: tuple[str, ...]
    parameters: Mapping[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """How many products were rewritten, kept and refused."""
        found = Counter(product.status for product in self.products)
        return {status: found[status] for status in ("rewritten", "kept", "refused")}

    @property
    def summary(self) -> str:
        """`17 products: 4 rewritten, 13 kept, 0 refused; 1,234 parameters → 5,678, 1,300 active`."""
        counted = ", ".join(f"{number} {status}" for status, number in self.counts.items())
        total = self.parameters
        size = f"{total['before']:,} parameters"
        if total["after"] != total["before"]:
            size += f" → {total['after']:,}, {total['active']:,} active"
        return f"{len(self.products)} products: {counted}; {size}"

    def to_json(self) -> dict[str, Any]:
        """Plain data, for machines."""
        return {**asdict(self), "counts": self.counts}

    def __str__(self) -> str:
        blocks = ["\n".join(_words(product)) for product in self.products]
        blocks += ["\n".join(_layer_words(layer)) for layer in self.layers]
        blocks += ["\n".join([*(f"note: {note}" for note in self.notes), self.summary])]
        return "\n\n".join(blocks)


def _words(product: Product) -> list[str]:
    at = f"  {product.source}" if product.source else ""
    role = f" · {product.role}" if product.role else ""
    by = f"  (by {product.by})" if product.by else ""
    became = [f"  now        {name}" for name in product.became if product.status == "rewritten"]
    size = "×".join(map(str, product.shape))
    taught = [f"  teacher's  {product.teacher}"] if product.teacher else []
    said = f"  {product.status:<10} {product.reason}{by}"
    return [f"{product.weight}  {size}{role}{at}", said, *became, *taught]


def _layer_words(layer: SparseLayer) -> list[str]:
    told = "  ".join(f"{key} = {value}" for key, value in layer.settings.items())
    return [
        f"{layer.name} · {layer.path}  {layer.source}".rstrip(),
        f"  {told}  capacity = {layer.capacity}",
        f"  parameters {layer.before:,} → {layer.after:,}, {layer.active:,} active",
    ]


def explain(program: Program, about: str = "") -> Explanation:
    """Say for each parameterised product of `program` what was done and why not otherwise.

    `about` picks some: a layer's number, a region (`moe_3`), a weight, a module path, or a glob over weights.
    Raises `PassError` with the nearest name when nothing is meant by it.
    """
    products = tuple(_product(entry, program.origins) for entry in program.ledger)
    layers = tuple(_layers(program))
    if about:
        chosen = tuple(product for product in products if _is_about(product, about))
        if not chosen:
            raise _nothing(about, program, products)
        layers = tuple(layer for layer in layers if _touches(layer, chosen))
        products = chosen
    return Explanation(
        program.source.name, program.stage, products, layers, program.ledger.notes, _totals(program)
    )


def _product(entry: Entry, origins: Origins) -> Product:
    became = [
        f"{name}{'[e]' if origin.experts else ''}  {_how(origin)}".rstrip()
        for name, origin in origins.items()
        if origin.source == entry.weight and name != entry.weight
    ]
    path = entry.weight.rpartition(".")[0]
    taught = [origin.teacher for origin in origins.values() if origin.source == entry.weight]
    return Product(
        entry.weight, path, entry.shape, entry.source, entry.role, entry.status, entry.reason, entry.by,
        tuple(became), taught[0] if taught else "",
    )  # fmt: skip


def _how(origin: Origin) -> str:
    turned = "transposed" if origin.transposed else ""
    times = f"{origin.how} × {origin.experts}" if origin.experts else ""
    told = ", ".join(part for part in (times, turned) if part)
    return f"({told})" if told else ""


def _is_about(product: Product, about: str) -> bool:
    if about.lstrip("-").isdigit():
        return _number(product) == int(about)
    atoms = [
        product.role.split(" ")[0],
        product.reason.partition(":")[0],
        *(b.split(".")[0] for b in product.became),
    ]
    inside = product.weight == about or product.weight.startswith(f"{about}.")
    return inside or about in atoms or fnmatchcase(product.weight, about)


def _number(product: Product) -> int | None:
    """The layer a product belongs to, by its region."""
    digits = product.role.split(" ")[0].rpartition("_")[2]
    return int(digits) if digits.isdigit() else None


def _touches(layer: SparseLayer, products: tuple[Product, ...]) -> bool:
    return any(name.startswith(f"{layer.name}.") for product in products for name in product.became)


def _nothing(about: str, program: Program, products: tuple[Product, ...]) -> PassError:
    known = [*regions(program.graph), *(p.weight for p in products), *(p.path for p in products)]
    needed = "a layer's number, a region (moe_3), a weight, a module path, or a glob over weights"
    return PassError(f"explain '{about}'", "no matrix product of that name", needed, nearest(about, known))


# the plan's effect


def _layers(program: Program) -> list[SparseLayer]:
    return [_layer(program, name, module) for name, module in regions(program.graph, "moe").items()]


def _layer(program: Program, name: str, module: fx.GraphModule) -> SparseLayer:
    region = region_of(module)
    assert region is not None
    beside = _beside(program.graph, region)
    after = sum(parameter.numel() for part in (module, *beside) for parameter in part.parameters())
    return SparseLayer(
        name=name, path=region.path, source=region.source,
        settings={key: region.settings[key] for key in SETTINGS if key in region.settings},
        capacity=str(region.settings.get("capacity_factor", "dropless")),
        before=sum(_dense_sizes(program.origins, {f"{name}.{n}": p for n, p in
        module.named_parameters()}).values()), after=after, active=after - _idle(module, region),
    )  # fmt: skip


def _beside(root: fx.GraphModule, region: Region) -> list[nn.Module]:
    """What a residual layer keeps beside its experts: the dense feed-forward, and the mix of the two."""
    if region.settings.get("residual", "none") == "none":
        return []
    names = (f"ffn_{region.index}", f"mix_{region.index}")
    return [root.get_submodule(name) for name in names if name in regions(root)]


def _idle(module: fx.GraphModule, region: Region) -> int:
    """Parameters of the experts that one token does not visit."""
    sizes = [module.get_parameter(name).numel() for name in region.settings["expert_parameters"]]
    return sum(size // region.settings["experts"] * region.settings["idle_experts"] for size in sizes)


def _dense_sizes(origins: Origins, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """The user's parameter → its size, for everything `parameters` were made from."""
    sizes: dict[str, int] = {}
    for name, value in parameters.items():
        origin = origins.get(name)
        if origin is not None and origin.source is not None:
            copies = origin.experts if origin.experts and origin.how != "split" else 1
            sizes[origin.source] = math.prod(value.shape) // copies
    return sizes


def _totals(program: Program) -> dict[str, int]:
    dense = _dense_sizes(program.origins, dict(program.graph.named_parameters(remove_duplicate=False)))
    return {
        "before": sum(dense.values()),
        "after": program.num_parameters(),
        "active": program.num_parameters(active=True),
    }
