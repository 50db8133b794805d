"""What of quant_matmul on CUDA needs no GPU: its self-test, its errors, how rows are aligned."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmos_fast.native import quant_matmul as native
from llmos_fast.native import quant_matmul_cuda as cuda
from llmos_fast.native import quant_matmul_self_test as self_test
from llmos_fast.quantize import QuantizedWeight, quantize, rounds_activations
from llmos_fast.reference.quant_matmul import finish, round_activations
from llmos_fast.testing import random

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SCHEMES = ["int8_a16", "int4_a16", "int4_asym_a16", "nf4_a16"]
ROUNDED = ["int8", "int4", "int4_asym"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(self_test, "SIZES", ((80, 260, False), (96, 260, True), (33, 43, False)))
    monkeypatch.setattr(self_test, "ROUNDS", 2)


def right(x, packed, scales, zeros, bias, residual, scheme, group_size, n, activation, gated):
    """As the kernels: rounded levels, sums in fp32, rounded once."""
    weight = QuantizedWeight(packed, scales, zeros, scheme, group_size, (n, x.shape[-1]))
    wide = x.float()
    if rounds_activations(scheme):
        integers, x_scales = round_activations(x, "int8", group_size)
        wide = integers * x_scales
    y = wide @ weight.dequantize(x.dtype).float().T + bias.float()
    y = finish(y, activation or None, gated, None if residual is None else residual.float())
    return y.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES + ROUNDED)
def test_what_is_right_passes(small, scheme, dtype):
    product = None if dtype == torch.float32 and scheme in SCHEMES else right
    assert self_test.passes(product, native._dequantize, CPU, scheme, dtype)


@pytest.mark.parametrize("scheme", ROUNDED)
def test_rounding_half_up_fails(small, scheme):
    def half_up(x, *rest):
        return right((x + 1e-3).float(), *rest).to(x.dtype)

    assert not self_test.passes(half_up, native._dequantize, CPU, scheme, torch.float32)


@pytest.mark.parametrize("scheme", SCHEMES + ROUNDED)
def test_one_wrong_result_fails(small, scheme):
    def once_wrong(x, *rest):
        y = right(x, *rest)
        calls.append(y)
        if len(calls) == 9:
            y[-1, -1] += 1
        return y

    def wrong_weight(*arguments):
        return native._dequantize(*arguments) + 1

    calls = []
    assert not self_test.passes(once_wrong, native._dequantize, CPU, scheme, torch.bfloat16)
    assert not self_test.passes(right, wrong_weight, CPU, scheme, torch.bfloat16)
    assert not self_test.passes(None, wrong_weight, CPU, scheme, torch.bfloat16)


@pytest.fixture
def verdicts(monkeypatch, tmp_path):
    """No verdicts, and a GPU by name."""
    monkeypatch.setattr(self_test, "_verdicts", {})
    monkeypatch.setattr(cuda, "_avoids_warpgroups", set())
    monkeypatch.setattr(cuda, "extension_path", lambda: Path(__file__))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    self_test._environment.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H9000")
    monkeypatch.setattr(cuda, "multiplies", lambda device, dtype: True)
    monkeypatch.setattr(cuda, "has_room", lambda device: True)
    monkeypatch.setattr(cuda, "has_warpgroups", lambda device: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield self_test._verdicts
    self_test._environment.cache_clear()


def answers(monkeypatch, answer):
    asked = []

    def passes(*arguments):
        asked.append(arguments[2:])
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(self_test, "passes", passes)
    return asked


def test_a_gpu_is_asked_once(monkeypatch, verdicts):
    asked = answers(monkeypatch, True)
    for scheme in ("int4", "int4_a16", "nf4", "int4_a16", "int4", "nf4_a16"):
        assert self_test.refusal(GPU, scheme, torch.bfloat16) is None
    assert asked == [(GPU, scheme, torch.bfloat16) for scheme in ("int4", "int4_a16", "nf4_a16")]


def test_rounded_activations_need_the_shared_memory_of_an_a100(monkeypatch, verdicts):
    asked = answers(monkeypatch, True)
    monkeypatch.setattr(cuda, "has_room", lambda device: False)
    assert "164 KB of shared memory" in self_test.refusal(GPU, "int8", torch.bfloat16)
    assert asked == []


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (False, "gives results that are not exact"),
        (RuntimeError("CUDA kernel quant_matmul: no kernel image"), "no kernel image"),
    ],
    ids=["wrong", "error"],
)
def test_a_failure_is_named_and_remembered(monkeypatch, verdicts, answer, sentence):
    asked = answers(monkeypatch, answer)
    with pytest.warns(UserWarning, match=f"fails its self-test for nf4_a16 .*H9000: .*{sentence}"):
        reason = self_test.refusal(GPU, "nf4", torch.float16)
    assert sentence in reason
    assert self_test.refusal(GPU, "nf4", torch.float16) == reason
    assert len(asked) == 1


def test_a_failure_of_warpgroups_leaves_the_kernels_without_them(monkeypatch, verdicts):
    monkeypatch.setattr(cuda, "has_warpgroups", lambda device: True)
    monkeypatch.setattr(self_test, "passes", lambda *arguments: GPU in cuda._avoids_warpgroups)
    for _ in range(2):  # as two processes, of which the second one knows nothing of the first
        with pytest.warns(UserWarning, match="not exact; it goes on without Hopper's own"):
            assert self_test.refusal(GPU, "int8", torch.bfloat16) is None
        assert cuda._avoids_warpgroups == {GPU}
        cuda._avoids_warpgroups.clear()
        verdicts.clear()


def test_without_warpgroups_other_schemes_are_asked_again(monkeypatch, verdicts):
    monkeypatch.setattr(cuda, "has_warpgroups", lambda device: True)
    answers(monkeypatch, True)
    assert self_test.refusal(GPU, "int8", torch.bfloat16) is None
    monkeypatch.setattr(self_test, "passes", lambda *arguments: GPU in cuda._avoids_warpgroups)
    with pytest.warns(UserWarning, match="goes on without"):
        assert self_test.refusal(GPU, "int4", torch.bfloat16) is None
    asked = answers(monkeypatch, True)
    assert self_test.refusal(GPU, "int8", torch.bfloat16) is None
    assert asked == [(GPU, "int8", torch.bfloat16)]


def test_what_passed_is_kept_for_the_next_process(monkeypatch, verdicts):
    asked = answers(monkeypatch, True)
    assert self_test.refusal(GPU, "int8", torch.bfloat16) is None
    verdicts.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert self_test.refusal(GPU, "int8", torch.bfloat16) is None
    assert len(asked) == 1
    assert "outside of a CUDA graph" in self_test.refusal(GPU, "int8", torch.float16)


def test_what_passed_is_asked_again_of_other_code(monkeypatch, verdicts, tmp_path):
    asked = answers(monkeypatch, True)
    assert self_test.refusal(GPU, "int8", torch.bfloat16) is None
    verdicts.clear()
    self_test._environment.cache_clear()
    other = tmp_path / "other.so"
    other.write_bytes(b"other")
    monkeypatch.setattr(cuda, "extension_path", lambda: other)
    assert self_test.refusal(GPU, "int8", torch.bfloat16) is None
    assert len(asked) == 2


def test_no_memory_is_no_verdict(monkeypatch, verdicts):
    answers(monkeypatch, torch.OutOfMemoryError("full"))
    assert "more free memory" in self_test.refusal(GPU, "nf4", torch.float16)
    answers(monkeypatch, True)
    assert self_test.refusal(GPU, "nf4", torch.float16) is None


def test_nothing_is_tested_inside_of_a_graph_or_with_fake_tensors(monkeypatch, verdicts):
    asked = answers(monkeypatch, False)
    with FakeTensorMode():
        assert self_test.refusal(GPU, "int8_a16", torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "outside of a CUDA graph" in self_test.refusal(GPU, "int8_a16", torch.bfloat16)
    assert asked == []
    assert verdicts == {}


@pytest.mark.parametrize("k", [1, 8, 20, 64])
def test_rows_are_aligned(k):
    storage = random(4, 3 * k + 8, dtype=torch.bfloat16)
    for x in (storage[:, :k], storage[:, 1 : k + 1], storage[:, : 2 * k : 2], storage[:1, :k]):
        rows = cuda.aligned_rows(x)
        assert rows.data_ptr() % 16 == 0
        assert len(rows) == 1 or rows.stride(0) % 8 == 0
        assert rows.stride(1) == 1
        assert rows.shape[1] >= k
        assert torch.equal(rows[:, :k], x)
        assert not rows[:, k:].any()


def test_aligned_rows_are_not_copied():
    x = random(2, 3, 64, dtype=torch.float16)
    assert cuda.aligned_rows(x).data_ptr() == x.data_ptr()
    assert cuda.aligned_rows(x[:, :, :40]).shape == (6, 40)


@pytest.mark.parametrize(
    ("rows", "dtype", "room", "chosen"),
    [
        (1, torch.bfloat16, True, "few"),
        (256, torch.float16, True, "few"),
        (257, torch.bfloat16, True, "dense"),
        (1, torch.float32, True, "dense"),
        (1, torch.bfloat16, False, "dense"),
        (0, torch.bfloat16, True, "dense"),
    ],
)
def test_few_rows_have_a_kernel_where_it_fits(monkeypatch, rows, dtype, room, chosen):
    weight = quantize(random(32, 40), "int4_a16", 32)
    x, bias = random(rows, 40, dtype=dtype), random(32)
    few = right(x, weight.packed, weight.scales, None, bias, None, "int4_a16", 32, 32, "", False)
    properties = SimpleNamespace(shared_memory_per_multiprocessor=(164 if room else 100) * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    cuda.multiplies.cache_clear()
    monkeypatch.setattr(cuda, "few_rows", lambda *arguments: few)
    monkeypatch.setattr(cuda, "dequantize", native._dequantize)
    rest = (weight.zero_points, bias, None, "int4_a16", 32, 32, "", False)
    out = cuda.product(x, weight.packed, weight.scales, *rest)
    cuda.multiplies.cache_clear()
    assert (out is few) == (chosen == "few")
    assert out.shape == few.shape


@pytest.mark.parametrize("rows", [0, 1, 65])
def test_rounded_rows_have_a_kernel_whatever_their_number(monkeypatch, rows):
    weight = quantize(random(32, 40), "int4", 32)
    monkeypatch.setattr(cuda, "rounded_rows", lambda x, *rest: x.new_zeros(()))
    rest = (weight.zero_points, None, None, "int4", 32, 32, "", False)
    assert cuda.product(random(rows, 40), weight.packed, weight.scales, *rest).shape == ()


def test_no_rows_need_no_launch():
    weight, x = quantize(random(32, 40), "int8"), random(2, 0, 40)
    rest = (None, None, None, "int8", 40, 32, "", False)
    assert cuda.rounded_rows(x, weight.packed, weight.scales, *rest).shape == (2, 0, 32)


def test_what_is_refused_on_cuda(monkeypatch, verdicts):
    answers(monkeypatch, True)
    monkeypatch.setattr(cuda, "is_built", lambda: True)

    def reason(scheme, k=40):
        x = SimpleNamespace(
            dtype=torch.bfloat16, shape=(1, k), is_cpu=False, device=torch.device("cuda", 0)
        )
        rest = dict.fromkeys(("bias", "activation", "residual"))
        weight = SimpleNamespace(scheme=scheme)
        return native.unsupported(x=x, qweight=weight, gated=False, **rest)

    assert [reason(scheme) for scheme in SCHEMES + ROUNDED] == [None] * 7
    assert "takes int8, int4, int4_asym and nf4 on CUDA" in reason("fp8")
    assert "K <= 131072" in reason("int8", 131073)
    assert reason("int8_a16", 131073) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where CUDA fails")
def test_errors_name_the_kernel_and_the_shape():
    extension = pytest.importorskip("llmos_fast._CUDA", reason="the CUDA extension was not built")
    sizes = (2, 48, 256, 32, 1)  # m, n, k, group_size, int4
    with pytest.raises(RuntimeError, match=r"quant_matmul, its plan, of 2 rows and a \(48, 256\)"):
        extension.quant_matmul_plan(0, *sizes, "bfloat16", False)
    pointers = (0, 256, 0, 0, 0, 0, False, 0, 0)
    with pytest.raises(RuntimeError, match=r"integer_matmul, its plan, of 2 rows and a \(48"):
        extension.integer_matmul_plan(0, *sizes, "bfloat16", False)
    for kernel in ("quant_matmul", "integer_matmul"):
        with pytest.raises(RuntimeError, match=rf"kernel {kernel} of 2 rows and a \(48, 256\)"):
            getattr(extension, kernel)(
                0, *pointers, *sizes, -1, False, "bfloat16", False, 1, 0, 0, 0
            )
