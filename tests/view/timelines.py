"""Small timelines made by hand, for what draws them: a GPT in which every other layer gets experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moec.ir import Entry
from moec.view.folding import runs
from moec.view.timeline import (
    Check,
    Drawing,
    Node,
    RegionBox,
    Section,
    Side,
    Status,
    Step,
    Timeline,
    Weight,
)

VALUE = "bf16 [B, S, 96]"
PATH = "blocks.{layer}.mlp"
FFN: dict[str, Any] = {"path": PATH, "source": "gpt.py:52"}
NORM: dict[str, Any] = {"path": "blocks.{layer}.norm_1", "source": "gpt.py:65"}
DIFF = """--- canonical
+++ sparse
# appeared: moe 1, 3 (×2)

@@ moe_1 is new
- h = linear(x)
+ scores = moec.router(x)
"""
TEXT = """# GPT · sparse


def forward(self, tokens):
    e = embedding(tokens)  # [B, S, 96]
    return e
"""
LIFT_DOC = """Put an expert axis under each selected feed-forward.

before:  y = ffn_3(x)
after:   y, … = moe_3(x)
"""
PLAN = ("[moe]", 'layers = "1::2"', "experts = 64", "", "[parallel]", "expert = 8")


def weight(name: str, *shape: int, origin: str = "") -> Weight:
    """A float32 weight."""
    parameters = 1
    for size in shape:
        parameters *= size
    return Weight(name, shape, "float32", origin or name, parameters)


def side(name: str, operator: str, **facts: Any) -> Side:
    """An operator that reads `x`, as it stands on one side."""
    code = f"{name} = {operator}(x)  # {VALUE}"
    return Side(name, facts.pop("code", code), operator, **{"value": VALUE, **facts})


def node(status: Status, name: str, operator: str, **facts: Any) -> Node:
    """The same on both sides, or on the one where it is."""
    made_from, fused_by = facts.pop("made_from", ()), facts.pop("fused_by", "")
    before_region = facts.pop("before_region", facts.get("region"))
    seen = side(name, operator, **facts)
    before = None if status == "created" else replace(seen, region=before_region)
    return Node(status, before, None if status == "removed" else seen, made_from, fused_by)


def dense_block() -> Drawing:
    """A block that nothing happened to: attention and feed-forward as regions."""
    up, down = weight("ffn_{layer}.up.weight", 384, 96), weight("ffn_{layer}.down.weight", 96, 384)
    nodes = (
        node("kept", "x", "input"),
        node("kept", "n", "aten.layer_norm", **NORM),
        node("kept", "a", "aten.scaled_dot_product_attention", region=0, flops=2e6, bytes=3e5),
        node("kept", "h", "aten.linear", region=1, weights=(up,), flops=7e6, **FFN),
        node("kept", "g", "aten.gelu", region=1, **FFN),
        node("kept", "f", "aten.linear", region=1, weights=(down,), flops=7e6, **FFN),
        node("kept", "y", "aten.add"),
        node("kept", "out", "output"),
    )
    regions = (
        RegionBox("attention_{layer}", "attention", "blocks.{layer}.attention", "gpt.py:38", "kept"),
        RegionBox("ffn_{layer}", "ffn", PATH, "gpt.py:52", "kept"),
    )
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (0, 6), (6, 7)]
    return Drawing(nodes, regions, tuple((a, b, 0) for a, b in edges))


def lifted_block() -> Drawing:
    """A block whose feed-forward got experts: nodes of every status, an exchange, a fused operator."""
    router = weight("moe_{layer}.router.weight", 64, 96)
    expert = weight("moe_{layer}.up.weight", 64, 384, 96, origin="blocks.{layer}.mlp.up.weight")
    counted: dict[str, Any] = {"flops": 7e6, "bytes": 9e6, "flops_text": "2*B*S*36864"}
    placed: dict[str, Any] = {"placement": "dim 0 over expert"}
    sent: dict[str, Any] = {"collective": "all_to_all", "axis": "expert", "bytes": 4e5}
    inside: dict[str, Any] = {"region": 1}
    nodes = (
        node("kept", "x", "input"),
        node("kept", "n", "aten.layer_norm", **NORM),
        node("removed", "h", "aten.linear", region=0, **FFN),
        node("moved", "g", "aten.gelu", before_region=0, **inside, **FFN),
        node("created", "scores", "moec.router", weights=(router,), flops=1e6, **inside),
        node("created", "up", "moec.grouped_linear", made_from=(2,), weights=(expert,),
             **inside, **FFN, **counted, **placed),
        node("created", "all", "c10d.all_to_all_single", **inside, **sent),
        node("created", "c", "moec.combine", fused_by="fuse_moe_ffn", **inside),
        node("rewired", "y", "aten.add"),
        node("kept", "out", "output"),
    )  # fmt: skip
    settings = {"experts": "64", "top_k": "1"}
    regions = (
        RegionBox("ffn_{layer}", "ffn", PATH, "gpt.py:52", "removed"),
        RegionBox("moe_{layer}", "moe", PATH, "gpt.py:52", "created", settings, (0, 1, 2)),
    )
    both = ((0, 1), (0, 8), (8, 9))
    before, after = ((1, 2), (2, 3), (3, 8)), ((1, 4), (4, 5), (5, 3), (3, 6), (6, 7), (7, 8))
    edges = [(a, b, which) for which, ends in enumerate((both, before, after)) for a, b in ends]
    return Drawing(nodes, regions, tuple(edges))


def outside(name: str, status: Status = "kept") -> Drawing:
    """What stands outside of blocks: one operator."""
    nodes = (node(status, "tokens", "input"), node(status, name, "aten.embedding"))
    return Drawing(nodes, (), ((0, 1, 0 if status == "kept" else 2),))


def created(drawing: Drawing) -> Drawing:
    """The same as it came to be: nothing before."""
    nodes = tuple(
        Node("created", None, each.after or each.before)
        for each in drawing.nodes
        if each.after or each.before
    )
    regions = tuple(replace(region, status="created") for region in drawing.regions)
    return Drawing(nodes, regions, tuple((a, b, 2) for a, b, _ in drawing.edges))


def ledger(layers: int) -> tuple[Entry, ...]:
    """Two products of every layer; those of every other one were rewritten."""
    fates = {
        0: ("kept", "the plan leaves it dense", ""),
        1: ("rewritten", "a copy in each of 64 experts", "lift_experts"),
    }
    return tuple(
        Entry(f"blocks.{layer}.mlp.{name}.weight", shape, "ffn", *fates[layer % 2], "gpt.py:52")
        for layer in range(layers)
        for name, shape in (("up", (384, 96)), ("down", (96, 384)))
    )


def titled(layers: tuple[int, ...]) -> str:
    """`blocks 1, 3 … 11`."""
    return f"block{'s' if len(layers) > 1 else ''} {runs(layers)}"


def steps_of(layers: int) -> tuple[Step, ...]:
    """Captured, a pass that changes nothing, the experts, and the stage that sums it up."""
    every, odd, even = (tuple(range(*which)) for which in ((layers,), (1, layers, 2), (0, layers, 2)))
    ends = (Section("embedding", (), 0, False), Section("head", (), 0, False))
    dense, mixed = (
        Section(titled(every), every, 1, False),
        (Section(titled(even), even, 1, False), Section(titled(odd), odd, 2, True)),
    )
    first = tuple(Section(*each) for each in (("embedding", (), 4, True), (titled(every), every, 3, True)))
    counts = {"kept": 30, "created": 8, "removed": 2, "moved": 2, "rewired": 2}
    proved = Check("changes-model", "proved", 1.3e-15, 1e-10, "moe_1 against the dense layer", "")
    stated = Check("exact", "stated", None, None, "", "too large to compare")
    same, lifted = (ends[0], dense, ends[1]), (ends[0], *mixed, ends[1])
    idle = "Drop operators that do nothing."
    return (
        Step("captured", "capture", "", "captured", "", None, 1.2, {"created": 44}, first, ""),
        Step("drop_noops", "pass", "captured", "canonical", idle, stated, 0.01, {"kept": 40}, same, ""),
        Step("lift_experts", "pass", "structured", "sparse", LIFT_DOC, proved, 0.25, counts, lifted, DIFF),
        Step("captured → sparse", "stage", "captured", "sparse", "", None, 1.5, counts, lifted, DIFF),
    )


def timeline(layers: int = 4, **changes: Any) -> Timeline:
    """Of a GPT of so many layers; `changes` are fields."""
    dense = dense_block()
    drawings = (outside("e"), dense, lifted_block(), created(dense), outside("e", "created"))
    whole = Timeline(
        name="GPT",
        stage="sparse",
        version="0.1",
        facts={"parameters": "9,989,572", "active": "639,364"},
        sizes={"B": 8, "S": 64},
        plan_lines=PLAN,
        steps=steps_of(layers),
        drawings=drawings,
        ledger=ledger(layers),
        notes=("layer 2 was left dense",),
        sources={"gpt.py:52": "return self.down(F.gelu(self.up(x_BSD)))", "gpt.py:65": "x = self.norm_1(x)"},
        text=TEXT,
    )
    return replace(whole, **changes)
