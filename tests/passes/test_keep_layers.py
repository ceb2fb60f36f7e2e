"""A depth cut is the same model built shallow with the weights copied: values, gradients, names, text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import moec
from moec.errors import PlanError, VerifyError
from moec.ir import Program, regions
from moec.ir.compare import EXACT
from moec.passes import keep_layers
from moec.passes.blocks import Block
from moec.passes.keep_layers import KeepLayers
from moec.passes.layer_names import LayerNames
from moec.passes.renumber_layers import renumber_layers
from moec.passes.runner import Runner
from moec.plan import Student
from moec.plan.depth import kept_layers, spread
from moec.testing.decoders import decoders
from moec.testing.pass_assertions import assert_preserves, assert_refuses
from moec.testing.recipe import DecoderRecipe, LogitsOnly
from moec.testing.same_function import assert_same_function

TINY = DecoderRecipe(num_layers=4)
EXPERTS = {"layers": "1::2", "experts": 3, "z_loss": 0.1, "balance_loss": 0.5}


@pytest.fixture(scope="module")
def dense() -> moec.Program:
    return moec.compile(TINY.build(), verify="off")


def cut(program: Program, keep: Sequence[int], verify: str = "full") -> Program:
    return Runner(verify=verify).run(program.fork(), [KeepLayers(tuple(keep))])


def shallow(recipe: DecoderRecipe, model: nn.Module, keep: Sequence[int]) -> nn.Module:
    """The same model built with fewer layers, the weights of the kept ones copied by hand."""
    small = replace(recipe, num_layers=len(keep)).build(seed=1, dtype=torch.float64)
    state, blocks, copied = model.state_dict(), f"{recipe.names.blocks}.", {}
    for name in small.state_dict():
        number, _, rest = name.removeprefix(blocks).partition(".")
        copied[name] = state[f"{blocks}{keep[int(number)]}.{rest}" if name.startswith(blocks) else name]
    small.load_state_dict(copied)
    return small


class Named(LogitsOnly):
    """A recipe's model from tokens to logits, its parameters under their own names."""

    def named_parameters(self, *args, **options):  # type: ignore[no-untyped-def]
        return self.model.named_parameters(*args, **options)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[DecoderRecipe, tuple[int, ...]]:
    recipe = draw(decoders(min_layers=2, max_layers=4, float32=False, dropout=False))
    layers = st.sets(st.integers(0, recipe.num_layers - 1), min_size=1)
    return recipe, tuple(sorted(draw(layers)))


def _is_the_shallow_model(recipe: DecoderRecipe, keep: tuple[int, ...]) -> None:
    model = recipe.build(seed=0, dtype=torch.float64).eval()
    small = shallow(recipe, model, keep).eval()
    student = cut(moec.compile(model, verify="off"), keep).eval()
    assert_same_function(Named(recipe, small), student, (recipe.tokens(length=7),), tolerance=EXACT)
    built = moec.compile(small, verify="off")
    assert list(student.state_dict()) == list(built.state_dict())
    assert dict(student.source.aliases) == dict(built.source.aliases)
    assert set(student.source.unused) == set(built.source.unused)
    assert [replace(origin, teacher="") for origin in student.origins.values()] == [*built.origins.values()]
    assert list(student.ledger) == list(built.ledger)
    dense, state = student.to_dense_state_dict(), small.state_dict()
    assert dense.keys() == state.keys()
    assert all(torch.equal(dense[name], value) for name, value in state.items())


@settings(max_examples=4)
@given(cuts())
def test_a_cut_is_the_model_built_shallow(case: tuple[DecoderRecipe, tuple[int, ...]]) -> None:
    """Random decoders and random layers: function, gradients, names in order, origins, ledger, state dict."""
    _is_the_shallow_model(*case)


@pytest.mark.nightly
@settings(max_examples=300)
@given(cuts())
def test_a_cut_is_the_model_built_shallow_many_times(case: tuple[DecoderRecipe, tuple[int, ...]]) -> None:
    _is_the_shallow_model(*case)


@pytest.mark.parametrize("tied", ["no", "module"])
def test_rows_of_shared_weights_stand_where_they_are_first_read(tied: str) -> None:
    """The head multiplies last, wherever the graph fetches it, and whatever else reads it."""
    _is_the_shallow_model(replace(TINY, num_layers=2, share="ffn", tied=tied), (1,))


