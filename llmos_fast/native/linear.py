"""linear on the CPU: the routed product."""

from torch import Tensor

from llmos_fast.native.common import refusal
from llmos_fast.native.product import as_read, product


def unsupported(*, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Needs CPU tensors in fp32 or bf16."""
    return refusal(x, weight, bias)


def forward(*, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See llmos_fast.ops.linear."""
    weight = as_read(weight, x)
    if x.dim() == 2:
        return product(x, weight, bias)  # type: ignore[no-any-return]
    rows = x.reshape(-1, x.shape[-1])
    return product(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])  # type: ignore[no-any-return]
