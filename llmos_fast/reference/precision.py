"""In which dtype the references compute."""

import torch
from torch import Tensor

# False only inside llmos_fast.testing.native_precision(), which measures eager PyTorch's own error.
UPCAST = True


def upcast(x: Tensor) -> Tensor:
    """fp32 for 16-bit input, otherwise ``x`` as it is: references round once, at the end."""
    return x.float() if UPCAST and x.dtype in (torch.bfloat16, torch.float16) else x
