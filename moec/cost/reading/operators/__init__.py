"""What torch's own operators cost; those of `moec::` stand beside their kernels."""

from .aten import price_of

__all__ = ["price_of"]
