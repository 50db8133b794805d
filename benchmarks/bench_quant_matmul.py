"""quant_matmul beside torch's own products, with the error of each result."""

import pytest
import torch
import torch.nn.functional as F

from llmos_fast import ops, quantize, reference
from llmos_fast.reference.quant_matmul import round_to_int8
from llmos_fast.testing import assert_close_to_truth, random

SHAPES = [(64, 128), (768, 3072), (3072, 768), (4096, 4096)]  # in_features, out_features


def int8_peers(x, weight):
    """Torch's own 8-bit products of the same numbers."""
    quantized = quantize(weight, "int8")
    narrow_x, scales = x.bfloat16(), quantized.scales[:, 0].bfloat16()
    integers = torch.quantize_per_channel(
        weight,
        quantized.scales[:, 0].double(),
        torch.zeros(len(weight), dtype=torch.int64),
        axis=0,
        dtype=torch.qint8,
    )
    packed = torch.ops.quantized.linear_prepack(integers, None)

    def int_mm():
        rounded, scale = round_to_int8(x)
        product = torch._int_mm(rounded.to(torch.int8), quantized.packed.T)
        return product * scale * quantized.scales[:, 0]

    return {
        "quantized_dynamic": lambda: torch.ops.quantized.linear_dynamic(x, packed),
        "weight_int8pack": lambda: torch._weight_int8pack_mm(narrow_x, quantized.packed, scales),
        "int_mm": int_mm,
    }


def int4_peers(x, weight):
    """Torch's own 4-bit product, groups of 128."""
    if weight.shape[1] % 128:
        return {}
    quantized = quantize(weight, "int4")
    codes = (quantized.dequantize() / quantized.scales.repeat_interleave(128, 1)).round() + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    scales = quantized.scales.T.contiguous().bfloat16()
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1)
    product, narrow_x = torch.ops.aten._weight_int4pack_mm_for_cpu, x.bfloat16()
    return {"weight_int4pack": lambda: product(narrow_x, packed, 128, scales_and_zeros)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("rows", [1, 16, 512])
@pytest.mark.parametrize("scheme", ["int8", "int4", "int4_a16", "nf4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def bench_quant_matmul(benchmark, compare, smoke, shape, scheme, rows):
    if smoke and shape != SHAPES[0]:
        pytest.skip("not in a smoke run")
    features, out_features = shape
    x = random(rows, features)
    weight = random(out_features, features, scale=features**-0.5)
    narrow_x, narrow = x.bfloat16(), weight.bfloat16()
    quantized = quantize(weight, scheme)
    peers = {
        "linear_fp32": lambda: F.linear(x, weight),
        "linear_bf16": lambda: F.linear(narrow_x, narrow),
        **(int8_peers(x, weight) if scheme == "int8" else int4_peers(x, weight)),
    }

    def check():
        truth = reference.quant_matmul(x.double(), quantized)
        eager = reference.quant_matmul(x, quantized)
        out = ops.quant_matmul(x, quantized, impl="native")
        assert_close_to_truth(out, eager, truth, reduction=features)

    compare(
        lambda: ops.quant_matmul(x, quantized),
        peers,
        check=check,
        flops=0 if rows == 1 else 2 * rows * features * out_features,
        bytes=quantized.nbytes,
        rounds=15 if rows == 512 else 50,
    )
    exact = F.linear(x, weight)

    def error(result):
        return ((result.float() - exact).norm() / exact.norm()).item()

    benchmark.extra_info["relative_error"] = {
        "ours": error(ops.quant_matmul(x, quantized)),
        **{name: error(peer()) for name, peer in peers.items()},
    }
