"""What may be handed to `capture`, how it is called, how its answer is read, and what is refused with which
words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import moec
from moec.capture import capture
from moec.errors import CaptureError

VOCABULARY, WIDTH = 11, 8


class Plain(nn.Module):
    """An embedding, a feed-forward and a head; subclasses change how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.down(F.gelu(self.up(x))))

    def forward(self, tokens: Tensor) -> Any:
        return self.logits(tokens)


@dataclass
class Output:
    """What some models return."""

    loss: Tensor | None
    logits: Tensor


class ReturnsDict(Plain):
    def forward(self, tokens: Tensor) -> Any:
        return {"hidden": self.embedding(tokens), "logits": self.logits(tokens)}


class ReturnsTuple(Plain):
    def forward(self, tokens: Tensor) -> Any:
        return self.logits(tokens), None


class ReturnsDataclass(Plain):
    def forward(self, tokens: Tensor) -> Any:
        return Output(None, self.logits(tokens))


class NamedInputs(Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return self.logits(input_ids)


class LastUnlessTargets(Plain):
    """nanoGPT's way: only the last position, unless there are targets."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        if targets is None:
            return self.logits(idx)[:, [-1], :], None
        logits = self.logits(idx)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class NeedsTargets(Plain):
    def forward(self, tokens: Tensor, targets: Tensor) -> Any:
        logits = self.logits(tokens)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class NeedsScale(Plain):
    def forward(self, tokens: Tensor, scale: float) -> Any:
        return self.logits(tokens) * scale


def tokens_of(batch: int = 2, length: int = 5) -> Tensor:
    """Random tokens."""
    return torch.randint(VOCABULARY, (batch, length))


@pytest.mark.parametrize(
    "make", [Plain, ReturnsDict, ReturnsTuple, ReturnsDataclass, NamedInputs, LastUnlessTargets, NeedsTargets]
)
@pytest.mark.parametrize("shape", [(2, 9), (1, 1), (3, 4)])
def test_logits_of_every_position_whatever_the_interface(make: type[Plain], shape: tuple[int, int]) -> None:
    model, tokens = make(), tokens_of(*shape)
    assert torch.equal(capture(model).eval()(tokens), model.logits(tokens))


def test_constants_that_forward_needs_come_from_example_inputs() -> None:
    model, tokens = NeedsScale(), tokens_of()
    for example in ({"tokens": tokens, "scale": 0.5}, (tokens, 0.5)):
        assert torch.equal(capture(model, example_inputs=example)(tokens), model.logits(tokens) * 0.5)


def test_a_missing_argument_is_asked_for() -> None:
    with pytest.raises(
        CaptureError, match=r"NeedsScale.*\n.*scale(.|\n)*example_inputs=\{'tokens': tokens, 'scale'"
    ):
        capture(NeedsScale())


def test_a_tensor_argument_is_refused() -> None:
    with pytest.raises(CaptureError, match="a program has one input"):
        capture(NeedsScale(), example_inputs=(tokens_of(), torch.ones(3)))


def test_what_is_not_a_model_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"int\n.*nn.Module"):
        capture(3)  # type: ignore[arg-type]


def test_only_the_last_position_without_targets_is_refused() -> None:
    class OnlyLast(Plain):
        def forward(self, tokens: Tensor) -> Any:
            return self.logits(tokens)[:, -1:]

    with pytest.raises(CaptureError, match=r"for every position(.|\n)*`targets`"):
        capture(OnlyLast())


def test_an_answer_without_logits_is_refused() -> None:
    class Nothing(Plain):
        def forward(self, tokens: Tensor) -> Any:
            return "hello"

    with pytest.raises(CaptureError, match="str without logits"):
        capture(Nothing())


def test_control_flow_on_token_values_is_refused_with_its_line() -> None:
    class Branches(Plain):
        def forward(self, tokens: Tensor) -> Any:
            return self.logits(tokens) if tokens.sum() > 3 else self.logits(tokens) * 2

    with pytest.raises(CaptureError, match=r"test_calls\.py(.|\n)*reads tensor values in Python"):
        capture(Branches())


def test_a_loop_over_positions_is_refused() -> None:
    class Recurrent(Plain):
        def forward(self, tokens: Tensor) -> Any:
            x, state, states = self.embedding(tokens), torch.zeros(WIDTH), []
            for i in range(x.shape[1]):
                state = torch.tanh(state + x[:, i])
                states.append(state)
            return self.head(torch.stack(states, 1))

    with pytest.raises(CaptureError, match=r"S baked in(.|\n)*loops over positions"):
        capture(Recurrent())


def test_a_running_statistic_is_refused() -> None:
    class Counts(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, tokens: Tensor) -> Any:
            self.calls.add_(1)  # type: ignore[operator]
            return self.logits(tokens)

    with pytest.raises(CaptureError, match="writes to the buffer calls"):
        capture(Counts())


class Table(Plain):
    """A table of positions that is only four long."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(4, WIDTH)

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(x + self.down(F.gelu(self.up(x))))


def test_a_tiny_table_of_positions_is_the_limit() -> None:
    model = Table()
    program = moec.compile(model, verify="full").eval()
    assert program.source.max_positions == 4
    for length in (1, 4):
        tokens = tokens_of(2, length)
        assert torch.allclose(program(tokens), model.logits(tokens), atol=1e-6)
    with pytest.raises(moec.MoecError, match=r"5 positions\n.*at most 4"):
        program(tokens_of(2, 5))


def test_attributes_with_names_that_fx_or_moec_use_themselves() -> None:
    class Misnamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = nn.Embedding(VOCABULARY, WIDTH)
            self.code, self.ffn_0 = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
            self.positions = nn.Parameter(torch.randn(16, WIDTH))
            self.attention_0 = nn.Linear(WIDTH, VOCABULARY)
            self.x, self.logits = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.graph(tokens) * self.x + self.positions[: tokens.shape[1]] + self.logits
            return self.attention_0(x + self.ffn_0(F.relu(self.code(x))))

    model, tokens = Misnamed(), tokens_of()
    program = moec.compile(model, verify="full")
    assert {n for n, _ in program.named_parameters()} == {n for n, _ in model.named_parameters()}
    assert torch.allclose(program(tokens), model(tokens), atol=1e-6)
    program.load_state_dict(model.state_dict())
    assert len(program.ledger.where(role="ffn_0 up")) == 1


def test_parameters_in_lists_and_dicts_and_under_odd_names() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ParameterList([torch.randn(VOCABULARY, WIDTH), torch.randn(12, WIDTH)])
            self.more = nn.ParameterDict(
                {"down": torch.randn(WIDTH, 12), "q\"u'ote": torch.randn(VOCABULARY, WIDTH)}
            )
            self.add_module("with space", nn.Linear(WIDTH, WIDTH))

        def forward(self, tokens: Tensor) -> Tensor:
            x = getattr(self, "with space")(F.embedding(tokens, self.tables[0]))
            x = x + F.linear(F.silu(F.linear(x, self.tables[1])), self.more["down"])
            return F.linear(x, self.more["q\"u'ote"])

    model, tokens = Odd(), tokens_of()
    program = moec.compile(model, verify="full")
    assert {n for n, _ in program.named_parameters()} == {n for n, _ in model.named_parameters()}
    assert torch.allclose(program(tokens), model(tokens), atol=1e-5)
    assert program.ledger["more.down"].role == "ffn_0 down"


def test_a_graph_module_and_an_exported_program_are_taken() -> None:
    model, tokens = Plain(), tokens_of()
    traced = fx.symbolic_trace(model)
    dims = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    exported = torch.export.export(model, (tokens_of(2, 9),), dynamic_shapes=dims)
    for given in (traced, exported, exported.module()):
        program = moec.compile(given, verify="full")
        assert torch.allclose(program(tokens), model(tokens), atol=1e-6)
        assert {n for n, _ in program.named_parameters()} == {n for n, _ in model.named_parameters()}
        assert len(program.ledger.where(role="ffn_0 up")) == 1


def test_an_exported_program_of_one_size_is_refused() -> None:
    class Heads(Plain):
        def logits(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            h = x.view(tokens.shape[0], tokens.shape[1], 2, 4).transpose(1, 2)
            y = F.scaled_dot_product_attention(h, h, h, is_causal=True)
            return self.head(y.transpose(1, 2).reshape(x.shape))

    exported = torch.export.export(Heads(), (tokens_of(2, 9),))
    with pytest.raises(CaptureError, match="traced with fixed sizes"):
        capture(exported)


def test_a_causal_mask_in_the_state_dict_stays_there() -> None:
    class Masked(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keep", torch.ones(16, 16, dtype=torch.bool).tril())

        def logits(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            h, keep = x.unsqueeze(1), self.keep[: tokens.shape[1], : tokens.shape[1]]
            y = F.scaled_dot_product_attention(h, h, h, attn_mask=keep)
            return self.head(x + self.down(F.gelu(self.up(y.squeeze(1)))))

    model, tokens = Masked(), tokens_of()
    program = moec.compile(model, verify="full")
    assert program.to_dense_state_dict().keys() == model.state_dict().keys()
    assert torch.allclose(program(tokens), model(tokens), atol=1e-6)


def test_example_inputs_that_are_no_tokens_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"tokens \[3\]\n.*tokens \[B, S\]"):
        capture(Plain(), example_inputs=(torch.zeros(3, dtype=torch.long),))
