"""Every Hugging Face family that must work: forward and gradients, dense and with experts; two that are
explained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moec
from moec.ir import regions
from moec.passes.pipeline import sparse
from moec.passes.runner import Runner
from moec.plan import Plan
from moec.testing import error_of
from tests.capture.families import FAMILIES, MAMBA, MIXTRAL, VOCABULARY

SHAPES = ((2, 9), (1, 1), (2, 1), (3, 40))
PLAN = {
    "moe": {
        "layers": "all",
        "experts": 3,
        "top_k": 2,
        "gate": "normalized",
        "init": "copy",
        "residual": "none",
    }
}
WITHOUT_CAUSAL_SDPA = {"gemma2", "bloom", "falcon_alibi", "mistral", "gemma3"}


def tokens_of(batch: int, length: int) -> Tensor:
    """Random tokens."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """The model's own logits."""
    return model(input_ids=tokens, use_cache=False).logits


def gradients_of(module: torch.nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the logits, by the user's names."""
    draw = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    named = dict(module.named_parameters())
    found = torch.autograd.grad((logits * draw).sum(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(named[n]) if g is None else g for n, g in zip(named, found, strict=True)}


def assert_same_gradients(program: moec.Program, model: torch.nn.Module, tokens: Tensor) -> None:
    """Every parameter, relative to its scale or a tenth of the largest."""
    needed = gradients_of(model, logits_of(model, tokens))
    found = gradients_of(program, program(tokens))
    assert found.keys() == needed.keys()
    floor = 0.1 * max(float(g.abs().max()) for g in needed.values())
    for name, gradient in needed.items():
        assert error_of(found[name], gradient, floor) < 5e-5, name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_compiled_exactly(name: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    program = moec.compile(model, verify="off").eval()
    captured = program.stages["captured"].eval()
    for shape in SHAPES:
        tokens = tokens_of(*shape)
        with torch.no_grad():
            needed = logits_of(model, tokens)
            assert torch.equal(captured(tokens), needed), shape
            assert error_of(program(tokens), needed) < 5e-6, shape
    assert_same_gradients(program, model, tokens_of(2, 9))
    assert list(regions(program.graph, "ffn")) == ["ffn_0", "ffn_1"]
    assert list(regions(program.graph, "attention")) == ["attention_0", "attention_1"]
    assert ("is_causal=True" in str(program)) == (name not in WITHOUT_CAUSAL_SDPA)
    _assert_experts(program, model)


def _assert_experts(program: moec.Program, model: torch.nn.Module) -> None:
    """Copies of each feed-forward under normalized weights: the same function, to rounding."""
    tokens = tokens_of(2, 9)
    experts = Runner(verify="off").run(program, sparse(Plan.resolve(PLAN))).eval()
    assert len(regions(experts.graph, "moe")) == 2
    with torch.no_grad():
        assert error_of(experts.run(tokens)[0], logits_of(model, tokens)) < 5e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "falcon_alibi"])
def test_passes_prove_themselves_on_eager_attention(name: str) -> None:
    model = FAMILIES[name](attn_implementation="eager").eval()
    program = moec.compile(model, verify="full").eval()
    assert {certificate.verdict for certificate in program.certificates} == {"proved"}
    tokens = tokens_of(2, 9)
    with torch.no_grad():
        assert error_of(program(tokens), logits_of(model, tokens)) < 5e-6
    if name != "gemma2":  # a soft cap stands between product and softmax
        assert "scaled_dot_product_attention" in str(program)


def test_a_mixtral_is_compiled_dense_and_its_experts_are_refused() -> None:
    model = MIXTRAL().eval()
    program = moec.compile(model, verify="off").eval()
    tokens = tokens_of(2, 9)
    assert error_of(program(tokens), logits_of(model, tokens)) < 5e-6
    experts = program.ledger.where(role="experts", status="refused")
    assert len(experts) == 4
    assert all("already sparse" in entry.reason for entry in experts)
    with pytest.raises(moec.PassError, match="no feed-forward"):
        moec.compile(model, "upcycle", verify="off")


def test_a_mamba_is_explained() -> None:
    with pytest.raises(moec.CaptureError, match=r"(?s)MambaForCausalLM.*recurrent or state-space layer"):
        moec.compile(MAMBA())


def test_a_model_that_is_not_touched_by_capture_still_generates() -> None:
    """Capture works on a copy: the user's model keeps its cache, its mode and its config."""
    model = FAMILIES["llama"]().eval()
    config = model.config.to_dict()
    moec.compile(model, verify="off")
    assert model.config.to_dict() == config
    assert model(input_ids=tokens_of(1, 3)).past_key_values is not None
