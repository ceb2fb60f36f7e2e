"""The model that a name means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moec.errors import ModelError
from moec.models import absolute_name, is_saved_program, open_model
from tests.cli.conftest import GPT, MODELS


def same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_function_class_and_object() -> None:
    assert type(open_model(GPT)).__name__ == "GPT"
    assert type(open_model(f"{MODELS}:Bare")).__name__ == "Bare"
    assert type(open_model(f"{MODELS}:ready")).__name__ == "Bare"


@pytest.mark.parametrize("joint", ["&", ","])
def test_arguments_are_literals(joint: str) -> None:
    model: Any = open_model(f"{GPT}?layers=3{joint}vocab=0x20")
    assert len(model.blocks) == 3
    assert model.config.vocab == 32


def test_bare_words_are_text(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        "from torch import nn\n"
        "class Named(nn.Module):\n"
        "    def __init__(self, act, sizes=(), scale=1.0):\n"
        "        super().__init__(); self.given = (act, sizes, scale)\n"
    )
    model: Any = open_model(f"{tmp_path}/m.py:Named?act=relu&sizes=(1, 2)&scale=-0.5")
    assert model.given == ("relu", (1, 2), -0.5)


def test_one_name_is_one_model_and_the_caller_keeps_its_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = open_model(GPT)
    assert torch.equal(torch.rand(3), expected)
    assert same(first, open_model(GPT))
    assert not same(first, open_model(GPT, seed=1))


def test_meta() -> None:
    assert {p.device.type for p in open_model(GPT, meta=True).parameters()} == {"meta"}


def test_a_file_sees_its_neighbours_and_its_dataclasses(tmp_path: Path) -> None:
    (tmp_path / "sizes_beside.py").write_text("WIDTH = 3\n")
    (tmp_path / "typing.py").write_text(  # a name that is loaded already
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\nfrom torch import nn\nfrom sizes_beside import WIDTH\n"
        "@dataclass\nclass Sizes:\n    width: int = WIDTH\n"
        "def f(): return nn.Linear(Sizes().width, 1)\n"
    )
    model: Any = open_model(f"{tmp_path}/typing.py:f")
    assert model.in_features == 3


def test_names_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MODELS.parent)
    name = absolute_name("models.py:gpt?layers=1")
    assert absolute_name("hf:config.json") == f"hf:{MODELS.parent}/config.json"
    monkeypatch.chdir(tmp_path)
    assert same(open_model(name), open_model(f"{GPT}?layers=1"))


def test_what_counts_as_a_saved_program(saved: Path, tmp_path: Path) -> None:
    assert is_saved_program(str(saved))
    assert is_saved_program(str(tmp_path))  # a damaged one, perhaps: loading says so
    assert not is_saved_program(GPT)
    (tmp_path / "config.json").write_text("{}")
    assert not is_saved_program(str(tmp_path))


# Hugging Face

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "vocab_size": 40,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    pytest.importorskip("transformers", reason="Hugging Face models need `transformers`, an extra")
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}))
    return path


def test_fresh_weights_from_a_config(config: Path) -> None:
    model: Any = open_model(f"hf:{config}")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.hidden_size == 16
    assert same(model, open_model(f"hf:{config.parent}"))


def test_weights_from_a_folder(config: Path) -> None:
    model: Any = open_model(f"hf:{config}", seed=3)
    model.save_pretrained(config.parent)
    assert same(open_model(f"hf:{config.parent}"), model)
    assert not same(open_model(f"hf:{config}"), model)


def test_weights_that_leave_some_out_are_refused(config: Path) -> None:
    from safetensors.torch import load_file, save_file

    model: Any = open_model(f"hf:{config}")
    model.save_pretrained(config.parent)
    (path,) = config.parent.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for model\.layers\.0\.mlp\.up_proj\.weight"):
        open_model(f"hf:{config.parent}")
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(ModelError, match="safetensors that belong to its config"):
        open_model(f"hf:{config.parent}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "no model_type"),
        ('{"model_type": "llamma"}', r"model_type 'llamma'(.|\n)*nearest 'llama'"),
        ('{"model_type": "odd", "auto_map": {"AutoModel": "x.Y"}}', "whose code is in the folder"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "llama"),
    ],
)
def test_odd_configs(text: str, reason: str, config: Path) -> None:
    config.write_text(text)
    with pytest.raises(ModelError, match=reason):
        open_model(f"hf:{config}")
