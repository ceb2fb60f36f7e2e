"""Text from a program, by running it over all tokens so far for each new one.

Slow and plain: it needs nothing from the program but logits. Cached decoding is another matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.errors import DataError
from moec.runtime.trainable import Trainable, device_of, in_mode
from moec.runtime.vocabulary import Vocabulary, open_vocabulary


@torch.no_grad()
def sample_tokens(
    program: Trainable,
    tokens_BS: Tensor,
    num_new: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    window: int | None = None,
) -> Tensor:
    """Extend tokens i64 `[B, S]` (S ≥ 1) to `[B, S + num_new]`; the same `seed` gives the same text.

    Temperature 0 takes the likeliest token. With `window`, each token sees at most that many before it: for
    programs with a longest sequence. Torch's own generators are left alone. Raises `DataError` on an empty
    prompt or a negative temperature.
    """
    if tokens_BS.shape[-1] == 0:
        raise DataError("sample", "an empty prompt", "at least one token")
    if temperature < 0.0:
        raise DataError("sample", f"temperature {temperature}", "0 or more")
    draw = torch.Generator().manual_seed(seed)
    with in_mode(program, training=False):
        for _ in range(num_new):
            seen_BS = tokens_BS if window is None else tokens_BS[:, -window:]
            next_B1 = _choose(program(seen_BS)[:, -1], temperature, draw)
            tokens_BS = torch.cat([tokens_BS, next_B1.to(tokens_BS)], dim=1)
    return tokens_BS


def sample(
    program: Trainable,
    prompt: bytes | str,
    num_new: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    window: int | None = None,
    vocabulary: Vocabulary | str = "bytes",
) -> bytes:
    """`prompt` and `num_new` tokens more, as text; see `sample_tokens`."""
    words = open_vocabulary(vocabulary)
    text = prompt.encode() if isinstance(prompt, str) else prompt
    device = device_of(program)
    tokens_1S = torch.tensor([words.encode(text, "prompt").tolist()], dtype=torch.long, device=device)
    out_1S = sample_tokens(program, tokens_1S, num_new, temperature=temperature, seed=seed, window=window)
    return words.decode(out_1S[0].tolist())


def _choose(logits_BV: Tensor, temperature: float, draw: torch.Generator) -> Tensor:
    if temperature == 0.0:
        return logits_BV.argmax(-1, keepdim=True)
    # On the CPU and in fp32, so that a seed means the same on every device and in every arithmetic.
    return torch.multinomial((logits_BV.float().cpu() / temperature).softmax(-1), 1, generator=draw)
