"""For every pass a program on which it does something, and the lines that show what.

Passes that are shown on the same program share its code, which is then run once.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """`setup`: code that makes a program. `show`: code that prints what the pass did to it. `language`: of
    what is printed. `said`: a remark that stands above it."""

    setup: str
    show: str
    language: str = "diff"
    said: str = ""

    @property
    def code(self) -> str:
        """Both, as one would type them."""
        return f"{self.setup}\n{self.show}\n"


@dataclass
class Screen:
    """Runs examples and gives what they print; what several setups begin with is run once."""

    _ready: dict[str, dict[str, object]] = field(default_factory=lambda: {"": {"__name__": "example"}})

    def printed(self, example: Example) -> str:
        """What `example` prints."""
        names = dict(self._names(example.setup))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(example.show, names)
        return printed.getvalue().rstrip()

    def _names(self, setup: str) -> dict[str, object]:
        setup = f"{setup}\n"  # so that one setup begins another with whole lines
        if setup not in self._ready:
            begun = max((known for known in self._ready if setup.startswith(known)), key=len)
            names = dict(self._ready[begun])
            exec(setup.removeprefix(begun), names)
            self._ready[setup] = names
        return self._ready[setup]


def _diff(setup: str, before: str, after: str, of: str = "program") -> Example:
    return Example(setup, f'print({of}.diff("{before}", "{after}"))')


def _chain(setup: str, *names: str, of: str = "program") -> dict[str, Example]:
    """An example for each of `names` but the first, against the one before it."""
    return {after: _diff(setup, before, after, of) for before, after in itertools.pairwise(names)}


def _comments(setup: str, before: str, after: str) -> Example:
    said = "The code stays; what changes stands in its comments, which `program.diff` leaves out."
    show = (
        "import difflib\n\n"
        f'before, after = (program.text(stage).splitlines() for stage in ("{before}", "{after}"))\n'
        f'print(*difflib.unified_diff(before, after, "{before}", "{after}", n=0, lineterm=""), sep="\\n")'
    )
    return Example(setup, show, said=said)


DENSE = """\
import moec
from examples import by_hand

program = moec.compile(by_hand.GPT(layers=1), verify="off")"""

TWO_TABLES = """\
import moec
from moec.testing import DecoderRecipe

recipe = DecoderRecipe(num_layers=2, positions="rotary_half")   # each layer makes its own rotary tables
program = moec.compile(recipe.build(), verify="off")"""

SPARSE = """\
import moec
from examples import gpt

program = moec.compile(gpt.small(), plan="examples/pr_moe.toml", verify="off")"""

FUSED = f'{SPARSE}\nfused = program.fused(verify="off")'

DECODER = f"{SPARSE}\ndecoder = program.decoder()"

PACKED = f"{SPARSE}\ndecoder = program.decoder(packed=True)"

SEPARATE = f"{DENSE}\ndecoder = program.decoder(128)"

NORMS = f"""{SPARSE}
decoder = program.decoder().program"""

STUDENT = f'{SPARSE}\nstudent = program.student(depth=3, verify="off")'

FRESH = f"""{SPARSE}
fresh = program.student({{"student": {{"depth": 3, "init": "fresh", "seed": 1}}}})"""

TAPPED = f'{SPARSE}\ntapped = program.tapped([0, 2], verify="off")'

PLACED = """\
import moec
from examples.gpt import GPT, GPTConfig

model = GPT(GPTConfig(vocab=256, seq=64, layers=2, width=32, heads=4, dropout=0.0))
plan = {
    "moe": {"layers": "1::2", "experts": 4, "residual": "learned"},
    "parallel": {"tensor": 2, "expert": 4},
}
program = moec.compile(model, plan, world=4, verify="off")"""

RANK = f"{PLACED}\nlocal = program.partition(0)"

INFERRED = """\
import moec
from torch import nn
from examples.gpt import GPT, GPTConfig

