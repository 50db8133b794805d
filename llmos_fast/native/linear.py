"""linear on the CPU: the routed product."""

import torch.nn.functional as F
from torch import Tensor

from llmos_fast.library import is_plain
from llmos_fast.native.common import contiguous, refusal
from llmos_fast.native.product import as_read, product, way


def unsupported(*, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Needs CPU tensors in fp32 or bf16."""
    return refusal(x, weight, bias)


def forward(*, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See llmos_fast.ops.linear."""
    weight = as_read(weight, x)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if x.dtype == weight.dtype and is_plain((x, weight, bias)) and way(rows, weight) == "torch":
        # small: torch's own gradients save 40 us of Python
        return F.linear(x, weight, contiguous(bias))
    out: Tensor = product(rows, weight, bias)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])
