"""Which teacher it is: any other weight is another one, and no mesh is."""

from __future__ import annotations

import copy
import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moec.errors import ArtifactError
from moec.runtime.distillation import identity
from moec.runtime.distillation.identity import identity_of, identity_of_saved, weights_digest
from moec.runtime.ranks import ALONE, ranks_of
from moec.runtime.simulated import run_ranks
from tests.runtime.rank_runs import compiled, plan
from tests.runtime.tiny import TinyProgram

ALL = 2**64 - 1
KINDS = {
    torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64,
    torch.int64: torch.int64, torch.bool: torch.uint8,
}  # fmt: skip


def plain_digest(tensors: dict[str, Tensor]) -> str:
    """The definition, an element at a time."""
    total = 0
    for name, tensor in tensors.items():
        told = f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
        salt = int.from_bytes(hashlib.sha256(told).digest()[:8], "big")
        for place, bits in enumerate(tensor.contiguous().view(KINDS[tensor.dtype]).flatten().tolist()):
            x = place * 0x9E3779B97F4A7C15 + salt + bits & ALL
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & ALL
            x = (x ^ x >> 27) * 0x94D049BB133111EB & ALL
            total += x ^ x >> 31
    return f"{total & ALL:016x}"


def holder(tensors: dict[str, Tensor]) -> nn.Module:
    """A module with these buffers."""
    made = nn.Module()
    for name, tensor in tensors.items():
        made.register_buffer(name, tensor)
    return made


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    made = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 2
    made = made.to(draw(st.sampled_from(list(KINDS))))
    turned = made.dim() > 1 and draw(st.booleans())
    return made.transpose(0, 1) if turned else made  # strides of any kind


@given(st.lists(tensors(), max_size=3), st.integers(1, 9))
def test_the_digest_is_the_plain_sum(values: list[Tensor], stretch: int) -> None:
    named = {f"w{i}": value for i, value in enumerate(values)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(identity, "STRETCH", stretch)
        assert weights_digest(holder(named), ALONE) == plain_digest(named)


def test_any_change_of_a_weight_is_another_teacher() -> None:
    program = TinyProgram()
    seen = {weights_digest(program, ALONE)}
    assert weights_digest(copy.deepcopy(program), ALONE) in seen

    def note(changed: TinyProgram) -> None:
        digest = weights_digest(changed, ALONE)
        assert digest not in seen
        seen.add(digest)

    for name, value in program.state_dict().items():
        changed = copy.deepcopy(program)
        last = changed.state_dict()[name].flatten()[-1:]
        last.view(torch.int32).bitwise_xor_(1)  # the smallest step there is
        note(changed)
        if value.dim() > 1:
            turned = copy.deepcopy(program)
            turned.state_dict()[name].copy_(value.flip(0))  # the same numbers elsewhere
            note(turned)
    swapped = copy.deepcopy(program)
    swapped.norm.weight, swapped.norm.bias = swapped.norm.bias, swapped.norm.weight
    note(swapped)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(3, {"tensor": 3}), (4, {"expert": 2, "slice": 2})],
    ids=["tensor 3", "slice 2"],
)
def test_on_any_mesh_it_is_the_same_teacher(world: int, parallel: dict[str, Any]) -> None:
    whole = compiled(plan(**parallel))
    placed = compiled(plan(**parallel), world)
    assert placed.layout is not None
    expected = identity_of(whole, ALONE)

    def body(rank: int) -> tuple[str, str]:
        local = placed.partition(rank)
        # its own part, and the whole program on every rank
        return weights_digest(local, ranks_of(local)), weights_digest(whole, ranks_of(local))

    digests = set(itertools.chain(*run_ranks(placed.layout.mesh, body)))
    assert digests == {expected["weights"]}
    assert expected["program"] == whole.fingerprint() == placed.fingerprint()


def test_of_a_saved_program_it_is_read_off_the_manifest(tmp_path: Path) -> None:
    program = compiled(plan())
    first, again = (identity_of_saved(program.save(tmp_path / name)) for name in ("first", "again"))
    assert first == again
    assert first["program"] == program.fingerprint()
    with torch.no_grad():
        next(program.parameters()).flatten()[0] += 1e-9
    other = identity_of_saved(program.save(tmp_path / "other"))
    assert other["program"] == first["program"]
    assert other["files"] != first["files"]
    for file in (tmp_path / "first").glob("*.safetensors"):
        file.unlink()
    assert identity_of_saved(tmp_path / "first") == first  # no weight is read
    manifest = tmp_path / "first/manifest.json"
    manifest.write_text(manifest.read_text().replace("embedding", "embeding", 1))
    with pytest.raises(ArtifactError, match="edited"):
        identity_of_saved(tmp_path / "first")
    with pytest.raises(ArtifactError, match="no such folder"):
        identity_of_saved(tmp_path / "nowhere")
