"""GPTs of other libraries, where they are installed: litgpt, x-transformers, torchtune."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moec
from moec.ir import regions
from moec.testing import error_of

WHY = "its GPTs are compiled only where it is installed; moec does not depend on it"


def _litgpt(**fields: Any) -> nn.Module:
    litgpt = pytest.importorskip("litgpt", reason=WHY, exc_type=ImportError)
    sizes = {
        "block_size": 32,
        "vocab_size": 96,
        "padded_vocab_size": 96,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
    }
    name = fields.pop("name", None)
    config = litgpt.Config.from_name(name, **sizes, **fields) if name else litgpt.Config(**sizes, **fields)
    made: nn.Module = litgpt.GPT(config)
    return made


def _x_transformers(**fields: Any) -> nn.Module:
    library = pytest.importorskip("x_transformers", reason=WHY, exc_type=ImportError)
    layers = library.Decoder(dim=32, depth=2, heads=4, attn_dim_head=32, **fields)
    made: nn.Module = library.TransformerWrapper(num_tokens=96, max_seq_len=64, attn_layers=layers)
    return made


def _torchtune() -> nn.Module:
    models = pytest.importorskip("torchtune.models.llama3", reason=WHY, exc_type=ImportError)
    made: nn.Module = models.llama3(
        vocab_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=64,
        intermediate_dim=56,
    )
    return made


LLAMA = {"name": "Llama-3.2-1B", "n_query_groups": 2, "head_size": 8, "intermediate_size": 56}
MODELS = {
    "litgpt": _litgpt,
    "litgpt_llama": lambda: _litgpt(**LLAMA),
    "litgpt_pythia": lambda: _litgpt(name="pythia-14m"),
    "x_transformers": _x_transformers,
    "x_transformers_rotary_glu": lambda: _x_transformers(rotary_pos_emb=True, ff_glu=True, ff_swish=True),
    "x_transformers_flash": lambda: _x_transformers(attn_flash=True),
    "torchtune": _torchtune,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_gpt_of_another_library_is_compiled_exactly(name: str) -> None:
    model = MODELS[name]().eval()
    program = moec.compile(model).eval()
    assert {certificate.verdict for certificate in program.certificates} == {"proved"}
    assert list(regions(program.graph, "ffn")) == ["ffn_0", "ffn_1"]
    assert list(regions(program.graph, "attention")) == ["attention_0", "attention_1"]
    for shape in ((2, 9), (1, 1), (3, 5)):
        tokens = torch.randint(96, shape)
        with torch.no_grad():
            assert error_of(program(tokens), model(tokens)) < 5e-6


def test_an_alibi_made_of_python_numbers_is_explained() -> None:
    model = _x_transformers(alibi_pos_bias=True)
    with pytest.raises(moec.CaptureError, match="S baked in"):
        moec.compile(model)