class Rows(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x.flatten(0, 1)).view(*x.shape[:2], -1)   # the last size is to be inferred

model = GPT(GPTConfig(vocab=256, seq=64, layers=1, width=32, heads=4))
model.blocks[0].mlp = Rows(model.blocks[0].mlp)
program = moec.compile(model, {"parallel": {"tensor": 2}}, world=2, verify="off")
local = program.partition(0)"""

NAMED = f'{RANK}\nteacher = local.named("teacher")'


EXAMPLES: dict[str, Example] = {
    **_chain(
        DENSE,
        "captured", "functionalize_writes", "drop_noops", "normalize_views", "spell_linears", "spell_norms",
        "spell_activations", "spell_products", "spell_attention", "spell_masks", "group_heads",
    ),
    "merge_equal_values": _diff(TWO_TABLES, "group_heads", "merge_equal_values"),
    "complete_canonical": _comments(DENSE, "merge_equal_values", "canonical"),
    **_chain(
        DENSE,
        "canonical", "outline_feed_forwards", "outline_attention", "outline_positions", "name_values",
    ),
    "keep_layers": Example(STUDENT, 'print(student.diff("teacher"))'),
    "renew_weights": Example(
        FRESH,
        'name = "blocks.0.attention.qkv.weight"\n'
        "for made in (program, fresh):\n"
        "    print([round(number, 4) for number in made.state_dict()[name].flatten()[:6].tolist()])\n"
        "print(fresh.certificates[-1])",
        "text",
        "The text stays; the numbers are new.",
    ),
    **_chain(SPARSE, "structured", "branch_experts", "lift_experts", "collect_terms"),
    "tap_hidden": _diff(TAPPED, "sparse", "tap_hidden", "tapped"),
    "arrange_ranks": Example(
        PLACED,
        'print(program.layout.mesh, program.layout.mesh.axes_of("moe_1"), sep="\\n")',
        "text",
        "The graph stays; the program has a layout now.",
    ),
    "place_dense": _comments(PLACED, "arrange_ranks", "place_dense"),
    "place_experts": _comments(PLACED, "place_dense", "place_experts"),
    **_chain(RANK, "placed", "lower_dense", "lower_experts", of="local"),
    "write_sizes": _diff(INFERRED, "lower_experts", "write_sizes", "local"),
    "overlap_exchanges": _diff(RANK, "write_sizes", "overlap_exchanges", "local"),
    "name_axes": _diff(NAMED, "partitioned", "name_axes", "teacher"),
    **_chain(DECODER, "sparse", "derive_cache", "trim_outputs", "pick_positions", of="decoder.program"),
    **_chain(FUSED, "sparse", "fuse_gate", "fuse_moe_ffn", "fuse_mix", "choose_products", of="fused"),
    "complete_fused": Example(
        FUSED,
        'for stage in ("choose_products", "fused"):\n    print(fused.text(stage).splitlines()[0])',
        "text",
        "The graph stays; the stage has another name.",
    ),
    "settle_training": _diff(DECODER, "cached", "settle_training", "decoder.fused"),
    "fuse_qkv": _diff(SEPARATE, "settle_training", "fuse_qkv", "decoder.fused"),
    "pack_weights": Example(
        PACKED,
        'print(*[note for note in decoder.fused.ledger.notes if "pack_weights" in note], sep="\\n")',
        "text",
        "The text stays; what was packed stands among the notes of the ledger.",
    ),
    "fuse_norms": Example(
        NORMS,
        "from moec.passes.fuse_norms import FuseNorms\n"
        "from moec.passes.runner import Runner\n\n"
        'fused = Runner(verify="off").run(decoder.fork(), [FuseNorms(devices=("cpu",))])\n'
        'print(fused.diff("cached", "fuse_norms"))',
        said="It leaves a program on a CPU alone, unless it is told otherwise, as here.",
    ),
}  # fmt: skip
