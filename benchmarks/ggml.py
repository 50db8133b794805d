"""llama.cpp's products with quantized weights: ctypes on the ggml of PyPI's llama-cpp-python.

Weights lie in a buffer of the CPU backend, or of its "repack" kind, which reorders rows for wide
vectors as the tensors are filled. A graph holds one mul_mat by each copy.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TYPES = {"f32": 0, "q4_0": 2, "q4_K": 12}  # enum ggml_type, fixed by the file format GGUF
WEIGHTS = 1  # enum ggml_backend_buffer_usage
SETTINGS = 4096  # bytes, more than ggml_threadpool_params has


# what ggml would print: a line for every tensor that it repacks
SILENT = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)


class InitParams(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("memory", c_void_p), ("no_alloc", c_bool))


# name: (result, arguments...)
BASE = {
    "ggml_backend_alloc_ctx_tensors": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_buffer_set_usage": (None, c_void_p, c_int),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_reg_dev_get": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_free": (None, c_void_p),
    "ggml_get_data_f32": (c_void_p, c_void_p),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_init": (c_void_p, InitParams),
    "ggml_log_set": (None, c_void_p, c_void_p),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_nbytes": (c_size_t, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_quantize_chunk": (
        *(c_size_t, c_int, c_void_p, c_void_p),
        *(c_int64, c_int64, c_int64, ctypes.POINTER(c_float)),
    ),
    "ggml_set_output": (None, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_threadpool_params_init": (None, c_void_p, c_int),
}
CPU = {
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_reg": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_cpu_set_threadpool": (None, c_void_p, c_void_p),
    "ggml_threadpool_new": (c_void_p, c_void_p),
}


class Ggml:
    """The libraries' functions without their prefix, and a CPU backend."""

    def __init__(self, folder: Path) -> None:
        for file, functions in (("libggml-base.so", BASE), ("libggml-cpu.so", CPU)):
            library = ctypes.CDLL(str(folder / file), mode=ctypes.RTLD_GLOBAL)
            for name, (result, *arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_").removeprefix("backend_"), function)
        self.log_set(SILENT, None)
        self.backend = self.cpu_init()
        threads = torch.get_num_threads()
        self.cpu_set_n_threads(self.backend, threads)
        settings = ctypes.create_string_buffer(SETTINGS)
        self.threadpool_params_init(settings, threads)
        self.cpu_set_threadpool(self.backend, self.threadpool_new(settings))

    def repack_buffer_type(self) -> int:
        """Raises where this CPU has none."""
        registry = self.cpu_reg()
        address = self.reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        list_them = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
        for kind in list_them(self.reg_dev_get(registry, 0)):
            if kind is None:
                break
            if b"REPACK" in self.buft_name(kind):
                return kind
        raise NotImplementedError("ggml: no repack buffers on this CPU")


@functools.cache
def load() -> Ggml:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'llama_cpp'")
    return Ggml(Path(spec.origin).parent / "lib")


class Context:
    """Tensors described in a context, then allocated in one buffer; both freed with it."""

    def __init__(self, tensors: int, graph: int = 0) -> None:
        self.ggml = load()
        size = self.ggml.tensor_overhead() * tensors + self.ggml.graph_overhead_custom(graph, False)
        self.context = self.ggml.init(InitParams(size, None, True))
        self.buffer = None

    def matrix(self, kind: str, rows: int, columns: int) -> int:
        return self.ggml.new_tensor_2d(self.context, TYPES[kind], columns, rows)

    def allocate(self, buffer_type: int | None = None) -> None:
        if buffer_type is None:
            self.buffer = self.ggml.alloc_ctx_tensors(self.context, self.ggml.backend)
        else:
            self.buffer = self.ggml.alloc_ctx_tensors_from_buft(self.context, buffer_type)
        if not self.buffer:
            raise MemoryError("ggml: no buffer")

    def __del__(self) -> None:
        if self.buffer:
            self.ggml.buffer_free(self.buffer)
        self.ggml.free(self.context)


def prepare(
    weight: Tensor, group: int, copies: int, kind: str, repack: bool
) -> Callable[[Tensor], Callable[[], Tensor]]:
    """As quant_peers.py describes; the groups are those of the format, whatever ``group`` says."""
    ggml = load()
    n, k = weight.shape
    if k % (256 if kind == "q4_K" else 32):
        raise ValueError(f"ggml: {kind} does not take {k} columns")
    weights = Context(tensors=copies)
    matrices = [weights.matrix(kind, n, k) for _ in range(copies)]
    weights.allocate(ggml.repack_buffer_type() if repack else ggml.cpu_buffer_type())
    ggml.buffer_set_usage(weights.buffer, WEIGHTS)
    stored = ctypes.create_string_buffer(ggml.nbytes(matrices[0]))

    def quantize(start: int, stop: int) -> None:
        address = weight.data_ptr()
        ggml.quantize_chunk(TYPES[kind], address, stored, start * k, stop - start, k, None)

    with ThreadPoolExecutor() as pool:  # q4_K takes seconds
        parts = range(0, n, -(-n // torch.get_num_threads()))
        list(pool.map(quantize, parts, [*parts[1:], n]))
    for matrix in matrices:
        ggml.tensor_set(matrix, stored, 0, len(stored))

    def bind(x: Tensor) -> Callable[[], Tensor]:
        m = len(x)
        nodes = 2 * copies + 8
        inner = Context(tensors=nodes, graph=nodes)
        x_matrix = inner.matrix("f32", m, k)
        graph = ggml.new_graph_custom(inner.context, nodes, False)
        products = [ggml.mul_mat(inner.context, w, x_matrix) for w in matrices]
        if not ggml.supports_op(ggml.backend, products[0]):
            raise NotImplementedError(f"ggml: {kind} has no such product here")
        for product in products:
            ggml.set_output(product)
            ggml.build_forward_expand(graph, product)
        inner.allocate()
        ggml.tensor_set(x_matrix, x.data_ptr(), 0, x.nbytes)
        values = ctypes.cast(ggml.get_data_f32(products[0]), ctypes.POINTER(c_float))
        result = torch.from_numpy(np.ctypeslib.as_array(values, (m, n)))

        def run(owners: tuple[Context, Context] = (weights, inner)) -> Tensor:
            status = ggml.graph_compute(ggml.backend, graph)
            assert status == 0, status
            return result

        return run

    return bind
