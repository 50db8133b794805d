"""x W^T with both operands in e4m3: one launch rounds the rows of x, one multiplies.

The tensor cores' sums of 128 products are added in fp32. Scales of rows multiply the result, in the
epilogue; scales of blocks multiply those sums. A gated pair is one product, gated in the epilogue.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast.formats import FP8_BLOCK

from .epilogue import Epilogue
from .fp8_rounding import round_to_fp8
from .matrix import BlockScales, optional_matrix
from .product import product
from .runtime import contiguous


def fp8_matmul(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    blocks: bool,
    activation: str,
    gated: bool,
) -> Tensor:
    """activation(x [m k] W^T + bias) + residual [m n], or ``gated`` as ops.quant_matmul has it.

    packed, scales: of a weight in the format fp8, or where ``blocks`` is set in fp8_block
    """
    levels, x_scales = round_to_fp8(x, FP8_BLOCK if blocks else x.shape[1])
    bias, bias_up = contiguous(bias), None
    if gated and bias is not None:
        bias, bias_up = bias.chunk(2)
    epilogue, within = Epilogue(bias, bias_up, residual=optional_matrix(residual)), None
    if blocks:
        within = BlockScales(x_scales, scales, scales.shape[1])
    else:
        epilogue = epilogue._replace(scales=scales.view(-1), row_scales=x_scales.view(-1))
    weight = packed.view(torch.float8_e4m3fn)
    return product(
        levels, weight, epilogue, activation=activation, pair=gated, blocks=within, dtype=x.dtype
    )
