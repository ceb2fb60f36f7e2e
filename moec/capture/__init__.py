"""nn.Module → Program at stage *captured*: `capture(model)`.

signature.py   how to call a model so that it maps tokens [B, S] to logits [B, S, V]
exported.py    torch.export, with batch and sequence dynamic
flatten.py     the exported program as one flat graph that owns its weights under the user's names
dropout.py     dropout that follows train() and eval() again
"""

from .capture import capture

__all__ = ["capture"]
