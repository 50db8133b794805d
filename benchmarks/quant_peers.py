"""Other engines' products with quantized weights, for bench_quant_matmul.py.

A peer is a function ``prepare(weight, group, copies)`` of a fp32 weight (N, K). It quantizes the
weight, once, and returns ``bind(x)``, which converts fp32 x (M, K) to what the engine reads and
returns ``run()``: one product by each of the copies, giving the result of the first. Several copies
together are larger than the caches, so that weights come from memory as they do when a model
generates text. An engine that is not installed, or does not take the case, raises.

Every engine has torch's number of threads, on the same CPUs: libgomp has bound the thread that
calls to the first one where OMP_PROC_BIND is set, and engines with threads of their own bind these.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llmos_fast import capture, ops
from llmos_fast.quantize import QuantizedWeight, format_of

from . import ggml

Run = Callable[[], Any]
Bind = Callable[[Tensor], Run]
Prepare = Callable[[Tensor, int, int], Bind]
TOUCHED = 96 * 2**20  # bytes of weights in a run: three times a last-level cache of 32 MiB


class Peer(NamedTuple):
    prepare: Prepare
    bits: int  # of each stored weight without its scales, from which the copies follow


def in_turn(products: list[Callable[[Tensor], Any]], dtype: torch.dtype) -> Bind:
    """``bind`` of torch functions of x, one for each copy."""

    def bind(x: Tensor) -> Run:
        narrow = x.to(dtype)

        def run() -> Any:
            first = products[0](narrow)
            for product in products[1:]:
                product(narrow)
            return first

        return run

    return bind


def ours(quantized: QuantizedWeight, copies: int) -> dict[str, Bind]:
    """As ONNX Runtime, OpenVINO and ggml run what they prepared; and call by call from Python."""

    def clone() -> QuantizedWeight:
        return replace(quantized, **{n: t.clone() for n, t in quantized.tensors().items()})

    weights = [quantized, *(clone() for _ in range(copies - 1))]
    eager = in_turn([lambda x, w=w: ops.quant_matmul(x, w) for w in weights], torch.float32)
    return {"ours": lambda x: capture(eager(x)).replay, "eager": eager}


# ---- torch, torchao and bitsandbytes ----


def linear(weight: Tensor, group: int, copies: int, dtype: torch.dtype) -> Bind:
    weights = [weight.to(dtype, copy=True) for _ in range(copies)]
    return in_turn([lambda x, w=w: F.linear(x, w) for w in weights], dtype)


def round_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and one scale for each row."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scales).round().to(torch.int8), scales


def torch_dynamic(weight: Tensor, group: int, copies: int) -> Bind:
    """torch.ao's dynamically quantized linear on oneDNN."""
    torch.backends.quantized.engine = "onednn"
    scales = weight.abs().amax(1).double() / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    integers = torch.quantize_per_channel(weight, scales, zeros, axis=0, dtype=torch.qint8)
    packed = [torch.ops.quantized.linear_prepack(integers, None) for _ in range(copies)]
    product = torch.ops.quantized.linear_dynamic
    return in_turn([lambda x, p=p: product(x, p) for p in packed], torch.float32)


def torch_int_mm(weight: Tensor, group: int, copies: int) -> Bind:
    """torch._int_mm, x rounded row by row in plain torch."""
    codes, scales = round_int8(weight)

    def product(x: Tensor, codes: Tensor) -> Tensor:
        integers, x_scales = round_int8(x)
        return torch._int_mm(integers, codes) * x_scales * scales.T

    columns = [codes.T.clone(memory_format=torch.contiguous_format) for _ in range(copies)]
    return in_turn([partial(product, codes=c) for c in columns], torch.float32)


def torch_int8pack(weight: Tensor, group: int, copies: int) -> Bind:
    codes, scales = round_int8(weight)
    narrow = scales[:, 0].bfloat16()
    product = torch.ops.aten._weight_int8pack_mm
    all_codes = [codes.clone() for _ in range(copies)]
    return in_turn([lambda x, c=c: product(x, c, narrow) for c in all_codes], torch.bfloat16)


def torch_int4pack(weight: Tensor, group: int, copies: int) -> Bind:
    """Asymmetric rounding of each group; the kernel reads code 8 as the group's middle value."""
    grouped = weight.unflatten(1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scales = (high - low) / 15
    codes = ((grouped - low) / scales).round().flatten(1).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    middles = torch.cat((scales, low + 8 * scales), dim=-1).transpose(0, 1).contiguous().bfloat16()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    clones = [(packed.clone(), middles.clone()) for _ in range(copies)]
    return in_turn([lambda x, p=p, m=m: product(x, p, group, m) for p, m in clones], torch.bfloat16)


def copies_of(layer: torch.nn.Module, copies: int, dtype: torch.dtype) -> Bind:
    """Of a layer that another library has quantized."""
    layer.eval().requires_grad_(False)
    return in_turn([layer, *(copy.deepcopy(layer) for _ in range(copies - 1))], dtype)


def torchao(weight: Tensor, group: int, copies: int, bits: int) -> Bind:
    """int8: rounded activations; int4: weight only, activations in bf16. Eager."""
    from torchao.prototype.quantization.int4 import inference_workflow
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    configs = {
        8: Int8DynamicActivationInt8WeightConfig,
        4: partial(inference_workflow.PrototypeInt4WeightOnlyConfig, group_size=group),
    }
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=torch.bfloat16)
    layer.weight.data = weight.bfloat16()
    model = torch.nn.Sequential(layer)
    quantize_(model, configs[bits]())
    if type(layer.weight) is torch.nn.Parameter:
        raise ValueError("torchao: left the weight as it was")
    return copies_of(model, copies, torch.bfloat16)


