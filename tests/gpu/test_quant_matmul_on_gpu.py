"""What only a GPU can show of quant_matmul's CUDA kernels: formats, sizes, graphs, repetition.

Also, with few sizes: compute-sanitizer --tool memcheck (or racecheck) python -m pytest -k any_size
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: not run", allow_module_level=True)

from llmos_fast import dispatch, ops, reference
from llmos_fast.native import quant_matmul_cuda as cuda
from llmos_fast.native import quant_matmul_self_test as self_test
from llmos_fast.ops.quant_matmul import ACTIVATIONS
from llmos_fast.quantize import interleave, quantize
from llmos_fast.reference.quant_matmul import round_activations
from llmos_fast.testing import assert_within_budget, random

if not cuda.is_built():
    pytest.skip("the CUDA extension was not built: not run", allow_module_level=True)

DEVICE = torch.device("cuda", torch.cuda.current_device())
SCHEMES = ["int8_a16", "int4_a16", "int4_asym_a16", "nf4"]
ROUNDED = ["int8", "int4", "int4_asym"]
DTYPES = [torch.bfloat16, torch.float16]


def weight_of(n, k, scheme, group_size=128):
    return quantize(random(n, k, scale=k**-0.5).to(DEVICE), scheme, group_size)


def check(weight, m, dtype, residual=False, **options):
    n, k = weight.shape
    columns = n // 2 if options.get("gated") else n
    tensors = {"x": random(m, k, dtype=dtype), "bias": random(n, dtype=dtype)}
    tensors |= {"residual": random(m, columns, dtype=dtype)} if residual else {}
    assert_within_budget(
        ops.quant_matmul,
        reference.quant_matmul,
        {name: t.to(DEVICE) for name, t in tensors.items()},
        {"qweight": weight, **options},
        impl="native",
        reduction=k,
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES + ROUNDED)
def test_passes_its_self_test(scheme, dtype):
    assert self_test.refusal(DEVICE, scheme, dtype) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 100, 128, 200, 256, 257])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (77, 129), (300, 2500), (4096, 4096), (8200, 1500), (16400, 777)], ids=str
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_size(scheme, n, k, m, dtype):
    check(weight_of(n, k, scheme), m, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("m", [1, 8, 9, 17, 33, 64, 65, 128, 129, 1000])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (77, 129), (300, 2500), (4096, 4096)], ids=str)
@pytest.mark.parametrize("scheme", ROUNDED)
def test_any_size_with_rounded_activations(scheme, n, k, m, dtype):
    check(weight_of(n, k, scheme), m, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("k", [40, 4096, 9001])
@pytest.mark.parametrize("scheme", ROUNDED)
def test_activations_are_rounded_as_defined(scheme, k, dtype):
    """Against sums in float64 of the definition's integers: what is left is one rounding."""
    weight, x = weight_of(80, k, scheme, 32), random(70, k, dtype=dtype).to(DEVICE)
    integers, scales = round_activations(x, "int8", weight.group_size)
    exact = (integers.double() * scales.double()) @ weight.dequantize(torch.float64).T
    y = ops.quant_matmul(x.float(), weight, impl="native")
    assert (y - exact).abs().max() <= 1e-6 * k**0.5 * exact.abs().max()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("m", [2, 70])
@pytest.mark.parametrize("scheme", ROUNDED)
def test_a_row_that_is_not_finite_is_nan(scheme, m, value):
    weight, x = weight_of(300, 2500, scheme), random(m, 2500, dtype=torch.bfloat16).to(DEVICE)
    x[1, 1234] = value
    found = ops.quant_matmul(x, weight, impl="native").isnan()
    assert found[1].all()
    assert found.any(1).sum() == 1


@pytest.mark.parametrize("m", [1, 64, 300])
def test_int8_does_not_depend_on_how_k_is_split(m):
    """Integer sums are exact: rows alone have the result that they have among others."""
    weight, x = weight_of(1000, 8192, "int8"), random(m, 8192, dtype=torch.bfloat16).to(DEVICE)
    together = ops.quant_matmul(x, weight, impl="native")
    alone = torch.cat([ops.quant_matmul(row[None], weight, impl="native") for row in x])
    assert torch.equal(together, alone)


@pytest.mark.skipif(not cuda.has_warpgroups(DEVICE), reason="needs a Hopper GPU: not run")
def test_hopper_has_the_same_results_without_its_warpgroups(monkeypatch):
    weight, x = weight_of(8200, 1500, "int8"), random(150, 1500, dtype=torch.bfloat16).to(DEVICE)
    assert DEVICE not in cuda._avoids_warpgroups
    with_them = ops.quant_matmul(x, weight, impl="native")
    monkeypatch.setattr(cuda, "_avoids_warpgroups", {DEVICE})
    assert torch.equal(ops.quant_matmul(x, weight, impl="native"), with_them)
    for scheme in SCHEMES:
        check(weight_of(8200, 1500, scheme), 150, torch.bfloat16)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("m", "n"), [(5, 520), (150, 520), (150, 8200)])
