"""llmos_fast: a fast Transformer engine for PyTorch, drop-in layers on kernels of its own."""

from llmos_fast.version import __version__

__all__ = ["__version__"]
