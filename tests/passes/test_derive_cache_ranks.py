"""A cache derived from the program of one rank: Hugging Face's families, heads dealt out to two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moec
from moec.all_ranks import all_parts
from moec.decoder import Decoder
from moec.ir.mesh import DATA
from moec.runtime.simulated import run_ranks
from tests.capture.families import FAMILIES

MOE = {"experts": 4, "top_k": 2, "residual": "learned", "layers": "1", "init": "fresh"}
EVERYDAY = ("bloom",)  # ALiBi: each rank takes its heads' part of a table of positions
LONG = [pytest.param(name, marks=pytest.mark.nightly) for name in FAMILIES if name not in EVERYDAY]


def logits_of(decoder: Decoder, texts: Tensor) -> Tensor:
    """Logits of eight positions: four are read at once, then one by one, then two."""
    rows = texts.shape[0]
    cache, past = decoder.new_cache(rows, 16), torch.zeros(rows, dtype=torch.long)
    made, done = [], 0
    for size in (4, 1, 1, 2):
        wanted = torch.arange(size).expand(rows, size)
        made.append(decoder.step(texts[:, done : done + size], past + done, wanted, cache, done + size))
        done += size
    return torch.cat(made, 1)


@pytest.mark.parametrize("parallel", [{"tensor": 2, "expert": 2}, {"expert": 2}], ids=str)
@pytest.mark.parametrize("name", [*EVERYDAY, *LONG])
def test_ranks_decode_what_the_program_recomputes(name: str, parallel: dict[str, Any]) -> None:
    """Data ranks share the rows unevenly: the second has none."""
    torch.manual_seed(1)
    model = FAMILIES[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    narrow = moec.compile(model, {"moe": MOE, "parallel": parallel}, world=2, verify="off")
    program = narrow.to_dtype(torch.float64).eval()  # after: some families can only be built in fp32
    assert program.layout is not None
    mesh, parts, texts = program.layout.mesh, all_parts(program), torch.randint(1, 90, (3, 8))

    def body(rank: int) -> Tensor:
        own = texts[: 0 if mesh.coordinate(DATA, rank) else 3]
        return logits_of(parts[rank].decoder(16), own)

    first, second = run_ranks(mesh, body, timeout=600.0)
    torch.testing.assert_close(first, program(texts), rtol=0, atol=1e-9)
    torch.testing.assert_close(second, program(texts)[: second.shape[0]], rtol=0, atol=1e-9)
    assert second.shape[0] == (3 if mesh.tensor == 2 else 0)