def bnb_int8(weight: Tensor, group: int, copies: int) -> Bind:
    """The LLM.int8() layer of bitsandbytes."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    return copies_of(layer.to("cpu"), copies, torch.float16)  # rounds fp16, casts others


def bnb_nf4(weight: Tensor, group: int, copies: int, dtype: torch.dtype) -> Bind:
    """The QLoRA layer of bitsandbytes, in its groups of 64."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        *weight.shape[::-1],
        bias=False,
        compute_dtype=dtype,
        quant_type="nf4",
        compress_statistics=False,
    )
    layer.load_state_dict({"weight": weight.to(dtype)})
    layer = layer.to("cpu").eval()
    layer(torch.zeros(1, weight.shape[1], dtype=dtype))  # packs for the CPU at the first call
    return copies_of(layer, copies, dtype)


# ---- onnxruntime and OpenVINO: a graph of one product by each copy ----
# They merge equal constants, so copy i is the weight with its rows rotated by i.


@contextmanager
def unbound() -> Iterator[None]:
    """All CPUs for the threads that an engine creates here, which it counts and binds itself."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ort_session(model: bytes) -> Any:
    """A session with torch's number of threads, which stop spinning when a run ends."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    cpus = ";".join(str(i + 1) for i in range(1, threads))  # from 1, but the calling thread's
    if cpus:
        options.add_session_config_entry("session.intra_op_thread_affinities", cpus)
    with unbound():
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnxruntime(weight: Tensor, group: int, copies: int, bits: int) -> Bind:
    """DynamicQuantizeMatMul, or MatMulNBits which rounds x to int8 too (accuracy level 4)."""
    from onnx import TensorProto, helper, numpy_helper

    n, k = weight.shape
    if bits == 8:
        codes, scales = (part.T.numpy() for part in round_int8(weight))
        scales = scales[0]
        operator, axis = "DynamicQuantizeMatMul", 1
        attributes = {}
    else:
        codes, scales = round_int4(weight, group)
        codes, scales = pack(codes + 8), scales.reshape(n, -1)
        operator, axis = "MatMulNBits", 0
        attributes = {"K": k, "N": n, "bits": 4, "block_size": group, "accuracy_level": 4}

    def node(i: int) -> Any:
        inputs = ["x", f"w{i}", f"s{i}"]
        return helper.make_node(operator, inputs, [f"y{i}"], domain="com.microsoft", **attributes)

    def constants(i: int) -> list[Any]:
        parts = {"w": np.roll(codes, i, axis), "s": np.roll(scales, i, 0)}
        return [numpy_helper.from_array(part, f"{name}{i}") for name, part in parts.items()]

    def value(name: str, columns: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", columns])

    every = range(copies)
    graph = helper.make_graph(
        [node(i) for i in every],
        "products",
        [value("x", k)],
        [value(f"y{i}", n) for i in every],
        [constant for i in every for constant in constants(i)],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    session = ort_session(model.SerializeToString())

    def bind(x: Tensor) -> Run:
        feed = {"x": x.numpy()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    return bind


def openvino_compiled(model: Any, precision: str = "f32", **settings: Any) -> Any:
    """For one request at a time on torch's number of threads."""
    import openvino as ov

    settings |= {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": True,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    with unbound():
        return ov.Core().compile_model(model, "CPU", settings)


def openvino_run(compiled: Any, *inputs: Tensor, owned: list[np.ndarray]) -> Run:
    """Runs on these inputs, again and again; ``owned`` are the arrays that the model points to."""
    import openvino as ov

    request = compiled.create_infer_request()
    for i, tensor in enumerate(inputs):
        request.set_input_tensor(i, ov.Tensor(tensor.numpy()))
    with unbound():  # it counts the CPUs at the first call
        request.infer()

    def run(owner: list[np.ndarray] = owned) -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def openvino(weight: Tensor, group: int, copies: int, bits: int) -> Bind:
    """MatMul by a compressed constant, x rounded to int8 in groups of 32."""
    import openvino as ov
    import openvino.opset13 as op

    n, k = weight.shape
    if bits == 8:
        codes, scales = (part.numpy() for part in round_int8(weight))
    else:
        codes, scales = round_int4(weight, group)
        scales = scales.astype(np.float16)
    shape = list(codes.shape)
    stored = codes if bits == 8 else pack(codes)
    kept: list[np.ndarray] = []  # OpenVINO shares the memory of packed arrays

    def constant(i: int) -> Any:
        array, scale = np.roll(stored, i, 0), np.roll(scales, i, 0)
        kept.append(array)
        tensor = ov.Tensor(array) if bits == 8 else ov.Tensor(array.reshape(-1), shape, ov.Type.i4)
        matrix = op.multiply(op.convert(op.constant(tensor), scale.dtype), op.constant(scale))
        if bits == 8:
            return matrix
        return op.convert(op.reshape(matrix, op.constant(np.array([n, k])), False), np.float32)

    x_node = op.parameter([-1, k], np.float32, name="x")
    products = [op.result(op.matmul(x_node, constant(i), False, True)) for i in range(copies)]
    compiled = openvino_compiled(ov.Model(products, [x_node]), DYNAMIC_QUANTIZATION_GROUP_SIZE=32)

    return lambda x: openvino_run(compiled, x, owned=kept)


def round_int4(weight: Tensor, group: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 levels -8..7 (N, K / group, group) and scales (N, K / group, 1)."""
    grouped = weight.unflatten(1, (-1, group))
    scales = grouped.abs().amax(-1, keepdim=True) / 7
    return (grouped / scales).round().to(torch.int8).numpy(), scales.numpy()


def pack(codes: np.ndarray) -> np.ndarray:
    """Two 4-bit codes to a byte, low nibble first."""
    codes = codes.astype(np.uint8)
    return codes[..., 0::2] & 15 | codes[..., 1::2] << 4


LINEAR = {
    "linear_fp32": Peer(partial(linear, dtype=torch.float32), 32),
    "linear_bf16": Peer(partial(linear, dtype=torch.bfloat16), 16),
}
INT8 = {
    "torch_dynamic": Peer(torch_dynamic, 8),
    "torch_int_mm": Peer(torch_int_mm, 8),
    "torch_int8pack": Peer(torch_int8pack, 8),
    "torchao_int8": Peer(partial(torchao, bits=8), 8),
    "bnb_int8": Peer(bnb_int8, 8),
    "ort_int8": Peer(partial(onnxruntime, bits=8), 8),
    "openvino_int8": Peer(partial(openvino, bits=8), 8),
}
NF4 = {
    "bnb_nf4_fp32": Peer(partial(bnb_nf4, dtype=torch.float32), 4),
    "bnb_nf4_bf16": Peer(partial(bnb_nf4, dtype=torch.bfloat16), 4),
}
INT4 = {
    "torch_int4pack": Peer(torch_int4pack, 4),
    "torchao_int4": Peer(partial(torchao, bits=4), 4),
    "ort_int4": Peer(partial(onnxruntime, bits=4), 4),
    "openvino_int4": Peer(partial(openvino, bits=4), 4),
    "ggml_q4_0": Peer(partial(ggml.prepare, kind="q4_0", repack=False), 4),
    "ggml_q4_0_repack": Peer(partial(ggml.prepare, kind="q4_0", repack=True), 4),
    "ggml_q4_K": Peer(partial(ggml.prepare, kind="q4_K", repack=False), 4),
    **NF4,
}


class Engines:
    """Ours and every peer of the scheme; weights from memory where ``cold``, else one copy.

    copies:   how many products a run is, by name
    left_out: why an engine is not here, by name
    """

    def __init__(self, weight: Tensor, quantized: QuantizedWeight, group: int, cold: bool) -> None:
        scheme = format_of(quantized.scheme)
        self._binds: dict[str, Bind] = {}
        self.copies: dict[str, int] = {}
        self.left_out: dict[str, str] = {}

        def copies(bits: int) -> int:
            return math.ceil(8 * TOUCHED / (bits * weight.numel())) if cold else 1

        count = copies(8 if scheme == "int8" else 4)
        self.copies |= {"ours": count, "eager": count}
        self._binds |= ours(quantized, count)
        for other, peer in (LINEAR | {"int8": INT8, "nf4": NF4}.get(scheme, INT4)).items():
            self.copies[other] = copies(peer.bits)
            try:
                self._binds[other] = peer.prepare(weight, group, self.copies[other])
            except Exception as error:
                self.left_out[other] = reason(error)

    def bind(self, x: Tensor) -> dict[str, Run]:
        """What takes x, by name; each has run once."""
        runs = {}
        for name, bind in self._binds.items():
            try:
                run = bind(x)
                run()
                runs[name] = run
            except Exception as error:
                if name in ("ours", "eager"):
                    raise
                self.left_out[name] = reason(error)
        return runs


def reason(error: Exception) -> str:
    first_line, *_ = f"{type(error).__name__}: {error}".splitlines()
    return first_line[:120]
