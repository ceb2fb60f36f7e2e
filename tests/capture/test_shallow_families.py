"""Hugging Face families cut to fewer layers, against the family's own model with fewer layers."""

from __future__ import annotations

import pytest
import torch

import moec
from tests.capture.families import FAMILIES

UNLIKE = {"gemma2", "gemma3"}  # every other layer has a window: which is which goes by its number
EVERY_DAY = {"gpt2", "llama", "bloom"}


@pytest.mark.parametrize(
    "name",
    [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.nightly)
     for name in FAMILIES if name not in UNLIKE],
)  # fmt: skip
def test_hugging_face_models_built_shallow(name: str) -> None:
    """A family's model, cut, is the family's model with fewer layers in its config."""
    count = "n_layer" if name in ("gpt2", "bloom", "gptj") else "num_hidden_layers"
    model, small = (FAMILIES[name](**{count: layers}).eval() for layers in (3, 2))
    state = model.state_dict()
    copied = {key: state[_of_layer(key, {0: 0, 1: 2})] for key in small.state_dict()}
    small.load_state_dict(copied)
    student = moec.compile(model, verify="off").student(keep=[0, 2]).eval()
    ids = torch.randint(0, student.source.vocabulary, (2, 7), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(student(ids), small.eval()(ids).logits)
    assert set(student.to_dense_state_dict()) == set(small.state_dict())


def _of_layer(name: str, layers: dict[int, int]) -> str:
    return ".".join(str(layers[int(atom)]) if atom.isdigit() else atom for atom in name.split("."))