@pytest.mark.parametrize("residual", ["", "none", "sum", "learned"])
def test_a_student_reads_as_the_shallow_model(residual: str) -> None:
    """Letter by letter, comments and all, dense and with experts."""
    plan = {"moe": {**EXPERTS, "layers": "all", "residual": residual}} if residual else None
    built = moec.compile(replace(TINY, num_layers=2).build(), plan, verify="off")
    student = cut(moec.compile(TINY.build(), plan, verify="off"), (1, 3), verify="off")
    assert student.text() == built.text()
    assert list(student.state_dict()) == list(built.state_dict())


@pytest.mark.parametrize("residual", ["none", "learned"])
def test_sparse_against_the_kept_layers_by_hand(residual: str) -> None:
    """Tied embeddings, fused gate and up, biases, a parallel residual: terms, counts, weights."""
    recipe = replace(TINY, tied="module", block="parallel_two_norms")
    program = moec.compile(recipe.build(), {"moe": {**EXPERTS, "residual": residual}}, verify="off")
    student = cut(program, (0, 2, 3))
    kinds = {check.what: check for check in student.certificates[-1].checks}
    assert {"logits against the kept layers", "balance against the kept layers"} <= kinds.keys()
    assert {"z against the kept layers", "gradients against the kept layers", "weights"} <= kinds.keys()
    assert list(regions(student.graph, "moe")) == ["moe_2"]
    assert student.origins["moe_2.up.weight"].teacher == "moe_3.up.weight"
    assert student.origins["moe_2.up.weight"].source == "blocks.2.mlp.up.weight"
    assert list(student.run(recipe.tokens())[1]["counts"]) == ["moe_2"]
    shared = {id(value) for value in program.parameters()}
    assert all(id(value) in shared for value in student.parameters())


def test_without_experts_only_logits_are_left() -> None:
    program = moec.compile(TINY.build(), {"moe": EXPERTS}, verify="off")
    student = cut(program, (0, 2))
    assert student.run(TINY.tokens())[1] == {}
    assert not regions(student.graph, "moe")


def test_all_layers_is_the_identity() -> None:
    recipe = replace(TINY, num_layers=2)
    program = moec.compile(recipe.build(dtype=torch.float64), verify="off")
    same = assert_preserves(KeepLayers((0, 1)), program, shapes=[(2, 9)])
    assert same.text() == program.text()
    assert KeepLayers((0, 1)).contract_for(program) == "exact"
    assert KeepLayers(depth=1).contract_for(program) == "changes-model"


def test_records_say_what_left(dense: moec.Program) -> None:
    student = cut(dense, (0, 2), verify="off")
    assert student.ledger.notes == ("layers 1, 3 dropped",)
    assert student.ledger["blocks.1.mlp.up.weight"].role == "ffn_1 up"
    assert "blocks.1.mlp.up.weight    teacher's blocks.2.mlp.up.weight" in str(student.origins)


# what is broken is seen


def _one_too_many(dropped: Sequence[Block]) -> None:
    """The first block goes as well."""
    graph = dropped[0].exit.graph
    dropped[0].exit.replace_all_uses_with(next(node for node in graph.nodes if node.name == "x"))


def _without_gradients(dropped: Sequence[Block]) -> None:
    """The right values, and nothing flows back through them."""
    exit_, entry = dropped[0].exit, dropped[0].entry
    exit_.replace_all_uses_with(entry)
    with entry.graph.inserting_after(entry):
        alone = entry.graph.call_function(torch.ops.aten.detach.default, (entry,))
    alone.meta = dict(entry.meta)
    entry.replace_all_uses_with(alone, delete_user_cb=lambda user: user is not alone)


def _other_weights(program: Program, names: LayerNames, dropped: Sequence[int]) -> None:
    """A weight that is equal to the teacher's, and not it."""
    renumber_layers(program, names, dropped)
    up = program.graph.get_submodule("ffn_1.up")
    up._parameters["weight"] = nn.Parameter(up.get_parameter("weight").detach().clone())


@pytest.mark.parametrize(
    ("step", "broken", "seen"),
    [
        ("_leave_out", _one_too_many, "logits against the kept layers"),
        ("_leave_out", _without_gradients, "gradients against the kept layers"),
        ("renumber_layers", _other_weights, "ffn_1.up.weight"),
    ],
)
def test_the_proof_sees_a_broken_cut(
    dense: moec.Program, step: str, broken: object, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keep_layers, step, broken)
    with pytest.raises(VerifyError, match=seen):
        cut(dense, (0, 2, 3))


# refusals


