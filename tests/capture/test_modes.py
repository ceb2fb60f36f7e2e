"""Training flags, dropout, dtypes, devices and ties of captured programs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moec
from moec.capture import capture
from moec.testing import NAMED


class Dropping(nn.Module):
    """A decoder with dropout 0.5 on hidden values and 0.25 on attention; every value is made of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.up, self.down, self.head = nn.Linear(8, 64), nn.Linear(64, 8), nn.Linear(8, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        h = x.unsqueeze(1)
        y = F.scaled_dot_product_attention(h, h, h, is_causal=True, dropout_p=0.25 if self.training else 0.0)
        return self.head(x + y.squeeze(1) + self.down(self.dropout(F.gelu(self.up(x)))))


def differs(program: moec.Program, tokens: Tensor) -> bool:
    """Whether two runs differ."""
    return not torch.equal(program(tokens), program(tokens))


def test_dropout_follows_train_and_eval_at_every_stage() -> None:
    program, tokens = moec.compile(Dropping(), verify="off"), torch.randint(5, (2, 6))
    for stage in ("captured", "canonical", "structured"):
        graph = program.stages[stage]
        graph.train()
        assert not torch.equal(graph(tokens), graph(tokens)), stage
        graph.eval()
        assert torch.equal(graph(tokens), graph(tokens)), stage


def test_the_probability_is_the_models() -> None:
    text = str(moec.compile(Dropping(), verify="off"))
    assert "dropout(h_1, 0.5, self.training)" in text
    assert "drop = self.training * 0.25" in text


def test_dropout_zeroes_as_many_values_as_it_says() -> None:
    class OnlyDropout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.dropout = nn.Embedding(3, 4000), nn.Dropout(0.3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.dropout(self.table(tokens))

    model = OnlyDropout()
    nn.init.ones_(model.table.weight)
    program = capture(model).train()
    out = program(torch.zeros(2, 3, dtype=torch.long))
    assert abs(float((out == 0).double().mean()) - 0.3) < 0.02
    assert torch.allclose(out[out != 0], torch.tensor(1 / 0.7))


def test_the_random_numbers_are_the_models_own() -> None:
    """With the same seed a training step of the captured program is that of the model, dropout included."""
    recipe = NAMED["gpt2_like"]
    model, tokens = recipe.build(seed=3).train(), recipe.tokens()
    program = capture(model).train()
    torch.manual_seed(7)
    needed = recipe.logits(model, tokens)
    torch.manual_seed(7)
    assert torch.equal(program(tokens), needed)


def test_a_model_captured_in_eval_mode_still_trains_with_dropout() -> None:
    program = capture(NAMED["gpt2_like"].build().eval()).train()
    assert differs(program, NAMED["gpt2_like"].tokens())


def test_capture_leaves_the_model_alone() -> None:
    model = NAMED["gpt2_like"].build().eval()
    model.get_submodule(next(name for name, _ in model.named_children())).train()
    flags = {name: module.training for name, module in model.named_modules()}
    program = capture(model)
    assert {name: module.training for name, module in model.named_modules()} == flags
    mine = {value.untyped_storage().data_ptr() for value in program.state_dict().values()}
    assert mine.isdisjoint(value.untyped_storage().data_ptr() for value in model.state_dict().values())


def test_bf16_is_captured_in_bf16() -> None:
    recipe = NAMED["llama_cast_like"]
    model = recipe.build(seed=4)
    program = moec.compile(model, plan={"compile": {"dtype": "bf16"}})
    tokens = recipe.tokens()
    assert {p.dtype for p in program.parameters()} == {torch.bfloat16}
    needed = recipe.logits(model.to(torch.bfloat16).eval(), tokens)
    captured = program.stages["captured"].eval()(tokens)
    assert captured.dtype is torch.bfloat16
    assert torch.equal(captured, needed)
    assert (program.eval()(tokens) - needed).abs().max() <= 6e-2 * needed.abs().max()


def test_meta_models_stay_on_meta_and_print() -> None:
    program = moec.compile(NAMED["llama_like"].build(device="meta"))
    assert all(p.is_meta for p in program.parameters())
    assert {certificate.verdict for certificate in program.certificates} == {"stated"}
    assert "ffn 0, 1 (2 alike)" in str(program)


def test_tied_weights_stay_tied() -> None:
    model = NAMED["gpt2_like"].build()
    program = moec.compile(model, verify="off")
    assert program.num_parameters() == sum(p.numel() for p in model.parameters())
    assert set(program.source.aliases) == {"lm_head.weight"}
    tokens = NAMED["gpt2_like"].tokens()
    before = program.eval()(tokens)
    with torch.no_grad():
        dict(program.named_parameters())["wte.weight"].mul_(2.0)
        model.get_parameter("wte.weight").mul_(2.0)
    assert not torch.equal(program(tokens), before)
    needed = NAMED["gpt2_like"].logits(model.eval(), tokens)
    assert torch.allclose(program(tokens), needed, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_stay_frozen() -> None:
    model = NAMED["nano_gpt"].build()
    frozen = [name for name, _ in model.named_parameters()][::2]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    program = moec.compile(model, verify="off")
    assert sorted(name for name, p in program.named_parameters() if not p.requires_grad) == sorted(frozen)


@pytest.mark.parametrize("name", ["llama_like", "gpt2_like", "shared_ffn", "phi3_like"])
def test_the_source_models_state_dict_loads(name: str) -> None:
    """Tied names and buffers that the forward never reads included."""
    recipe = NAMED[name]
    program = moec.compile(recipe.build(seed=0), verify="off").eval()
    other = recipe.build(seed=9).eval()
    program.load_state_dict(other.state_dict())
    tokens = recipe.tokens()
    assert torch.allclose(program(tokens), recipe.logits(other, tokens), rtol=1e-4, atol=1e-5)
    program.load_state_dict(program.state_dict())
