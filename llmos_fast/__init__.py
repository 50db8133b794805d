"""llmos_fast: a fast Transformer engine for PyTorch, drop-in layers on kernels of its own."""

from llmos_fast import ops, reference
from llmos_fast.dispatch import explain, use
from llmos_fast.quantize import QuantizedWeight, quantize
from llmos_fast.version import __version__

reference.publish(ops)

__all__ = ["QuantizedWeight", "__version__", "explain", "ops", "quantize", "reference", "use"]