@pytest.mark.parametrize("scheme", SCHEMES[1:] + ROUNDED[1:])
def test_any_group(scheme, m, n, group_size):
    for k in (260, 4096):
        check(weight_of(n, k, scheme, group_size), m, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(
    ("scheme", "m", "n"),
    [
        *[("int8_a16", 13, 530), ("int8_a16", 140, 8200), ("int4_a16", 13, 530)],
        *[("int4_a16", 140, 530), ("int4_a16", 140, 8200)],
        *[("int8", 13, 530), ("int8", 140, 530), ("int4", 70, 530)],
    ],
)
def test_epilogue(scheme, m, n, activation, dtype):
    check(weight_of(n, 1028, scheme), m, dtype, residual=True, activation=activation)
    pair = interleave(*(weight_of(n // 16 * 16, 1028, scheme) for _ in range(2)))
    check(pair, m, dtype, residual=True, activation=activation, gated=True)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int4_a16", "int8"])
def test_views_and_biases(scheme, bias_dtype):
    weight, wide = weight_of(300, 512, scheme), random(6, 1100, dtype=torch.bfloat16).to(DEVICE)
    bias = random(300, dtype=bias_dtype).to(DEVICE)
    for x in (wide[:, :512], wide[:, 3:515], wide[:, :1024:2], wide[:1, :512].expand(6, 512)):
        expected = ops.quant_matmul(x.contiguous(), weight, bias, impl="native")
        assert torch.equal(ops.quant_matmul(x, weight, bias, impl="native"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [*((m, 4096) for m in (1, 16, 32, 64, 100)), (256, 8192)])
@pytest.mark.parametrize("scheme", SCHEMES + ROUNDED)
def test_the_same_a_thousand_times(scheme, m, n, dtype):
    weight, x = weight_of(n, 4096, scheme), random(m, 4096, dtype=dtype).to(DEVICE)
    expected = ops.quant_matmul(x, weight, impl="native")
    wrong = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(1000):
        wrong |= (ops.quant_matmul(x, weight, impl="native") != expected).any()
    assert not wrong


@pytest.mark.parametrize("m", [1, 40, 200])
@pytest.mark.parametrize("scheme", SCHEMES + ROUNDED)
def test_a_graph_follows_its_input(captured, scheme, m):
    weight, x = weight_of(1000, 4096, scheme), random(m, 4096, dtype=torch.bfloat16).to(DEVICE)
    graph, out = captured(lambda: ops.quant_matmul(x, weight, impl="native"))
    for _ in range(3):
        x.copy_(random(m, 4096))
        graph.replay()
        assert torch.equal(out, ops.quant_matmul(x, weight, impl="native"))


@pytest.mark.parametrize("scheme", ["int4_a16", "int8"])
def test_streams_do_not_share_counters(scheme):
    weight, x = weight_of(2048, 8192, scheme), random(1, 8192, dtype=torch.bfloat16).to(DEVICE)
    expected = ops.quant_matmul(x, weight, impl="native")
    torch.cuda.synchronize()
    found = []
    streams = [torch.cuda.Stream() for _ in range(4)]
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(ops.quant_matmul(x, weight, impl="native"))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in found)


@pytest.mark.parametrize("scheme", SCHEMES + ROUNDED)
def test_gradients(scheme):
    weight = weight_of(300, 520, scheme)
    tensors = {"x": random(9, 520, dtype=torch.bfloat16), "bias": random(300, dtype=torch.bfloat16)}
    assert_within_budget(
        ops.quant_matmul,
        reference.quant_matmul,
        {name: t.to(DEVICE).requires_grad_() for name, t in tensors.items()},
        {"qweight": weight, "activation": "silu"},
        impl="native",
        reduction=520,
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: not run")
@pytest.mark.parametrize("scheme", ["int4_a16", "int8"])
def test_another_gpu_than_the_current_one(scheme):
    other = torch.device("cuda", (DEVICE.index + 1) % torch.cuda.device_count())
    weight, x = weight_of(600, 4096, scheme), random(3, 4096, dtype=torch.bfloat16)
    expected = ops.quant_matmul(x.to(DEVICE), weight, impl="native")
    found = ops.quant_matmul(x.to(other), weight.to(other), impl="native")
    assert torch.equal(found.to(DEVICE), expected)


@pytest.mark.parametrize("scheme", ["int4_a16", "int8", "int4"])
def test_it_is_chosen(scheme):
    weight, x = weight_of(64, 128, scheme), random(1, 128, dtype=torch.bfloat16).to(DEVICE)
    assert dispatch.explain(ops.quant_matmul, x, weight)[0] == ("native", None)
