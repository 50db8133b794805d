"""quant_matmul beside torch's own: time, bytes moved, operations, error of the result.

    pytest benchmarks/bench_quant_matmul.py --benchmark-only --benchmark-json=out.json

Every contender multiplies the same x (M, K) by the same W (N, K), each in its own format, and says
how far it is from the fp32 product of the same numbers. Ours is checked against its definition
first, and a wrong result fails.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmos_fast.ops.quant_matmul import quant_matmul
from llmos_fast.quantize import quantize
from llmos_fast.reference import quant_matmul as definition
from llmos_fast.testing import assert_close_to_truth

SHAPES = [(768, 3072), (3072, 768), (4096, 4096)]
OURS = ("int8", "int4", "int8_a16", "int4_a16", "nf4")
# what one contender reads of the weight, in bytes, and how it is called
Contender = tuple[int, Callable[[], Tensor]]


def ours(scheme: str, x: Tensor, weight: Tensor) -> Contender:
    quantized = quantize(weight, scheme)
    check(scheme, x, weight)
    return quantized.nbytes, lambda: quant_matmul(x, quantized, impl="native")


def check(scheme: str, x: Tensor, weight: Tensor) -> None:
    quantized = quantize(weight, scheme)
    truth = definition.quant_matmul(x.double(), quantized)
    eager = definition.quant_matmul(x, quantized)
    out = quant_matmul(x, quantized, impl="native")
    assert_close_to_truth(out, eager, truth, reduction=weight.shape[1])


def linear_fp32(x: Tensor, weight: Tensor) -> Contender:
    return weight.nbytes, lambda: F.linear(x, weight)


def linear_bf16(x: Tensor, weight: Tensor) -> Contender:
    narrow_x, narrow = x.bfloat16(), weight.bfloat16()
    return narrow.nbytes, lambda: F.linear(narrow_x, narrow)


def weight_int8pack(x: Tensor, weight: Tensor) -> Contender:
    quantized = quantize(weight, "int8")
    narrow_x, scales = x.bfloat16(), quantized.scales[:, 0].bfloat16()
    return quantized.nbytes, lambda: torch._weight_int8pack_mm(narrow_x, quantized.packed, scales)


def int_mm(x: Tensor, weight: Tensor) -> Contender:
    quantized = quantize(weight, "int8")
    transposed = quantized.packed.T

    def run() -> Tensor:
        integers, scale = definition.round_to_int8(x)
        product = torch._int_mm(integers.to(torch.int8), transposed)
        return product * scale * quantized.scales[:, 0]

    return quantized.nbytes, run


def weight_int4pack(x: Tensor, weight: Tensor) -> Contender:
    quantized = quantize(weight, "int4")
    codes = (quantized.dequantize() / quantized.scales.repeat_interleave(128, 1)).round() + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    scales = quantized.scales.T.contiguous().bfloat16()
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1)
    narrow_x = x.bfloat16()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return quantized.nbytes, lambda: product(narrow_x, packed, 128, scales_and_zeros)


def dynamic_linear(x: Tensor, weight: Tensor) -> Contender:
    integers = torch.quantize_per_channel(
        weight,
        quantize(weight, "int8").scales[:, 0].double(),
        torch.zeros(len(weight), dtype=torch.int64),
        axis=0,
        dtype=torch.qint8,
    )
    packed = torch.ops.quantized.linear_prepack(integers, None)
    return weight.numel(), lambda: torch.ops.quantized.linear_dynamic(x, packed)


PEERS: dict[str, Callable[[Tensor, Tensor], Contender]] = {
    "torch_linear_fp32": linear_fp32,
    "torch_linear_bf16": linear_bf16,
    "torch_weight_int8pack": weight_int8pack,
    "torch_int_mm": int_mm,
    "torch_weight_int4pack": weight_int4pack,
    "torch_dynamic_linear": dynamic_linear,
}


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def shape(request):
    return request.param


@pytest.mark.parametrize("m", [1, 16, 512], ids=lambda m: f"M{m}")
@pytest.mark.parametrize("name", [*(f"ours_{s}" for s in OURS), *PEERS])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quant_matmul(benchmark, shape, m, name):
    k, n = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator)
    weight = torch.randn(n, k, generator=generator) / k**0.5
    benchmark.group = f"K={k} N={n} M={m}"
    with torch.no_grad():
        if name.startswith("ours_"):
            weight_bytes, run = ours(name.removeprefix("ours_"), x, weight)
        else:
            weight_bytes, run = PEERS[name](x, weight)
        exact = F.linear(x, weight)
        error = ((run().float() - exact).norm() / exact.norm()).item()
        assert error < 0.2, f"{name}: relative error {error:.3g}"
        rounds = 5 if m == 512 else 50
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=3)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    moved = weight_bytes + x.nbytes + 4 * m * n
    benchmark.extra_info.update(
        gb_per_s=round(moved / seconds / 1e9, 2),
        gflop_per_s=round(2 * m * n * k / seconds / 1e9, 1),
        relative_error=float(f"{error:.2e}"),
        weight_mb=round(weight_bytes / 1e6, 3),
        threads=torch.get_num_threads(),
    )
