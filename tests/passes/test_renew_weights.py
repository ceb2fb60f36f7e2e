"""Fresh weights: what each weight is for, how it begins, and that the program with them is a beginner."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moec
from examples.gpt import GPT, GPTConfig
from moec.errors import VerifyError
from moec.ir.graphs import named_weights
from moec.passes import renew_weights
from moec.passes.branch_ends import branch_ends
from moec.passes.first_draws import Draw
from moec.passes.renew_weights import RenewWeights
from moec.passes.runner import Runner
from moec.testing import DecoderRecipe, assert_refuses, decoders
from moec.testing.parts.norms import NormRecipe
from tests.capture.families import FAMILIES

SPARSE = {
    "moe": {"layers": "1::2", "experts": 4, "residual": "learned", "balance": "bias", "router_std": 0.05}
}


def renewed(program: moec.Program, seed: int = 0, verify: str = "full", **options: float) -> moec.Program:
    """The program after the pass, proved."""
    return moec.Program.of(Runner(verify=verify).step(program, RenewWeights(seed=seed, **options)))


def gpt(**sizes: int) -> GPT:
    """The example, small."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**{"vocab": 61, "seq": 16, "layers": 3, "width": 32, "heads": 2, **sizes}))


def loss_of(program: moec.Program) -> float:
    """Mean cross-entropy on random tokens."""
    tokens = torch.randint(program.source.vocabulary, (4, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = program.eval()(tokens[:, :-1]).double()
    return float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.parametrize("plan", [None, SPARSE], ids=["dense", "sparse"])
def test_the_example_begins_as_it_begins_itself(plan: dict[str, object] | None) -> None:
    """Every weight of the example has the spread that its own initialisation gives it."""
    model = gpt(width=64)
    for parameter in model.parameters():
        parameter.data = parameter.data + 3.0  # whatever it was, nothing of it may be left
    fresh = dict(renewed(moec.compile(model, plan, verify="off")).named_parameters())
    end = 0.02 / 6**0.5
    for name, value in fresh.items():
        if name.endswith("bias"):
            assert torch.equal(value, torch.zeros_like(value)), name
        elif "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            ends = name.endswith(("attention.out.weight", "mlp.down.weight", "moe_1.down.weight"))
            wanted = 0.05 if "router" in name or "coefficient" in name else end if ends else 0.02
            error = abs(float(value.detach().double().square().mean().sqrt()) / wanted - 1)
            assert error < 5 / (2 * value.numel()) ** 0.5, name


def test_experts_are_each_drawn_and_their_origins_say_so() -> None:
    program = moec.compile(gpt(), SPARSE, verify="off")
    program.graph.get_submodule("moe_1").get_buffer("bias").add_(1.0)
    fresh = renewed(program)
    up = dict(fresh.named_parameters())["moe_1.up.weight"]
    assert not any(torch.equal(up[a], up[b]) for a in range(4) for b in range(a))
    assert fresh.origins["moe_1.up.weight"].how == "fresh"
    assert fresh.origins["ffn_0.up.weight"] == program.origins["ffn_0.up.weight"]
    assert not fresh.graph.get_submodule("moe_1").get_buffer("bias").any()
    assert any("drawn anew (seed 0)" in note for note in fresh.ledger.notes)


@given(decoders(float32=False), st.integers(0, 2**31))
@settings(max_examples=settings.default.max_examples // 8)
def test_random_decoders_begin_anew(recipe: DecoderRecipe, seed: int) -> None:
    """Ends of branches are the outputs of attentions and feed-forwards, and no others; the loss is that of
    one who knows nothing; ties hold; the program before is left alone; the proof holds."""
    program = moec.compile(recipe.build(seed=1), verify="off")
    kept = {name: value.clone() for name, value in named_weights(program.graph)}
    answer = recipe.answer()
    ends = {program.origins[name].source for name in branch_ends(program.graph).matrices}
    downs = {site.weights["down"] for site in answer.sites}
    outs = {name for name in answer.attention if name.removesuffix(".weight").endswith(("out", "out_w"))}
    assert ends == downs | outs
    assert branch_ends(program.graph).branches == 2 * recipe.num_layers
    fresh = renewed(program, seed)
    assert all(torch.equal(value, kept[name]) for name, value in named_weights(program.graph))
    assert {n: v.shape for n, v in fresh.named_parameters()} == {
        n: v.shape for n, v in program.named_parameters()
    }
    assert loss_of(fresh) == pytest.approx(math.log(recipe.vocab), abs=0.15)


@given(decoders(float32=False, dropout=False))
@settings(max_examples=settings.default.max_examples // 12)
def test_the_seed_tells_every_number(recipe: DecoderRecipe) -> None:
    program = moec.compile(recipe.build(seed=1), verify="off")
    first, again = (dict(renewed(program, 7, verify="off").named_parameters()) for _ in range(2))
    other = dict(renewed(program, 8, verify="off").named_parameters())
    wide = moec.compile(recipe.build(seed=2, dtype=torch.float64), verify="off")
    doubled = dict(renewed(wide, 7, verify="off").named_parameters())
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value.double(), doubled[name])
        assert value.std(unbiased=False) == 0 or not torch.equal(value, other[name]), name


OFTEN = ("gpt2", "gemma2", "gemma3", "bloom")
EACH = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.nightly) for name in FAMILIES]


@pytest.mark.parametrize("name", EACH)
def test_families_begin_anew(name: str) -> None:
    """Norms of every family, Gemma's among them, do nothing at first: the pass sees to it by running."""
    torch.manual_seed(0)
    model = FAMILIES[name](tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    program = moec.compile(model, verify="off")
    fresh = renewed(program)
    norms = {c.what: c.error for c in fresh.certificates[-1].checks}
    assert norms["norms against norms without weights"] < 1e-12
    assert loss_of(fresh) == pytest.approx(math.log(96), abs=0.5 if name.startswith("gemma") else 0.15)
    buffers = dict(program.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in fresh.named_buffers())


def test_a_fresh_student_is_the_shallow_model_begun_anew() -> None:
    """By the plan, compiled or cut from a program: the numbers of the model that was built shallow."""
    table = {"student": {"keep": [0, 2], "init": "fresh", "seed": 4}}
    shallow = dict(renewed(moec.compile(gpt(layers=2), verify="off"), 4).named_parameters())
    teacher = moec.compile(gpt(), verify="off")
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    for student in (moec.compile(gpt(), table), teacher.student(table)):
        found = dict(student.named_parameters())
        assert found.keys() == shallow.keys()
        assert all(torch.equal(found[name], value) for name, value in shallow.items())
        assert student.certificates[-1].rewrite == "renew_weights"
    assert all(torch.equal(value, before[name]) for name, value in teacher.named_parameters())


def test_a_fresh_student_of_experts_has_experts_of_its_own() -> None:
    table = {"student": {"keep": [0, 1], "init": "fresh"}}
    teacher = moec.compile(gpt(), SPARSE, verify="off")
    student = teacher.student(table)
    old, new = (dict(p.named_parameters()) for p in (teacher, student))
    assert not any(
        torch.equal(new[name], old[name])
        for name in new
        if name.startswith(("moe_1", "mix_1")) and new[name].any()
    )
    assert student.origins["moe_1.up.weight"].how == "fresh"
    assert {c.what for c in student.certificates[-1].checks} >= {"experts that are alike"}


def test_what_changes_the_width_of_the_stream_ends_no_branch() -> None:
    """OPT's 350M embeds in fewer dims than its layers have: products on the way in and out, no branches."""
    torch.manual_seed(0)
    model = FAMILIES["opt"](word_embed_proj_dim=16, do_layer_norm_before=False)
    ends = branch_ends(moec.compile(model, verify="off").graph)
    assert ends.branches == 4
    assert {name.split(".")[-2] for name in ends.matrices} == {"out_proj", "down"}


class Tempered(nn.Module):
    """A GPT with a learned temperature, read through `exp`."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt, self.heat = gpt(), nn.Parameter(torch.tensor(0.3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens) * self.heat.exp()


class Both(nn.Module):
    """One weight that is a factor and a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.both + self.both


def test_what_is_not_known_is_refused_by_name() -> None:
    program = moec.compile(Tempered(), verify="off")
    assert_refuses(RenewWeights(), program, match=r"heat \[\][\s\S]*unknown of `.*exp")
    model = gpt()
    model.add_module("norm", Both())
    program = moec.compile(model, verify="off")
    assert_refuses(RenewWeights(), program, match=r"both \[32\][\s\S]*scale of[\s\S]*shift of")
    program = moec.compile(gpt(), verify="off")
    assert_refuses(RenewWeights(std=0.0), program, match="std")
    assert_refuses(RenewWeights(), moec.compile(gpt().requires_grad_(False), verify="off"), match="learns")
    placed = moec.compile(gpt(), {"parallel": {"data": 2}}, verify="off", world=2)
    assert_refuses(RenewWeights(), placed, match="stage placed")


def test_frozen_weights_stay_and_are_named() -> None:
    model = gpt()
    model.position_embedding.weight.requires_grad_(False)
    program = moec.compile(model, verify="off")
    fresh = renewed(program)
    assert torch.equal(
        dict(fresh.named_parameters())["position_embedding.weight"], model.position_embedding.weight
    )
    assert any("position_embedding.weight do not learn" in note for note in fresh.ledger.notes)


def test_padding_is_not_drawn() -> None:
    model = gpt()
    model.token_embedding.padding_idx = 3
    fresh = dict(renewed(moec.compile(model, verify="off")).named_parameters())["token_embedding.weight"]
    assert not fresh[3].any()
    assert fresh[2].any()


def test_on_meta_nothing_is_drawn() -> None:
    with torch.device("meta"):
        model = gpt()
    fresh = renewed(moec.compile(model, SPARSE, verify="off"), verify="auto")
    assert all(value.is_meta for value in fresh.parameters())


def test_wrong_rules_are_seen_where_the_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`1 + w` overlooked: the draws and their proof agree, and the norms do not."""
    program = moec.compile(DecoderRecipe(norm=NormRecipe("rms_rsqrt", one_plus=True)).build(), verify="off")
    right = renew_weights.first_draws

    def wrong(given: moec.Program, std: float, rewrite: str) -> dict[str, Draw]:
        draws = right(given, std, rewrite)
        return {n: replace(d, value=1.0) if "norm" in n else d for n, d in draws.items()}

    renewed(program)
    monkeypatch.setattr(renew_weights, "first_draws", wrong)
    with pytest.raises(VerifyError, match="norms against norms without weights"):
        renewed(program)


def _too_wide(self: Draw, like: Tensor, seed: int) -> Tensor:
    made = MAKE(self, like, seed)
    return made * 1.2 if like.dim() == 3 else made


def _all_one(self: Draw, like: Tensor, seed: int) -> Tensor:
    made = MAKE(self, like, seed)
    return made[:1].expand_as(made).clone() if like.dim() == 3 else made


MAKE = Draw.make


@pytest.mark.parametrize(
    ("broken", "said"), [(_too_wide, "drawn numbers"), (_all_one, "experts that are alike")]
)
def test_wrong_numbers_are_seen(
    broken: Callable[[Draw, Tensor, int], Tensor], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts with a spread that is a fifth too wide; experts that are all the same."""
    program = moec.compile(gpt(), SPARSE, verify="off")
    monkeypatch.setattr(Draw, "make", broken)
    with pytest.raises(VerifyError, match=said):
        renewed(program)