class SharedKeys(nn.Module):
    """Every layer after the first attends to the first one's keys."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.q, self.out, self.up, self.down = (
            nn.ModuleList(nn.Linear(a, b) for _ in range(3)) for a, b in ((8, 8), (8, 8), (8, 16), (16, 8))
        )
        self.kv = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.e(tokens)
        linked = None
        for q, out, up, down in zip(self.q, self.out, self.up, self.down, strict=True):
            y = q(x)
            a = nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True)
            x = x + out(a)
            h = self.kv(x)
            linked = h if linked is None else linked
            x = x + down(torch.relu(up(x))) + linked.sum(-1, keepdim=True)
        return self.head(x)


def test_a_layer_that_another_reads_stays() -> None:
    program = moec.compile(SharedKeys(), verify="off")
    assert_refuses(KeepLayers((1, 2)), program, match=r"layer 0\n.*inside it is read by .*which stays")
    assert cut(program, (0, 2)).stage == "structured"


def test_stages_without_layers_are_refused(dense: moec.Program) -> None:
    program = moec.compile(TINY.build(), {"moe": EXPERTS}, verify="off", world=2)
    assert_refuses(KeepLayers((0,)), program, match="stage placed")
    assert_refuses(KeepLayers((0,)), dense.fused(verify="off"), match="stage fused")


# which layers


def test_layers_at_even_distances() -> None:
    left = set(range(24)) - set(spread(21, 24))
    assert left == {4, 11, 19}
    for layers in range(2, 30):
        for depth in range(1, layers):
            found = spread(depth, layers)
            assert len(set(found)) == depth
            assert found[0] == 0
            assert depth == 1 or found[-1] == layers - 1


def test_layers_by_importance_are_in_order() -> None:
    student = Student(depth=2, by="importance")
    assert kept_layers(student, 4, [0.1, 0.5, 0.2, 0.5]) == (1, 3)
    assert kept_layers(student, 4, [0.5, 0.5, 0.5, 0.5]) == (0, 1)


@pytest.mark.parametrize(
    ("student", "where", "needed"),
    [
        (Student(depth=4), "student.depth", "fewer"),
        (Student(depth=9), "student.depth", "fewer"),
        (Student(keep=(0, 4)), "student.keep", "layers from 0 to 3"),
        (Student(depth=2, by="importance"), "student.by", "text"),
    ],
)
def test_layers_that_are_not_there(student: Student, where: str, needed: str) -> None:
    with pytest.raises(PlanError) as caught:
        kept_layers(student, 4)
    assert caught.value.where == where
    assert needed in caught.value.needed


# names


def test_names_of_layers() -> None:
    """A list of blocks, one inside a block, one that only some blocks have, and what stands behind."""
    own = [{f"h.{i}.mlp.0.w", f"h.{i}.mlp.2.w", f"h.{i}.q.0.w"} for i in range(5)]
    own[1].add("experts.0.w")
    own[3].add("experts.1.w")
    names = LayerNames(own, [0, 2, 3])
    new = {name: names.new(name) for name in ("h.3.mlp.2.w", "h.1.x", "h.2.q.0.w", "experts.1.w", "head")}
    assert new == {
        "h.3.mlp.2.w": "h.2.mlp.2.w", "h.1.x": None, "h.2.q.0.w": "h.1.q.0.w", "experts.1.w": "experts.0.w",
        "head": "head",
    }  # fmt: skip
    assert names.new("experts.0.w") is None
    sequential = LayerNames([{f"{i + 1}.w"} for i in range(3)], [0, 2])
    assert [sequential.new(f"{i}.w") for i in range(5)] == ["0.w", "1.w", None, "2.w", "3.w"]


def test_a_sequential_model() -> None:
    """The norm and the head behind the blocks move up with the blocks."""
    blocks = [Layer() for _ in range(3)]
    model = nn.Sequential(nn.Embedding(11, 8), *blocks, nn.LayerNorm(8), nn.Linear(8, 11)).double()
    student = cut(moec.compile(model, verify="off"), (0, 2)).eval()
    small = nn.Sequential(*(model[i] for i in (0, 1, 3, 4, 5))).eval()
    tokens = torch.randint(11, (2, 5))
    assert_same_function(small, student, (tokens,), tolerance=EXACT)
    assert isinstance(student.graph, fx.GraphModule)
    assert set(student.to_dense_state_dict()) == set(small.state_dict())


class Layer(nn.Module):
    """A block of a sequential model."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(torch.relu(self.up(x)))
