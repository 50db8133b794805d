"""Other products with quantized weights on a GPU, for bench_quant_matmul_gpu.

A peer is a function ``prepare(weight, group)`` of a bf16 weight (N, K) on the GPU, which returns a
function of bf16 x (M, K).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_fast.formats import FP8_BLOCK, FP8_MAX

from . import cuda
from .quant_peers import round_int8

Product = Callable[[Tensor], Tensor]


def cublas_bf16(weight: Tensor, group: int) -> Product:
    return lambda x: F.linear(x, weight)


def torch_int4(weight: Tensor, group: int) -> Product:
    """Asymmetric rounding of each group; the kernel reads code 8 as the group's middle value."""
    grouped = weight.float().unflatten(1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scales = (high - low) / 15
    codes = ((grouped - low) / scales).round().flatten(1).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    middles = torch.cat((scales, low + 8 * scales), dim=-1).transpose(0, 1).contiguous().bfloat16()
    product = torch.ops.aten._weight_int4pack_mm
    return lambda x: product(x, packed, group, middles)


def torch_int8(weight: Tensor, group: int) -> Product:
    codes, scales = round_int8(weight.float())
    narrow = scales[:, 0].bfloat16()
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, narrow)


def torch_int_mm(weight: Tensor, group: int) -> Product:
    """torch._int_mm, x rounded row by row in compiled torch; it takes more than 16 rows."""
    codes, scales = round_int8(weight.float())
    columns, narrow = codes.T, scales.T

    @torch.compile
    def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
        return round_int8(x.float())

    @torch.compile
    def scaled(sums: Tensor, x_scales: Tensor) -> Tensor:
        return (sums * x_scales * narrow).bfloat16()

    def product(x: Tensor) -> Tensor:
        integers, x_scales = rounded(x)
        return scaled(torch._int_mm(integers, columns), x_scales)

    return product


def bnb_nf4(weight: Tensor, group: int) -> Product:
    import bitsandbytes as bnb

    packed, state = bnb.functional.quantize_4bit(weight, blocksize=group, quant_type="nf4")
    return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)


def to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3, scales) of fp32 values; the last two dimensions share a scale."""
    scales = values.abs().amax((-1, -2), keepdim=True).clamp(min=1e-30) / FP8_MAX
    return (values / scales).to(torch.float8_e4m3fn), scales


def rows_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [m k], scales [m 1])."""
    levels, scales = to_fp8(x.float()[:, None])
    return levels[:, 0], scales[:, 0]


def groups_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 [m k], scales [m groups], which lie group after group)."""
    levels, scales = to_fp8(x.float().unflatten(1, (-1, 1, FP8_BLOCK)))
    return levels.flatten(1), scales[..., 0, 0].T.contiguous().T


def torch_fp8(weight: Tensor, group: int) -> Product:
    """Rounds x by a compiled function, as it would be in a compiled model."""
    levels, scales = rows_to_fp8(weight)
    rounded = cuda.compiled(rows_to_fp8)

    def product(x: Tensor) -> Tensor:
        x_levels, x_scales = rounded(x)
        return torch._scaled_mm(x_levels, levels.T, x_scales, scales.T, out_dtype=x.dtype)

    return product


def torch_fp8_blocks(weight: Tensor, group: int) -> Product:
    """As ``torch_fp8``, of sizes that blocks divide."""
    blocks = weight.float().unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))
    by_block, block_scales = to_fp8(blocks.transpose(1, 2))
    levels = by_block.transpose(1, 2).flatten(2).flatten(0, 1)
    scales = block_scales[..., 0, 0]
    rounded = cuda.compiled(groups_to_fp8)

    def product(x: Tensor) -> Tensor:
        x_levels, x_scales = rounded(x)
        return torch._scaled_mm(x_levels, levels.T, x_scales, scales.T, out_dtype=x.dtype)

    return product


PEERS: dict[str, dict[str, Callable[[Tensor, int], Product]]] = {
    "int8": {"cublas_bf16": cublas_bf16, "torch_int8": torch_int8, "torch_int_mm": torch_int_mm},
    "int8_a16": {"cublas_bf16": cublas_bf16, "torch_int8": torch_int8},
    "int4": {"cublas_bf16": cublas_bf16, "torch_int4": torch_int4},
    "int4_a16": {"cublas_bf16": cublas_bf16, "torch_int4": torch_int4},
    "int4_asym": {"cublas_bf16": cublas_bf16, "torch_int4": torch_int4},
    "int4_asym_a16": {"cublas_bf16": cublas_bf16, "torch_int4": torch_int4},
    "nf4": {"cublas_bf16": cublas_bf16, "bnb_nf4": bnb_nf4},
    "fp8": {"cublas_bf16": cublas_bf16, "torch_fp8": torch_fp8},
    "fp8_block": {"cublas_bf16": cublas_bf16, "torch_fp8_blocks": torch_fp8_blocks},
    "fp8_a16": {"cublas_bf16": cublas_bf16},
}


def prepared(scheme: str, weight: Tensor, group: int) -> dict[str, Product]:
    """The scheme's peers; one that cannot be prepared says why when it is called."""
    products: dict[str, Product] = {}
    for name, prepare in PEERS[scheme].items():
        try:
            products[name] = prepare(weight, group)
        except Exception as error:  # not installed, or not for this GPU

            def refuse(x: Tensor, error: Exception = error) -> Tensor:
                raise error

            products[name] = refuse
    return products
